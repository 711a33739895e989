//! `kv-eval` as a user runs it, on the embedded demo model: small, but every part of it.

mod common;
use common::{error, rsinfer, stdout, write};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

/// Sentences enough for two sequences of `--ppl-length 48`.
const TEXT: &str = "Once upon a time a king lived in a castle by the sea. He had a ship and a horse and a daughter who \
                    read books. One day the ship did not come back, and the king walked down to the water and waited. \
                    The stars came out, and the wind grew cold. Then the daughter lit a lamp in the highest window, and \
                    far away somebody saw it and turned the ship around. In the morning everyone was home and happy.";

/// Two policies and the full cache, two budgets, all tasks.
fn small<'a>(out: &'a str, ppl: &'a str) -> Vec<&'a str> {
    vec![
        "kv-eval",
        "demo",
        "--policies",
        "full,sinks,h2o",
        "--budgets",
        "24,50%",
        "--tasks",
        ppl,
        "--tasks",
        "recall,passkey",
        "--questions",
        "4",
        "--fillers",
        "1,3",
        "--passkeys",
        "1",
        "--depths",
        "0,100",
        "--passkey-length",
        "60",
        "--ppl-length",
        "48",
        "--ppl-sequences",
        "2",
        "--batch-size",
        "8",
        "-t",
        "1",
        "--out",
        out,
    ]
}

/// results.csv without the columns of time.
fn results(dir: &Path) -> Vec<Vec<String>> {
    let text = std::fs::read_to_string(dir.join("results.csv")).expect("results");
    let rows = text.lines().map(|l| l.split(',').map(Into::into).collect::<Vec<String>>());
    rows.map(|r| r[..r.len() - 3].to_vec()).collect()
}

fn answers(dir: &Path) -> BTreeMap<String, String> {
    let files = std::fs::read_dir(dir.join("answers")).expect("a folder").map(|f| f.expect("a file").path());
    files
        .map(|p| {
            (p.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read_to_string(&p).unwrap())
        })
        .collect()
}

#[test]
fn results_repeat_themselves_and_a_kill_costs_one_cell() {
    let dir = tempfile::tempdir().unwrap();
    let text = format!("ppl:{}", write(dir.path(), "text.txt", TEXT));
    let (whole, cut) = (dir.path().join("whole"), dir.path().join("cut"));
    let summary = stdout(&small(whole.to_str().unwrap(), &text));
    assert!(summary.contains("recall") && summary.contains("sinks"), "{summary}");

    let mut child = rsinfer()
        .args(small(cut.to_str().unwrap(), &text))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let start = Instant::now();
    let lines = || std::fs::read_to_string(cut.join("results.csv")).map_or(0, |t| t.lines().count());
    while lines() < 12 {
        assert!(start.elapsed() < Duration::from_secs(300), "no results");
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    // What a kill in the middle of a line leaves.
    let half = std::fs::read(cut.join("results.csv")).unwrap();
    std::fs::write(cut.join("results.csv"), &half[..half.len() - 7]).unwrap();
    let again = rsinfer().args(small(cut.to_str().unwrap(), &text)).output().unwrap();
    assert!(again.status.success(), "{}", String::from_utf8_lossy(&again.stderr));
    assert!(String::from_utf8_lossy(&again.stderr).contains("cells are in"));
    assert_eq!(results(&whole), results(&cut));
    assert_eq!(answers(&whole), answers(&cut));
    assert_eq!(String::from_utf8(again.stdout).unwrap().replace("cut", "whole"), summary);

    // 5 cells a task; 8 buckets of positions, distances as they fall, 2 depths; a row more for the sum.
    let rows = results(&whole);
    let count = |task: &str, bucket: Option<&str>| {
        rows.iter().filter(|r| r[0] == task && bucket.is_none_or(|b| r[5] == b)).count()
    };
    assert_eq!((count("ppl:text.txt", None), count("ppl:text.txt", Some("all"))), (5 * 9, 5));
    assert_eq!((count("passkey", None), count("passkey", Some("100%"))), (5 * 3, 5));
    assert_eq!(count("recall", Some("all")), 5);
    for r in rows.iter().skip(1).filter(|r| r[5] == "all") {
        let (value, low, high) = (&r[10], &r[11], &r[12]);
        let number = |s: &str| s.parse::<f64>().unwrap();
        assert!(number(low) <= number(value) && number(value) <= number(high), "{r:?}");
        assert_eq!(number(&r[15]) > 0.0, r[1] != "full", "evictions: {r:?}");
    }
    let page = std::fs::read_to_string(whole.join("report.html")).unwrap();
    assert!(page.contains("<svg") && page.contains("sinks") && page.contains("kv-eval demo"));
    for outside in ["http://", "https://", "<script", "<link", "@import", "url("] {
        assert!(!page.replace("http://www.w3.org/2000/svg", "").contains(outside), "{outside}");
    }
    for plot in ["recall.svg", "passkey.svg", "ppl-text-txt.svg"] {
        assert!(std::fs::read_to_string(whole.join(plot)).unwrap().ends_with("</svg>\n"), "{plot}");
    }

    // Other settings may not mix with these; more policies may.
    let mut other = small(whole.to_str().unwrap(), &text);
    other.extend(["--seed", "2"]);
    let e = error(&other);
    assert!(e.contains("seed: 1 there, 2 now") && e.contains("--out"), "{e}");
    assert_eq!(results(&whole), rows);
    let mut more = small(whole.to_str().unwrap(), &text);
    more[3] = "full,h2o,sinks:2";
    stdout(&more);
    assert_eq!(results(&whole)[..rows.len()], rows);
    assert_eq!(results(&whole).iter().filter(|r| r[1] == "sinks:2" && r[5] == "all").count(), 6);
}

#[test]
fn budgets_of_at_least_the_length_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let text = format!("ppl:{}", write(dir.path(), "text.txt", TEXT));
    let out = dir.path().join("out");
    let mut args = small(out.to_str().unwrap(), &text);
    args[5] = "1000";
    stdout(&args);
    let rows = results(&out);
    let of = |policy: &str| -> Vec<Vec<String>> {
        let mine = rows.iter().filter(|r| r[1] == policy);
        mine.map(|r| [&r[..1], &r[5..16]].concat()).collect()
    };
    assert!(of("full").len() > 12);
    for policy in ["h2o", "sinks"] {
        assert_eq!(of("full"), of(policy), "{policy}");
        let said = |name: &str| answers(&out)[name].clone();
        assert_eq!(said("recall full -.jsonl"), said(&format!("recall {policy} 1000.jsonl")));
    }
}

