"""The Python libraries that users have (openai, ollama, anthropic, langchain-ollama) against a running rsinfer server.

usage: clients.py http://HOST:PORT
Every check is a function; the demo model answers. What it says does not matter: that it arrives in the libraries' own
types does.
"""
import json
import sys

import anthropic
import ollama
import openai
from langchain_ollama import ChatOllama, OllamaEmbeddings

BASE = sys.argv[1]
MODEL = "demo"
ASK = [{"role": "user", "content": "Tell me a story about a dog."}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
              "required": ["city"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "The weather", "parameters": PARAMETERS}}
SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"enum": [3, 7]}},
          "required": ["name", "age"], "additionalProperties": False}

oai = openai.OpenAI(base_url=f"{BASE}/v1", api_key="unused", max_retries=0)
oll = ollama.Client(host=BASE)
ant = anthropic.Anthropic(base_url=BASE, api_key="unused", max_retries=0)


def fails(kind, call):
    try:
        call()
    except kind as e:
        return e
    raise AssertionError(f"no {kind.__name__}")


def openai_chat():
    whole = oai.chat.completions.create(model=MODEL, messages=ASK, max_tokens=40, seed=1)
    assert whole.choices[0].finish_reason in ("stop", "length") and whole.usage.completion_tokens <= 40
    stream = oai.chat.completions.create(model=MODEL, messages=ASK, max_tokens=40, seed=1, stream=True,
                                         stream_options={"include_usage": True})
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == (whole.choices[0].message.content or ""), (text, whole)
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def openai_tools():
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        got = oai.chat.completions.create(model=MODEL, messages=ASK, tools=[TOOL], tool_choice=choice, seed=1)
        call = got.choices[0].message.tool_calls[0]
        assert got.choices[0].finish_reason == "tool_calls"
        assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    after = ASK + [got.choices[0].message.model_dump(exclude_none=True),
                   {"role": "tool", "tool_call_id": call.id, "content": "Rain."}]
    oai.chat.completions.create(model=MODEL, messages=after, tools=[TOOL], max_tokens=8)
    none = oai.chat.completions.create(model=MODEL, messages=ASK, tools=[TOOL], tool_choice="none", max_tokens=8)
    assert not none.choices[0].message.tool_calls


def openai_schema():
    form = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": SCHEMA}}
    got = oai.chat.completions.create(model=MODEL, messages=ASK, response_format=form, seed=1)
    person = json.loads(got.choices[0].message.content)
    assert person["age"] in (3, 7) and len(person["name"]) <= 8


def openai_logprobs():
    got = oai.chat.completions.create(model=MODEL, messages=ASK, max_tokens=5, logprobs=True, top_logprobs=3)
    tokens = got.choices[0].logprobs.content
    assert len(tokens) == got.usage.completion_tokens and all(len(t.top_logprobs) == 3 for t in tokens)
    text = oai.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=5, logprobs=2)
    assert len(text.choices[0].logprobs.tokens) == 5


def openai_embeddings():
    got = oai.embeddings.create(model=MODEL, input=["one", "two"])  # asks for base64
    plain = oai.embeddings.create(model=MODEL, input="one", encoding_format="float")
    assert len(got.data) == 2 and got.data[0].embedding == plain.data[0].embedding
    assert abs(sum(x * x for x in plain.data[0].embedding) - 1) < 1e-5


def openai_responses():
    got = oai.responses.create(model=MODEL, input="Tell me a story.", max_output_tokens=20, store=False)
    assert got.status in ("completed", "incomplete") and isinstance(got.output_text, str)
    kinds = [e.type for e in oai.responses.create(model=MODEL, input="Hi", max_output_tokens=20, store=False, stream=True)]
    assert kinds[0] == "response.created" and kinds[-1] in ("response.completed", "response.incomplete"), kinds


def openai_errors():
    e = fails(openai.NotFoundError, lambda: oai.chat.completions.create(model="nosuch", messages=ASK))
    assert "nosuch" in str(e)
    e = fails(openai.BadRequestError, lambda: oai.chat.completions.create(model=MODEL, messages=ASK, temperature=-1))
    assert "temperature" in str(e)
    e = fails(openai.BadRequestError, lambda: oai.chat.completions.create(
        model=MODEL, messages=ASK, response_format={"type": "json_schema", "json_schema": {
            "name": "x", "schema": {"type": "nonsense"}}}))
    assert "nonsense" in str(e)
    assert MODEL in " ".join(m.id for m in oai.models.list())


def ollama_chat():
    whole = oll.chat(model=MODEL, messages=ASK, options={"num_predict": 40, "seed": 1})
    assert whole.done and whole.done_reason in ("stop", "length") and whole.eval_count <= 40
    parts = list(oll.chat(model=MODEL, messages=ASK, options={"num_predict": 40, "seed": 1}, stream=True))
    assert "".join(p.message.content or "" for p in parts) == (whole.message.content or "") and parts[-1].done
    raw = oll.generate(model=MODEL, prompt="Once upon a time", raw=True, options={"num_predict": 5})
    assert raw.eval_count == 5 and raw.response


