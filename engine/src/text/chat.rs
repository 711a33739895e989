//! Chat templates: a conversation to the text a model was trained on, by the model's own Jinja template.
//!
//! Renders as Jinja2 does the way Hugging Face's transformers sets it up (`apply_chat_template`: trim_blocks and
//! lstrip_blocks on, no auto-escaping, lenient undefined, `tojson`, `raise_exception`, `strftime_now`). Templates come with
//! model files and are hostile: they run on limited fuel and see nothing but the conversation. Knows nothing of HTTP and
//! of ids.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State, UndefinedBehavior};
use serde_json::Value as Json;

use super::json::Dumps;
use super::thinking::ThinkTags;
use super::{TextError, Vocab};
use crate::gguf::Metadata;

/// What a file without a template gets: ChatML.
pub const DEFAULT_TEMPLATE: &str = "\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}";

/// Instructions a rendering may execute: a base and so much a message, up to a most. Real templates need a few hundred a
/// message.
const FUEL: u64 = 250_000;
const FUEL_PER_MESSAGE: u64 = 5_000;
const MAX_FUEL: u64 = 2_000_000;
/// Stack of a rendering, in bytes: a template can nest a list at every few instructions, and dropping it recurses. Address
/// space, not memory, until used.
const STACK: usize = 64 << 20;
const STACK_PER_FUEL: usize = 256;
const RECURSION: usize = 100;

/// A conversation and how it is to be rendered.
#[derive(Clone, Debug)]
pub struct RenderOptions<'a> {
    /// An array of objects with `role` and `content`, as in the OpenAI API.
    pub messages: &'a Json,
    /// An array of tools, as in the OpenAI API.
    pub tools: Option<&'a Json>,
    /// End with what makes the model answer.
    pub add_generation_prompt: bool,
    /// More variables for the template (`enable_thinking`, ...); they win over all others.
    pub kwargs: serde_json::Map<String, Json>,
}

/// A model's chat template.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    source: String,
    /// The template for conversations with tools, where the file has one of its own.
    tool_source: Option<String>,
    special: Vec<(&'static str, String)>,
    is_default: bool,
}

impl ChatTemplate {
    /// Checks the syntax. `bos` and `eos` are the texts of these tokens, or empty.
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<Self, TextError> {
        let t = Self {
            source: without_generation_tags(source),
            tool_source: None,
            special: vec![("bos_token", bos.into()), ("eos_token", eos.into())],
            is_default: false,
        };
        check(&t.source)?;
        Ok(t)
    }

    /// The template of a file (`tokenizer.chat_template`), or [`DEFAULT_TEMPLATE`].
    pub fn from_metadata(m: &Metadata, vocab: &Vocab) -> Result<Self, TextError> {
        let text = |id: Option<u32>| id.and_then(|id| vocab.token_text(id)).unwrap_or_default();
        let source = m.str("tokenizer.chat_template")?;
        let mut t = Self::new(source.unwrap_or(DEFAULT_TEMPLATE), text(vocab.bos()), text(vocab.eos()))?;
        t.is_default = source.is_none();
        if let Some(s) = m.str("tokenizer.chat_template.tool_use")? {
            let s = without_generation_tags(s);
            check(&s)?;
            t.tool_source = Some(s);
        }
        for (name, id) in [("unk_token", vocab.unknown()), ("pad_token", vocab.padding())] {
            if id.is_some() {
                t.special.push((name, text(id).into()));
            }
        }
        Ok(t)
    }

    /// Whether this is [`DEFAULT_TEMPLATE`] for want of one in the file.
    pub fn is_default(&self) -> bool {
        self.is_default
    }

    /// The template's source (`{% generation %}` tags are gone).
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The tags around the model's thinking, if the template speaks of any.
    pub fn think_tags(&self) -> Option<ThinkTags> {
        ThinkTags::in_template(&self.source)
    }

    /// Renders a conversation.
    ///
    /// Where `content` is null, templates differ in what they take: it is given as null first, and as "" if the template
    /// fails on it or would print it. Tool calls' `arguments` that are strings of JSON objects are given as objects, as
    /// templates apply `tojson` to them; as strings if the template fails on objects.
    pub fn render(&self, options: &RenderOptions) -> Result<String, TextError> {
        check_messages(options.messages)?;
        let with_objects = map_arguments(options.messages, |a| match a {
            Json::String(s) => serde_json::from_str(s).ok().filter(Json::is_object),
            _ => None,
        });
        let first = self.attempt(options, &with_objects);
        if matches!(first, Ok((_, false))) {
            return first.map(|(text, _)| text);
        }
        let mut best = first;
        let filled = map_messages(&with_objects, |m| {
            if m.get("content").is_some_and(Json::is_null) {
                m.insert("content".into(), "".into());
            }
        });
        if filled != with_objects {
            let second = self.attempt(options, &filled);
            if second.is_ok() || best.is_err() {
                best = second;
            }
        }
        if best.is_err() {
            let as_text = map_arguments(&filled, |a| a.is_object().then(|| Json::String(python_json(a))));
            if as_text != filled
                && let Ok(third) = self.attempt(options, &as_text)
            {
                best = Ok(third);
            }
        }
        best.map(|(text, _)| text)
    }