#[test]
fn the_list_names_policies_parameters_and_papers() {
    let list = stdout(&["kv-eval", "--list"]);
    for part in
        ["full\n", "window\n", "sinks", "2309.17453", "random", "seed", "knorm", "pyramid(POLICY)", "needs"]
    {
        assert!(list.contains(part), "{part}: {list}");
    }
}

#[test]
fn bad_input_is_one_clear_line() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let out = out.to_str().unwrap();
    let short = format!("ppl:{}", write(dir.path(), "short.txt", "Too short."));
    let says = |args: &[&str], words: &[&str]| {
        let e = error(&[&["kv-eval", "demo", "--out", out], args].concat());
        for w in words {
            assert!(e.contains(w), "{args:?}: {w:?} is not in {e:?}");
        }
        assert!(!Path::new(out).exists(), "{args:?} left a folder");
    };
    says(&["--policies", "full,windw"], &["windw", "did you mean `window`", "--list"]);
    says(&["--policies", "sinks:colour=3"], &["colour"]);
    says(&["--policies", "random:seed=x"], &["seed", "x"]);
    says(&["--policies", "window", "--budgets", "64,0"], &["--budgets", "0"]);
    says(&["--budgets", "150%"], &["--budgets", "150%"]);
    says(&["--policies", "sinks:40", "--budgets", "41"], &["window"]);
    says(&["--tasks", "recal"], &["recal", "passkey"]);
    says(&["--tasks", "ppl:/no/such/file.txt"], &["/no/such/file.txt", "No such file"]);
    says(&["--tasks", &short], &["short.txt", "--ppl-length"]);
    says(&["--passkey-fact", "The key."], &["--passkey-fact", "{number}"]);
    let e = error(&["kv-eval", "/no/model.gguf", "--out", out]);
    assert!(e.contains("/no/model.gguf"), "{e}");
    let file = write(dir.path(), "file", "x");
    let e = error(&["kv-eval", "demo", "--policies", "full", "--questions", "1", "--out", &file]);
    assert!(e.contains(&file), "{e}");
    assert_eq!(rsinfer().args(["kv-eval", "demo"]).output().unwrap().status.code(), Some(2));
}

/// Shape and numbers of a float32 .npy file.
fn npy(path: &Path) -> (Vec<usize>, Vec<f32>) {
    let bytes = std::fs::read(path).unwrap();
    assert_eq!(&bytes[..8], b"\x93NUMPY\x01\x00");
    let start = 10 + usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    let head = std::str::from_utf8(&bytes[10..start]).unwrap();
    let shape = head.split_once("'shape': (").unwrap().1.split_once(')').unwrap().0;
    let shape: Vec<usize> = shape.split(',').map(|n| n.trim().parse().unwrap()).collect();
    let numbers = bytes[start..].chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
    (shape, numbers.collect())
}