def ollama_format_and_tools():
    got = oll.chat(model=MODEL, messages=ASK, format=SCHEMA, options={"seed": 1})
    assert json.loads(got.message.content)["age"] in (3, 7)
    oll.chat(model=MODEL, messages=ASK, tools=[TOOL], options={"num_predict": 8})


def ollama_models():
    oll.create(model="clients/tiny", from_="demo", system="Be brief.", parameters={"num_predict": 4})
    names = [m.model for m in oll.list().models]
    assert "clients/tiny:latest" in names, names
    assert oll.show("clients/tiny").modelfile and oll.show("demo").modelinfo["general.architecture"]
    oll.copy("clients/tiny", "clients/other")
    oll.delete("clients/other")
    oll.delete("clients/tiny")
    e = fails(ollama.ResponseError, lambda: oll.delete("clients/tiny"))
    assert e.status_code == 404


def ollama_embed():
    got = oll.embed(model=MODEL, input=["one", "two"])
    assert len(got.embeddings) == 2 and abs(sum(x * x for x in got.embeddings[0]) - 1) < 1e-5
    assert len(oll.embeddings(model=MODEL, prompt="one").embedding) == len(got.embeddings[0])


def ollama_keep_alive():
    oll.generate(model=MODEL, prompt="Hi", options={"num_predict": 1}, keep_alive="90m")
    loaded = oll.ps().models
    left = (loaded[0].expires_at - __import__("datetime").datetime.now(loaded[0].expires_at.tzinfo)).total_seconds()
    assert 80 * 60 < left <= 90 * 60, left
    oll.generate(model=MODEL, keep_alive=0)
    for _ in range(100):
        if not oll.ps().models:
            return
        __import__("time").sleep(0.05)
    raise AssertionError("the model is still loaded")


def ollama_errors():
    e = fails(ollama.ResponseError, lambda: oll.chat(model="nosuch", messages=ASK))
    assert e.status_code == 404 and "nosuch" in e.error
    e = fails(ollama.ResponseError, lambda: oll.chat(model=MODEL, messages=ASK, options={"top_p": 2}))
    assert e.status_code == 400


def anthropic_messages():
    got = ant.messages.create(model=MODEL, max_tokens=40, system="Be brief.", messages=ASK)
    assert got.type == "message" and got.stop_reason in ("end_turn", "max_tokens") and got.usage.output_tokens <= 40
    with ant.messages.stream(model=MODEL, max_tokens=40, messages=ASK) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == "".join(b.text for b in final.content if b.type == "text")
    assert ant.messages.count_tokens(model=MODEL, messages=ASK).input_tokens > 3
    tool = {"name": "get_weather", "description": "The weather", "input_schema": PARAMETERS}
    got = ant.messages.create(model=MODEL, max_tokens=300, messages=ASK, tools=[tool], tool_choice={"type": "any"})
    use = got.content[-1]
    assert got.stop_reason == "tool_use" and use.input["city"] in ("Paris", "Rome")
    after = ASK + [{"role": "assistant", "content": [b.model_dump() for b in got.content]},
                   {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": "Rain."}]}]
    ant.messages.create(model=MODEL, max_tokens=8, messages=after, tools=[tool])
    fails(anthropic.NotFoundError, lambda: ant.messages.create(model="nosuch", max_tokens=1, messages=ASK))
    fails(anthropic.BadRequestError, lambda: ant.messages.create(model=MODEL, max_tokens=1, messages=[]))


def langchain():
    chat = ChatOllama(model=MODEL, base_url=BASE, num_predict=20, seed=1)
    whole = chat.invoke("Tell me a story.")
    assert isinstance(whole.content, str) and whole.usage_metadata["output_tokens"] <= 20
    assert len(list(chat.stream("Tell me a story."))) > 1
    person = ChatOllama(model=MODEL, base_url=BASE, seed=1).with_structured_output(SCHEMA, method="json_schema")
    assert person.invoke("Who are you?")["age"] in (3, 7)
    assert len(OllamaEmbeddings(model=MODEL, base_url=BASE).embed_documents(["a", "b"])) == 2


CHECKS = [openai_chat, openai_tools, openai_schema, openai_logprobs, openai_embeddings, openai_responses, openai_errors,
          ollama_chat, ollama_format_and_tools, ollama_models, ollama_embed, ollama_errors, anthropic_messages, langchain,
          ollama_keep_alive]

if __name__ == "__main__":
    failed = 0
    for check in CHECKS:
        try:
            check()
            print("ok  ", check.__name__)
        except Exception as e:  # noqa: BLE001
            failed += 1
            print("FAIL", check.__name__, type(e).__name__, str(e)[:500])
    sys.exit(f"{failed} of {len(CHECKS)} failed" if failed else 0)
