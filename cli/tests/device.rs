//! `--device` where there is no GPU: one clear line, or the CPU.

mod common;
use common::server::Server;
use common::{driver, error, rsinfer, run, with_driver, without_driver};
use serde_json::{Value, json};

const RUN: [&str; 11] =
    ["run", "demo", "--raw", "-p", "Once upon", "-n", "5", "--temp", "0", "--device", "cuda:0"];

#[test]
fn a_gpu_answers_as_the_cpu_does() {
    // Without graphs, too: then all goes out launch by launch. Where no memory can be pinned: each copy is waited for. And with launches that
    // overlap, or would.
    for fault in ["", "no graphs", "nothing pinned", "hopper", "no overlaps"] {
        let Some(o) = with_driver(fault, &RUN) else { return };
        let text = String::from_utf8_lossy(&o.stderr);
        assert!(o.status.success(), "{text}");
        assert_eq!(o.stdout, run(&RUN[..9]).stdout, "{text}");
    }
    let Some(o) = with_driver("", &["run", "demo", "--raw", "-p", "Once", "-n", "1", "--device", "auto"])
    else {
        return;
    };
    let text = String::from_utf8_lossy(&o.stderr);
    assert!(o.status.success() && text.contains("cuda:0 (interpreted GPU"), "{text}");
}

/// Layers, and experts, on one GPU, on two of which each is half of one, and on the CPU: the text is the CPU's, and where everything lies
/// is what `plan` says.
#[test]
fn a_split_model_answers_as_the_cpu_does() {
    let want = run(&RUN[..9]).stdout;
    for (place, gpus, on_gpus) in [
        (&["--device", "cuda:0,cuda:0"][..], 2, "whole"),
        (&["--device", "cuda:0,cuda:0", "-ngl", "3"], 2, "layers"),
        (&["--device", "cuda:0", "--cpu-moe"], 1, "all but experts"),
        (&["-ngl", "2", "--n-cpu-moe", "99"], 1, "layers"),
        (&["--device", "cuda:0,cuda:0", "-ts", "1,2", "-ot", "ffn_.*_exps=CPU"], 2, "all but experts"),
    ] {
        let Some(o) = with_driver("", &[&RUN[..9], place].concat()) else { return };
        let text = String::from_utf8_lossy(&o.stderr);
        assert!(o.status.success(), "{place:?}: {text}");
        assert_eq!(o.stdout, want, "{place:?}: {text}");
        let Some(o) = with_driver("", &[&["plan", "demo", "--json"], place].concat()) else { return };
        let p: Value = serde_json::from_slice(&o.stdout).expect("JSON");
        let devices = p["devices"].as_array().expect("devices");
        assert_eq!(devices.len(), gpus + 1, "{place:?}");
        let bytes = |d: &Value, part: Option<&str>| -> u64 {
            let parts = d["weights"].as_array().expect("parts").iter();
            let parts = parts.filter(|w| part.is_none_or(|p| w["part"] == p));
            parts
                .map(|w| w["mapped_bytes"].as_u64().unwrap_or(0) + w["resident_bytes"].as_u64().unwrap_or(0))
                .sum()
        };
        assert!(devices.iter().all(|d| bytes(d, None) > 0), "{place:?}: {p}");
        let here = |part| bytes(&devices[0], Some(part)) > 0;
        let want = match on_gpus {
            "whole" => (false, false),
            "layers" => (true, true),
            _ => (false, true),
        };
        assert_eq!((here("attention"), here("experts")), want, "{place:?}: {p}");
    }
}

/// `num_gpu` of a request counts when its model is loaded, and `/api/ps` says what lies on GPUs.
#[test]
fn a_server_places_models_as_it_is_asked() {
    let Some(folder) = driver() else { return };
    let path = folder.path().display().to_string();
    let server = Server::start(&["--device", "cuda:0"], &[("LD_LIBRARY_PATH", path.as_str())]);
    let ask = |more: Value| {
        let mut options = json!({"num_predict": 3, "temperature": 0, "num_ctx": 64, "num_batch": 8});
        options.as_object_mut().expect("options").extend(more.as_object().expect("options").clone());
        let body =
            json!({"model": "demo", "prompt": "Once upon", "raw": true, "stream": false, "options": options});
        let answer = server.post("/api/generate", body).json();
        let vram = server.get("/api/ps").json()["models"][0]["size_vram"].as_u64().expect("bytes");
        server.post("/api/generate", json!({"model": "demo", "keep_alive": 0, "stream": false}));
        server.until("unloaded", |s| s.get("/api/ps").json()["models"].as_array().is_some_and(Vec::is_empty));
        (answer["response"].as_str().expect("a text").to_owned(), vram)
    };
    let (whole, some, none) = (ask(json!({})), ask(json!({"num_gpu": 2})), ask(json!({"num_gpu": 0})));
    assert!(whole.1 > some.1 && some.1 > 0 && none.1 == 0, "{whole:?}, {some:?}, {none:?}");
    assert!(whole.0 == none.0 && some.0 == none.0, "{whole:?}, {some:?}, {none:?}");
}

