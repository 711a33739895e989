//! Both stores on temporary folders: what is found, made, refused.

use super::*;
use serde_json::json;
use std::fs;

struct Folders {
    dir: tempfile::TempDir,
    store: Store,
}

fn folders() -> Folders {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::at(&dir.path().join("own"), &dir.path().join("ollama"));
    Folders { dir, store }
}

impl Folders {
    fn model(&self) -> PathBuf {
        let path = self.dir.path().join("demo.gguf");
        fs::write(&path, crate::demo::bytes()).unwrap();
        path
    }

    /// Puts a model into Ollama's store, as `ollama pull` does.
    fn pull(&self, name: &str, layers: &[(&str, &[u8])]) -> PathBuf {
        let root = self.dir.path().join("ollama");
        fs::create_dir_all(root.join("blobs")).unwrap();
        let blob = |bytes: &[u8]| {
            let digest = format!("sha256:{}", sha256(bytes));
            fs::write(root.join("blobs").join(digest.replace(':', "-")), bytes).unwrap();
            digest
        };
        let config =
            json!({"model_format": "gguf", "model_family": "deepseek2", "model_families": ["deepseek2"],
            "model_type": "11M", "file_type": "Q8_0"})
            .to_string();
        let layers: Vec<Value> = layers
            .iter()
            .map(|(kind, bytes)| json!({"mediaType": format!("application/vnd.ollama.image.{kind}"), "digest": blob(bytes), "size": bytes.len()}))
            .collect();
        let manifest = json!({"schemaVersion": 2, "layers": layers,
            "config": {"digest": blob(config.as_bytes()), "size": config.len()}});
        let file = Name::parse(name).unwrap().below(&root.join("manifests"), "");
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, manifest.to_string()).unwrap();
        file
    }

    fn create(&self, name: &str, modelfile: &str) -> Result<Resolved> {
        self.store.create(name, &Modelfile::parse(modelfile)?, self.dir.path())
    }
}

fn fails<T: std::fmt::Debug>(r: Result<T>, words: &str) {
    let e = format!("{:#}", r.unwrap_err());
    assert!(e.contains(words), "{words:?} is not in {e:?}");
}

