//! Models over several devices: every way to split the tiny ones over the CPU and two GPUs, experts apart from their layers, and what
//! a cache does that lies in parts.

use crate::models::{eval, load, options};
use crate::{gpu, interpreted};
use engine::plan::{self, Gpu, Machine, PlanModel, PlanOptions, Rules};
use engine::{Context, Devices, EngineError, KvSpec, Layout, Model, Rows, Session, SessionOptions, Spot};
use kernels::Device;
use kernels::cpu::CpuBackend;
use quant::DType;
use ref_tests::gpu::{Call, Fault, Interpreted};
use ref_tests::{compare, fixture, read_npy, read_tokens};
use std::sync::{Arc, Mutex};

const CPU: usize = 0;
const A: usize = 1;
const B: usize = 2;

/// The CPU and two GPUs; where a GPU is asked for, that one twice.
fn devices() -> Vec<Device> {
    vec![Device::new(CpuBackend::new(1)), gpu(), gpu()]
}

/// The CPU and two interpreters.
fn interpreters() -> (Vec<Device>, Interpreted, Interpreted) {
    let ((a, on_a), (b, on_b)) = (interpreted(), interpreted());
    (vec![Device::new(CpuBackend::new(1)), a, b], on_a, on_b)
}

/// Layers by device, routed experts by device, the head's.
fn layout(layers: &[usize], experts: &[usize], head: usize) -> Layout {
    let spot = |(&layer, &experts)| Spot { layer, experts };
    Layout { layers: layers.iter().zip(experts).map(spot).collect(), head }
}

fn split(name: &str, all: &[Device], layout: Layout) -> Arc<Model> {
    load(name, Some(Devices::new(all.to_vec(), layout).expect("devices that are there")))
}

/// The first `n` layers on the CPU, those up to `m` on one GPU, the rest of `layers` on the other; the output with the last.
fn cut(n: usize, m: usize, layers: usize) -> Layout {
    let at: Vec<usize> = (0..layers)
        .map(|i| {
            if i < n {
                CPU
            } else if i < m {
                A
            } else {
                B
            }
        })
        .collect();
    layout(&at, &at, *at.last().expect("a layer"))
}

fn check(name: &str, all: &[Device], at: &Layout, n: usize) {
    let tokens = &read_tokens(&fixture(name).join("tokens.json"))[..n];
    let (_, vocab, reference) = read_npy(&fixture(name).join("logits.npy"));
    let model = split(name, all, at.clone());
    // A prompt, and a token that is decoded.
    let mut session = Session::new(&model, &options(n, n - 1, DType::F32)).expect("a session");
    let mut got = eval(&mut session, &tokens[..n - 1]);
    got.extend(eval(&mut session, &tokens[n - 1..]));
    let d = compare(&reference[..n * vocab], &got, vocab);
    assert!(d.max_kl <= 1e-6 && d.top1 == 1.0, "{name}, {at:?}: {d:?}");
}

#[test]
fn every_cut_gives_hugging_faces_logits() {
    let all = devices();
    for (name, layers) in
        [("llama3", 3), ("qwen2", 2), ("qwen3moe", 3), ("deepseek2-v2-lite-old", 2), ("deepseek2-v3", 3)]
    {
        for (n, m) in (0..=layers).flat_map(|n| (n..=layers).map(move |m| (n, m))) {
            check(name, &all, &cut(n, m, layers), 3);
        }
    }
    check("deepseek2-v3-heads", &all, &cut(1, 1, 2), 3);
    // Six kinds of layers: local and global ones on each side.
    for (n, m) in [(0, 8), (0, 5), (1, 6), (5, 6), (6, 8), (8, 8)] {
        check("gemma3", &all, &cut(n, m, 8), 3);
    }
}

