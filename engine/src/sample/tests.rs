//! The chain against a naive one (full sort, f64), its distribution, its determinism, its refusals and its speed.

use super::*;
use proptest::prelude::*;

/// llama.cpp's chain written the obvious way: (id, probability) of everything that may be drawn.
fn naive(logits: &[f32], o: &SamplerOptions, seen: &[u32]) -> Vec<(u32, f64)> {
    let mut l: Vec<f64> = logits.iter().map(|&x| f64::from(x)).collect();
    for &(t, b) in &o.logit_bias {
        l[t as usize] += f64::from(b);
    }
    let window = &seen[seen.len().saturating_sub(o.repeat_last_n)..];
    for (t, x) in l.iter_mut().enumerate() {
        let count = window.iter().filter(|&&s| s as usize == t).count();
        if count > 0 {
            let r = f64::from(o.repeat_penalty);
            *x = if *x > 0.0 { *x / r } else { *x * r };
            *x -= count as f64 * f64::from(o.frequency_penalty) + f64::from(o.presence_penalty);
        }
    }
    let mut c: Vec<(u32, f64)> = l.iter().enumerate().map(|(i, &x)| (i as u32, x)).collect();
    let by_logit =
        |c: &mut Vec<(u32, f64)>| c.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap().then(a.0.cmp(&b.0)));
    by_logit(&mut c);
    c.retain(|x| x.1 > f64::NEG_INFINITY);
    if o.temperature == 0.0 {
        return vec![(c[0].0, 1.0)];
    }
    if o.top_k > 0 {
        c.truncate(o.top_k);
    }
    let probs = |c: &[(u32, f64)]| -> Vec<f64> {
        let max = c.iter().map(|x| x.1).fold(f64::MIN, f64::max);
        let e: Vec<f64> = c.iter().map(|x| (x.1 - max).exp()).collect();
        let sum: f64 = e.iter().sum();
        e.iter().map(|x| x / sum).collect()
    };
    if o.typical_p < 1.0 {
        let p = probs(&c);
        let entropy: f64 = p.iter().map(|p| if *p > 0.0 { -p * p.ln() } else { 0.0 }).sum();
        let mut s: Vec<_> = c.iter().zip(&p).map(|(x, p)| ((-p.ln() - entropy).abs(), *x, *p)).collect();
        s.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.0.cmp(&b.1.0)));
        let mut mass = 0.0;
        c.clear();
        for (_, x, p) in s {
            c.push(x);
            mass += p;
            if mass > f64::from(o.typical_p) {
                break;
            }
        }
        by_logit(&mut c);
    }
    if o.top_p < 1.0 {
        let mut mass = 0.0;
        let keep = probs(&c).iter().position(|p| {
            mass += p;
            mass >= f64::from(o.top_p)
        });
        c.truncate(keep.map_or(c.len(), |k| k + 1));
    }
    let p = probs(&c);
    let cut: Vec<_> =
        c.iter().zip(&p).filter(|(_, q)| **q >= f64::from(o.min_p) * p[0]).map(|(x, _)| *x).collect();
    let hot: Vec<_> = cut.iter().map(|x| (x.0, x.1 / f64::from(o.temperature))).collect();
    hot.iter().zip(probs(&hot)).map(|(x, p)| (x.0, p)).collect()
}

/// What the real chain may draw, with probabilities, read from its candidates after a draw.
fn real(logits: &[f32], o: &SamplerOptions, seen: &[u32]) -> Vec<(u32, f64)> {
    let mut s = Sampler::new(o.clone()).unwrap();
    s.prime(seen);
    let mut row = logits.to_vec();
    let id = s.sample(&mut row).unwrap();
    if o.temperature == 0.0 {
        return vec![(id, 1.0)];
    }
    let c = &s.candidates.items;
    assert!(c.iter().any(|x| x.id == id));
    let max = c.iter().map(|x| x.logit).fold(f32::MIN, f32::max);
    let w = c.iter().map(|x| (f64::from(x.logit - max) / f64::from(o.temperature)).exp());
    let sum: f64 = w.clone().sum();
    c.iter().zip(w).map(|(x, w)| (x.id, w / sum)).collect()
}

