//! Chat templates against Jinja2 (ref-tests/text/chat_reference.py), and hostile ones.

use std::path::{Path, PathBuf};

use engine::gguf::{Metadata, Value as Meta};
use engine::text::thinking::ThinkTags;
use engine::text::{ChatTemplate, RenderOptions, TextError, Vocab};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

fn render(source: &str, messages: Value) -> Result<String, TextError> {
    ChatTemplate::new(source, "<BOS>", "<EOS>")?.render(&RenderOptions {
        messages: &messages,
        tools: None,
        add_generation_prompt: true,
        kwargs: Map::new(),
    })
}

/// A template that is given no messages.
fn plain(source: &str) -> Result<String, String> {
    render(source, json!([])).map_err(|e| e.to_string())
}

#[test]
fn real_templates_render_as_jinja2_renders_them() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let dir: PathBuf = root.join("../../shared/templates");
    if !dir.is_dir() {
        assert!(std::env::var("CI").as_deref() != Ok("true"), "../shared is not here");
        println!("skipped: ../shared is not here");
        return;
    }
    let fixture = std::fs::read(root.join("../ref-tests/text/chat_reference.json")).unwrap();
    let fixture: Value = serde_json::from_slice(&fixture).unwrap();
    let mut wrong = Vec::new();
    let mut same = 0;
    for (name, results) in fixture["renderings"].as_object().unwrap() {
        let source = std::fs::read_to_string(dir.join(name)).unwrap();
        let template = ChatTemplate::new(&source, "<BOS>", "<EOS>").unwrap();
        let cases = fixture["cases"].as_array().unwrap();
        assert_eq!(cases.len(), results.as_array().unwrap().len());
        for (case, want) in cases.iter().zip(results.as_array().unwrap()) {
            let conversation = case["messages"].as_str().unwrap();
            let got = template.render(&RenderOptions {
                messages: &fixture["conversations"][conversation],
                tools: case["tools"].as_bool().unwrap().then_some(&fixture["tools"]),
                add_generation_prompt: case["add_generation_prompt"].as_bool().unwrap(),
                kwargs: case["kwargs"].as_object().unwrap().clone(),
            });
            let ok = match (&got, want["raises"].as_str()) {
                (Ok(text), None) => {
                    let hash: String = Sha256::digest(text).iter().map(|b| format!("{b:02x}")).collect();
                    *want == json!([text.len(), hash])
                }
                (Err(TextError::TemplateRaised(message)), Some(raises)) => message == raises,
                _ => false,
            };
            same += usize::from(ok);
            if !ok {
                wrong.push(format!("{name} {case}: wanted {want}, got {got:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{} wrong, {same} right; the first: {}", wrong.len(), wrong[0]);
    assert!(same > 500, "only {same} renderings compared");
}

#[test]
fn small_differences_between_jinja2_and_minijinja() {
    let messages = json!([{"role": "user", "content": "a<b>&'\"é"}]);
    assert_eq!(
        render("{{ messages[0] | tojson }}", messages.clone()).unwrap(),
        r#"{"role": "user", "content": "a<b>&'\"é"}"#
    );
    assert_eq!(
        render("{{ messages | tojson(indent=2) }}", json!([{"role": "x"}])).unwrap(),
        "[\n  {\n    \"role\": \"x\"\n  }\n]"
    );
    for (source, want) in [
        ("{{ bos_token }}|{{ eos_token }}", "<BOS>|<EOS>"),
        ("{{ none }} {{ true }} {{ 1.0 }} {{ nothing }}", "None True 1.0 "),
        ("{{ nothing | length }}", "0"),
        ("{{ 'a b c'.rsplit(' ', 1)[0] }}", "a b"),
        ("{{ ' a  b c '.rsplit(none, 1)[0] }}", " a  b"),
        ("{{ 'xyx'.removeprefix('x') }}{{ 'xyx'.removesuffix('x') }}", "yxxy"),
        ("{{ 'a=b=c'.partition('=')[2] }}{{ 'a=b=c'.rpartition('=')[0] }}", "b=ca=b"),
        ("{{ ('{\"a\": [1, 2.5]}' | from_json).a[1] }}", "2.5"),
        ("{% for x in [1, 2, 3] %}{% if x == 2 %}{% continue %}{% endif %}{{ x }}{% endfor %}", "13"),
        ("a\n  {% if true %}\nb\n  {% endif %}\nc\n", "a\nb\nc"),
        ("x {%- generation -%} y {%- endgeneration -%} z", "xyz"),
        ("{% generation %}{{ '{% generation' }}{% endgeneration %}", "{% generation"),
        ("{{ {'b': 1, 'a': 2} | tojson }}", "{\"b\": 1, \"a\": 2}"),
        (
            "{{ {'b': 1, 'a': 'é'} | tojson(sort_keys=true, ensure_ascii=true, separators=(',', ':')) }}",
            "{\"a\":\"\\u00e9\",\"b\":1}",
        ),
        ("{{ [] | tojson(indent=2) }}{{ {} | tojson(indent=2) }}", "[]{}"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ '<>&' }}", "<>&"),
    ] {
        assert_eq!(plain(source).as_deref(), Ok(want), "{source}");
    }
}

#[test]
fn null_content_and_arguments_as_text() {
    let messages = json!([{"role": "assistant", "content": null}]);
    assert_eq!(render("[{{ messages[0].content }}]", messages.clone()).unwrap(), "[]");
    assert_eq!(render("{{ messages[0].content is none }}", messages.clone()).unwrap(), "True");
    assert_eq!(render("{{ messages[0].content.strip() }}!", messages).unwrap(), "!");
    let call = json!([{"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "function": {"name": "f", "arguments": "{\"z\": 1, \"a\": \"<\"}"}}]}]);
    let arguments = "messages[0].tool_calls[0].function.arguments";
    let wanted = r#"{"z": 1, "a": "<"}"#;
    assert_eq!(render(&format!("{{{{ {arguments} | tojson }}}}"), call.clone()).unwrap(), wanted);
    assert_eq!(render(&format!("{{{{ 'x' + {arguments} }}}}"), call).unwrap(), format!("x{wanted}"));
}