#[test]
fn parts_may_lie_anywhere() {
    let all = devices();
    for name in ["qwen3moe", "deepseek2-v3"] {
        for (layers, experts, head) in [
            // Experts on the CPU, all or some; on another GPU; layers on the CPU with experts on a GPU.
            ([A, A, A], [CPU, CPU, CPU], A),
            ([A, A, A], [A, A, CPU], A),
            ([CPU, A, B], [CPU, CPU, CPU], B),
            ([A, A, A], [A, B, B], A),
            ([CPU, CPU, CPU], [CPU, A, B], CPU),
            // Back and forth, and an output apart from the last layer.
            ([A, B, A], [A, CPU, B], B),
            ([B, CPU, B], [B, CPU, B], A),
            ([A, A, A], [A, A, A], CPU),
            ([CPU, CPU, CPU], [CPU, CPU, CPU], A),
        ] {
            check(name, &all, &layout(&layers, &experts, head), 4);
        }
    }
    let nowhere = layout(&[3], &[3], 0);
    assert!(Devices::new(all, nowhere).is_err());
}

/// What the CPU computes has the CPU's bits: a model whose GPUs hold nothing, and a cut behind the last layer that is asked for.
#[test]
fn the_cpus_part_has_the_cpus_bits() {
    let (all, on_a, on_b) = interpreters();
    for name in ["llama3", "deepseek2-v3"] {
        let tokens = &read_tokens(&fixture(name).join("tokens.json"))[..6];
        let run = |devices: Option<Devices>| {
            let model = load(name, devices);
            eval(&mut Session::new(&model, &options(8, 4, DType::F16)).expect("a session"), tokens)
        };
        let (whole, over) = (run(None), run(Some(Devices::new(all.clone(), cut(3, 3, 3)).expect("devices"))));
        assert!(whole.iter().zip(&over).all(|(a, b)| a.to_bits() == b.to_bits()), "{name}");
        let on_gpu = (
            run(Some(all[1].clone().into())),
            run(Some(Devices::new(all.clone(), cut(0, 3, 3)).expect("devices"))),
        );
        assert!(on_gpu.0.iter().zip(&on_gpu.1).all(|(a, b)| a.to_bits() == b.to_bits()), "{name} on a GPU");
    }
    drop(all);
    assert_eq!((on_a.held(), on_b.held()), (0, 0), "memory was given back");
}

/// Rings, policies that measure, move and turn, with a cache in three parts.
#[test]
fn caches_in_parts_forget_as_whole_ones() {
    let all = devices();
    for (name, kv) in [
        ("llama3", "sinks:2+window:6"),
        ("deepseek2-v2-lite", "h2o:budget=8,positions=compact"),
        ("qwen3", "snapkv:budget=8"),
    ] {
        let tokens = &read_tokens(&fixture(name).join("tokens.json"))[..14];
        let o = SessionOptions { kv: spec(kv), ..options(64, 4, DType::F32) };
        let run = |devices: Option<Devices>| {
            eval(&mut Session::new(&load(name, devices), &o).expect("a session"), tokens)
        };
        let over = Devices::new(all.clone(), cut(1, 2, 3)).expect("devices");
        let (want, got) = (run(None), run(Some(over)));
        let d = compare(&want, &got, want.len() / tokens.len());
        assert!(d.max_kl <= 1e-6 && d.top1 == 1.0, "{name}, {kv}: {d:?}");
    }
}

fn spec(kv: &str) -> KvSpec {
    kv.parse().unwrap_or_else(|e| panic!("{kv}: {e:?}"))
}

