//! The planner over random models and machines.

use super::*;
use crate::stages::Layout;
use proptest::prelude::*;
use std::collections::HashMap;
use std::sync::Arc;

/// What devices work in: so much where layers are, half of it where only experts are, a third for the output.
#[derive(Clone)]
struct Works(Arc<WorkOf>);

type WorkOf = dyn Fn(&Layout) -> Vec<Work>;

impl std::fmt::Debug for Works {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Works")
    }
}

fn works(activations: usize, scratch: usize) -> Works {
    Works(Arc::new(move |layout| {
        let of = |d: usize| {
            let (layers, experts) =
                (layout.layers.iter().any(|s| s.layer == d), layout.layers.iter().any(|s| s.experts == d));
            let share = if layers { 2 } else { usize::from(experts) };
            let head = usize::from(layout.head == d);
            Work {
                activations: activations * share / 2 + head * activations / 3,
                scratch: scratch * share.max(head) / 2,
            }
        };
        (0..8).map(of).collect()
    }))
}

#[derive(Clone, Debug)]
struct Model {
    weights: Vec<WeightFact>,
    layers: usize,
    tied: bool,
    needs: Needs,
    work: Works,
}

fn fact(name: String, layer: Option<usize>, bytes: u64, copy: u64) -> WeightFact {
    WeightFact { part: Part::of(&name), name, layer, bytes, copy, gpu: if copy > 0 { copy } else { bytes } }
}

fn model() -> impl Strategy<Value = Model> {
    let layer = (0u64..500, 0u64..2000, 0u64..20_000, 1u64..9, 0u64..300);
    let rest = (1u64..5000, any::<bool>(), 1u64..800, 1u64..800, any::<bool>());
    (proptest::collection::vec(layer, 1..12), rest).prop_map(|(layers, (embed, tied, a, b, moe))| {
        let mut weights = Vec::new();
        let mut add = |name: String, layer, bytes, copy| {
            weights.push(fact(name, layer, bytes, copy));
        };
        add("token_embd.weight".into(), None, embed, 0);
        for (i, l) in layers.iter().enumerate() {
            let p = |n: &str| format!("blk.{i}.{n}");
            add(p("attn_q.weight"), Some(i), l.0, 0);
            add(p("attn_norm.weight"), Some(i), l.3, l.3);
            if moe {
                add(p("ffn_up_exps.weight"), Some(i), l.2, 0);
                add(p("ffn_gate_inp.weight"), Some(i), l.3, 0);
            } else {
                add(p("ffn_up.weight"), Some(i), l.1, 0);
            }
        }
        if !tied {
            add("output.weight".into(), None, embed, 0);
        }
        let kv: Vec<u64> = layers.iter().map(|l| l.4).collect();
        let kv_on_gpu = kv.iter().map(|b| b + b / 16).collect();
        let needs = Needs { kv, kv_on_gpu, sampling: a / 2, host: b / 2, policy: a / 3 };
        Model { layers: layers.len(), tied, needs, weights, work: works(a as usize, b as usize) }
    })
}

fn machine() -> impl Strategy<Value = Machine> {
    let gpu = (0u64..100_000, any::<bool>()).prop_map(|(bytes, display)| Gpu { bytes, display });
    (0u64..300_000, proptest::collection::vec(gpu, 0..4)).prop_map(|(memory, gpus)| Machine { memory, gpus })
}

fn access() -> impl Strategy<Value = Access> {
    prop_oneof![Just(Access::Mapped), Just(Access::Locked), Just(Access::Read)]
}

fn rules() -> impl Strategy<Value = Rules> {
    let layers = proptest::option::of(0usize..16);
    let moe = proptest::option::of(0usize..16);
    let split = proptest::collection::vec(0.0f64..3.0, 0..4);
    let device = || (0usize..5).prop_map(|d| d.checked_sub(1).map_or(Device::Cpu, Device::Gpu));
    let named = || proptest::collection::hash_map(0usize..12, device(), 0..4);
    let named = (named(), named(), proptest::option::weighted(0.2, device()));
    (layers, moe, proptest::option::weighted(0.2, 0usize..4), split, named).prop_map(
        |(gpu_layers, cpu_moe, main_gpu, split, (layers, experts, output))| Rules {
            gpu_layers,
            cpu_moe,
            main_gpu,
            split,
            layers,
            experts,
            output,
        },
    )
}

fn load(m: &Model, access: Access) -> Load<'_> {
    Load {
        weights: &m.weights,
        layers: m.layers,
        tied: m.tied,
        needs: &m.needs,
        work: &*m.work.0,
        access,
        pinned: 0,
        parallel: 1,
    }
}

