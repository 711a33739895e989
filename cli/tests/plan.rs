//! `plan`, and plans before a run.

mod common;
use common::{error, rsinfer, run, stdout, with_driver, without_driver};
use serde_json::Value;
use std::process::Stdio;
use std::time::Duration;

fn plan(args: &[&str]) -> Value {
    serde_json::from_str(&stdout(&[&["plan", "demo", "--json"], args].concat())).expect("JSON")
}

fn bytes(v: &Value, key: &str) -> u64 {
    v[key].as_u64().unwrap_or_else(|| panic!("{key} in {v}"))
}

#[test]
fn sizes_follow_the_options() {
    let base = plan(&["--memory", "8GiB"]);
    assert_eq!(base["fits"], true);
    assert!(bytes(&base, "mapped_bytes") > 1 << 20);
    let device = &base["devices"][0];
    let parts =
        ["kv_bytes", "activation_bytes", "scratch_bytes", "sampling_bytes", "host_bytes", "policy_bytes"];
    let rest: u64 = parts.iter().map(|p| bytes(device, p)).sum();
    let weights: u64 = device["weights"].as_array().unwrap().iter().map(|w| bytes(w, "resident_bytes")).sum();
    assert_eq!(bytes(&base, "resident_bytes"), rest + weights);
    let two = plan(&["--memory", "8GiB", "--parallel", "2"]);
    assert_eq!(bytes(&two, "kv_bytes"), 2 * bytes(&base, "kv_bytes"));
    let q8 = plan(&["--memory", "8GiB", "-ctk", "q8_0", "-ctv", "q8_0"]);
    // Latents of 17/32 the size; the rotary keys stay at f16.
    let (small, large) = (bytes(&q8, "kv_bytes"), bytes(&base, "kv_bytes"));
    assert!(small * 32 > large * 17 && small < large, "{small}, {large}");
    let read = plan(&["--memory", "8GiB", "--no-mmap"]);
    assert_eq!(bytes(&read, "mapped_bytes"), 0);
    assert_eq!(bytes(&read, "resident_bytes"), bytes(&base, "resident_bytes") + bytes(&base, "mapped_bytes"));
    assert!(stdout(&["plan", "demo", "--memory", "1GiB", "--gpu", "1GiB,1GiB(display)"]).contains("on GPUs"));
}

/// Flags that are offered fit when they are pasted behind those that were given.
#[test]
fn what_does_not_fit_comes_with_flags_that_do() {
    let room = bytes(&plan(&["-t", "2", "-c", "512", "--memory", "8GiB"]), "resident_bytes") + (1 << 20);
    let memory = room.to_string();
    let gpu = ["--gpu", "3MiB,3MiB"];
    let mut offered = Vec::new();
    for args in [
        &["-c", "100000"][..],
        &["-c", "1024"],
        &["-c", "512", "-b", "64", "--parallel", "9"],
        &["-c", "2048", "-b", "2048", "--parallel", "9"],
        &["-c", "512", "--no-mmap"],
        &["-c", "512", "--mlock", "-ctk", "f32", "-ctv", "f32"],
        &["-c", "30000", "--no-mmap", "--parallel", "3", "--kv", "h2o:budget=25%"],
        &["-c", "512", "-b", "64", "-ngl", "9", "--cpu-moe", gpu[0], gpu[1]],
        &["-c", "512", "-b", "64", "-ngl", "9", "--n-cpu-moe", "1", "-ts", "1,5", gpu[0], gpu[1]],
    ] {
        let args = [&["-t", "2", "--memory", &memory], args].concat();
        let p = plan(&args);
        assert_eq!(p["fits"], false, "{args:?}");
        let ways = p["flags_that_fit"].as_array().unwrap();
        assert!(!ways.is_empty(), "{args:?}");
        for way in ways {
            let way = way.as_str().unwrap();
            let pasted: Vec<&str> = args.iter().copied().chain(way.split(' ')).collect();
            assert_eq!(plan(&pasted)["fits"], true, "{args:?} {way}");
            offered.push(way.to_owned());
        }
        let fitted = plan(&[&args[..], &["--fit"]].concat());
        assert_eq!((&fitted["fits"], &fitted["changed"]), (&Value::Bool(true), &ways[0]), "{args:?}");
    }
    for flag in ["-c ", "-b ", "--parallel ", "-ctk ", "--mmap", "-ngl ", "--n-cpu-moe "] {
        assert!(offered.iter().any(|w| w.contains(flag)), "{flag} is never offered: {offered:?}");
    }
    let rules = ["-c", "512", "-b", "64", "-ot", "ffn_.*_exps=GPU1", gpu[0], gpu[1]];
    let text = stdout(&[&["plan", "demo", "--memory", "1GiB"], &rules[..]].concat());
    assert!(text.contains("GPU1 is short of") && text.contains("other rules for GPUs"), "{text}");
    let p = plan(&["-t", "2", "--memory", &memory, "-c", "100000"]);
    assert_eq!(bytes(&p, "shortfall_bytes"), bytes(&p, "resident_bytes") - room);
    let hopeless = plan(&["--memory", "1MiB"]);
    assert_eq!(
        (hopeless["fits"].as_bool(), hopeless["flags_that_fit"].as_array().map(Vec::len)),
        (Some(false), Some(0))
    );
}