/// Clients at once get the tokens that each gets alone, when all logits are read (for their probabilities) and not only the best.
#[test]
fn clients_of_a_gpu_get_the_tokens_that_each_gets_alone() {
    let Some(folder) = driver() else { return };
    let path = folder.path().display().to_string();
    let gpu =
        Server::start(&["--device", "cuda:0", "--parallel", "3"], &[("LD_LIBRARY_PATH", path.as_str())]);
    let ask = |seed: usize, logprobs: bool| {
        let options = json!({"num_predict": 2, "temperature": 2.0, "top_k": 10 * seed, "seed": seed,
            "repeat_penalty": 1.1, "num_ctx": 64});
        let body = json!({"model": "demo", "prompt": "Once upon a time,", "raw": true, "stream": false, "options": options,
            "logprobs": logprobs});
        let answer = gpu.post("/api/generate", body).json();
        answer["response"].as_str().expect("a text").to_owned()
    };
    let alone: Vec<_> = (1..4).map(|seed| ask(seed, true)).collect();
    assert!(alone[0] != alone[1] && alone[1] != alone[2], "{alone:?}");
    std::thread::scope(|s| {
        let clients: Vec<_> = (1..4)
            .map(|seed| {
                s.spawn({
                    let ask = &ask;
                    move || ask(seed, false)
                })
            })
            .collect();
        let together: Vec<_> = clients.into_iter().map(|c| c.join().expect("an answer")).collect();
        assert_eq!(together, alone);
    });
}

#[test]
fn placements_that_cannot_be_are_one_line() {
    for (place, part) in [
        (&["--device", "cuda:0", "-ot", "attn_q=CPU"][..], "-ot moves blk.0.attn_q"),
        (&["--device", "cuda:0", "-mg", "1"], "there is no GPU1"),
        (&["--device", "cuda:0", "-ts", "1,1"], "2 shares for 1 GPU"),
        (&["--device", "cuda:0,cuda:1"], "there is no GPU cuda:1"),
    ] {
        let Some(o) = with_driver("", &[&RUN[..9], place].concat()) else { return };
        let text = String::from_utf8_lossy(&o.stderr);
        assert!(o.status.code() == Some(1) && text.lines().count() == 1, "{place:?}: {text}");
        assert!(text.starts_with("error: ") && text.contains(part), "{place:?}: {text}");
    }
}

#[test]
fn what_a_driver_refuses_is_one_line() {
    for (fault, parts) in [
        ("old", ["CUDA 11.8, 12.1 is needed", "update it"]),
        ("none", ["0 here", "--device cpu"]),
        ("busy", ["cuDevicePrimaryCtxRetain", "nvidia-smi"]),
        ("pre-turing", ["capability 7.0", "--device cpu"]),
        ("small", ["GPU0 is short of", "-ngl 0"]),
        ("refuses", ["refuses the kernels", "update it"]),
        ("lost", ["the GPU was lost (cuLaunchKernel: CUDA_ERROR_ILLEGAL_ADDRESS", "restart"]),
        ("lost in a graph", ["the GPU was lost (cuGraphLaunch: CUDA_ERROR_ILLEGAL_ADDRESS", "restart"]),
    ] {
        let Some(o) = with_driver(fault, &RUN) else { return };
        let text = String::from_utf8_lossy(&o.stderr);
        assert_eq!(o.status.code(), Some(1), "{fault}: {text}");
        let last: Vec<&str> = text.lines().filter(|l| !l.starts_with("note: ")).collect();
        assert!(last.len() == 1 && last[0].starts_with("error: "), "{fault}: {text}");
        assert!(parts.iter().all(|p| last[0].contains(p)), "{fault}: {text}");
        let mut auto = RUN;
        auto[10] = "auto";
        // What shows only later cannot be foreseen.
        if !fault.starts_with("lost") {
            let Some(o) = with_driver(fault, &auto) else { return };
            let text = String::from_utf8_lossy(&o.stderr);
            assert!(o.status.success() && text.contains("--device auto: the CPU; "), "{fault}: {text}");
        }
    }
}

fn stderr(args: &[&str]) -> (Option<i32>, String) {
    let folder = without_driver();
    let o = rsinfer().args(args).env("LD_LIBRARY_PATH", folder.path()).output().expect("the binary runs");
    (o.status.code(), String::from_utf8(o.stderr).expect("UTF-8"))
}

#[test]
fn a_gpu_that_is_not_there_is_one_line_that_says_what_to_do() {
    for command in [
        &["run", "demo", "--device", "cuda:0", "-p", "Hello", "-n", "4"][..],
        &["bench", "demo", "--device", "cuda:3", "-p", "4", "-n", "0"],
    ] {
        let (code, text) = stderr(command);
        assert_eq!(code, Some(1), "{text}");
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines.len() == 1 && lines[0].starts_with("error: "), "{text}");
        assert!(lines[0].contains("no NVIDIA driver") && lines[0].contains("--device cpu"), "{text}");
    }
}

#[test]
fn auto_takes_the_cpu_and_says_so() {
    let (code, text) = stderr(&["run", "demo", "--device", "auto", "-p", "Hello", "-n", "4", "--temp", "0"]);
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("note: --device auto: the CPU; no NVIDIA driver"), "{text}");
    let (code, text) = stderr(&["run", "demo", "-ngl", "99", "--cpu-moe", "-p", "Hello", "-n", "4"]);
    assert!(code == Some(0) && text.contains("note: --device auto: the CPU; no NVIDIA driver"), "{text}");
    let (code, text) = stderr(&["run", "demo", "-p", "Hello", "-n", "4"]);
    assert!(code == Some(0) && !text.contains("--device"), "{text}");
}

#[test]
fn unknown_devices_and_splits_are_refused() {
    let o = run(&["run", "demo", "--device", "gpu9", "-p", "x"]);
    assert_eq!(o.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&o.stderr).contains("cuda:0"));
    assert!(error(&["run", "demo", "--device", "cpu", "-ngl", "1", "-p", "x"]).contains("--device auto"));
}