#[test]
fn errors_are_one_clear_line() {
    let e = render("{{ raise_exception('Only\nthis <way>') }}", json!([])).unwrap_err();
    assert!(matches!(&e, TextError::TemplateRaised(m) if m == "Only this <way>"), "{e}");
    for (source, words) in [
        ("{% if %}", "line 1"),
        ("{{ none.x.y }}", "chat template"),
        ("{{ 'a' | nosuchfilter }}", "nosuchfilter"),
        ("{% include 'other' %}", "other"),
        ("{{ 'a' + 1 }}", "line 1"),
    ] {
        let e = plain(source).unwrap_err();
        assert!(e.contains(words) && !e.contains('\n'), "{source}: {e}");
    }
    for bad in [json!({}), json!(["x"]), json!([{"content": "x"}]), json!([{"role": 1}])] {
        assert!(matches!(render("x", bad), Err(TextError::Messages(_))));
    }
}

#[test]
fn hostile_templates_end_in_an_error() {
    for source in [
        "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ 'x' * 10000000000 }}",
        "{{ range(10000000000) | list }}",
        "{% set ns = namespace(x=[]) %}{% for i in range(90000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x | tojson }}",
        "{{ [1] | tojson(indent=-1) }}",
        "{{ strftime_now('%') }}",
        "{{ 'x'.rsplit('') }}{{ raise_exception('x') }}",
    ] {
        let e = plain(source).unwrap_err();
        assert!(!e.contains('\n'), "{source}: {e}");
    }
    let deep = format!("{}x{}", "{{ (", "(".repeat(20_000));
    assert!(plain(&deep).is_err());
    assert!(plain(&"{% if true %}".repeat(20_000)).is_err());
}

fn with_template(template: Option<&str>) -> (Metadata, Vocab) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../ref-tests/fixtures/llama/model.gguf");
    let mut m = engine::gguf::File::open(path, engine::gguf::OpenMode::Read).unwrap().metadata().clone();
    match template {
        Some(t) => m.set("tokenizer.chat_template", Meta::String(t.into())),
        None => {
            m.remove("tokenizer.chat_template");
        }
    }
    let v = Vocab::from_metadata(&m).unwrap();
    (m, v)
}

#[test]
fn a_file_without_template_gets_chatml() {
    let messages = json!([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]);
    let options =
        RenderOptions { messages: &messages, tools: None, add_generation_prompt: true, kwargs: Map::new() };
    let (m, v) = with_template(None);
    let t = ChatTemplate::from_metadata(&m, &v).unwrap();
    assert!(t.is_default() && t.think_tags().is_none());
    let want = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(t.render(&options).unwrap(), want);

    let (mut m, v) = with_template(Some("{{ '<think>' }}"));
    let t = ChatTemplate::from_metadata(&m, &v).unwrap();
    assert!(!t.is_default());
    let tags: ThinkTags = t.think_tags().unwrap();
    assert!(tags.opened_by(&t.render(&options).unwrap()));
    m.set("tokenizer.chat_template.tool_use", Meta::String("{{ tools[0].name }}".into()));
    let t = ChatTemplate::from_metadata(&m, &v).unwrap();
    let tools = json!([{"name": "f"}]);
    assert_eq!(t.render(&RenderOptions { tools: Some(&tools), ..options.clone() }).unwrap(), "f");
    assert_eq!(t.render(&options).unwrap(), "<think>");
}
