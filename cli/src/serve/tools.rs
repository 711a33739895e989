//! Tool calls in the text of an answer, as the model families write them: DeepSeek (R1, V3, V3.1), Qwen 2.5 and 3 (also
//! Hermes and others that took it over), Llama 3, and bare JSON. Which it is, the chat template tells. What turns out to be
//! no call is given back as text. Knows nothing of dialects.

use super::constrain::{Format, FormatError};
use engine::text::Vocab;
use serde_json::{Map, Value, json};
use std::hash::{BuildHasher, Hasher, RandomState};

/// A call of a tool.
#[derive(Clone, Debug, PartialEq)]
pub struct ToolCall {
    /// `call_` and eight characters.
    pub id: String,
    pub name: String,
    /// An object, in the order in which the model wrote it.
    pub arguments: Value,
}

/// A piece of an answer.
#[derive(Clone, Debug, PartialEq)]
pub enum Piece {
    Thinking(String),
    Text(String),
    Call(ToolCall),
}

/// Whether tools are to be called.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// The model decides.
    #[default]
    Auto,
    /// One of them.
    Required,
    /// This one.
    Named(String),
}

const DEEPSEEK: Tags = Tags {
    open: "<｜tool▁call▁begin｜>",
    close: "<｜tool▁call▁end｜>",
    around: &["<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"],
};
const DEEPSEEK_SEP: &str = "<｜tool▁sep｜>";
const QWEN: Tags = Tags { open: "<tool_call>", close: "</tool_call>", around: &[] };
const PYTHON: &str = "<|python_tag|>";

/// What stands around calls.
#[derive(Debug)]
struct Tags {
    open: &'static str,
    close: &'static str,
    /// Around all calls; dropped.
    around: &'static [&'static str],
}