    /// One rendering, and whether it printed a None; in a thread for its stack.
    fn attempt(&self, options: &RenderOptions, messages: &Json) -> Result<(String, bool), TextError> {
        let n = messages.as_array().map_or(0, Vec::len) as u64;
        let fuel = FUEL.saturating_add(n.saturating_mul(FUEL_PER_MESSAGE)).min(MAX_FUEL);
        std::thread::scope(|scope| {
            let thread = (std::thread::Builder::new().stack_size(STACK + fuel as usize * STACK_PER_FUEL))
                .spawn_scoped(scope, || self.attempt_here(options, messages, fuel).map_err(failure))
                .map_err(|e| TextError::TemplateFailed(format!("no thread to render in: {e}")))?;
            thread.join().unwrap_or_else(|_| Err(TextError::TemplateFailed("the renderer failed".into())))
        })
    }

    fn attempt_here(
        &self,
        options: &RenderOptions,
        messages: &Json,
        fuel: u64,
    ) -> Result<(String, bool), Error> {
        let has_tools = options.tools.is_some_and(|t| t.as_array().is_none_or(|a| !a.is_empty()));
        let source: &str = self.tool_source.as_ref().filter(|_| has_tools).unwrap_or(&self.source);
        let printed_none = Arc::new(AtomicBool::new(false));
        let seen = printed_none.clone();
        let mut env = environment();
        env.set_fuel(Some(fuel));
        env.set_formatter(move |out, state, value| {
            if value.is_none() {
                seen.store(true, Ordering::Relaxed);
            }
            minijinja::escape_formatter(out, state, value)
        });
        let mut variables: Vec<(String, Value)> = vec![
            ("messages".into(), Value::from(Serde(messages))),
            ("tools".into(), options.tools.map_or(Value::from(()), |t| Value::from(Serde(t)))),
            ("documents".into(), Value::from(())),
            ("add_generation_prompt".into(), options.add_generation_prompt.into()),
        ];
        variables.extend(self.special.iter().map(|(k, v)| ((*k).into(), v.as_str().into())));
        variables.extend(options.kwargs.iter().map(|(k, v)| (k.clone(), Value::from(Serde(v)))));
        let text =
            env.template_from_named_str("chat_template", source)?.render(Value::from_pairs(variables))?;
        Ok((text, printed_none.load(Ordering::Relaxed)))
    }
}

fn environment<'s>() -> Environment<'s> {
    let mut env = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    env.set_syntax(syntax.expect("the usual delimiters"));
    env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    env.set_undefined_behavior(UndefinedBehavior::Lenient);
    env.set_recursion_limit(RECURSION);
    env.set_debug(false);
    env.set_unknown_method_callback(method);
    env.add_filter("tojson", to_json);
    env.add_filter("from_json", from_json);
    for name in ["length", "count"] {
        env.add_filter(name, |v: &Value| match v.is_undefined() {
            true => Ok(0),
            false => minijinja::filters::length(v),
        });
    }
    env.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, "raise_exception").with_source(Raised(message)))
    });
    env.add_function("strftime_now", |format: &str| -> Result<String, Error> {
        jiff::fmt::strtime::format(format, &jiff::Zoned::now())
            .map_err(|e| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {e}")))
    });
    env
}

/// What a template said with `raise_exception`.
#[derive(Debug)]
struct Raised(String);

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

fn failure(e: Error) -> TextError {
    let mut source = std::error::Error::source(&e);
    while let Some(s) = source {
        if let Some(Raised(message)) = s.downcast_ref() {
            return TextError::TemplateRaised(one_line(message));
        }
        source = s.source();
    }
    TextError::TemplateFailed(describe(&e))
}

fn check(source: &str) -> Result<(), TextError> {
    environment()
        .template_from_named_str("chat_template", source)
        .map_err(|e| TextError::TemplateSyntax(describe(&e)))?;
    Ok(())
}

fn describe(e: &Error) -> String {
    let mut text = e.kind().to_string();
    if let Some(detail) = e.detail() {
        text += &format!(": {detail}");
    }
    if let Some(line) = e.line() {
        text += &format!(" (line {line})");
    }
    one_line(&text)
}

fn one_line(text: &str) -> String {
    text.split(['\n', '\r']).map(str::trim).filter(|l| !l.is_empty()).collect::<Vec<_>>().join(" ")
}

