//! Every command run as a user runs it, on the embedded demo model.

mod common;
use common::{error, rsinfer, run, shared, stdout, write};
use std::io::Write;
use std::process::Stdio;

#[test]
fn help_and_version() {
    assert!(stdout(&["--version"]).starts_with("rsinfer "));
    for command in [
        "run",
        "logits",
        "tokenize",
        "template",
        "inspect",
        "plan",
        "perplexity",
        "bench",
        "kv-eval",
        "quantize",
    ] {
        let help = stdout(&[command, "--help"]);
        assert!(help.contains("Example") && help.contains("Usage: rsinfer"), "{command}: {help}");
    }
    let o = run(&[]);
    assert!(String::from_utf8_lossy(&o.stderr).contains("Examples:"));
    for args in [
        &["run"][..],
        &["run", "demo", "--nonsense"],
        &["tokenize", "demo"],
        &["nonsense"],
        &["run", "demo", "-p", "x", "--kwargs", "[]"],
    ] {
        assert_eq!(run(args).status.code(), Some(2), "{args:?}");
    }
}

#[test]
fn run_answers_and_repeats_itself() {
    let args = ["run", "demo", "-p", "Tell me a story.", "-s", "7", "-n", "60"];
    let first = stdout(&args);
    assert!(first.split_whitespace().count() > 20, "{first}");
    assert_eq!(first, stdout(&args));
    assert_ne!(first, stdout(&["run", "demo", "-p", "Tell me a story.", "-s", "8", "-n", "60"]));
    // The prompt as a word, options under llama.cpp's names; thinking is not the answer.
    let o = run(&[
        "run",
        "-m",
        "demo",
        "Tell me a story.",
        "--temp",
        "0",
        "--top_k",
        "1",
        "-ctk",
        "f32",
        "-n",
        "30",
    ]);
    assert!(o.status.success(), "{}", String::from_utf8_lossy(&o.stderr));
    assert!(!String::from_utf8_lossy(&o.stdout).contains("think>"));
}

