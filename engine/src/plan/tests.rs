//! The planner over random models and machines.

use super::*;
use proptest::prelude::*;
use std::collections::HashMap;

#[derive(Clone, Debug)]
struct Model {
    weights: Vec<WeightFact>,
    layers: usize,
    tied: bool,
    needs: Needs,
}

fn model() -> impl Strategy<Value = Model> {
    let layer = (0u64..500, 0u64..2000, 0u64..20_000, 1u64..9, 0u64..300);
    let rest = (1u64..5000, any::<bool>(), 1u64..800, 1u64..800, any::<bool>());
    (proptest::collection::vec(layer, 1..12), rest).prop_map(|(layers, (embed, tied, a, b, moe))| {
        let mut weights = Vec::new();
        let mut add = |name: String, layer, bytes, copy| {
            weights.push(WeightFact { part: Part::of(&name), name, layer, bytes, copy });
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
        let kv = layers.iter().map(|l| l.4).collect();
        let needs = Needs { kv, activations: a, scratch: b, sampling: a / 2, host: b / 2, policy: a / 3 };
        Model { layers: layers.len(), tied, needs, weights }
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
    let kind = prop_oneof![Just("attn_q"), Just("ffn_up_exps"), Just("ffn_up"), Just("attn_norm")];
    let named = (0usize..12, kind, 0usize..5).prop_map(|(layer, kind, device)| {
        let device = device.checked_sub(1).map_or(Device::Cpu, Device::Gpu);
        (format!("blk.{layer}.{kind}.weight"), device)
    });
    let tensors =
        proptest::collection::hash_map(Just("token_embd.weight".to_owned()), Just(Device::Gpu(0)), 0..2);
    let tensors = (tensors, proptest::collection::vec(named, 0..6)).prop_map(|(mut all, some)| {
        all.extend(some);
        all
    });
    (layers, moe, proptest::option::weighted(0.2, 0usize..4), split, tensors).prop_map(
        |(gpu_layers, cpu_moe, main_gpu, split, tensors)| Rules {
            gpu_layers,
            cpu_moe,
            main_gpu,
            split,
            tensors,
        },
    )
}

fn load(m: &Model, access: Access) -> Load<'_> {
    Load {
        weights: &m.weights,
        layers: m.layers,
        tied: m.tied,
        needs: &m.needs,
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
        prop_assert_eq!(p.kv(), m.needs.kv.iter().sum::<u64>());
        for part in Part::ALL {
            let of = |w: &&WeightFact| w.part == part;
            let want: u64 = m.weights.iter().filter(of).map(|w| w.bytes).sum();
            let vectors: u64 = m.weights.iter().filter(of).map(|w| w.copy).sum();
            let sum = |f: fn(&PartBytes) -> u64| p.devices.iter().map(|d| f(&d.weights[part as usize])).sum::<u64>();
            let held = sum(|b| b.mapped) + sum(|b| b.resident) - sum(|b| b.copied);
            // Vectors are widened: beside the map on the CPU, instead of it on a GPU.
            prop_assert!(held >= want && held <= want + vectors, "{part:?}: {held}, {want}");
        }
        // Nothing is copied but a tied output that lies on a GPU.
        let copies: u64 = p.devices.iter().flat_map(|d| &d.weights).map(|w| w.copied).sum();
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
        for (i, d) in p.devices.iter().enumerate() {
            let here = |w: &&WeightFact| r.tensors.get(&w.name).filter(there) == Some(&d.device);
            let named: u64 = m.weights.iter().filter(here).map(|w| w.bytes).sum();
            prop_assert!(d.mapped() + d.weights_resident() >= named, "device {i}");
        }
        // GPUs that no rule allows stay empty.
        for (i, d) in p.devices[1..].iter().enumerate() {
            let named = r.tensors.values().any(|d| *d == Device::Gpu(i));
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
    let tensor = |name: &str, layer, bytes| WeightFact {
        part: Part::of(name),
        name: name.into(),
        layer,
        bytes,
        copy: 0,
    };
    let weights = vec![
        tensor("blk.0.attn_q.weight", Some(0), 10),
        tensor("blk.0.ffn_up_exps.weight", Some(0), 100),
        tensor("blk.1.attn_q.weight", Some(1), 10),
        tensor("blk.1.ffn_up_exps.weight", Some(1), 100),
    ];
    let needs = Needs { kv: vec![5, 5], ..Needs::default() };
    let l = Load {
        weights: &weights,
        layers: 2,
        tied: false,
        needs: &needs,
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
    let tensors = HashMap::from([("blk.1.attn_q.weight".into(), Device::Cpu)]);
    let p = place(l, &machine(300), &Rules { tensors, ..Rules::default() });
    assert_eq!((p.devices[0].mapped(), p.devices[1].resident()), (10, 220));
}

/// Layers that keep their experts are the last ones: dealt by bytes, they lie on all GPUs.
#[test]
fn experts_are_spread_over_gpus_as_their_layers_are() {
    let mut weights = Vec::new();
    for i in 0..8 {
        for (name, bytes) in [("attn_q", 10), ("ffn_up_exps", 100)] {
            let name = format!("blk.{i}.{name}.weight");
            weights.push(WeightFact { part: Part::of(&name), name, layer: Some(i), bytes, copy: 0 });
        }
    }
    let needs = Needs { kv: vec![1; 8], scratch: 7, ..Needs::default() };
    let l = Load {
        weights: &weights,
        layers: 8,
        tied: false,
        needs: &needs,
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
