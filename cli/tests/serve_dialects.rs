//! A real server on the demo model: the store over HTTP, embeddings, forced tools, Anthropic's, OpenAI's and llama-server's
//! routes. What clients' own libraries make of it is ref-tests/clients.

mod common;
use common::rsinfer;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Stdio};

struct Server {
    child: Child,
    base: String,
    _dir: tempfile::TempDir,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn start() -> Server {
    let dir = tempfile::tempdir().unwrap();
    let mut child = rsinfer()
        .args(["serve", "--host", "127.0.0.1:0", "--parallel", "2"])
        .env("RSINFER_MODELS", dir.path().join("models"))
        .stderr(Stdio::piped())
        .spawn()
        .expect("the server starts");
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let base = loop {
        let line = lines.next().expect("the server says where it is").unwrap();
        if let Some((_, at)) = line.split_once("serves on ") {
            break at.trim().to_owned();
        }
    };
    std::thread::spawn(move || lines.for_each(drop));
    Server { child, base, _dir: dir }
}

impl Server {
    fn ask(&self, method: &str, path: &str, body: &[u8]) -> (u16, String) {
        let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
        let url = format!("{}{path}", self.base);
        let sent = match method {
            "GET" => agent.get(&url).call(),
            "HEAD" => agent.head(&url).call(),
            "DELETE" => agent.delete(&url).force_send_body().send(body),
            _ => agent.post(&url).send(body),
        };
        let mut response = sent.unwrap_or_else(|e| panic!("{method} {path}: {e}"));
        let mut text = String::new();
        response.body_mut().as_reader().read_to_string(&mut text).unwrap();
        (response.status().as_u16(), text)
    }

    /// The JSON of a request that must succeed.
    fn post(&self, path: &str, body: Value) -> Value {
        let (status, text) = self.ask("POST", path, body.to_string().as_bytes());
        assert_eq!(status, 200, "{path} {body}: {text}");
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{path}: {e}: {text}"))
    }

    /// The status and body of one that must fail.
    fn refused(&self, path: &str, body: Value) -> (u16, String) {
        let (status, text) = self.ask("POST", path, body.to_string().as_bytes());
        assert!(status >= 400, "{path} {body}: {text}");
        (status, text)
    }

    /// The events of a stream.
    fn events(&self, path: &str, body: Value) -> Vec<Value> {
        let (status, text) = self.ask("POST", path, body.to_string().as_bytes());
        assert_eq!(status, 200, "{path}: {text}");
        let data = text.lines().filter_map(|l| l.strip_prefix("data: ")).filter(|d| *d != "[DONE]");
        data.map(|d| serde_json::from_str(d).unwrap()).collect()
    }
}

fn tool() -> Value {
    json!({"name": "get_weather", "description": "The weather", "parameters": {"type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"], "additionalProperties": false}})
}

fn user(text: &str) -> Value {
    json!([{"role": "user", "content": text}])
}

