//! `GET /openapi.json`: what this server answers, for programs that read OpenAPI. Written by hand; the tests here hold it against
//! the router, ref-tests/clients/openapi.py holds the running server against it.

use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use serde_json::{Value, json};
use std::sync::LazyLock;

const DOCUMENT: &str = include_str!("openapi.json");

/// With what holds everywhere, and is written once: what need not be there may be null, and counts as left out.
static SERVED: LazyLock<String> = LazyLock::new(|| {
    let mut doc: Value = serde_json::from_str(DOCUMENT).expect("a test reads it");
    nullable(&mut doc["components"]["schemas"]);
    doc.to_string()
});

fn nullable(v: &mut Value) {
    match v {
        Value::Object(o) => {
            if o.get("additionalProperties") == Some(&json!(false)) {
                o.insert("additionalProperties".into(), json!({"type": "null"}));
            }
            let needed = o.get("required").and_then(Value::as_array).cloned().unwrap_or_default();
            if let Some(Value::Object(properties)) = o.get_mut("properties") {
                for (_, schema) in properties.iter_mut().filter(|(n, _)| !needed.iter().any(|v| v == *n)) {
                    *schema = json!({"anyOf": [schema.take(), {"type": "null"}]});
                }
            }
            o.values_mut().for_each(nullable);
        }
        Value::Array(a) => a.iter_mut().for_each(nullable),
        _ => {}
    }
}

/// See the module.
pub async fn document() -> impl IntoResponse {
    ([(CONTENT_TYPE, "application/json")], &**SERVED)
}

#[cfg(test)]
mod tests {
    use super::*;
    use regex::Regex;
    use std::collections::BTreeSet;

    /// `METHOD path` of every route, as the router's source says it: axum does not list them.
    fn routes() -> BTreeSet<String> {
        let route = Regex::new(r#"\.route\(\s*"([^"]+)",\s*(.*?)\)\s*\n"#).unwrap();
        let method = Regex::new(r"\b(get|post|put|patch|delete|head)\(").unwrap();
        let source = include_str!("mod.rs");
        assert_eq!(
            source.matches(".route(").count(),
            route.captures_iter(source).count(),
            "a route is not understood"
        );
        let mut all = BTreeSet::new();
        for r in route.captures_iter(source) {
            // A rest of the path is a parameter like any other.
            let path = r[1].replace("{*", "{");
            all.extend(method.captures_iter(&r[2]).map(|m| format!("{} {path}", &m[1])));
        }
        all
    }

    fn document() -> Value {
        serde_json::from_str(&SERVED).expect("JSON")
    }

    #[test]
    fn it_names_every_route_and_no_other() {
        let doc = document();
        let paths = doc["paths"].as_object().expect("paths");
        let named = paths.iter().flat_map(|(path, methods)| {
            let methods = methods.as_object().expect("methods");
            methods.keys().map(move |m| format!("{m} {path}"))
        });
        assert_eq!(named.collect::<BTreeSet<_>>(), routes());
        assert!(routes().len() > 25);
    }

    #[test]
    fn it_hangs_together() {
        fn walk(doc: &Value, v: &Value, used: &mut BTreeSet<String>) {
            if let Some(r) = v.get("$ref").and_then(Value::as_str) {
                assert!(doc.pointer(r.trim_start_matches('#')).is_some(), "{r} is not there");
                used.insert(r.to_owned());
            }
            match v {
                Value::Object(o) => o.values().for_each(|v| walk(doc, v, used)),
                Value::Array(a) => a.iter().for_each(|v| walk(doc, v, used)),
                _ => {}
            }
        }
        let doc = document();
        assert_eq!(doc["info"]["version"], env!("CARGO_PKG_VERSION"));
        let mut used = BTreeSet::new();
        walk(&doc, &doc, &mut used);
        for kind in ["schemas", "responses"] {
            for name in doc["components"][kind].as_object().expect("components").keys() {
                assert!(used.contains(&format!("#/components/{kind}/{name}")), "{name} is not used");
            }
        }
    }
}