#[test]
fn what_ollama_has_pulled_is_found_as_it_is() {
    let f = folders();
    let template = b"{{ if .System }}{{ .System }}{{ end }}";
    f.pull(
        "Tiny:q8",
        &[
            ("model", crate::demo::bytes()),
            ("template", template),
            ("system", b"Be brief."),
            ("params", br#"{"stop": ["<|user|>"], "temperature": 0.6, "num_ctx": 512, "rope_base": 1}"#),
            ("license", b"MIT"),
            ("messages", br#"[{"role": "user", "content": "Hi"}]"#),
        ],
    );
    let e = f.store.named("tiny:Q8").unwrap();
    assert_eq!((e.place, e.system.as_deref(), &e.template), (Place::Ollama, Some("Be brief."), &None));
    assert_eq!((e.params.stop(), e.params.int("num_ctx")), (vec!["<|user|>".to_owned()], Some(512)));
    assert!(e.go_template && e.size > crate::demo::bytes().len() as u64 && e.digest.len() == 64);
    assert_eq!(e.messages, [json!({"role": "user", "content": "Hi"})]);
    assert_eq!(e.details().unwrap().quantization_level, "Q8_0");
    assert_eq!(e.source.open().unwrap().metadata().str("general.architecture").unwrap(), Some("deepseek2"));
    assert!(f.store.all().0.iter().any(|e| e.name == "Tiny:q8"));
    fails(f.store.remove("tiny:q8"), "ollama rm");
}

#[test]
fn models_are_made_of_files_and_of_models() {
    let f = folders();
    let path = f.model();
    let e = f
        .create(
            "me/story",
            "FROM demo.gguf\nPARAMETER temperature 0.1\nPARAMETER stop a\nSYSTEM s\nLICENSE l",
        )
        .unwrap();
    assert_eq!(e.source, Source::File(path.clone()));
    assert_eq!(e.size, crate::demo::bytes().len() as u64);
    let child = f.create("child", "FROM me/story\nPARAMETER top_k 3\nPARAMETER stop b").unwrap();
    assert_eq!(
        child.params.as_json(),
        json!({"temperature": 0.1, "stop": ["b"], "top_k": 3}).as_object().unwrap()
    );
    assert_eq!((child.system.as_deref(), child.source.clone()), (Some("s"), e.source));
    assert_eq!(child.details().unwrap().parent_model, "me/story:latest");
    assert_eq!(f.store.copy(&child, "other:1").unwrap().params, child.params);
    let names: Vec<String> = f.store.all().0.into_iter().map(|e| e.name).collect();
    assert!(
        ["me/story:latest", "child:latest", "other:1", "demo:latest"]
            .iter()
            .all(|n| names.contains(&(*n).into())),
        "{names:?}"
    );
    // Made of the embedded model, and replaced.
    assert_eq!(f.create("child", "FROM demo").unwrap().source, Source::Demo);
    f.store.remove("CHILD").unwrap();
    fails(f.store.find("child"), "model 'child' not found");
    assert!(path.is_file(), "files that are referred to stay");
    fs::remove_file(&path).unwrap();
    fails(f.store.find("other:1"), "is gone");
    assert_eq!(f.store.all().1.len(), 2);
}

#[test]
fn uploaded_blobs_go_with_their_last_model() {
    let f = folders();
    let blob = f.store.blob(&format!("sha256:{}", sha256(crate::demo::bytes()))).unwrap();
    fs::create_dir_all(blob.parent().unwrap()).unwrap();
    fs::write(&blob, crate::demo::bytes()).unwrap();
    let from = format!("FROM {}", blob.display());
    f.create("a", &from).unwrap();
    f.create("b", &from).unwrap();
    assert_eq!(f.store.find("a").unwrap().source, Source::File(blob.clone()));
    f.store.remove("a").unwrap();
    assert!(blob.is_file());
    f.store.remove("b").unwrap();
    assert!(!blob.exists());
}

#[test]
fn names_and_paths_are_told_apart() {
    let f = folders();
    let served = f.store.clone().with_files(vec![f.model()]);
    assert_eq!(served.resolve("nosuch").unwrap().map(|e| e.name), None);
    assert_eq!(served.list().unwrap()[0].name, "demo:latest");
    assert_eq!(f.store.named("demo").unwrap().place, Place::Demo);
    assert_eq!(f.store.named("demo:latest").unwrap().place, Place::Demo);
    assert_eq!(f.store.named(f.model().to_str().unwrap()).unwrap().place, Place::Path);
    fails(f.store.named("/no/such/file.gguf"), "/no/such/file.gguf: No such file");
    fails(f.store.named("nosuch.gguf"), "nosuch.gguf: No such file");
    let e = f.store.named("nosuch").unwrap_err();
    assert!(e.is::<NotFound>(), "{e:#}");
    fails(f.store.named("nosuch"), "own");
    // A name never reaches a file.
    for name in ["/etc/passwd", "../own/x", "demo.gguf"] {
        assert!(f.store.find(name).is_err(), "{name}");
    }
    fails(f.create("demo", "FROM demo"), "taken");
    fails(f.create("../x", "FROM demo"), "no model name");
    fails(f.create("x", "FROM nosuch"), "not found");
    fs::write(f.dir.path().join("text.gguf"), "no model").unwrap();
    fails(f.create("x", "FROM text.gguf"), "text.gguf");
    fails(f.create("x", "FROM ./"), "folder");
}

#[test]
fn hostile_manifests_are_errors() {
    let f = folders();
    let file = f.pull("m", &[("model", crate::demo::bytes())]);
    let whole: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    let with = |change: &dyn Fn(&mut Value)| {
        let mut m = whole.clone();
        change(&mut m);
        fs::write(&file, m.to_string()).unwrap();
        f.store.named("m")
    };
    assert!(with(&|_| {}).is_ok());
    for digest in ["sha256:../../../etc/passwd", "../x", "sha256:00", ""] {
        fails(with(&|m| m["layers"][0]["digest"] = digest.into()), "no digest");
    }
    fails(with(&|m| m["layers"][0]["digest"] = format!("sha256:{}", "0".repeat(64)).into()), "missing");
    fails(with(&|m| m["layers"] = 1.into()), "not a manifest");
    fails(with(&|m| m["layers"] = json!([])), "no model layer");
    fails(
        with(&|m| m["layers"][0]["mediaType"] = "application/vnd.ollama.image.tensor".into()),
        "safetensors",
    );
    assert!(with(&|m| m["layers"][0]["size"] = (u64::MAX).into()).is_ok(), "sizes are only shown");
    for text in ["", "null", "[", "{\"layers\": [{}]}"] {
        fs::write(&file, text).unwrap();
        fails(f.store.named("m"), "not a manifest");
    }
    fs::write(&file, vec![b' '; modelfile::MOST_BYTES + 1]).unwrap();
    fails(f.store.named("m"), "larger");
    assert_eq!(f.store.all().1.len(), 1, "a broken model is told, and hides no other");

    f.create("own", "FROM demo").unwrap();
    let file = Name::parse("own").unwrap().below(&f.dir.path().join("own/manifests"), ENDING);
    let whole: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    for (key, value, words) in [
        ("version", json!(2), "version 2"),
        ("parameters", json!({"nonsense": 1}), "nonsense"),
        ("messages", json!([1]), "role"),
        ("extra", json!(1), "extra"),
        ("model", json!({"blob": "sha256:../x"}), "no digest"),
        ("model", json!({"path": "/no/such"}), "is gone"),
    ] {
        let mut m = whole.clone();
        m[key] = value;
        fs::write(&file, m.to_string()).unwrap();
        fails(f.store.named("own"), words);
    }
}