#[test]
fn run_reads_standard_input_before_the_prompt() {
    let mut child = rsinfer()
        .args(["run", "demo", "--raw", "-p", "a time", "--temp", "0", "-n", "5"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"Once upon").unwrap();
    let piped = child.wait_with_output().unwrap();
    assert!(piped.status.success());
    let whole = stdout(&["run", "demo", "--raw", "-p", "Once upon a time", "--temp", "0", "-n", "5"]);
    assert_eq!(String::from_utf8(piped.stdout).unwrap(), whole);
}

#[test]
fn run_says_when_the_context_is_full() {
    let o =
        run(&["run", "demo", "-p", "Tell me a story.", "-c", "40", "--ignore-eos", "-s", "1", "--verbose"]);
    let err = String::from_utf8(o.stderr).unwrap();
    assert!(o.status.success(), "{err}");
    assert!(err.contains("context of 40 tokens is full"), "{err}");
    for line in ["total duration:", "load duration:", "prompt eval count:", "eval rate:", "GB/s"] {
        assert!(err.contains(line), "{line}: {err}");
    }
}

#[test]
fn stop_strings_and_banned_tokens() {
    let args = ["run", "demo", "--raw", "-p", "Once upon a time", "--temp", "0", "-n", "40"];
    let whole = stdout(&args);
    let word = whole.split_whitespace().nth(5).unwrap();
    let cut = stdout(&[&args[..], &["--stop", word]].concat());
    assert_eq!(cut.trim_end(), whole[..whole.find(word).unwrap()].trim_end());
    let ids: Vec<u32> =
        serde_json::from_str(&stdout(&["tokenize", "demo", "--ids", "--no-bos", "-p", &whole])).unwrap();
    let banned = stdout(&[&args[..], &["-l", &format!("{}-inf", ids[0])]].concat());
    assert_ne!(banned, whole);
}

#[test]
fn a_closed_pipe_is_no_error() {
    for args in [&["inspect", "demo", "--json"][..], &["run", "demo", "-p", "Tell me a story.", "-s", "1"]] {
        let mut child = rsinfer().args(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let o = child.wait_with_output().unwrap();
        let err = String::from_utf8_lossy(&o.stderr);
        assert!(o.status.success() && !err.contains("error") && !err.contains("panicked"), "{err}");
    }
}

#[test]
fn logits_of_given_ids() {
    let dir = tempfile::tempdir().unwrap();
    let ids = write(dir.path(), "ids.json", "[0, 3, 17, 99, 1000]");
    let out = dir.path().join("out.npy");
    let read = |batch: &str| {
        stdout(&["logits", "demo", "--tokens-file", &ids, "--out", out.to_str().unwrap(), "-b", batch]);
        std::fs::read(&out).unwrap()
    };
    let npy = read("512");
    let header = String::from_utf8_lossy(&npy[..128]).into_owned();
    assert!(header.contains("'<f4'") && header.contains("(5, 2048)"), "{header}");
    let start = 10 + usize::from(u16::from_le_bytes([npy[8], npy[9]]));
    assert_eq!(start % 64, 0);
    assert_eq!(npy.len() - start, 5 * 2048 * 4);
    let row: Vec<f32> = npy[start..].as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    assert!(row.iter().all(|x| x.is_finite()) && row.iter().any(|x| *x != row[0]));
    assert_eq!(npy, read("2"), "logits depend on the batch size");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "something was left behind");
}

#[test]
fn tokenize_prints_ids_alone() {
    assert_eq!(stdout(&["tokenize", "demo", "--ids", "-p", ""]).trim(), "[0]");
    assert_eq!(stdout(&["tokenize", "demo", "--ids", "--no-bos", "-p", ""]).trim(), "[]");
    let special = stdout(&["tokenize", "demo", "--ids", "--no-bos", "-p", "<｜User｜>"]);
    assert_eq!(special, "[3]\n");
    let plain = stdout(&["tokenize", "demo", "--ids", "--no-bos", "--no-parse-special", "-p", "<｜User｜>"]);
    assert!(plain.matches(',').count() >= 2, "{plain}");
    let lines = stdout(&["tokenize", "demo", "-p", "Hi", "--show-count"]);
    assert!(lines.contains(" -> '") && lines.contains("Total number of tokens: "), "{lines}");
    let Some(vocab) = shared("vocab/ggml-vocab-llama-spm.gguf") else { return };
    assert_eq!(
        stdout(&["tokenize", vocab.to_str().unwrap(), "--ids", "-p", "Hello world"]),
        "[1, 15043, 3186]\n"
    );
}

#[test]
fn template_prints_the_prompt_alone() {
    let dir = tempfile::tempdir().unwrap();
    let m = write(dir.path(), "m.json", r#"[{"role": "user", "content": "Hi <b>"}]"#);
    assert_eq!(stdout(&["template", "demo", "--messages", &m]), "<｜begin▁of▁sentence｜><｜User｜>Hi <b>");
    let opened = stdout(&["template", "demo", "--messages", &m, "--add-generation-prompt"]);
    assert!(opened.ends_with("<｜Assistant｜><think>\n"), "{opened}");
    let t = write(dir.path(), "t.jinja", "{{ messages[0].content }}{{ tools | length }}{{ who }}");
    let tools = write(dir.path(), "tools.json", "[{}, {}]");
    let args = [
        "template",
        "demo",
        "--messages",
        &m,
        "--chat-template-file",
        &t,
        "--tools",
        &tools,
        "--kwargs",
        r#"{"who": "me"}"#,
    ];
    assert_eq!(stdout(&args), "Hi <b>2me");
    let raising = write(dir.path(), "r.jinja", "{{ raise_exception('roles must alternate') }}");
    let e = error(&["template", "demo", "--messages", &m, "--chat-template-file", &raising]);
    assert!(e.contains("roles must alternate"), "{e}");
}

#[test]
fn inspect_tells_the_same_twice() {
    let text = stdout(&["inspect", "demo", "--tensors"]);
    for s in ["deepseek2", "q8_0", "token_embd.weight", "general.architecture", "bits"] {
        assert!(text.contains(s), "{s}: {text}");
    }
    let json: serde_json::Value = serde_json::from_str(&stdout(&["inspect", "demo", "--json"])).unwrap();
    assert_eq!(json["architecture"], "deepseek2");
    assert_eq!(json["metadata"]["tokenizer.ggml.tokens"].as_array().unwrap().len(), 2048);
    let sum: u64 = json["tensors"].as_array().unwrap().iter().map(|t| t["bytes"].as_u64().unwrap()).sum();
    assert_eq!(json["tensor_bytes"].as_u64(), Some(sum));
}

#[test]
fn perplexity_and_divergence() {
    let dir = tempfile::tempdir().unwrap();
    let text =
        "The cat sat on the mat. A dog came by and they played in the garden until it was dark. ".repeat(20);
    let f = write(dir.path(), "text", text + "\n");
    let base = dir.path().join("base.kld");
    let base = base.to_str().unwrap();
    let common = ["perplexity", "demo", "-c", "64", "--chunks", "4"];
    let plain = stdout(&[&common[..], &["-f", &f]].concat());
    assert!(
        plain.starts_with("[1]") && plain.contains(",[4]") && plain.contains("Final estimate: PPL = "),
        "{plain}"
    );
    assert!(!plain.contains("[5]"));
    assert_eq!(stdout(&[&common[..], &["-f", &f, "--kl-divergence-base", base]].concat()), plain);
    let same = stdout(&[&common[..], &["--kl-divergence-base", base, "--kl-divergence"]].concat());
    let value = |name: &str| -> f64 {
        let line = same.lines().find(|l| l.starts_with(name)).unwrap_or_else(|| panic!("{name}: {same}"));
        line[line.find(':').unwrap() + 1..]
            .split_whitespace()
            .next()
            .unwrap()
            .trim_end_matches('%')
            .parse()
            .unwrap()
    };
    assert!(value("Mean    KLD").abs() < 1e-4 && value("Maximum KLD").abs() < 1e-3, "{same}");
    assert!(value("Same top p") > 99.0 && value("RMS Δp").abs() < 0.1, "{same}");
    // The file holds no prediction below e^-16 of the best: the base's perplexity can only look better.
    assert!(value("Mean PPL(base)") <= value("Mean PPL(Q)") * 1.001, "{same}");
    let strided = stdout(&[&common[..], &["-f", &f, "--ppl-stride", "16"]].concat());
    assert!(strided.contains("Final estimate: PPL = "), "{strided}");
    let e = error(&["perplexity", "demo", "--kl-divergence", "--kl-divergence-base", &f]);
    assert!(e.contains("not a file of predictions"), "{e}");
    let short = write(dir.path(), "short", "Too short.");
    assert!(error(&["perplexity", "demo", "-f", &short]).contains("at least"));
}

#[test]
fn bench_formats() {
    let args =
        ["bench", "demo", "-p", "16", "-n", "4", "-pg", "8,2", "-r", "2", "-d", "0,8", "-t", "1", "-o"];
    let md = stdout(&[&args[..], &["md"]].concat());
    assert!(md.starts_with("| model "), "{md}");
    for test in ["pp16 |", "tg4 |", "pp8+tg2 |", "tg4 @ d8 |"] {
        assert!(md.contains(test), "{test}: {md}");
    }
    let json: serde_json::Value = serde_json::from_str(&stdout(&[&args[..], &["json"]].concat())).unwrap();
    let all = json.as_array().unwrap();
    assert_eq!(all.len(), 6);
    let tg = all.iter().find(|t| t["n_gen"] == 4 && t["n_prompt"] == 0).unwrap();
    assert_eq!(tg["samples_ts"].as_array().unwrap().len(), 2);
    assert!(tg["avg_ts"].as_f64().unwrap() > 0.0 && tg["bandwidth_share"].as_f64().unwrap() > 0.0);
    let one = ["bench", "demo", "-r", "1", "-t", "1", "-o", "json"];
    let several = stdout(&[&one[..], &["-p", "0", "-pg", "40,4", "-n", "4", "-np", "1,3"]].concat());
    let several: serde_json::Value = serde_json::from_str(&several).unwrap();
    let number = |i: usize, key: &str| several[i][key].as_f64().unwrap_or_else(|| panic!("{key}: {several}"));
    for (i, n_prompt, sequences) in [(0, 0.0, 1.0), (1, 0.0, 3.0), (2, 40.0, 1.0), (3, 40.0, 3.0)] {
        assert_eq!((number(i, "n_prompt"), number(i, "n_parallel")), (n_prompt, sequences));
        // Tokens of all sequences over the time of all.
        let tokens = number(i, "avg_ts") * number(i, "avg_ns") / 1e9;
        assert!((tokens / (sequences * (n_prompt + 4.0)) - 1.0).abs() < 1e-3, "{tokens}: {several}");
    }
    assert_eq!(number(1, "cache_bytes"), 3.0 * number(0, "cache_bytes"));
    let csv = stdout(&["bench", "demo", "-p", "4", "-n", "0", "-r", "1", "-t", "1", "-o", "csv"]);
    let lines: Vec<&str> = csv.lines().collect();
    assert_eq!(lines.len(), 2);
    assert_eq!(lines[0].matches(',').count(), lines[1].matches("\",\"").count(), "{csv}");
}

#[test]
fn quantize_makes_a_model_that_runs() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("q4.gguf");
    let out = out.to_str().unwrap();
    assert!(error(&["quantize", "demo", out, "Q4_0"]).contains("--allow-requantize"));
    assert!(error(&["quantize", "demo", out, "Q9_X"]).contains("Q4_K_M"));
    stdout(&["quantize", "--allow-requantize", "demo", out, "Q4_0"]);
    let json: serde_json::Value = serde_json::from_str(&stdout(&["inspect", out, "--json"])).unwrap();
    assert!(json["by_type"].as_array().unwrap().iter().any(|t| t["type"] == "q4_0"));
    assert!(!stdout(&["run", out, "--raw", "-p", "Once upon a time", "-n", "5"]).trim().is_empty());
}

#[test]
fn the_little_llama_tells_its_story() {
    let Some(model) = shared("models/stories260K.gguf") else { return };
    let args = ["run", model.to_str().unwrap(), "--raw", "-p", "Once upon a time", "--temp", "0", "-n", "70"];
    let story = stdout(&args);
    let want = "there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball.";
    assert!(story.trim_start_matches([',', ' ']).starts_with(want), "{story}");
}

#[test]
fn answers_are_held_to_a_format() {
    let answer =
        |format: &str| stdout(&["run", "demo", "-p", "Tell me a story.", "-s", "1", "--format", format]);
    let word = answer("regex:(yes|no)[a-d]{8}");
    let tail = word.trim_end().trim_start_matches("yes").trim_start_matches("no");
    assert!(tail.len() == 8 && tail.chars().all(|c| "abcd".contains(c)), "{word}");
    let schema = r#"{"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"enum": [3, 7]}},
        "required": ["name", "age"], "additionalProperties": false}"#;
    let person: serde_json::Value = serde_json::from_str(&answer(schema)).expect("JSON");
    assert!(person["name"].as_str().is_some_and(|s| s.chars().count() <= 8), "{person}");
    assert!([3, 7].contains(&person["age"].as_i64().unwrap()), "{person}");
    let e = error(&["run", "demo", "-p", "x", "--format", r#"{"type": "nonsense"}"#]);
    assert!(e.contains("nonsense"), "{e}");
}

#[test]
fn a_prompt_cannot_write_control_tokens() {
    let tokens = |prompt: &str| -> usize {
        let o = run(&["run", "demo", "-p", prompt, "-n", "1", "--verbose"]);
        let err = String::from_utf8(o.stderr).unwrap();
        let line = err.lines().find_map(|l| l.strip_prefix("prompt eval count:")).expect("timings");
        line.split_whitespace().next().unwrap().parse().unwrap()
    };
    assert!(tokens("<｜User｜>") > tokens("a") + 1, "the mark of a turn was read as one token");
}