proptest! {
    #[test]
    fn everything_is_placed_once(m in model(), machine in machine(), r in rules(), a in access()) {
        let p = place(load(&m, a), &machine, &r);
        prop_assert_eq!(p.devices.len(), machine.gpus.len() + 1);
        prop_assert_eq!(p.devices.iter().map(|d| d.tensors).sum::<usize>(), m.weights.len());
        let cache = |(i, (host, gpu)): (usize, (&u64, &u64))| if p.layout.spot(i).layer == 0 { *host } else { *gpu };
        prop_assert_eq!(p.kv(), m.needs.kv.iter().zip(&m.needs.kv_on_gpu).enumerate().map(cache).sum::<u64>());
        let work = (m.work.0)(&p.layout);
        for (d, w) in p.devices.iter().zip(work) {
            prop_assert_eq!((d.activations, d.scratch), (w.activations as u64, w.scratch as u64));
        }
        for part in Part::ALL {
            let of = |w: &&WeightFact| w.part == part;
            let want: u64 = m.weights.iter().filter(of).map(|w| w.bytes).sum();
            let vectors: u64 = m.weights.iter().filter(of).map(|w| w.copy).sum();
            let sum = |f: fn(&PartBytes) -> u64| p.devices.iter().map(|d| f(&d.weights[part as usize])).sum::<u64>();
            let held = sum(|b| b.mapped) + sum(|b| b.resident) - sum(|b| b.copied);
            // Vectors are widened: beside the map on the CPU, instead of it on a GPU.
            prop_assert!(held >= want && held <= want + vectors, "{part:?}: {held}, {want}");
        }
        // Nothing is copied but a tied output that lies on a GPU, and what of a file that is read lies there.
        let copies: u64 = p.devices[1..].iter().flat_map(|d| &d.weights).map(|w| w.copied).sum();
        prop_assert!(a == Access::Read || p.devices[0].weights.iter().all(|w| w.copied == 0));
        prop_assert!(copies == 0 || (m.tied && p.uses_gpu() || p.gpu_layers > 0));
        prop_assert_eq!(p.devices[0].mapped() > 0 && a == Access::Read, false);
    }

    #[test]
    fn no_gpu_is_over_its_size_where_the_planner_chooses(m in model(), machine in machine(), a in access()) {
        let p = place(load(&m, a), &machine, &Rules::default());
        // Whatever does not fit lies on the host, where it is reported.
        for d in &p.devices[1..] {
            prop_assert!(d.required() <= d.size, "{d:?}");
        }
        for d in &p.devices {
            prop_assert_eq!(d.shortfall(), d.required().saturating_sub(d.size));
            prop_assert!(d.resident() + d.mapped() <= d.size + d.streamed() + d.shortfall());
        }
        prop_assert_eq!(p.fits(), p.devices[0].required() <= machine.memory);
    }

    #[test]
    fn more_memory_never_hurts(m in model(), machine in machine(), r in rules(), a in access(), more in 0u64..50_000) {
        let before = place(load(&m, a), &machine, &r);
        let mut larger = machine.clone();
        larger.memory += more;
        let after = place(load(&m, a), &larger, &r);
        prop_assert!(after.fits() || !before.fits());
        prop_assert!(after.gpu_layers >= before.gpu_layers || !before.fits());
        let fixed = Rules { gpu_layers: Some(before.gpu_layers), cpu_moe: Some(before.cpu_moe), ..r };
        let (x, y) = (place(load(&m, a), &machine, &fixed), place(load(&m, a), &larger, &fixed));
        prop_assert!(y.shortfall() <= x.shortfall());
        prop_assert!(y.devices[0].streamed() <= x.devices[0].streamed());
    }

    #[test]
    fn more_memory_of_gpus_never_hurts(m in model(), machine in machine(), r in rules(), a in access(), more in prop::collection::vec(0u64..50_000, 4)) {
        let mut larger = machine.clone();
        larger.gpus.iter_mut().zip(more).for_each(|(g, more)| g.bytes += more);
        let (before, after) = (place(load(&m, a), &machine, &r), place(load(&m, a), &larger, &r));
        prop_assert!(after.fits() || !before.fits());
        prop_assert!(after.gpu_layers >= before.gpu_layers || !before.fits());
    }

    #[test]
    fn named_tensors_lie_where_they_should(m in model(), machine in machine(), r in rules(), a in access()) {
        let p = place(load(&m, a), &machine, &r);
        let there = |d: &&Device| !matches!(d, Device::Gpu(i) if *i >= machine.gpus.len());
        let ruled = |w: &WeightFact| match (w.part, w.layer) {
            (Part::Output, _) => r.output.as_ref(),
            (Part::Experts | Part::Router, Some(i)) => r.experts.get(&i),
            (_, Some(i)) => r.layers.get(&i),
            _ => None,
        };
        for (i, d) in p.devices.iter().enumerate() {
            let here = |w: &&WeightFact| ruled(w).filter(there) == Some(&d.device);
            let named: u64 = m.weights.iter().filter(here).map(|w| w.bytes).sum();
            prop_assert!(d.mapped() + d.weights_resident() >= named, "device {i}");
        }
        // GPUs that no rule allows stay empty.
        for (i, d) in p.devices[1..].iter().enumerate() {
            let named = r.layers.values().chain(r.experts.values()).chain(&r.output).any(|d| *d == Device::Gpu(i));
            let share = match r.main_gpu {
                Some(main) => main == i,
                None if r.split.is_empty() => !machine.gpus[i].display,
                None => r.split.get(i).is_some_and(|s| *s > 0.0),
            };
            prop_assert!(share || named || d.resident() == 0, "GPU{i}");
        }
    }

    #[test]
    fn displays_are_left_alone(m in model(), machine in machine(), a in access()) {
        let p = place(load(&m, a), &machine, &Rules::default());
        for (d, g) in p.devices[1..].iter().zip(&machine.gpus) {
            prop_assert!(!g.display || d.resident() == 0);
        }
        if let Some(named) = machine.gpus.iter().position(|g| g.display) {
            let r = Rules { main_gpu: Some(named), gpu_layers: Some(1), ..Rules::default() };
            let p = place(load(&m, a), &machine, &r);
            prop_assert!(p.devices[named + 1].resident() > 0);
        }
    }
}

