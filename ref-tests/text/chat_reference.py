#!/usr/bin/env python3
"""What Jinja2, set up as transformers does it, renders of ../shared/templates: hashes for engine/tests/text_chat.rs.

Usage: chat_reference.py TEMPLATES_DIR OUT.json        needs jinja2 >= 3.1.6

The conversations below are this project's own. The renderings contain words of the templates, which are others', so the
fixture keeps only length and SHA-256 of each; a template that raises is kept as its error's text.
"""
import hashlib
import json
import sys
from datetime import datetime
from pathlib import Path

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

TOOLS = [
    {"type": "function", "function": {
        "name": "get_weather",
        "description": "Weather in a <place> & its \"mood\", it's said; größer, 天气",
        "parameters": {"type": "object", "properties": {
            "place": {"type": "string", "enum": ["Zürich", "北京"]},
            "days": {"type": "integer", "minimum": 1, "default": 3},
            "scale": {"type": "number", "default": 1.5e-7}}, "required": ["place"]}}},
    {"type": "function", "function": {"name": "now", "description": "", "parameters": {"type": "object", "properties": {}}}},
]


def call(name, arguments, n=1):
    return {"id": f"call_{n}", "type": "function", "function": {"name": name, "arguments": arguments}}


def user(text):
    return {"role": "user", "content": text}


def bot(text, **more):
    return {"role": "assistant", "content": text, **more}


SYSTEM = {"role": "system", "content": "Be terse. <b>Never</b> say \"no\" & don't shout.\n"}
WEIRD = "a < b && c > d; it's \"quoted\" {{ not a template }} {% nor this %}\n\ttab \\ back\\nslash é 中文 🦙 \u00a0|"

CONVERSATIONS = {
    "hello": [user("Hello!")],
    "weird": [user(WEIRD)],
    "system": [SYSTEM, user("Hi")],
    "turns": [user("1+1?"), bot("2"), user("and 2+2?"), bot("  4\n"), user("  thanks \n")],
    "system-turns": [SYSTEM, user(WEIRD), bot(WEIRD), user("again")],
    "two-systems": [SYSTEM, user("x"), {"role": "system", "content": "Now be long."}, user("y")],
    "thought": [user("why?"), bot("<think>\nhm, why\n</think>\n\nBecause."), user("I see")],
    "thought-last": [user("why?"), bot("<think>\nhm, why\n</think>\n\nBecause.")],
    "reasoning-content": [user("why?"), bot("Because.", reasoning_content="hm,\nwhy"), user("ok"), bot("Yes.", reasoning_content="sure")],
    "one-call": [user("Weather?"), bot("", tool_calls=[call("get_weather", {"place": "Zürich", "days": 2})]),
                 {"role": "tool", "name": "get_weather", "content": "{\"sky\": \"<clear>\"}"}],
    "call-answered": [SYSTEM, user("Weather?"), bot("", tool_calls=[call("get_weather", {"place": "北京 & 'x'", "scale": 0.00001, "ok": True, "none": None, "l": [1, 2.0, "ü"]})]),
                      {"role": "tool", "name": "get_weather", "content": "rain"}, bot("It rains."), user("Thanks")],
    "two-calls": [user("Both"), bot("Let me see.", tool_calls=[call("get_weather", {"place": "x"}), call("now", {}, 2)]),
                  {"role": "tool", "content": "sun"}, {"role": "tool", "content": "noon"}, user("so?")],
    "null-content": [user("Weather?"), bot(None, tool_calls=[call("now", {"z": 1, "a": 2})]), {"role": "tool", "content": "noon"}, user("ok")],
    "two-users": [user("a"), user("b")],
    "empty-text": [user("")],
}

CASES = [(name, tools, generate, kwargs)
         for name in CONVERSATIONS
         for tools, generate, kwargs in [
             (False, True, {}), (False, False, {}), (True, True, {}),
             (False, True, {"enable_thinking": False}), (False, True, {"enable_thinking": True}), (False, True, {"thinking": True}),
             (True, False, {"tools_in_user_message": False, "date_string": "1 Jan 2026"}),
         ]]


def environment():
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        # default=list: what `map(..)` gives is no list in Python, and json.dumps would refuse it.
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys, default=list)

    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda f: datetime.now().strftime(f)
    return env


def render(template, variables):
    """Null content is given as it is; as "" to a template that fails on it or would print it."""
    filled = [dict(m, content="") if m["content"] is None else m for m in variables["messages"]]
    try:
        text = template.render(**variables)
        if filled == variables["messages"] or "None" not in text:
            return text
    except TypeError:
        pass
    return template.render(**dict(variables, messages=filled))


def main(templates, out):
    env = environment()
    renderings = {}
    for path in sorted(Path(templates).glob("*.jinja")):
        template = env.from_string(path.read_text(encoding="utf-8"))
        results = []
        for name, tools, generate, kwargs in CASES:
            variables = dict(messages=CONVERSATIONS[name], tools=TOOLS if tools else None, documents=None,
                             add_generation_prompt=generate, bos_token="<BOS>", eos_token="<EOS>", **kwargs)
            try:
                text = render(template, variables).encode()
                results.append([len(text), hashlib.sha256(text).hexdigest()])
            except TemplateError as e:
                results.append({"raises": str(e)})
            except Exception as e:  # noqa: BLE001  what Python itself refuses (None + str); no reference then
                results.append({"fails": type(e).__name__})
        renderings[path.name] = results
    fixture = {"tools": TOOLS, "conversations": CONVERSATIONS,
               "cases": [dict(messages=n, tools=t, add_generation_prompt=g, kwargs=k) for n, t, g, k in CASES],
               "renderings": renderings}
    Path(out).write_text(json.dumps(fixture, ensure_ascii=False, indent=0, separators=(",", ":")) + "\n", encoding="utf-8")
    flat = [r for rs in renderings.values() for r in rs]
    print(f"{len(flat)} renderings: {sum(isinstance(r, list) for r in flat)} texts, "
          f"{sum('raises' in r for r in flat)} raise, {sum('fails' in r for r in flat)} fail in Python")


if __name__ == "__main__":
    main(*sys.argv[1:])