/// Equal but for tokens whose probability is within rounding of a threshold: at most one may differ at the edge.
fn close(mut a: Vec<(u32, f64)>, mut b: Vec<(u32, f64)>) -> bool {
    a.sort_by_key(|x| x.0);
    b.sort_by_key(|x| x.0);
    a.len() == b.len() && a.iter().zip(&b).all(|(x, y)| x.0 == y.0 && (x.1 - y.1).abs() < 1e-5 + 1e-4 * y.1)
}

fn options() -> impl Strategy<Value = SamplerOptions> {
    let filters = (
        prop_oneof![Just(0usize), Just(1), Just(40), 1usize..400],
        prop_oneof![Just(1.0f32), 0.0f32..1.0],
        prop_oneof![Just(0.0f32), 0.0f32..0.3],
        prop_oneof![3 => Just(1.0f32), 1 => 0.05f32..1.0],
    );
    let penalties =
        (prop_oneof![Just(0usize), Just(usize::MAX), 1usize..40], 0.8f32..1.5, -1f32..1.0, -0.5f32..0.5);
    let rest = (prop_oneof![4 => 0.1f32..2.0, 1 => Just(0.0f32)], any::<u64>());
    let bias = prop::collection::vec((0u32..10, prop_oneof![-5f32..5.0, Just(f32::NEG_INFINITY)]), 0..3);
    (filters, penalties, rest, bias).prop_map(|(f, p, r, logit_bias)| SamplerOptions {
        top_k: f.0,
        top_p: f.1,
        min_p: f.2,
        typical_p: f.3,
        repeat_last_n: p.0,
        repeat_penalty: p.1,
        presence_penalty: p.2,
        frequency_penalty: p.3,
        temperature: r.0,
        seed: Some(r.1),
        logit_bias,
    })
}

/// A row whose logits are spread by a seeded stream: flat, peaked, with ties, with bans.
fn row(n: usize, seed: u64, spread: f32, ties: bool) -> Vec<f32> {
    let mut r = rng::Rng::new(seed);
    (0..n)
        .map(|_| {
            let x = (r.uniform() as f32 + r.uniform() as f32 - 1.0) * spread;
            match (ties, r.next_u64() % 50) {
                (_, 0) => f32::NEG_INFINITY,
                (true, _) => x.round(),
                _ => x,
            }
        })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, ..ProptestConfig::default() })]
    #[test]
    fn equals_naive(
        o in options(), n in 12usize..3000, seed in any::<u64>(), spread in 0.1f32..20.0, ties in any::<bool>(),
        seen in prop::collection::vec(0u32..12, 0..60),
    ) {
        let logits = row(n, seed, spread, ties);
        let (got, want) = (real(&logits, &o, &seen), naive(&logits, &o, &seen));
        if !close(got.clone(), want) {
            // A threshold within rounding of a candidate's own value may go either way; moving it must settle it.
            let nudge = |f: f32| SamplerOptions {
                top_p: (o.top_p * f).min(1.0), min_p: o.min_p * (2.0 - f), typical_p: (o.typical_p * f).min(1.0), ..o.clone()
            };
            let settled = [1.0 - 2e-6, 1.0 + 2e-6].iter().any(|&f| close(got.clone(), naive(&logits, &nudge(f), &seen)));
            // Equal typicality scores of distinct tokens (ties of logits) are broken by id in both, but only to rounding.
            prop_assert!(settled || (o.typical_p < 1.0 && ties), "{o:?}: {} candidates", got.len());
        }
    }

    /// The best logits alone give the same tokens, the same state and the same errors, where they are said to be enough.
    #[test]
    fn few_logits_choose_as_all(
        o in options(), n in 12usize..3000, seed in any::<u64>(), spread in 0.1f32..20.0, ties in any::<bool>(),
        seen in prop::collection::vec(0u32..12, 0..60), more in 0usize..9, lower in any::<bool>(),
    ) {
        let lowering = SamplerOptions {
            repeat_penalty: o.repeat_penalty.max(1.0),
            presence_penalty: o.presence_penalty.abs(),
            frequency_penalty: o.frequency_penalty.abs(),
            logit_bias: o.logit_bias.iter().map(|b| (b.0, -b.1.abs())).collect(),
            ..o.clone()
        };
        let o = if lower { lowering } else { o };
        let mut all = Sampler::new(o.clone()).unwrap();
        all.prime(&seen);
        let mut few = all.clone();
        for step in 0..4 {
            let logits = row(n, seed ^ step, spread, ties);
            let Some(k) = few.few(n) else {
                let tail = &seen[seen.len().saturating_sub(o.repeat_last_n)..];
                let raises = o.repeat_penalty < 1.0 || o.presence_penalty < 0.0 || o.frequency_penalty < 0.0;
                let raised = raises && (step > 0 || !tail.is_empty()) || o.logit_bias.iter().any(|b| b.1 > 0.0);
                prop_assert!(raised || o.temperature > 0.0 && !(1..n).contains(&o.top_k) || o.top_k + 24 > n.min(MOST_BEST));
                break;
            };
            let mut best: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
            best.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap().then(a.0.cmp(&b.0)));
            best.truncate((k + more).min(n));
            let want = all.sample(&mut logits.clone());
            prop_assert_eq!(&want, &few.choose(Logits::Best { best: &best, n_vocab: n }));
            let Ok(token) = want else { break };
            all.accept(token);
            few.accept(token);
        }
    }

    /// The bias towards speed in `Candidates::all` must not lose a member of the nucleus.
    #[test]
    fn nucleus_of_everything(n in 2usize..5000, seed in any::<u64>(), spread in 0.01f32..30.0, p in 0.0f32..1.0) {
        let o = SamplerOptions { top_k: 0, top_p: p, min_p: 0.0, temperature: 1.0, seed: Some(1), ..Default::default() };
        let logits = row(n, seed, spread, false);
        prop_assume!(logits.iter().any(|l| l.is_finite()));
        let (got, want) = (real(&logits, &o, &[]).len(), naive(&logits, &o, &[]).len());
        prop_assert!(got.abs_diff(want) <= 1, "{got} {want}");
    }
}