#[test]
fn models_are_made_over_http() {
    let s = start();
    let made = s.post(
        "/api/create",
        json!({"model": "me/tiny", "from": "demo", "system": "Be brief.",
        "parameters": {"temperature": 0, "num_predict": 6}, "stream": false}),
    );
    assert_eq!(made["status"], "success");
    let show = s.post("/api/show", json!({"model": "me/tiny"}));
    assert_eq!(show["system"], "Be brief.");
    assert!(show["modelfile"].as_str().unwrap().contains("PARAMETER temperature 0"), "{show}");
    let answer = s.post("/api/chat", json!({"model": "me/tiny", "messages": user("Hi"), "stream": false}));
    assert!(answer["eval_count"].as_u64().unwrap() <= 6, "{answer}");
    let copy = json!({"source": "me/tiny", "destination": "other"});
    assert_eq!(s.ask("POST", "/api/copy", copy.to_string().as_bytes()).0, 200);
    let names = s.ask("GET", "/api/tags", b"").1;
    assert!(names.contains("other:latest") && names.contains("me/tiny:latest"), "{names}");
    assert_eq!(s.ask("DELETE", "/api/delete", br#"{"model": "other"}"#).0, 200);
    assert_eq!(s.ask("DELETE", "/api/delete", br#"{"model": "other"}"#).0, 404);
    let (status, text) = s.refused("/api/pull", json!({"model": "llama3"}));
    assert!(status == 400 && text.contains("rsinfer create"), "{text}");
    for (body, status, words) in [
        (json!({"model": "x", "from": "nosuch"}), 404, "nosuch"),
        (json!({"model": "x", "from": "/etc/passwd"}), 400, "no model name"),
        (json!({"model": "../x", "from": "demo"}), 400, "no model name"),
        (json!({"model": "x", "from": "demo", "template": "{{ .Prompt }}"}), 400, "Go template"),
        (json!({"model": "x", "from": "demo", "parameters": {"nonsense": 1}}), 400, "nonsense"),
        (json!({"model": "x"}), 400, "from"),
        (json!({"model": "x", "from": "demo", "quantize": "q4_0"}), 400, "quantize"),
    ] {
        let (got, text) = s.refused("/api/create", body.clone());
        assert!(got == status && text.contains(words), "{body}: {got} {text}");
    }
}

#[test]
fn blobs_are_uploaded_and_become_models() {
    let s = start();
    let bytes = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../ref-tests/demo-model/demo-q8_0.gguf"))
        .unwrap();
    use sha2::{Digest, Sha256};
    let hex: String = Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
    let path = format!("/api/blobs/sha256:{hex}");
    assert_eq!(s.ask("HEAD", &path, b"").0, 404);
    assert_eq!(s.ask("POST", &path, b"something else").0, 400);
    assert_eq!(s.ask("HEAD", &path, b"").0, 404);
    assert_eq!(s.ask("POST", &path, &bytes).0, 201);
    assert_eq!(s.ask("POST", &path, b"").0, 200);
    assert_eq!(s.ask("HEAD", &path, b"").0, 200);
    assert_eq!(s.ask("POST", "/api/blobs/sha256:..%2f..%2fx", b"").0, 400);
    s.post(
        "/api/create",
        json!({"model": "up", "files": {"m.gguf": format!("sha256:{hex}")}, "stream": false}),
    );
    s.post(
        "/api/generate",
        json!({"model": "up", "prompt": "Hi", "stream": false, "options": {"num_predict": 3}}),
    );
    let missing = format!("sha256:{}", "0".repeat(64));
    let (status, text) = s.refused("/api/create", json!({"model": "x", "files": {"m.gguf": missing}}));
    assert!(status == 400 && text.contains("not uploaded"), "{text}");
}

#[test]
fn embeddings_have_length_one() {
    let s = start();
    let both = s.post("/api/embed", json!({"model": "demo", "input": ["A story.", "Another one."]}));
    let vectors = both["embeddings"].as_array().unwrap();
    let values =
        |v: &Value| -> Vec<f64> { v.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect() };
    assert_eq!(vectors.len(), 2);
    for v in vectors {
        assert!((values(v).iter().map(|x| x * x).sum::<f64>() - 1.0).abs() < 1e-5);
    }
    let old = s.post("/api/embeddings", json!({"model": "demo", "prompt": "A story."}));
    assert_eq!(values(&old["embedding"]), values(&vectors[0]));
    let openai = s.post("/v1/embeddings", json!({"model": "demo", "input": "A story.", "dimensions": 8}));
    let short = values(&openai["data"][0]["embedding"]);
    assert!(short.len() == 8 && (short.iter().map(|x| x * x).sum::<f64>() - 1.0).abs() < 1e-5);
    let base64 =
        s.post("/v1/embeddings", json!({"model": "demo", "input": "A story.", "encoding_format": "base64"}));
    assert_eq!(
        base64["data"][0]["embedding"].as_str().unwrap().len(),
        (values(&vectors[0]).len() * 4).div_ceil(3) * 4
    );
    for (body, words) in [
        (json!({"model": "demo", "input": []}), "input"),
        (json!({"model": "demo", "input": [[99999]]}), "99999"),
        (json!({"model": "demo", "input": "x", "dimensions": 99999}), "dimensions"),
        (json!({"model": "demo", "input": {"a": 1}}), "input"),
        (json!({"model": "demo", "input": "x", "encoding_format": "hex"}), "encoding_format"),
    ] {
        let (status, text) = s.refused("/v1/embeddings", body.clone());
        assert!(status == 400 && text.contains(words), "{body}: {text}");
    }
}

#[test]
fn calls_can_be_forced_and_schemas_hold() {
    let s = start();
    let body = |choice: Value| {
        json!({"model": "demo", "messages": user("Weather?"), "seed": 1,
        "tools": [{"type": "function", "function": tool()}], "tool_choice": choice})
    };
    for choice in [json!("required"), json!({"type": "function", "function": {"name": "get_weather"}})] {
        let answer = s.post("/v1/chat/completions", body(choice.clone()));
        let call = &answer["choices"][0]["message"]["tool_calls"][0]["function"];
        let city: Value =
            serde_json::from_str(call["arguments"].as_str().unwrap_or_else(|| panic!("{answer}"))).unwrap();
        assert!(city["city"] == "Paris" || city["city"] == "Rome", "{answer}");
        assert_eq!(answer["choices"][0]["finish_reason"], "tool_calls");
        let mut streamed = body(choice);
        streamed["stream"] = json!(true);
        let events = s.events("/v1/chat/completions", streamed);
        assert!(
            events
                .iter()
                .any(|e| e["choices"][0]["delta"]["tool_calls"][0]["function"]["name"] == "get_weather")
        );
    }
    let (status, text) =
        s.refused("/v1/chat/completions", body(json!({"type": "function", "function": {"name": "nosuch"}})));
    assert!(status == 400 && text.contains("nosuch"), "{text}");
    let schema = json!({"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": false});
    let answer = s.post(
        "/api/chat",
        json!({"model": "demo", "messages": user("Hi"), "format": schema, "stream": false}),
    );
    let said: Value = serde_json::from_str(answer["message"]["content"].as_str().unwrap()).unwrap();
    assert!(said["n"] == 1 || said["n"] == 2, "{answer}");
    let (status, text) = s.refused(
        "/api/chat",
        json!({"model": "demo", "messages": user("Hi"), "format": {"type": "nonsense"}}),
    );
    assert!(status == 400 && text.contains("nonsense"), "{text}");
}

#[test]
fn anthropic_messages() {
    let s = start();
    let body = json!({"model": "demo", "max_tokens": 12, "system": [{"type": "text", "text": "Be brief."}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Tell me a story."}]}]});
    let whole = s.post("/v1/messages", body.clone());
    assert_eq!(
        (whole["type"].as_str(), whole["stop_reason"].as_str()),
        (Some("message"), Some("max_tokens"))
    );
    assert!(whole["usage"]["output_tokens"].as_u64().unwrap() <= 12);
    let mut streamed = body.clone();
    streamed["stream"] = json!(true);
    let kinds: Vec<String> =
        s.events("/v1/messages", streamed).iter().map(|e| e["type"].as_str().unwrap().to_owned()).collect();
    assert_eq!(kinds[0], "message_start");
    assert_eq!(kinds[kinds.len() - 2..], ["message_delta", "message_stop"]);
    let count = |kind: &str| kinds.iter().filter(|k| *k == kind).count();
    assert!(count("content_block_start") >= 1 && count("content_block_start") == count("content_block_stop"));
    let mut counted = body.clone();
    counted.as_object_mut().unwrap().remove("max_tokens");
    let n = s.post("/v1/messages/count_tokens", counted)["input_tokens"].as_u64().unwrap();
    let usage = &whole["usage"];
    assert_eq!(
        n,
        usage["input_tokens"].as_u64().unwrap() + usage["cache_read_input_tokens"].as_u64().unwrap()
    );
    let mut t = tool();
    t["input_schema"] = t["parameters"].take();
    t.as_object_mut().unwrap().remove("parameters");
    let mut calling = body.clone();
    calling["max_tokens"] = json!(200);
    calling["tools"] = json!([t]);
    calling["tool_choice"] = json!({"type": "any"});
    let call = s.post("/v1/messages", calling);
    assert_eq!(
        (call["stop_reason"].as_str(), call["content"].as_array().unwrap().last().unwrap()["type"].as_str()),
        (Some("tool_use"), Some("tool_use")),
        "{call}"
    );
    let mut held = body.clone();
    held["max_tokens"] = json!(200);
    held["output_config"] = json!({"format": {"type": "json_schema", "schema": {"enum": ["a", "b"]}}});
    let held = s.post("/v1/messages", held);
    assert!(
        ["\"a\"", "\"b\""]
            .contains(&held["content"].as_array().unwrap().last().unwrap()["text"].as_str().unwrap()),
        "{held}"
    );
    let (status, text) = s.refused("/v1/messages", json!({"model": "demo", "messages": user("x")}));
    assert!(status == 400 && text.contains("max_tokens") && text.contains("\"type\":\"error\""), "{text}");
    let image = json!([{"role": "user", "content": [{"type": "image", "source": {}}]}]);
    let (status, text) =
        s.refused("/v1/messages", json!({"model": "demo", "max_tokens": 1, "messages": image}));
    assert!(status == 400 && text.contains("image"), "{text}");
}

/// A log-probability for every token of the prompt, the same as where the model says these tokens itself.
#[test]
fn prompts_are_echoed_with_their_log_probabilities() {
    let s = start();
    let body = json!({"model": "demo", "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0, "logprobs": 2});
    let said = &s.post("/v1/completions", body.clone())["choices"][0];
    let (text, made) = (said["text"].as_str().unwrap(), &said["logprobs"]);
    let all = format!("Once upon a time{text}");
    for stream in [false, true] {
        let body = json!({"model": "demo", "prompt": all, "max_tokens": 0, "logprobs": 2, "echo": true, "stream": stream});
        let choices: Vec<Value> = match stream {
            true => s.events("/v1/completions", body).iter().map(|e| e["choices"][0].clone()).collect(),
            false => vec![s.post("/v1/completions", body)["choices"][0].clone()],
        };
        let echoed: String = choices.iter().map(|c| c["text"].as_str().unwrap()).collect();
        assert_eq!(echoed, all);
        let probs = choices.iter().find(|c| c["logprobs"].is_object()).unwrap()["logprobs"].clone();
        let tokens: Vec<&str> =
            probs["tokens"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect();
        assert_eq!(tokens.concat(), all);
        let (got, want) =
            (probs["token_logprobs"].as_array().unwrap(), made["token_logprobs"].as_array().unwrap());
        assert_eq!(tokens.len(), got.len());
        for (g, w) in got[got.len() - want.len()..].iter().zip(want) {
            assert!((g.as_f64().unwrap() - w.as_f64().unwrap()).abs() < 0.05, "{got:?} {want:?}");
        }
        assert_eq!(probs["text_offset"][1], tokens[0].len());
    }
    // As tokens: nothing comes before the first.
    let ids =
        s.post("/tokenize", json!({"content": "Once upon a time", "add_special": true}))["tokens"].clone();
    let body = json!({"model": "demo", "prompt": [ids, "The dog"], "max_tokens": 2, "logprobs": 0, "echo": true, "n": 2, "seed": 1});
    let both = s.post("/v1/completions", body);
    let choices = both["choices"].as_array().unwrap();
    assert_eq!(choices.iter().map(|c| c["index"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 1, 2, 3]);
    assert!(choices[..2].iter().all(|c| c["text"].as_str().unwrap().contains("Once upon a time")), "{both}");
    assert!(choices[2..].iter().all(|c| c["text"].as_str().unwrap().starts_with("The dog")), "{both}");
    assert_eq!(choices[0]["logprobs"]["token_logprobs"][0], Value::Null);
    assert_eq!(both["usage"]["completion_tokens"], 8);
    let alone = json!({"model": "demo", "prompt": "The dog", "max_tokens": 2, "seed": 1});
    let alone = s.post("/v1/completions", alone);
    let second = choices[2]["text"].as_str().unwrap().strip_prefix("The dog");
    assert_eq!(second, alone["choices"][0]["text"].as_str());
    let prompts = both["usage"]["prompt_tokens"].as_u64().unwrap();
    assert_eq!(prompts, ids_len(&ids) + alone["usage"]["prompt_tokens"].as_u64().unwrap());
}

fn ids_len(v: &Value) -> u64 {
    v.as_array().unwrap().len() as u64
}

/// What overflows goes from behind the system prompt, however long that is; what of it cannot stay is told.
#[test]
fn system_prompts_stay() {
    let s = start();
    let system = "You are a dog. ".repeat(60);
    let ask = |system: &str, more: Value| {
        let mut body = json!({"model": "demo", "stream": false, "messages": [{"role": "system", "content": system},
            {"role": "user", "content": "Once there was a fox. ".repeat(100)}],
            "options": {"num_ctx": 512, "num_predict": 4}});
        body["options"].as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        s.post("/api/chat", body)
    };
    let told = ask(&system, json!({}));
    assert!(told["evicted_tokens"].as_u64().unwrap() > 100, "{told}");
    assert!(told["system_evicted_tokens"].is_null(), "{told}");
    let status: Value = serde_json::from_str(&s.ask("GET", "/api/status", b"").1).unwrap();
    let held = |status: &Value| {
        let all = status["models"][0]["sequences"].as_array().unwrap().clone();
        let last = all.into_iter().find(|q| q["evicted"].as_u64() > Some(0)).unwrap();
        let held: Vec<f64> = last["held"].as_array().unwrap().iter().map(|h| h.as_f64().unwrap()).collect();
        held.iter().take_while(|h| **h == 1.0).count() as f64 / held.len() as f64
            * last["tokens"].as_f64().unwrap()
    };
    let prompt = s.post(
        "/apply-template",
        json!({"messages": [{"role": "system", "content": system}, {"role": "user", "content": ""}]}),
    );
    let head = s.post("/tokenize", json!({"content": prompt["prompt"]}))["tokens"].as_array().unwrap().len();
    assert!(held(&status) + 16.0 > head as f64 && head > 128, "{} of {head}: {status}", held(&status));
    let told = ask(&"You are a very good dog. ".repeat(100), json!({}));
    assert!(told["system_evicted_tokens"].as_u64().unwrap() > 50, "{told}");
    // As much as a client wants kept, if it fits.
    let told = ask("Be brief.", json!({"num_keep": 300}));
    assert!(
        told["evicted_tokens"].as_u64().unwrap() > 100 && told["system_evicted_tokens"].is_null(),
        "{told}"
    );
}

#[test]
fn openai_responses() {
    let s = start();
    let body = json!({"model": "demo", "input": "Tell me a story.", "max_output_tokens": 12, "instructions": "Be brief."});
    let whole = s.post("/v1/responses", body.clone());
    assert_eq!((whole["object"].as_str(), whole["status"].as_str()), (Some("response"), Some("incomplete")));
    assert_eq!(whole["incomplete_details"]["reason"], "max_output_tokens");
    let details = &whole["usage"]["output_tokens_details"];
    let thought = whole["output"].as_array().unwrap().iter().any(|i| i["type"] == "reasoning");
    assert_eq!(details["reasoning_tokens"].as_u64().unwrap() > 0, thought, "{whole}");
    let mut streamed = body;
    streamed["stream"] = json!(true);
    let events = s.events("/v1/responses", streamed);
    assert!(events.iter().enumerate().all(|(i, e)| e["sequence_number"] == i), "events are numbered");
    assert_eq!(events[0]["type"], "response.created");
    assert_eq!(events.last().unwrap()["type"], "response.incomplete");
    let mut t = tool();
    t["type"] = json!("function");
    let call = s.post(
        "/v1/responses",
        json!({"model": "demo", "tools": [t], "tool_choice": "required",
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]}]}),
    );
    let item = call["output"].as_array().unwrap().last().unwrap();
    assert_eq!(item["type"], "function_call", "{call}");
    let again = s.post(
        "/v1/responses",
        json!({"model": "demo", "max_output_tokens": 4, "input": [
        {"role": "user", "content": "Weather?"}, item,
        {"type": "function_call_output", "call_id": item["call_id"], "output": "Rain."}]}),
    );
    assert_eq!(again["object"], "response");
    let (status, text) =
        s.refused("/v1/responses", json!({"model": "demo", "input": "x", "previous_response_id": "resp_1"}));
    assert!(status == 400 && text.contains("previous_response_id"), "{text}");
}

#[test]
fn llama_servers_routes() {
    let s = start();
    let tokens = s.post("/tokenize", json!({"model": "demo", "content": "Hello world", "with_pieces": true}));
    let pieces = tokens["tokens"].as_array().unwrap();
    let text: String = pieces.iter().map(|p| p["piece"].as_str().unwrap()).collect();
    assert_eq!(text, "Hello world");
    let ids: Vec<&Value> = pieces.iter().map(|p| &p["id"]).collect();
    assert_eq!(s.post("/detokenize", json!({"tokens": ids}))["content"], "Hello world");
    let prompt = s.post("/apply-template", json!({"messages": user("Hello")}));
    assert!(prompt["prompt"].as_str().unwrap().contains("Hello"), "{prompt}");
    let done = s.post("/completion", json!({"prompt": ["Once", 5, " upon"], "n_predict": 5, "n_probs": 2, "return_tokens": true, "seed": 1}));
    assert_eq!(
        (done["stop_type"].as_str(), done["tokens"].as_array().unwrap().len()),
        (Some("limit"), 5),
        "{done}"
    );
    assert_eq!(done["completion_probabilities"][0]["top_logprobs"].as_array().unwrap().len(), 2);
    let settings = &done["generation_settings"];
    assert_eq!(
        (&settings["n_predict"], &settings["seed"], &settings["stream"]),
        (&json!(5), &json!(1), &json!(false))
    );
    let events = s.events("/completion", json!({"prompt": "Once", "n_predict": 5, "stream": true}));
    assert_eq!(events.last().unwrap()["stop"], true);
    let held = s.post("/completion", json!({"prompt": "Once", "json_schema": {"enum": ["a", "b"]}}));
    assert!(["\"a\"", "\"b\""].contains(&held["content"].as_str().unwrap()), "{held}");
    let lark = "%llguidance {}\nstart: /[a-c]{3}/";
    for (path, key) in [("/completion", "content"), ("/v1/completions", "choices")] {
        let held = s.post(path, json!({"model": "demo", "prompt": "Once", "grammar": lark}));
        let text = held[key].as_str().or(held[key][0]["text"].as_str()).unwrap();
        assert!(text.len() == 3 && text.bytes().all(|b| (b'a'..=b'c').contains(&b)), "{held}");
    }
    let (status, text) = s.refused("/v1/chat/completions", json!({"model": "demo", "messages": user("x"), "grammar": lark, "response_format": {"type": "json_object"}}));
    assert!(status == 400 && text.contains("response_format"), "{text}");
    let props: Value = serde_json::from_str(&s.ask("GET", "/props", b"").1).unwrap();
    assert_eq!(props["total_slots"], 2, "{props}");
    let slots: Value = serde_json::from_str(&s.ask("GET", "/slots", b"").1).unwrap();
    assert_eq!(slots.as_array().unwrap().len(), 2, "{slots}");
    let (status, text) = s.refused("/completion", json!({"prompt": "x", "num_ctx": 900_000_000}));
    assert!(status == 400 && text.contains("num_ctx") && text.contains("does not fit"), "{text}");
    let (status, text) = s.refused("/completion", json!({"model": "demo", "prompt": "x", "mirostat": 2}));
    assert!(status == 400 && text.contains("mirostat"), "{text}");
}