/// What the plan says of each GPU is what a run holds on it, to the byte.
#[test]
fn memory_is_what_was_planned() {
    let rules = |gpu_layers, cpu_moe| Rules { gpu_layers: Some(gpu_layers), cpu_moe, ..Rules::default() };
    let over = |layers: &[(usize, usize)], output: usize| {
        let device = |d: usize| d.checked_sub(1).map_or(plan::Device::Cpu, plan::Device::Gpu);
        let layers = layers.iter().map(|(l, d)| (*l, device(*d))).collect();
        Rules { layers, output: Some(device(output)), ..rules(99, None) }
    };
    let one = || Rules { main_gpu: Some(1), ..rules(99, None) };
    for (name, kv, cache, rules) in [
        (
            "llama3",
            "full",
            DType::F16,
            vec![one(), rules(99, None), rules(1, None), rules(2, None), over(&[(1, CPU)], CPU)],
        ),
        ("mistral", "full", DType::F16, vec![one()]),
        ("deepseek2-v2-lite", "full", DType::F16, vec![rules(99, Some(1))]),
        (
            "quantised/q-gemma3-qat",
            "sinks:2+window:20",
            DType::Q8_0,
            vec![one(), rules(5, None), over(&[(0, B), (7, A)], A)],
        ),
        (
            "deepseek2-v3",
            "h2o:budget=8",
            DType::F32,
            vec![one(), rules(99, Some(99)), rules(3, Some(2)), over(&[(2, CPU)], B)],
        ),
        (
            "qwen3moe",
            "snapkv:budget=8",
            DType::BF16,
            vec![one(), rules(99, None), rules(99, Some(2)), rules(2, Some(99))],
        ),
    ] {
        for rules in rules {
            let path = fixture(name).join("model.gguf");
            let session = SessionOptions { kv: spec(kv), cache_k_pe: Some(cache), ..options(40, 16, cache) };
            let o = PlanOptions { session, parallel: 2, threads: 1, ..PlanOptions::default() };
            let gpu = Gpu { bytes: 1 << 30, display: false };
            let machine = Machine { memory: 1 << 40, gpus: vec![gpu; 2] };
            let model = PlanModel::open(&path).expect("headers");
            let plan = plan::plan(&model, &o, &machine, &rules).expect("a plan");
            let all = devices();
            let model = split(name, &all, plan.layout.clone());
            for (d, dev) in plan.devices.iter().zip(&all).skip(1) {
                assert_eq!(
                    dev.held() as u64,
                    d.weights_resident(),
                    "{name}, {rules:?}: weights, {:?}",
                    d.device
                );
            }
            let context = Context::new(&model, &o.session, 2).expect("a context");
            for (d, dev) in plan.devices.iter().zip(&all).skip(1) {
                assert_eq!(dev.held() as u64, d.resident(), "{name}, {rules:?}: all, {:?}", d.device);
            }
            let work = plan.devices.iter().map(|d| d.activations + d.scratch).sum::<u64>();
            assert_eq!(context.scratch_bytes() as u64, work, "{name}, {rules:?}");
        }
    }
}

/// Several sequences, a fork of one, and one that is saved, on a model in three parts with experts apart.
#[test]
fn sequences_share_a_cache_in_parts() {
    let all = devices();
    let at = layout(&[CPU, A, B], &[CPU, CPU, B], B);
    let model = split("deepseek2-v3", &all, at);
    let tokens = read_tokens(&fixture("deepseek2-v3").join("tokens.json"));
    let o = options(16, 8, DType::Q8_0);
    let alone = |tokens: &[u32]| {
        let mut s = Session::new(&model, &o).expect("a session");
        eval(&mut s, &tokens[..3]);
        eval(&mut s, &tokens[3..4])
    };
    let want = [alone(&tokens), alone(&tokens[4..])];
    let mut c = Context::new(&model, &o, 3).expect("a context");
    let (a, b) = (c.cache_mut().admit(0).expect("room"), c.cache_mut().admit(0).expect("room"));
    let rows = |seq, tokens, prompt| Rows { seq, tokens, prompt };
    c.forward(&[rows(a, &tokens[..3], 3), rows(b, &tokens[4..7], 3)]).expect("a pass");
    let fork = c.cache_mut().fork(a).expect("a fork");
    let folder = tempfile::tempdir().expect("a folder");
    c.save(b, &folder.path().join("saved")).expect("saved");
    c.cache_mut().restart(b, 0).expect("forgotten");
    c.load(b, &folder.path().join("saved")).expect("loaded");
    c.forward(&[rows(fork, &tokens[3..4], 1), rows(b, &tokens[7..8], 1)]).expect("a pass");
    let mut got = Vec::new();
    c.logits(&[0, 1], &mut got).expect("logits");
    assert!(want.concat().iter().zip(&got).all(|(a, b)| a.to_bits() == b.to_bits()));
}