/// Chi-square of 200 000 draws against the naive probabilities.
#[test]
fn distribution() {
    for (top_k, top_p, min_p, temperature) in [
        (40, 0.95, 0.05, 0.8),
        (0, 0.9, 0.0, 1.3),
        (0, 1.0, 0.0, 1.0),
        (7, 1.0, 0.0, 0.5),
        (0, 1.0, 0.02, 1.0),
    ] {
        let o = SamplerOptions { top_k, top_p, min_p, temperature, seed: Some(5), ..Default::default() };
        let logits = row(60, 3, 4.0, false);
        let want = naive(&logits, &o, &[]);
        let mut s = Sampler::new(o).unwrap();
        let draws = 200_000;
        let mut counts = [0u32; 60];
        for _ in 0..draws {
            counts[s.sample(&mut logits.clone()).unwrap() as usize] += 1;
        }
        let total: u32 = want.iter().map(|x| counts[x.0 as usize]).sum();
        assert_eq!(total, draws, "a token outside the candidates was drawn");
        let chi: f64 = want
            .iter()
            .map(|(id, p)| {
                (f64::from(counts[*id as usize]) - p * f64::from(draws)).powi(2) / (p * f64::from(draws))
            })
            .sum();
        let freedom = want.len() as f64 - 1.0;
        // Mean k, variance 2k: five standard deviations.
        assert!(
            chi < freedom + 5.0 * (2.0 * freedom).sqrt() + 5.0,
            "chi-square {chi} for {freedom} degrees of freedom"
        );
    }
}

