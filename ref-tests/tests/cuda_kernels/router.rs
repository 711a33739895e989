//! The router against the CPU's, over gatings, corrections and group limits, with ties.

use crate::{Gpu, n, p};
use kernels::cpu::CpuBackend;
use kernels::cpu::isa::Isa;
use kernels::cuda::modules::module;
use kernels::testing::Rng;
use kernels::{Device, Gating, GroupScore, Groups, HostBytes, Router, Routes, Vector, View, Weight};
use ptx::Param;
use quant::DType;

struct Case {
    experts: usize,
    d: usize,
    used: usize,
    gating: Gating,
    correction: bool,
    groups: Option<Groups>,
    normalize: bool,
}

fn check(c: &Case, seed: u64) {
    let mut rng = Rng(seed);
    let rows = 3;
    let mut w: Vec<f32> = (0..c.experts * c.d).map(|_| rng.unit()).collect();
    // Two experts alike: a tie in every row.
    if c.experts > 5 {
        w.copy_within(c.d..2 * c.d, 5 * c.d);
    }
    let x: Vec<f32> = (0..rows * c.d).map(|_| rng.unit()).collect();
    let mut correction: Vec<f32> = (0..c.experts).map(|_| 0.3 * rng.unit()).collect();
    if c.experts > 5 {
        correction[5] = correction[1];
    }

    let mut g = Gpu::new(module("router").unwrap());
    let (dw, dx, dc) = (g.floats(&w), g.floats(&x), g.floats(&correction));
    let logits = g.room(rows * c.experts);
    g.run("router_logits", [c.experts, rows], 64, &[p(dw), p(dx), n(c.d), n(c.d), p(logits)]);
    let (ids, weights) = (g.room(rows * c.used), g.room(rows * c.used));
    let groups =
        c.groups.map_or((0, 0, 0), |g| (g.count, g.used, usize::from(g.score == GroupScore::Top2Sum)));
    let params = [
        p(logits),
        n(c.experts),
        n(usize::from(c.gating == Gating::Sigmoid)),
        p(if c.correction { dc } else { 0 }),
        n(groups.0),
        n(groups.1),
        n(groups.2),
        n(c.used),
        n(usize::from(c.normalize)),
        Param::F32(2.5),
        p(ids),
        p(weights),
    ];
    g.run_shared("route", [1, rows, 1], 32, 2 * c.experts + groups.0, &params);

    let bytes = w.iter().flat_map(|v| v.to_le_bytes()).collect();
    let weight = Weight::host(DType::F32, 1, c.experts, c.d, HostBytes::from_vec(bytes)).unwrap();
    let correction = Vector::new(correction);
    let router = Router {
        weight: &weight,
        gating: c.gating,
        correction: c.correction.then_some(&correction),
        groups: c.groups,
        used: c.used,
        normalize: c.normalize,
        scale: 2.5,
    };
    let mut want = Routes::default();
    Device::new(CpuBackend::new(1)).route(router, View::from_host(&x, c.d), &mut want).unwrap();
    let what = format!("{} experts, {} used, {:?}, {:?}", c.experts, c.used, c.gating, c.groups);
    let got: Vec<u32> = g.read(ids, rows * c.used).iter().map(|v| v.to_bits()).collect();
    assert_eq!(got, want.ids, "{what}");
    // To the bit where the CPU fuses multiply-adds as a GPU does.
    let exact = Isa::current().name().starts_with("avx");
    for (g, w) in g.read(weights, rows * c.used).iter().zip(&want.weights) {
        assert!(
            if exact { g.to_bits() == w.to_bits() } else { (g - w).abs() <= 1e-5 * w.abs() },
            "{what}: {g} {w}"
        );
    }
}

#[test]
fn routes_are_the_cpus() {
    let groups = |count, used, score| Some(Groups { count, used, score });
    let cases = [
        (1, 16, 1, None),
        (6, 33, 2, None),
        (8, 64, 8, None),
        (33, 100, 6, None),
        (64, 17, 6, None),
        (16, 48, 4, groups(4, 2, GroupScore::Max)),
        (64, 80, 6, groups(8, 3, GroupScore::Max)),
        (64, 80, 8, groups(8, 4, GroupScore::Top2Sum)),
        (6, 16, 2, groups(6, 3, GroupScore::Top2Sum)),
        (160, 130, 6, groups(8, 3, GroupScore::Max)),
        (256, 64, 8, groups(8, 4, GroupScore::Top2Sum)),
    ];
    for (i, (experts, d, used, groups)) in cases.into_iter().enumerate() {
        for gating in [Gating::Softmax, Gating::Sigmoid] {
            for (correction, normalize) in [(false, false), (true, true)] {
                check(&Case { experts, d, used, gating, correction, groups, normalize }, i as u64);
            }
        }
    }
}