#[test]
fn a_run_that_does_not_fit_ends_before_loading() {
    let o = run(&["run", "demo", "-p", "x", "-c", "2000000000"]);
    let err = String::from_utf8_lossy(&o.stderr);
    assert_eq!(o.status.code(), Some(1), "{err}");
    assert!(err.contains("short of") && err.contains("What would fit") && err.contains("-c "), "{err}");
    assert!(error(&["plan", "demo", "--gpu", "1GiB", "-ot", "ffn_up=CPU"]).contains("-ot moves"));
}

/// The driver's, here a stand-in with one of 4 GiB, less what is left to the driver; without one, what to do instead.
#[test]
fn gpus_of_this_machine() {
    let auto = ["plan", "demo", "--json", "--memory", "1GiB", "--gpu", "auto"];
    let folder = without_driver();
    let o = rsinfer().args(auto).env("LD_LIBRARY_PATH", folder.path()).output().expect("the binary runs");
    let text = String::from_utf8_lossy(&o.stderr);
    assert!(
        !o.status.success() && text.contains("no NVIDIA driver") && text.contains("--gpu 24GiB"),
        "{text}"
    );
    let Some(o) = with_driver("", &auto) else { return };
    let p: Value = serde_json::from_slice(&o.stdout).expect("JSON");
    let gpus = &p["devices"].as_array().expect("devices")[1..];
    assert_eq!(gpus.iter().map(|g| bytes(g, "size_bytes")).collect::<Vec<_>>(), [(4 << 30) - (512 << 20)]);
}

