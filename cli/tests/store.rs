//! Models by name, as a user gives them names and uses them.

mod common;
use common::{rsinfer, write};
use std::path::Path;

struct Result {
    ok: bool,
    out: String,
    err: String,
}

fn run(dir: &Path, args: &[&str]) -> Result {
    let o = rsinfer().args(args).env("RSINFER_MODELS", dir.join("models")).current_dir(dir).output().unwrap();
    let text = |b: Vec<u8>| String::from_utf8(b).unwrap();
    Result { ok: o.status.success(), out: text(o.stdout), err: text(o.stderr) }
}

#[test]
fn a_model_gets_a_name_and_is_used_by_it() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    write(
        d,
        "Modelfile",
        "FROM demo\nPARAMETER temperature 0\nPARAMETER num_predict 5\nPARAMETER stop \"<|end|>\"\nSYSTEM Be brief.\n",
    );
    let made = run(d, &["create", "me/tiny"]);
    assert!(made.ok && made.out.is_empty() && made.err.contains("me/tiny:latest"), "{}", made.err);
    let list = run(d, &["ls"]).out;
    let heads: Vec<&str> = list.lines().next().unwrap().split_whitespace().collect();
    assert_eq!(heads, ["NAME", "ID", "SIZE", "MODIFIED"]);
    assert!(
        list.contains("me/tiny:latest") && list.contains("Less than a second ago") && list.contains("demo"),
        "{list}"
    );

    let show = run(d, &["show", "me/tiny"]).out;
    for words in [
        "  Model\n",
        "architecture",
        "deepseek2",
        "  Capabilities\n    completion",
        "temperature",
        "Be brief.",
    ] {
        assert!(show.contains(words), "{words:?} is not in {show}");
    }
    let modelfile = run(d, &["show", "--modelfile", "me/tiny"]).out;
    assert!(modelfile.starts_with("FROM demo\nSYSTEM \"\"\"Be brief.\"\"\"\n"), "{modelfile}");
    assert!(run(d, &["show", "--template", "me/tiny"]).out.contains("{%"));

    // Its parameters hold where the command line is silent.
    let answer = run(d, &["run", "me/tiny", "-p", "Tell me a story.", "--verbose"]);
    assert!(answer.ok && answer.err.contains("eval count:           5 token(s)"), "{}", answer.err);
    let again = run(d, &["run", "me/tiny", "-p", "Tell me a story."]);
    assert_eq!(answer.out, again.out, "temperature 0");
    let longer = run(d, &["run", "me/tiny", "-p", "Tell me a story.", "--verbose", "-n", "7"]);
    assert!(longer.err.contains("eval count:           7 token(s)"), "{}", longer.err);

    assert!(run(d, &["cp", "me/tiny", "other"]).ok && run(d, &["rm", "me/tiny", "other"]).ok);
    let gone = run(d, &["run", "me/tiny", "-p", "x"]);
    assert!(
        !gone.ok && gone.err.contains("model 'me/tiny' not found") && gone.err.contains("models"),
        "{}",
        gone.err
    );
}

#[test]
fn mistakes_are_told_with_their_line() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    for (text, words) in [
        ("FROM demo\nPARAMETER nonsense 1\n", "Modelfile: line 2: unknown parameter \"nonsense\""),
        ("FROM demo\nTEMPLATE {{ .Prompt }}\n", "Go template"),
        ("FROM demo\nADAPTER x.gguf\n", "adapter"),
        ("FROM nosuch\n", "'nosuch' not found"),
    ] {
        write(d, "Modelfile", text);
        let made = run(d, &["create", "x"]);
        assert!(
            !made.ok && made.err.contains(words) && made.err.lines().count() == 1,
            "{text:?}: {}",
            made.err
        );
    }
    let none = run(d, &["ps", "--host", "127.0.0.1:1"]);
    assert!(!none.ok && none.err.contains("no server answers at http://127.0.0.1:1"), "{}", none.err);
}