#[test]
fn traces_tell_what_was_evicted() {
    let dir = tempfile::tempdir().unwrap();
    let trace = dir.path().join("t.jsonl");
    let file = trace.to_str().unwrap();
    // Random needs no attention masses: the trace has them recorded.
    let args = ["run", "demo", "--raw", "-p", TEXT, "--temp", "0", "-n", "20", "-b", "16", "--kv"];
    let spec = "random:budget=40,recent=8,every=4";
    let traced = stdout(&[&args[..], &[spec, "--trace", file]].concat());
    assert_eq!(traced, stdout(&[&args[..], &[spec]].concat()), "tracing changed the answer");
    let lines: Vec<serde_json::Value> =
        std::fs::read_to_string(&trace).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let ids = stdout(&["tokenize", "demo", "--ids", "-p", TEXT]);
    let ids: Vec<u64> = serde_json::from_str(&ids).unwrap();
    let (shape, masses) = npy(&dir.path().join("t.jsonl.npy"));
    let [1, layers, heads, tokens] = shape[..] else { panic!("{shape:?}") };
    assert!(layers > 1 && heads == 1 && tokens <= ids.len() + 20, "{shape:?}");
    let mut gone = std::collections::HashSet::new();
    for l in &lines {
        let number = |name: &str| l[name].as_u64().unwrap_or_else(|| panic!("{name}: {l}"));
        let (layer, position, at) = (number("layer"), number("position"), number("at"));
        assert!(gone.insert((layer, position)), "evicted twice: {l}");
        assert!(position + 8 < at && (layer as usize) < layers, "{l}");
        if (position as usize) < ids.len() {
            assert_eq!(number("token"), ids[position as usize]);
        }
        assert!(l["score"].is_number() && l["text"].is_string() && l["head"].is_null(), "{l}");
        let mass = masses[layer as usize * tokens + position as usize];
        assert!(mass > 0.0 && mass.is_finite(), "{l}: {mass}");
    }
    // As many in each layer: all but the budget, and what came since the last eviction.
    let of = |layer: u64| gone.iter().filter(|g| g.0 == layer).count();
    assert!((0..layers as u64).all(|l| of(l) == of(0) && of(l) + 40 + 4 + 16 >= ids.len()), "{}", of(0));

    let out = dir.path().join("lab");
    let text = "recall";
    let mut args = small(out.to_str().unwrap(), text);
    (args[3], args[9]) = ("full,window,h2o", "passkey");
    args.push("--trace");
    stdout(&args);
    let mut files: Vec<String> = std::fs::read_dir(out.join("trace"))
        .unwrap()
        .map(|f| f.unwrap().file_name().into_string().unwrap())
        .collect();
    files.sort();
    let want: Vec<String> = ["passkey h2o 24", "passkey h2o 50%", "recall h2o 24", "recall h2o 50%"]
        .iter()
        .flat_map(|n| [format!("{n}.jsonl"), format!("{n}.jsonl.npy")])
        .collect();
    assert_eq!(files, want);
    let (shape, _) = npy(&out.join("trace/recall h2o 24.jsonl.npy"));
    assert_eq!(shape[0], 4, "a row a question");
    let first = std::fs::read_to_string(out.join("trace/recall h2o 24.jsonl")).unwrap();
    let first: serde_json::Value = serde_json::from_str(first.lines().next().unwrap()).unwrap();
    assert_eq!((&first["policy"], &first["budget"]), (&"h2o".into(), &"24".into()));
}

/// The laboratory measures forgetting: the model itself must recall. Fresh questions, of the kind that its own figure is of.
#[test]
fn the_full_cache_recalls_what_the_model_was_trained_to() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../ref-tests/demo-model/metrics.json");
    let figures: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
    let claimed = figures["story_answers_right"].as_f64().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let args =
        ["kv-eval", "demo", "--policies", "full", "--tasks", "recall", "--questions", "120", "--facts", "2"];
    stdout(&[&args[..], &["--fillers", "6", "--out", dir.path().to_str().unwrap()]].concat());
    let rows = results(dir.path());
    let all = rows.iter().find(|r| r[5] == "all").unwrap();
    let right: f64 = all[10].parse().unwrap();
    println!("{right} of 120 fresh questions right, {claimed} by metrics.json");
    // Twice the standard error of both figures (120 and 60 questions).
    let error = (claimed * (1.0 - claimed) * (1.0 / 120.0 + 1.0 / 60.0)).sqrt();
    assert!(right >= claimed - 2.0 * error, "{right} right, {claimed} claimed");
}
