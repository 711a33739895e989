//! Messages of clients, checked and brought into the form of chat templates (OpenAI's), whatever the dialect.

use crate::serve::failure::Failure;
use crate::store::Resolved;
use serde_json::{Map, Value, json};

const ROLES: [&str; 5] = ["system", "user", "assistant", "tool", "developer"];

/// Text of `content`: a string, or an array of parts of text.
fn content(at: &str, v: Option<Value>) -> Result<Value, Failure> {
    match v {
        None | Some(Value::Null) => Ok(Value::Null),
        Some(Value::String(s)) => Ok(s.into()),
        Some(Value::Array(parts)) => {
            let mut all = String::new();
            for p in &parts {
                match (p["type"].as_str(), p["text"].as_str()) {
                    (Some("text" | "input_text" | "output_text"), Some(t)) => all.push_str(t),
                    (Some(kind), _) => {
                        let why = format!("parts of type {kind:?} are not supported: models here read text");
                        return Err(Failure::field(at, why));
                    }
                    _ => return Err(Failure::field(at, "every part needs a type and its text")),
                }
            }
            Ok(all.into())
        }
        Some(_) => Err(Failure::field(at, "it must be a string or an array of parts")),
    }
}

/// Checks messages, one by one; the errors name the message.
pub fn normalise(messages: Vec<Value>) -> Result<Vec<Value>, Failure> {
    let mut out = Vec::with_capacity(messages.len());
    for (i, m) in messages.into_iter().enumerate() {
        let at = |f: &str| format!("messages[{i}].{f}");
        let Value::Object(mut m) = m else {
            return Err(Failure::field("messages", format!("message {i} is not an object")));
        };
        let role = m.get("role").and_then(Value::as_str).map(str::to_lowercase);
        let role = role.filter(|r| ROLES.contains(&r.as_str()));
        let role = role
            .ok_or_else(|| Failure::field(&at("role"), format!("it must be one of {}", ROLES.join(", "))))?;
        if m.remove("images").is_some_and(|v| !v.is_null() && v != json!([])) {
            return Err(Failure::field(&at("images"), "models here read text alone"));
        }
        let mut new = Map::new();
        // Templates know no developers.
        new.insert("role".into(), if role == "developer" { "system".into() } else { role.as_str().into() });
        new.insert("content".into(), content(&at("content"), m.remove("content"))?);
        let mut text = |name: &str| match m.remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(_) => Err(Failure::field(&at(name), "it must be a string")),
        };
        // Ollama's and OpenAI's names; templates read the latter.
        for (from, to) in [
            ("thinking", "reasoning_content"),
            ("reasoning", "reasoning_content"),
            ("reasoning_content", "reasoning_content"),
            ("tool_name", "name"),
            ("name", "name"),
            ("tool_call_id", "tool_call_id"),
        ] {
            if let Some(s) = text(from)? {
                new.insert(to.into(), s.into());
            }
        }
        if let Some(calls) = m.remove("tool_calls").filter(|c| !c.is_null() && *c != json!([])) {
            let calls = calls
                .as_array()
                .cloned()
                .ok_or_else(|| Failure::field(&at("tool_calls"), "it must be an array"))?;
            for c in &calls {
                let (f, optional) = (&c["function"], |v: &Value, kind: &str| v.is_null() || v == kind);
                let arguments = &f["arguments"];
                let sound = arguments.is_object() || arguments.is_string() || arguments.is_null();
                let sound = sound && (c["id"].is_string() || c["id"].is_null());
                if !f["name"].is_string() || !sound || !optional(&c["type"], "function") {
                    let why = "every call needs a function with a name and arguments, an object or its text";
                    return Err(Failure::field(&at("tool_calls"), why));
                }
            }
            let typed = calls.into_iter().map(|mut c| {
                if c.get("type").is_none() {
                    c["type"] = "function".into();
                }
                c
            });
            new.insert("tool_calls".into(), typed.collect());
        }
        if role != "assistant" && new["content"].is_null() {
            return Err(Failure::field(&at("content"), "it is missing"));
        }
        out.push(new.into());
    }
    Ok(out)
}

/// What the model brings along before the client's messages.
pub fn with_models(model: &Resolved, messages: Vec<Value>) -> Vec<Value> {
    let own = messages.iter().any(|m| m["role"] == "system");
    let system = model.system.iter().filter(|_| !own).map(|s| json!({"role": "system", "content": s}));
    system.chain(model.messages.iter().cloned()).chain(messages).collect()
}