/// The most anonymous memory that a command held.
fn peak(args: &[&str]) -> u64 {
    let mut child =
        rsinfer().args(args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("the binary runs");
    let mut most = 0;
    while child.try_wait().expect("a child").is_none() {
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
        let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:")).unwrap_or("0 kB");
        let kib = line.trim().trim_end_matches("kB").trim().parse().unwrap_or(0u64);
        most = most.max(kib << 10);
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(child.wait().expect("a child").success(), "{args:?}");
    most
}

/// Planned and measured bytes of `command` on `model`; the bar is 2% and 32 MiB.
#[cfg(target_os = "linux")]
fn held(model: &str, command: &[&str], args: &[&str]) -> (u64, u64) {
    let text = stdout(&[&["plan", model, "--json", "--memory", "1TiB"], args].concat());
    let planned = bytes(&serde_json::from_str(&text).expect("JSON"), "resident_bytes");
    let measured = peak(&[&command[..1], &[model], &command[1..], args].concat());
    let slack = planned / 50 + (32 << 20);
    assert!(
        measured <= planned + slack && measured + slack >= planned,
        "{model} {args:?}: planned {planned}, measured {measured}"
    );
    (planned, measured)
}

#[test]
#[cfg(target_os = "linux")]
fn anonymous_memory_is_what_was_planned() {
    for args in [
        &["-c", "512"][..],
        &["-c", "4096", "-b", "64"],
        &["-c", "65536", "-ctk", "f32", "-ctv", "f32"],
        &["-c", "65536", "-ctk", "q8_0", "-ctv", "q8_0"],
        &["-c", "512", "--no-mmap"],
        &["-c", "4096", "--kv", "sinks:4+window:252"],
        &["-c", "4096", "--kv", "h2o:budget=64,every=8"],
        &["-c", "4096", "-b", "16", "--kv", "expected:budget=64,evict=both,every=8"],
    ] {
        let story = "Tell me a story about a dog and a cat.";
        let (planned, measured) = held("demo", &["run", "-p", story, "-n", "200", "--ignore-eos"], args);
        println!("{args:?}: planned {planned}, measured {measured}");
    }
}

/// The table of docs/memory.md: `RSINFER_PLAN_MODELS=a.gguf,b.gguf cargo test -p rsinfer --test plan -- --ignored --nocapture`.
#[test]
#[ignore = "needs large files, made by synth"]
#[cfg(target_os = "linux")]
fn anonymous_memory_of_large_models_is_what_was_planned() {
    let models = std::env::var("RSINFER_PLAN_MODELS").expect("RSINFER_PLAN_MODELS names the files");
    // A token for each letter in the vocabularies that synth writes: the smallest context is just filled.
    let words = "one two three four five six seven eight nine ten ".repeat(10);
    println!("| model | flags | planned MiB | peak MiB |\n| --- | --- | --- | --- |");
    for model in models.split(',') {
        for args in [
            &["-c", "512", "-b", "64"][..],
            &["-c", "8192", "-b", "64"],
            &["-c", "8192", "-b", "512"],
            &["-c", "32768", "-b", "512", "-ctk", "q8_0", "-ctv", "q8_0"],
            &["-c", "8192", "-b", "128", "-ctk", "f32", "-ctv", "f32"],
            &["-c", "8192", "-b", "64", "--kv", "sinks:4+window:1020"],
            &["-c", "8192", "-b", "64", "--kv", "snapkv:budget=128,evict=both"],
        ] {
            let (planned, measured) =
                held(model, &["run", "--raw", "-p", &words, "-n", "4", "--ignore-eos"], args);
            let mib = |b: u64| b as f64 / f64::from(1 << 20);
            let name = std::path::Path::new(model).file_stem().unwrap_or_default().to_string_lossy();
            println!("| {name} | {} | {:.1} | {:.1} |", args.join(" "), mib(planned), mib(measured));
        }
    }
}

/// A process that may not have more memory ends with an error, not a crash; with less to hold it runs.
#[test]
#[cfg(target_os = "linux")]
fn a_limit_of_the_system_is_an_error_value() {
    let under = |kib: &str, args: &[&str]| {
        std::process::Command::new("sh")
            .args(["-c", "ulimit -v $0; exec \"$@\"", kib, env!("CARGO_BIN_EXE_rsinfer")])
            .args(["run", "demo", "-t", "2", "-p", "Hello.", "-n", "4"])
            .args(args)
            .output()
            .expect("a shell")
    };
    let limit = "1000000";
    assert!(under(limit, &["-c", "512"]).status.success());
    for args in [
        &["-c", "400000"][..],
        &["-c", "200000", "-ctk", "f32"],
        &["-c", "100000", "-b", "100000"],
        &["-c", "4096", "-b", "400000", "--kv", "window:400"],
        &["--kv", "h2o:budget=300000", "-c", "400000"],
    ] {
        let o = under(limit, args);
        let err = String::from_utf8_lossy(&o.stderr);
        let lines: Vec<&str> = err.lines().filter(|l| !l.starts_with("note: ")).collect();
        assert_eq!(o.status.code(), Some(1), "{args:?}: {:?}, {err}", o.status);
        assert!(lines.len() == 1 && lines[0].contains("cannot allocate"), "{args:?}: {err}");
    }
}