#[derive(Clone, Copy, Debug)]
enum Family {
    Tagged(&'static Tags),
    /// Llama's: the answer is the call, an object with `name` and `parameters`.
    Bare,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum At {
    /// Of [`Family::Bare`]: nothing but calls so far.
    Start,
    Text,
    Call,
}

/// Finds calls in streamed text.
#[derive(Debug)]
pub struct Parser {
    family: Family,
    /// Names of the tools there are.
    names: Vec<String>,
    at: At,
    held: String,
    /// There was a call: what parts calls is layout.
    called: bool,
}

/// The tokens that mark calls, where they are control tokens: a decoder must show them.
pub fn marks(vocab: &Vocab) -> Vec<u32> {
    let texts = [DEEPSEEK.open, DEEPSEEK.close, DEEPSEEK_SEP, QWEN.open, QWEN.close, PYTHON];
    let all = texts.iter().chain(DEEPSEEK.around).filter_map(|t| vocab.token_id(t));
    all.filter(|&id| vocab.is_control(id)).collect()
}

/// What an answer must look like that is a call of one of `tools` (as in OpenAI's API); `None` where the model decides.
///
/// # Errors
/// No such tool, or none at all.
pub fn forced(tools: &[Value], choice: &Choice) -> Result<Option<Format>, FormatError> {
    let name = match choice {
        Choice::Auto => return Ok(None),
        Choice::Required => None,
        Choice::Named(n) => Some(n.as_str()),
    };
    let named = |t: &&Value| name.is_none_or(|n| t["function"]["name"] == n);
    let call = |t: &Value| {
        let parameters = &t["function"]["parameters"];
        let schema = if parameters.is_object() { parameters.clone() } else { json!({"type": "object"}) };
        json!({
            "type": "object",
            "properties": {"name": {"const": t["function"]["name"]}, "arguments": schema},
            "required": ["name", "arguments"],
            "additionalProperties": false,
        })
    };
    let calls: Vec<Value> = tools.iter().filter(named).map(call).collect();
    match (calls.len(), name) {
        (0, Some(n)) => Err(FormatError(format!("tool_choice names {n:?}, which is none of the tools"))),
        (0, None) => Err(FormatError("tool_choice asks for a call, but there are no tools".into())),
        _ => Ok(Some(Format::Schema(with_definitions(calls)?))),
    }
}

/// One schema of several; definitions of each move to the root, where `#/$defs/...` finds them.
fn with_definitions(mut calls: Vec<Value>) -> Result<Value, FormatError> {
    let mut root = Map::new();
    for c in &mut calls {
        let Some(arguments) = c["properties"]["arguments"].as_object_mut() else { continue };
        for key in ["$defs", "definitions"] {
            let Some(Value::Object(own)) = arguments.shift_remove(key) else { continue };
            let all = root.entry(key).or_insert_with(|| json!({}));
            for (name, schema) in own {
                if all.get(&name).is_some_and(|other| *other != schema) {
                    return Err(FormatError(format!("two tools define {name:?} differently")));
                }
                all[&name] = schema;
            }
        }
    }
    root.insert("anyOf".into(), calls.into());
    Ok(root.into())
}

impl Parser {
    /// For answers that a template with this source asks for; `tools` as in OpenAI's API.
    pub fn new(template: &str, tools: &[Value]) -> Self {
        let family = match template {
            t if t.contains(DEEPSEEK.open) => Family::Tagged(&DEEPSEEK),
            t if t.contains(QWEN.open) => Family::Tagged(&QWEN),
            _ => Family::Bare,
        };
        Self::of(family, tools)
    }

    /// For answers that are held to [`forced`].
    pub fn forced(tools: &[Value]) -> Self {
        Self::of(Family::Bare, tools)
    }

    fn of(family: Family, tools: &[Value]) -> Self {
        let names = tools.iter().filter_map(|t| t["function"]["name"].as_str().map(Into::into)).collect();
        let at = if matches!(family, Family::Bare) { At::Start } else { At::Text };
        Self { family, names, at, held: String::new(), called: false }
    }

    /// Takes text; gives what is certain.
    pub fn push(&mut self, text: &str) -> Vec<Piece> {
        self.held.push_str(text);
        self.steps(false)
    }

    /// Ends the text.
    pub fn finish(&mut self) -> Vec<Piece> {
        self.steps(true)
    }

    fn steps(&mut self, end: bool) -> Vec<Piece> {
        let mut out = Vec::new();
        while match self.family {
            Family::Tagged(tags) => self.tagged(tags, end, &mut out),
            Family::Bare => self.bare(end, &mut out),
        } {}
        out
    }

    /// Gives the first `n` held bytes as text.
    fn say(&mut self, n: usize, out: &mut Vec<Piece>) {
        let rest = self.held.split_off(n);
        let text = std::mem::replace(&mut self.held, rest);
        match out.last_mut() {
            Some(Piece::Text(t)) => t.push_str(&text),
            _ if text.is_empty() => {}
            _ => out.push(Piece::Text(text)),
        }
    }

    fn call(&mut self, call: ToolCall, out: &mut Vec<Piece>) {
        self.called = true;
        out.push(Piece::Call(call));
    }

    /// One step; whether there may be another.
    fn tagged(&mut self, tags: &'static Tags, end: bool, out: &mut Vec<Piece>) -> bool {
        if self.at == At::Call {
            let closed = self.held.find(tags.close);
            let Some(n) = closed.map(|i| i + tags.close.len()).or(end.then_some(self.held.len())) else {
                return false;
            };
            self.at = At::Text;
            let body = &self.held[tags.open.len()..closed.unwrap_or(n)];
            match tagged_call(body) {
                Some(call) => {
                    self.call(call, out);
                    self.held.drain(..n);
                }
                None => self.say(n, out),
            }
            return true;
        }
        let all = || tags.around.iter().copied().chain([tags.open]);
        let found = all().filter_map(|t| Some((self.held.find(t)?, t))).min_by_key(|f| f.0);
        if let Some((at, tag)) = found {
            // White space before a call is layout.
            let text = self.held[..at].trim_end().len();
            self.say(text, out);
            self.held.drain(..at - text);
            if tag == tags.open {
                self.at = At::Call;
            } else {
                self.held.drain(..tag.len());
            }
            return true;
        }
        let sure = if end {
            self.held.len()
        } else {
            let begins = all().filter_map(|t| partial(&self.held, t)).min();
            self.held[..begins.unwrap_or(self.held.len())].trim_end().len()
        };
        if end && self.called && self.held.trim().is_empty() {
            self.held.clear();
        }
        self.say(sure.min(self.held.len()), out);
        false
    }

    fn bare(&mut self, end: bool, out: &mut Vec<Piece>) -> bool {
        if self.at != At::Start {
            self.say(self.held.len(), out);
            return false;
        }
        let layout: &[char] = if self.called { &[';', '\n', ' '] } else { &['\n', ' '] };
        let text = self.held.trim_start_matches(layout);
        if end && self.called && text.is_empty() {
            self.held.clear();
            return false;
        }
        if !end && (text.is_empty() || PYTHON.starts_with(text)) {
            return false;
        }
        if let Some(call) = text.strip_prefix(PYTHON)
            && !call.trim_start().starts_with('{')
        {
            // Llama's built-in tools: NAME.call(key="value", ...), to the end of the answer.
            if !end {
                return false;
            }
            self.at = At::Text;
            match builtin(call.trim()) {
                Some(call) => {
                    self.call(call, out);
                    self.held.clear();
                }
                None => self.say(self.held.len(), out),
            }
            return true;
        }
        let body = text.strip_prefix(PYTHON).unwrap_or(text);
        let skipped = self.held.len() - body.len();
        let mut values = serde_json::Deserializer::from_str(body).into_iter::<Value>();
        match values.next() {
            Some(Ok(v)) if v.is_object() => {
                let n = skipped + values.byte_offset();
                match call_of(v).filter(|c| self.names.contains(&c.name)) {
                    Some(call) => {
                        self.call(call, out);
                        self.held.drain(..n);
                        return !self.held.is_empty();
                    }
                    None => self.at = At::Text,
                }
            }
            Some(Err(e)) if e.is_eof() && !end && may_be_call(body) => return false,
            _ => self.at = At::Text,
        }
        true
    }
}

/// Whether what begins like this can become a call: its first key is one of a call's.
fn may_be_call(body: &str) -> bool {
    let Some(inner) = body.trim_start().strip_prefix('{') else { return false };
    let inner = inner.trim_start();
    let key = inner.strip_prefix('"').unwrap_or(inner);
    let keys = ["name", "parameters", "arguments", "type", "function", "id"];
    match key.split_once('"') {
        Some((key, _)) => keys.contains(&key),
        None => keys.iter().any(|k| k.starts_with(key)),
    }
}

/// What stands between the tags of a call.
fn tagged_call(body: &str) -> Option<ToolCall> {
    let Some((kind, rest)) = body.split_once(DEEPSEEK_SEP) else {
        return call_of(serde_json::from_str(body.trim()).ok()?);
    };
    // R1: the kind, then the name and a block of JSON. V3.1: the name, then JSON.
    let (name, arguments) = match rest.split_once("```json") {
        Some((name, block)) => (name, block.trim().strip_suffix("```").unwrap_or(block)),
        None => (kind, rest),
    };
    let name = name.trim();
    if name.is_empty() || name.contains(char::is_whitespace) {
        return None;
    }
    call_of(json!({"name": name, "arguments": serde_json::from_str::<Value>(arguments.trim()).ok()?}))
}

/// The call that an object describes.
fn call_of(mut v: Value) -> Option<ToolCall> {
    if v["function"].is_object() {
        v = v["function"].take();
    }
    let name = v["name"].as_str()?.to_owned();
    let mut arguments = match v.get_mut("arguments") {
        Some(a) => a.take(),
        None => v.get_mut("parameters")?.take(),
    };
    if let Some(text) = arguments.as_str() {
        arguments = serde_json::from_str(text).ok()?;
    }
    (!name.is_empty() && arguments.is_object()).then(|| ToolCall { id: id(), name, arguments })
}

/// `name.call(key="value", other=1)`.
fn builtin(text: &str) -> Option<ToolCall> {
    let (name, rest) = text.split_once(".call(")?;
    let mut rest = rest.trim().strip_suffix(')')?.trim();
    let is_word = |s: &str| !s.is_empty() && s.chars().all(|c| c.is_alphanumeric() || c == '_');
    let mut arguments = Map::new();
    while !rest.is_empty() {
        let (key, value) = rest.split_once('=')?;
        let mut values = serde_json::Deserializer::from_str(value).into_iter::<Value>();
        let parsed = values.next()?.ok()?;
        let behind = value[values.byte_offset()..].trim_start();
        rest = behind.strip_prefix(',').unwrap_or(behind).trim_start();
        if !is_word(key.trim()) || (rest.len() == behind.len() && !rest.is_empty()) {
            return None;
        }
        arguments.insert(key.trim().into(), parsed);
    }
    is_word(name).then(|| ToolCall { id: id(), name: name.into(), arguments: arguments.into() })
}

/// Where the longest proper beginning of `tag` that ends `text` begins.
fn partial(text: &str, tag: &str) -> Option<usize> {
    let from = text.len().saturating_sub(tag.len() - 1);
    (from..text.len()).find(|&i| text.is_char_boundary(i) && tag.starts_with(&text[i..]))
}

fn id() -> String {
    const LETTERS: &[u8] = b"abcdefghijklmnopqrstuvwxyz0123456789";
    // A fresh hasher's keys are random.
    let mut n = RandomState::new().build_hasher().finish();
    let letter = |_| {
        let c = LETTERS[(n % LETTERS.len() as u64) as usize];
        n /= LETTERS.len() as u64;
        c as char
    };
    format!("call_{}", (0..8).map(letter).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    const R1: &str = "{{'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' ... '```json'}}";
    const HERMES: &str = "<tool_call></tool_call>";
    const LLAMA: &str = "Respond in the format {\"name\": function name, \"parameters\": ...}";

    fn tools() -> Vec<Value> {
        let tool = |name: &str| json!({"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": false}}});
        vec![tool("get_weather"), tool("get_time")]
    }

    /// Text, and calls as `name{arguments}`.
    fn parse(template: &str, pieces: &[&str]) -> (String, Vec<String>) {
        let mut p = Parser::new(template, &tools());
        let mut all: Vec<Piece> = pieces.iter().flat_map(|t| p.push(t)).collect();
        all.extend(p.finish());
        let (mut text, mut calls) = (String::new(), Vec::new());
        for piece in all {
            match piece {
                Piece::Text(t) | Piece::Thinking(t) => text += &t,
                Piece::Call(c) => {
                    assert!(c.id.len() == 13 && c.id.starts_with("call_"), "{}", c.id);
                    calls.push(format!("{}{}", c.name, c.arguments));
                }
            }
        }
        (text, calls)
    }

    fn check(template: &str, answer: &str, text: &str, calls: &[&str]) {
        let want = (text.to_owned(), calls.iter().map(|c| (*c).to_owned()).collect());
        assert_eq!(parse(template, &[answer]), want, "{answer:?}");
        let letters: Vec<String> = answer.chars().map(String::from).collect();
        let letters: Vec<&str> = letters.iter().map(String::as_str).collect();
        assert_eq!(parse(template, &letters), want, "{answer:?} by letters");
    }

    #[test]
    fn deepseek() {
        let r1 = "Let me look.\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{\"city\": \"Paris\"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_time\n```json\n{\n  \"city\": \"Rome\"\n}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>";
        check(R1, r1, "Let me look.", &[r#"get_weather{"city":"Paris"}"#, r#"get_time{"city":"Rome"}"#]);
        let v31 = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{\"city\": \"Paris\"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>";
        check(R1, v31, "", &[r#"get_weather{"city":"Paris"}"#]);
        // Cut off behind the arguments, and within them.
        check(R1, "<｜tool▁call▁begin｜>get_time<｜tool▁sep｜>{}", "", &["get_time{}"]);
        let cut = "<｜tool▁call▁begin｜>get_time<｜tool▁sep｜>{\"city\": ";
        check(R1, cut, cut, &[]);
        let malformed = "<｜tool▁call▁begin｜>get_time<｜tool▁sep｜>Paris<｜tool▁call▁end｜>";
        check(R1, malformed, malformed, &[]);
        check(R1, "1 < 2 <｜tool", "1 < 2 <｜tool", &[]);
    }

    #[test]
    fn qwen() {
        let one = "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\", \"a\": 1}}\n</tool_call>";
        let call = r#"get_weather{"city":"Paris","a":1}"#;
        check(HERMES, &format!("Sure.\n{one}\n{one}"), "Sure.", &[call, call]);
        check(HERMES, &format!("{one} done"), " done", &[call]);
        check(
            HERMES,
            "<tool_call>{\"name\": \"x\", \"arguments\": \"{\\\"b\\\": 2}\"}</tool_call>",
            "",
            &[r#"x{"b":2}"#],
        );
        for malformed in [
            "<tool_call>\n{\"name\": \"x\"\n</tool_call>",
            "<tool_call>[]</tool_call>",
            "<tool_call>{\"arguments\": {}}</tool_call>",
            "<tool_call>",
            "a <tool_cal b",
        ] {
            check(HERMES, malformed, malformed, &[]);
        }
        check(HERMES, "plain text\n", "plain text\n", &[]);
    }

    #[test]
    fn llama() {
        let call = r#"{"name": "get_weather", "parameters": {"city": "Paris"}}"#;
        check(LLAMA, call, "", &[r#"get_weather{"city":"Paris"}"#]);
        check(LLAMA, &format!("<|python_tag|>{call}; {call}"), "", &[r#"get_weather{"city":"Paris"}"#; 2]);
        check(
            LLAMA,
            "<|python_tag|>brave_search.call(query=\"a, b\", n=3)",
            "",
            &[r#"brave_search{"query":"a, b","n":3}"#],
        );
        for text in [
            r#"{"name": "no_such_tool", "parameters": {}}"#,
            r#"{"answer": 42}"#,
            r#"{"name": "get_weather", "parameters": {"#,
            "The weather: {\"name\": \"get_weather\", \"parameters\": {}}",
            "<|python_tag|>print(1)",
            " hello ",
        ] {
            check(LLAMA, text, text, &[]);
        }
    }

    #[test]
    fn text_is_not_held_back_without_need() {
        let mut p = Parser::new(LLAMA, &tools());
        assert_eq!(p.push("{\"answer\""), [Piece::Text("{\"answer\"".into())]);
        let mut p = Parser::new(HERMES, &tools());
        assert_eq!(p.push("hello wor"), [Piece::Text("hello wor".into())]);
        assert_eq!(p.push("ld<tool"), [Piece::Text("ld".into())]);
        assert_eq!(p.push("box"), [Piece::Text("<toolbox".into())]);
    }

    #[test]
    fn the_templates_of_the_families_are_known() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/templates");
        if !folder.is_dir() {
            println!("skipped: ../shared is not here");
            return;
        }
        for (name, tag) in [
            ("deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", Some(DEEPSEEK.open)),
            ("deepseek-ai-DeepSeek-V3.1", Some(DEEPSEEK.open)),
            ("llama-cpp-deepseek-r1", Some(DEEPSEEK.open)),
            ("Qwen-Qwen2.5-7B-Instruct", Some(QWEN.open)),
            ("Qwen-Qwen3-0.6B", Some(QWEN.open)),
            ("meta-llama-Llama-3.1-8B-Instruct", None),
            ("google-gemma-2-2b-it", None),
        ] {
            let source = std::fs::read_to_string(folder.join(format!("{name}.jinja"))).unwrap();
            let found = match Parser::new(&source, &[]).family {
                Family::Tagged(t) => Some(t.open),
                Family::Bare => None,
            };
            assert_eq!(found, tag, "{name}");
        }
    }

    #[test]
    fn a_call_can_be_forced() {
        use crate::serve::constrain::{Begin, Grammars};
        let file = engine::gguf::File::from_static("demo", crate::demo::bytes()).unwrap();
        let vocab = Vocab::from_metadata(file.metadata()).unwrap();
        let grammars = Grammars::new(&vocab).unwrap();
        let ok = |format: &Format, text: &str| {
            let mut c = grammars.constraint(format, Begin::Now).unwrap();
            let ids =
                vocab.encode(text, engine::text::EncodeOptions { add_special: false, parse_special: false });
            ids.iter().all(|&id| {
                let mut logits = vec![0.0; vocab.len()];
                c.mask(&mut logits).unwrap();
                logits[id as usize] == 0.0 && c.accept(id).is_ok()
            }) && c.is_done()
        };
        let weather = r#"{"name": "get_weather", "arguments": {"city": "Paris"}}"#;
        let time = r#"{"name": "get_time", "arguments": {"city": "Paris"}}"#;
        let named = |n: &str| Choice::Named(n.into());
        assert_eq!(forced(&tools(), &Choice::Auto), Ok(None));
        let any = forced(&tools(), &Choice::Required).unwrap().unwrap();
        assert!(ok(&any, weather) && ok(&any, time) && !ok(&any, "{\"name\": \"x\""));
        let time_only = forced(&tools(), &named("get_time")).unwrap().unwrap();
        assert!(ok(&time_only, time) && !ok(&time_only, weather));
        let mut p = Parser::forced(&tools());
        assert!(matches!(&p.push(weather)[..], [Piece::Call(c)] if c.name == "get_weather"));
        assert!(forced(&tools(), &named("nosuch")).is_err() && forced(&[], &Choice::Required).is_err());
        let with_defs = json!([{"type": "function", "function": {"name": "f", "parameters": {"type": "object",
            "properties": {"x": {"$ref": "#/$defs/X"}}, "required": ["x"], "additionalProperties": false, "$defs": {"X": {"type": "integer"}}}}}]);
        let f = forced(with_defs.as_array().unwrap(), &Choice::Required).unwrap().unwrap();
        assert!(ok(&f, r#"{"name": "f", "arguments": {"x": 3}}"#));
        let mut two = with_defs.as_array().unwrap().clone();
        two.push(two[0].clone());
        assert!(forced(&two, &Choice::Required).is_ok());
        two[1]["function"]["parameters"]["$defs"]["X"] = json!({"type": "string"});
        assert!(forced(&two, &Choice::Required).is_err());
    }
}