#[test]
fn names_of_tensors() {
    for (name, part) in [
        ("token_embd.weight", Part::Embeddings),
        ("output.weight", Part::Output),
        ("output_norm.weight", Part::Output),
        ("blk.3.attn_kv_a_mqa.weight", Part::Attention),
        ("blk.3.attn_q_a_norm.weight", Part::Norms),
        ("blk.3.ffn_down_exps.weight", Part::Experts),
        ("blk.3.ffn_down_shexp.weight", Part::SharedExperts),
        ("blk.3.ffn_gate_inp.weight", Part::Router),
        ("blk.3.exp_probs_b.bias", Part::Router),
        ("blk.0.ffn_gate.weight", Part::Dense),
        ("rope_freqs.weight", Part::Norms),
    ] {
        assert_eq!(Part::of(name), part, "{name}");
    }
}

#[test]
fn experts_leave_a_gpu_first_and_named_tensors_go_where_they_should() {
    let tensor = |name: &str, layer, bytes| fact(name.into(), layer, bytes, 0);
    let weights = vec![
        tensor("blk.0.attn_q.weight", Some(0), 10),
        tensor("blk.0.ffn_up_exps.weight", Some(0), 100),
        tensor("blk.1.attn_q.weight", Some(1), 10),
        tensor("blk.1.ffn_up_exps.weight", Some(1), 100),
    ];
    let needs = Needs { kv: vec![5, 5], kv_on_gpu: vec![5, 5], ..Needs::default() };
    let work = works(0, 0);
    let l = Load {
        weights: &weights,
        layers: 2,
        tied: false,
        needs: &needs,
        work: &*work.0,
        access: Access::Mapped,
        pinned: 0,
        parallel: 1,
    };
    let machine = |bytes| Machine { memory: 1000, gpus: vec![Gpu { bytes, display: false }] };
    for (bytes, layers, cpu_moe, on_gpu) in
        [(300, 3, 0, 230), (200, 3, 1, 130), (40, 3, 2, 30), (20, 2, 2, 15)]
    {
        let p = place(l, &machine(bytes), &Rules::default());
        assert_eq!((p.gpu_layers, p.cpu_moe, p.devices[1].resident()), (layers, cpu_moe, on_gpu), "{bytes}");
    }
    let layers = HashMap::from([(1, Device::Cpu)]);
    let p = place(l, &machine(300), &Rules { layers, ..Rules::default() });
    assert_eq!((p.devices[0].mapped(), p.devices[1].resident()), (10, 215));
}

/// Layers that keep their experts are the last ones: dealt by bytes, they lie on all GPUs.
#[test]
fn experts_are_spread_over_gpus_as_their_layers_are() {
    let mut weights = Vec::new();
    for i in 0..8 {
        for (name, bytes) in [("attn_q", 10), ("ffn_up_exps", 100)] {
            let name = format!("blk.{i}.{name}.weight");
            weights.push(fact(name, Some(i), bytes, 0));
        }
    }
    let needs = Needs { kv: vec![1; 8], kv_on_gpu: vec![1; 8], ..Needs::default() };
    let work = works(0, 7);
    let l = Load {
        weights: &weights,
        layers: 8,
        tied: false,
        needs: &needs,
        work: &*work.0,
        access: Access::Mapped,
        pinned: 0,
        parallel: 1,
    };
    let gpus = |sizes: &[u64]| sizes.iter().map(|b| Gpu { bytes: *b, display: false }).collect();
    let at = |sizes: &[u64], r: &Rules| {
        let p = place(l, &Machine { memory: 10_000, gpus: gpus(sizes) }, r);
        let experts = |d: &DevicePlan| d.weights[Part::Experts as usize].resident;
        assert!(p.fits(), "{p:?}");
        (p.cpu_moe, p.devices[1..].iter().map(experts).collect::<Vec<_>>())
    };
    assert_eq!(at(&[300, 300], &Rules::default()), (4, vec![200, 200]));
    assert_eq!(at(&[170, 450], &Rules::default()), (4, vec![100, 300]));
    let split = |split: &[f64]| Rules { split: split.into(), cpu_moe: Some(4), ..Rules::default() };
    assert_eq!(at(&[300, 300], &split(&[1.0, 1.0])), (4, vec![200, 200]));
    assert_eq!(at(&[500, 500], &split(&[1.0, 2.0])), (4, vec![100, 300]));
}