/// What a GPU refuses while another works: an error value, and nothing held afterwards.
#[test]
fn the_second_gpu_may_fail() {
    let run = |all: &[Device]| -> Result<(), EngineError> {
        let at = layout(&[A, B, A], &[A, CPU, B], B);
        let o = engine::LoadOptions {
            threads: 1,
            devices: Some(Devices::new(all.to_vec(), at)?),
            ..Default::default()
        };
        let model = Model::load(&fixture("qwen3moe").join("model.gguf"), &o)?;
        let mut session = Session::new(&model, &options(8, 4, DType::F16))?;
        session.eval(&[1, 2])?;
        session.eval(&[3]).map(|_| ())
    };
    let (all, _, second) = interpreters();
    run(&all).expect("without faults it runs");
    let launches = second.counts().launches;
    let mut seen = [0; 3];
    for n in (1..launches + 20).step_by(11) {
        for (kind, fault) in [Fault::Alloc(n), Fault::Launch(n), Fault::Lost(n)].into_iter().enumerate() {
            let (all, first, second) = interpreters();
            second.fail(fault);
            let Err(e) = run(&all) else { continue };
            assert!(matches!(e, EngineError::Kernel(kernels::KernelError::Gpu(_))), "{fault:?}: {e:?}");
            seen[kind] += 1;
            drop(all);
            assert_eq!((first.held(), second.held()), (0, 0), "{fault:?}: memory was given back");
        }
    }
    assert!(seen.iter().all(|n| *n >= 3), "{seen:?}");
}

/// A decoded token through a layer whose experts are on the CPU: the GPU has been given the shared experts before the host knows which
/// experts it will compute, and is waited for once a layer, and for the logits.
#[test]
fn shared_experts_are_launched_before_the_hosts_begin() {
    let (all, gpu, _) = interpreters();
    let name = "deepseek2-v3";
    let model = split(name, &all, layout(&[A; 3], &[CPU; 3], A));
    let tokens = read_tokens(&fixture(name).join("tokens.json"));
    let mut session = Session::new(&model, &options(16, 8, DType::F16)).expect("a session");
    eval(&mut session, &tokens[..3]);
    let events = Arc::new(Mutex::new(Vec::new()));
    let (log, of) = (events.clone(), model.clone());
    let before = model.pager().stats().chosen;
    gpu.watch(move |call| log.lock().expect("a log").push((call, of.pager().stats().chosen - before)));
    session.eval(&tokens[3..4]).expect("a token");
    let events = std::mem::take(&mut *events.lock().expect("a log"));
    let chosen = model.pager().stats().chosen - before;
    let layers = (0..3).filter(|l| model.pager().expert_bytes(*l) > 0).count() as u64;
    assert!(layers >= 2 && chosen > 0);
    let each = chosen / layers;
    let reads: Vec<usize> = (0..events.len()).filter(|i| events[*i].0 == Call::Read).collect();
    assert_eq!(reads.len() as u64, layers + 1, "one for each layer and one for the logits: {events:?}");
    for (k, &read) in reads[..layers as usize].iter().enumerate() {
        let shared = read
            + events[read..]
                .iter()
                .position(|e| e.0 == Call::Launch("gate_1".into()))
                .expect("shared experts");
        let result =
            read + events[read..].iter().position(|e| e.0 == Call::Write).expect("what the host computed");
        assert!(shared < result, "layer {k}: {events:?}");
        assert_eq!(
            (events[shared].1, events[result].1),
            (k as u64 * each, (k as u64 + 1) * each),
            "layer {k}"
        );
    }
}