fn to_json(value: &Value, kwargs: Kwargs) -> Result<String, Error> {
    let indent = match kwargs.get::<Option<Value>>("indent")? {
        Some(v) if v.kind() == ValueKind::String => Some(v.to_string()),
        // The spaces of a huge indent would be memory for the asking.
        Some(v) if !v.is_none() && !v.is_undefined() => Some(" ".repeat(usize::try_from(v)?.min(64))),
        _ => None,
    };
    let separators = match kwargs.get::<Option<Value>>("separators")? {
        Some(v) if !v.is_none() => (v.get_item(&0.into())?.to_string(), v.get_item(&1.into())?.to_string()),
        _ => (if indent.is_some() { "," } else { ", " }.into(), ": ".into()),
    };
    let dumps = Dumps {
        indent,
        separators,
        ensure_ascii: kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sort_keys: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    kwargs.assert_all_used()?;
    dumps.dump(value)
}

fn from_json(text: &str) -> Result<Value, Error> {
    serde_json::from_str::<Json>(text)
        .map(|v| Value::from(Serde(v)))
        .map_err(|e| Error::new(ErrorKind::InvalidOperation, format!("from_json: {e}")))
}

fn python_json(v: &Json) -> String {
    let dumps =
        Dumps { indent: None, separators: (", ".into(), ": ".into()), ensure_ascii: false, sort_keys: false };
    dumps.dump(&Value::from(Serde(v))).unwrap_or_else(|_| v.to_string())
}

/// Methods of Python's strings that minijinja-contrib lacks, then those it has.
fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    if let Some(s) = value.as_str() {
        match name {
            "removeprefix" => {
                let (prefix,): (&str,) = from_args(args)?;
                return Ok(s.strip_prefix(prefix).unwrap_or(s).into());
            }
            "removesuffix" => {
                let (suffix,): (&str,) = from_args(args)?;
                return Ok(s.strip_suffix(suffix).unwrap_or(s).into());
            }
            "rsplit" => {
                let (separator, most): (Option<&str>, Option<i64>) = from_args(args)?;
                let most = most.filter(|&n| n >= 0).map_or(usize::MAX, |n| (n as usize).saturating_add(1));
                return Ok(rsplit(s, separator, most).into_iter().map(Value::from).collect());
            }
            "partition" | "rpartition" => {
                let (separator,): (&str,) = from_args(args)?;
                let found =
                    if name == "partition" { s.split_once(separator) } else { s.rsplit_once(separator) };
                let parts = match (found, name) {
                    (Some((a, b)), _) => [a, separator, b],
                    (None, "partition") => [s, "", ""],
                    (None, _) => ["", "", s],
                };
                return Ok(parts.into_iter().map(Value::from).collect());
            }
            _ => {}
        }
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)
}

fn rsplit<'s>(s: &'s str, separator: Option<&str>, most: usize) -> Vec<&'s str> {
    let mut parts: Vec<&str> = match separator {
        Some(sep) => s.rsplitn(most, sep).collect(),
        None => {
            let (mut parts, mut rest) = (Vec::new(), s.trim_end());
            while !rest.is_empty() {
                match rest.rfind(char::is_whitespace).filter(|_| parts.len() + 1 < most) {
                    Some(at) => {
                        let after = at + rest[at..].chars().next().map_or(1, char::len_utf8);
                        parts.push(&rest[after..]);
                        rest = rest[..at].trim_end();
                    }
                    None => {
                        parts.push(if parts.len() + 1 < most { rest.trim_start() } else { rest });
                        rest = "";
                    }
                }
            }
            parts
        }
    };
    parts.reverse();
    parts
}

/// `{% generation %}` marks the model's words for training; here it is a scope and nothing else.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        out.push_str(before);
        let inner = tag.trim_start_matches(['-', '+']);
        out.push_str(&tag[..tag.len() - inner.len()]);
        let word = inner.trim_start();
        rest = inner;
        for (name, instead) in [("generation", " with"), ("endgeneration", " endwith")] {
            if let Some(after) = word.strip_prefix(name)
                && after.trim_start().trim_start_matches(['-', '+']).starts_with("%}")
            {
                out.push_str(instead);
                out.push(' ');
                rest = after;
            }
        }
    }
    out.push_str(rest);
    out
}

fn check_messages(messages: &Json) -> Result<(), TextError> {
    let list =
        messages.as_array().ok_or_else(|| TextError::Messages("expected an array of messages".into()))?;
    for (i, m) in list.iter().enumerate() {
        if !m.get("role").is_some_and(Json::is_string) {
            let reason = format!("message {i} is no object with a \"role\"");
            return Err(TextError::Messages(reason));
        }
    }
    Ok(())
}

fn map_messages(messages: &Json, f: impl Fn(&mut serde_json::Map<String, Json>)) -> Json {
    let mut messages = messages.clone();
    if let Some(list) = messages.as_array_mut() {
        list.iter_mut().filter_map(Json::as_object_mut).for_each(f);
    }
    messages
}

/// Replaces the arguments of tool calls for which `f` has another form.
fn map_arguments(messages: &Json, f: impl Fn(&Json) -> Option<Json>) -> Json {
    map_messages(messages, |m| {
        let calls = m.get_mut("tool_calls").and_then(Json::as_array_mut);
        for call in calls.into_iter().flatten() {
            let call = match call.get_mut("function") {
                Some(_) => &mut call["function"],
                None => call,
            };
            if let Some(a) = call.get_mut("arguments")
                && let Some(new) = f(a)
            {
                *a = new;
            }
        }
    })
}