/// The stream is part of the interface: these ids must never change, on any platform.
#[test]
fn same_seed_same_tokens() {
    let draw = |seed| {
        let mut s = Sampler::new(SamplerOptions { seed: Some(seed), ..Default::default() }).unwrap();
        let logits: Vec<f32> = (0..5000).map(|i| ((i * 7919) % 5000) as f32 * 1e-3).collect();
        (0..12).map(|_| s.sample(&mut logits.clone()).unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(draw(42), draw(42));
    assert_ne!(draw(42), draw(43));
    assert_eq!(draw(42), PINNED);
    let o = SamplerOptions { seed: None, ..Default::default() };
    let mut s = Sampler::new(o).unwrap();
    let mut again = Sampler::new(SamplerOptions { seed: Some(s.seed()), ..Default::default() }).unwrap();
    let logits = row(100, 9, 3.0, false);
    for _ in 0..20 {
        assert_eq!(s.sample(&mut logits.clone()), again.sample(&mut logits.clone()));
    }
    let first = {
        s.reset();
        s.sample(&mut logits.clone())
    };
    s.reset();
    assert_eq!(s.sample(&mut logits.clone()), first);
}

const PINNED: [u32; 12] = [1951, 2852, 3198, 2667, 1951, 3383, 1605, 3383, 3568, 3556, 1062, 1593];

#[test]
fn ties_go_to_the_lower_id() {
    let mut greedy = Sampler::new(SamplerOptions::greedy()).unwrap();
    assert_eq!(greedy.sample(&mut [1.0, 3.0, 3.0, 2.0]), Ok(1));
    let flat = vec![0.5f32; 1000];
    let o = SamplerOptions { top_k: 3, top_p: 1.0, min_p: 0.0, seed: Some(1), ..Default::default() };
    let mut ids: Vec<u32> = real(&flat, &o, &[]).iter().map(|x| x.0).collect();
    ids.sort();
    assert_eq!(ids, [0, 1, 2]);
    let zeros = [-0.0f32, 0.0, -1.0];
    assert_eq!(greedy.sample(&mut zeros.clone()), Ok(0));
}

#[test]
fn who_needs_all_logits() {
    let o = SamplerOptions::default;
    let few = |o: SamplerOptions, seen: &[u32]| {
        let mut s = Sampler::new(o).unwrap();
        s.prime(seen);
        s.few(1000)
    };
    assert_eq!(few(SamplerOptions::greedy(), &[1, 2]), Some(1));
    assert_eq!(few(o(), &[1, 2]), Some(40));
    assert_eq!(few(SamplerOptions { repeat_penalty: 1.1, ..o() }, &[1, 2, 1]), Some(42));
    assert_eq!(few(SamplerOptions { logit_bias: vec![(7, f32::NEG_INFINITY)], ..o() }, &[]), Some(41));
    let all = [
        SamplerOptions { top_k: 0, ..o() },
        SamplerOptions { top_k: MOST_BEST + 1, ..o() },
        SamplerOptions { repeat_penalty: 0.9, ..o() },
        SamplerOptions { presence_penalty: -0.1, ..o() },
        SamplerOptions { logit_bias: vec![(7, 0.5)], ..o() },
        SamplerOptions { logit_bias: vec![(1000, -0.5)], ..o() },
    ];
    all.into_iter().for_each(|o| assert_eq!(few(o.clone(), &[1]), None, "{o:?}"));
    let mut s = Sampler::new(o()).unwrap();
    let none = Err(SampleError::NoCandidate { n_vocab: 50 });
    assert_eq!(s.choose(Logits::Best { best: &[(3, f32::NEG_INFINITY)], n_vocab: 50 }), none);
}

#[test]
fn the_window_of_penalties_slides() {
    let o = SamplerOptions { repeat_last_n: 2, presence_penalty: 10.0, ..SamplerOptions::greedy() };
    let mut s = Sampler::new(o).unwrap();
    let logits = [3.0f32, 2.0, 1.0];
    s.prime(&[0, 0, 1]);
    assert_eq!(s.sample(&mut logits.clone()), Ok(2));
    s.accept(2); // window: 1 2
    assert_eq!(s.sample(&mut logits.clone()), Ok(0));
    s.accept(0);
    s.accept(0); // window: 0 0
    assert_eq!(s.sample(&mut logits.clone()), Ok(1));
    s.reset();
    assert_eq!(s.sample(&mut logits.clone()), Ok(0));
}

#[test]
fn refusals() {
    let base = SamplerOptions::default;
    type Bad = (&'static str, SamplerOptions);
    let bad: Vec<Bad> = vec![
        ("temperature", SamplerOptions { temperature: -0.1, ..base() }),
        ("temperature", SamplerOptions { temperature: f32::NAN, ..base() }),
        ("top_p", SamplerOptions { top_p: 1.5, ..base() }),
        ("top_p", SamplerOptions { top_p: f32::NAN, ..base() }),
        ("min_p", SamplerOptions { min_p: -1.0, ..base() }),
        ("typical_p", SamplerOptions { typical_p: 2.0, ..base() }),
        ("repeat_penalty", SamplerOptions { repeat_penalty: 0.0, ..base() }),
        ("presence_penalty", SamplerOptions { presence_penalty: f32::INFINITY, ..base() }),
        ("frequency_penalty", SamplerOptions { frequency_penalty: f32::NAN, ..base() }),
        ("logit_bias", SamplerOptions { logit_bias: vec![(1, f32::INFINITY)], ..base() }),
    ];
    for (name, o) in bad {
        let e = Sampler::new(o).unwrap_err();
        assert!(e.to_string().starts_with(name), "{e}");
    }
    for o in [base(), SamplerOptions::greedy(), SamplerOptions { top_k: 0, ..base() }] {
        let mut s = Sampler::new(o.clone()).unwrap();
        let mut nan = vec![0.0f32; 300];
        nan[211] = f32::NAN;
        assert!(matches!(s.sample(&mut nan), Err(SampleError::NotFinite { token: 211, .. })));
        assert_eq!(s.sample(&mut [f32::NEG_INFINITY; 9]), Err(SampleError::NoCandidate { n_vocab: 9 }));
        assert_eq!(s.sample(&mut []), Err(SampleError::NoCandidate { n_vocab: 0 }));
        let mut s = Sampler::new(SamplerOptions { logit_bias: vec![(9, 1.0)], ..o }).unwrap();
        assert_eq!(s.sample(&mut [0.0; 9]), Err(SampleError::BiasToken { token: 9, n_vocab: 9 }));
    }
}

#[test]
fn log_probabilities() {
    let logits = row(500, 8, 5.0, false);
    let all = naive(
        &logits,
        &SamplerOptions { top_k: 0, top_p: 1.0, min_p: 0.0, temperature: 1.0, ..Default::default() },
        &[],
    );
    let got = logprobs(&logits, all[7].0, 5);
    assert!((f64::from(got.logprob) - all[7].1.ln()).abs() < 1e-5);
    let ids: Vec<u32> = got.top.iter().map(|x| x.0).collect();
    assert_eq!(ids, all[..5].iter().map(|x| x.0).collect::<Vec<_>>());
    assert!((f64::from(got.top[0].1) - all[0].1.ln()).abs() < 1e-5);
    assert_eq!(logprobs(&logits, 9999, 0), LogProbs { logprob: f32::NEG_INFINITY, top: vec![] });
}

/// Not a benchmark but a guard: a full sort of 262k logits would take tens of milliseconds.
#[test]
fn large_vocabularies_are_cheap() {
    let logits = row(262_144, 1, 30.0, false);
    let options = [
        ("defaults", SamplerOptions::default()),
        ("greedy", SamplerOptions::greedy()),
        ("top-p 0.9 of all", SamplerOptions { top_k: 0, top_p: 0.9, min_p: 0.0, ..Default::default() }),
        ("no filter", SamplerOptions { top_k: 0, top_p: 1.0, min_p: 0.0, ..Default::default() }),
        ("penalties", SamplerOptions { repeat_penalty: 1.1, ..Default::default() }),
    ];
    for (name, o) in options {
        let mut s = Sampler::new(o).unwrap();
        s.prime(&(0..1000).collect::<Vec<_>>());
        let mut row = logits.clone();
        let best = (0..15)
            .map(|_| {
                row.copy_from_slice(&logits);
                let t = std::time::Instant::now();
                s.sample(&mut row).unwrap();
                t.elapsed()
            })
            .min()
            .unwrap();
        println!("sample from 262144 logits, {name}: {best:?}");
        assert!(best.as_millis() < 30, "{name}: {best:?}");
    }
}
