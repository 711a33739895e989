//! The cache against a naive model of it: every row sees exactly what it should, in order, once; whatever else happened to
//! its sequence and to the others in between.

use super::*;
use crate::kv::file::Origin;
use crate::kv::geometry::SecondKind;
use crate::kv::policy::{AttentionKind, KvPolicy, LayerGeometry, Needs, Rotary};
use crate::kv::spec::{KvPlan, Positions, SetPlan, Trigger};
use crate::kv::step::Rows;
use kernels::View;
use kernels::cpu::CpuBackend;
use proptest::prelude::*;
use quant::DType;
use std::sync::Arc;

const HEADS: usize = 2;
const CHUNK: usize = 40;
const LOCAL: usize = 5;

/// An order of positions that differs from head to head.
fn score(position: u64, head: usize) -> f32 {
    let x = (position * HEADS as u64 + head as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (x >> 40) as f32
}

#[derive(Debug)]
struct Scrambled;

impl KvPolicy for Scrambled {
    fn needs(&self) -> Needs {
        Needs { keys: true, ..Needs::default() }
    }

    fn score(&self, view: &LayerView<'_>, head: usize, out: &mut [f32]) {
        // The keys hold what was written for these positions.
        assert_eq!(view.keys(head).len(), view.entries);
        let positions = view.positions(head);
        out.iter_mut().zip(positions).for_each(|(o, p)| *o = score(*p, head));
    }
}

fn specs() -> Vec<LayerSpec> {
    let spec = |layer, window| LayerSpec {
        first: HEADS,
        second: HEADS,
        second_kind: SecondKind::Values,
        window,
        geometry: LayerGeometry {
            layer,
            n_layers: 2,
            kind: AttentionKind::Gqa,
            heads: HEADS,
            kv_heads: HEADS,
            key: 1,
            k_pe: 0,
            value: 1,
            scale: 1.0,
            rotary: Rotary { start: 0, freqs: Arc::new([]), adjacent: true },
            records_queries: true,
        },
    };
    vec![spec(0, Some(LOCAL)), spec(1, None)]
}

fn plan(kind: usize) -> KvPlan {
    match kind {
        0 => KvPlan::Full,
        1 => KvPlan::Ring { sinks: 3, window: 50 },
        2 => KvPlan::Ring { sinks: 0, window: 7 },
        3 => KvPlan::Ring { sinks: 35, window: 36 },
        8 => KvPlan::Ring { sinks: 64, window: 66 },
        _ => KvPlan::Set(SetPlan {
            policy: Arc::new(Scrambled),
            needs: Scrambled.needs(),
            budgets: vec![30],
            trigger: Trigger { prompt_end: kind.is_multiple_of(2), every: (kind < 6).then_some(9) },
            positions: Positions::Original,
        }),
    }
}

fn arena(kind: usize) -> Arena {
    let options = ArenaOptions { ctx: 400, chunk: CHUNK, sequences: 3, keep: plan(kind) };
    let types = CacheTypes { k: DType::F32, v: DType::F32, k_pe: None };
    Arena::new(&Device::new(CpuBackend::new(1)).into(), &specs(), types, options).unwrap()
}

/// A sequence as it should be.
#[derive(Clone, Default)]
struct Naive {
    /// One id per token.
    ids: Vec<u32>,
    /// Per head: indices that the set holds.
    kept: Vec<Vec<usize>>,
    evicted_at: usize,
    decoded: usize,
    /// Sinks of its own.
    sinks: Option<usize>,
    /// Its length when it was loaded from a file, which holds what the next query sees and no more.
    loaded: usize,
}

impl Naive {
    fn new() -> Self {
        Self { kept: vec![Vec::new(); HEADS], ..Self::default() }
    }

    fn evict(&mut self, n: usize) {
        if self.kept[0].len() <= n {
            return;
        }
        for (h, kept) in self.kept.iter_mut().enumerate() {
            kept.sort_by(|a, b| score(*b as u64, h).total_cmp(&score(*a as u64, h)).then(b.cmp(a)));
            kept.truncate(n);
            kept.sort();
        }
        self.evicted_at = self.ids.len();
    }

    /// Of every stretch of the tokens, how much the next query sees over layers and heads.
    fn held(&self, plan: &KvPlan, parts: usize) -> Vec<f32> {
        let (len, mut next) = (self.ids.len(), self.clone());
        next.ids.push(u32::MAX);
        let parts = parts.min(len);
        let (mut seen, mut all) = (vec![0.0; parts], vec![0.0; parts]);
        for (l, h) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let ids = next.sees(plan, l, h, len).0;
            for (i, id) in self.ids.iter().enumerate() {
                all[i * parts / len] += 1.0;
                seen[i * parts / len] += f32::from(u8::from(ids.contains(id)));
            }
        }
        seen.iter().zip(&all).map(|(s, a)| s / a).collect()
    }

    /// The ids that a query at index `t` sees in layer `l`, head `h`, and how many of them are sinks.
    fn sees(&self, plan: &KvPlan, l: usize, h: usize, t: usize) -> (Vec<u32>, usize) {
        let window = |sinks: usize, w: usize| {
            let from = (t + 1).saturating_sub(w).max(sinks.min(t + 1));
            ((0..sinks.min(t + 1)).chain(from..t + 1).map(|i| self.ids[i]).collect(), sinks.min(t + 1))
        };
        match (plan, l) {
            (KvPlan::Ring { window: w, .. }, 0) => window(0, LOCAL.min(*w)),
            (_, 0) => window(0, LOCAL),
            (KvPlan::Full, _) => window(0, usize::MAX),
            (KvPlan::Ring { sinks, window: w }, _) => {
                let own = self.sinks.unwrap_or(*sinks);
                window(own, sinks + w - own)
            }
            (KvPlan::Set(_), _) => {
                (self.kept[h].iter().filter(|i| **i <= t).map(|i| self.ids[*i]).collect(), 0)
            }
        }
    }
}

struct World {
    arena: Arena,
    plan: KvPlan,
    seqs: Vec<(SeqId, Naive)>,
    next: u32,
}

impl World {
    /// Appends `n` tokens to each of the given sequences in one pass.
    fn pass(&mut self, which: &[usize], n: usize, prompt: usize) {
        let mut ids: Vec<Vec<u32>> = Vec::new();
        for &i in which {
            let new: Vec<u32> = (self.next..self.next + n as u32).collect();
            self.next += n as u32;
            let naive = &mut self.seqs[i].1;
            if let KvPlan::Set(p) = &self.plan {
                let capacity = p.budgets[0] + CHUNK.max(p.trigger.every.unwrap_or(1));
                if naive.kept[0].len() + n > capacity {
                    naive.evict(p.budgets[0].min(capacity - n));
                }
            }
            let len = naive.ids.len();
            naive.ids.extend(&new);
            naive.kept.iter_mut().for_each(|k| k.extend(len..len + n));
            ids.push(new);
        }
        let rows: Vec<Rows<'_>> =
            which.iter().zip(&ids).map(|(&i, tokens)| Rows { seq: self.seqs[i].0, tokens, prompt }).collect();
        self.arena.begin(&rows).unwrap();
        let device = self.arena.layers[0].device.clone();
        let values: Vec<f32> = ids.iter().flatten().flat_map(|id| [*id as f32; HEADS]).collect();
        for l in 0..2 {
            let view = View::from_host(&values, HEADS);
            let stored = self.arena.append(&device, l, view, view).unwrap();
            let mut row = 0;
            for &i in which {
                let naive = &self.seqs[i].1;
                let len = naive.ids.len();
                for t in len - n..len {
                    let spans = stored.visible.row(row);
                    let slots: Vec<u32> = spans.iter().flat_map(|s| s.start..s.start + s.len).collect();
                    let sinks: usize = spans.iter().filter(|s| s.sink).map(|s| s.len as usize).sum();
                    for buf in [stored.first, stored.second] {
                        for h in 0..HEADS {
                            let mut got = vec![0.0; slots.len()];
                            device.kv_read(buf, &slots, h..h + 1, &mut got).unwrap();
                            let got: Vec<u32> = got.iter().map(|x| *x as u32).collect();
                            assert_eq!((got, sinks), naive.sees(&self.plan, l, h, t), "layer {l} at {t}");
                        }
                    }
                    row += 1;
                }
            }
        }
        self.arena.commit().unwrap();
    }

    /// What regular evictions do after a pass.
    fn settle(&mut self, i: usize, decoded: usize, prompt_ended: bool) {
        let KvPlan::Set(p) = &self.plan else { return };
        let naive = &mut self.seqs[i].1;
        naive.decoded = if prompt_ended { 0 } else { naive.decoded + decoded };
        let due = p.trigger.every.is_some_and(|e| naive.decoded >= e);
        if due || (prompt_ended && p.trigger.prompt_end) {
            naive.decoded = 0;
            naive.evict(p.budgets[0]);
        }
    }

    fn prompt(&mut self, i: usize, n: usize, chunk: usize) {
        let mut left = n;
        while left > 0 {
            let some = left.min(chunk);
            self.pass(&[i], some, n);
            left -= some;
            self.settle(i, 0, left == 0);
        }
    }

    fn decode(&mut self, which: &[usize]) {
        self.pass(which, 1, 0);
        which.iter().for_each(|&i| self.settle(i, 1, false));
    }

    fn truncate(&mut self, i: usize, share: usize) {
        let (id, naive) = &mut self.seqs[i];
        let now = naive.ids.len();
        let want = now * share / 100;
        let left = self.arena.truncate(*id, want).unwrap();
        assert!(left <= want);
        let unsaved = |window: usize| want < naive.loaded && naive.loaded >= window;
        match &self.plan {
            KvPlan::Full => assert!(left == want || want + LOCAL < now || unsaved(LOCAL)),
            KvPlan::Ring { sinks, window } => {
                assert!(left == want || now > sinks + window || now > LOCAL || unsaved(LOCAL.min(*window)));
            }
            KvPlan::Set(_) => {
                assert!(left == 0 || (left == want && (want >= naive.evicted_at || want == now)))
            }
        }
        naive.ids.truncate(left);
        naive.kept.iter_mut().for_each(|k| k.retain(|i| *i < left));
        if left < now {
            naive.decoded = 0;
        }
        if left == 0 {
            (naive.evicted_at, naive.loaded) = (0, 0);
        }
    }

    fn set_sinks(&mut self, i: usize, n: usize) {
        let (id, naive) = &mut self.seqs[i];
        let now = naive.ids.len();
        let left = self.arena.set_sinks(*id, n).unwrap();
        match &self.plan {
            KvPlan::Ring { sinks, window } if *sinks > 0 => {
                let (own, all) = (self.arena.sinks(*id).unwrap(), sinks + window);
                assert!(own >= n.min(self.arena.most_sinks()) && all - own >= all / 4, "{own} of {all}");
                let old = naive.sinks.unwrap_or(*sinks);
                assert!(left == now || now > all || naive.loaded > 0 || !old.is_multiple_of(32));
                naive.sinks = (naive.sinks.is_some() || own != *sinks).then_some(own);
            }
            _ => assert_eq!(left, now),
        }
        naive.ids.truncate(left);
        if left == 0 {
            naive.loaded = 0;
        }
    }

    fn save_and_load(&mut self, i: usize) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cache");
        let origin = Origin { model: [7; 32], kv: "test", n_vocab: usize::MAX };
        let id = self.seqs[i].0;
        self.arena.save(id, &origin, &path).unwrap();
        self.arena.truncate(id, 0).unwrap();
        self.arena.load(id, &origin, &path).unwrap();
        let other = Origin { model: [8; 32], ..origin };
        assert!(matches!(self.arena.load(id, &other, &path), Err(EngineError::CacheFile { .. })));
        let mut bytes = std::fs::read(&path).unwrap();
        let at = bytes.len() / 2;
        bytes[at] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        let origin = Origin { model: [7; 32], kv: "test", n_vocab: usize::MAX };
        assert!(matches!(self.arena.load(id, &origin, &path), Err(EngineError::CacheFile { .. })));
        bytes.truncate(at);
        std::fs::write(&path, &bytes).unwrap();
        assert!(matches!(self.arena.load(id, &origin, &path), Err(EngineError::CacheFile { .. })));
        let naive = &mut self.seqs[i].1;
        assert_eq!(self.arena.tokens(id).unwrap(), naive.ids);
        naive.loaded = naive.ids.len();
    }
}

#[derive(Clone, Debug)]
enum Op {
    Prompt(usize, usize, usize),
    Decode(usize, usize),
    Together(usize),
    Fork(usize),
    Free(usize),
    Truncate(usize, usize),
    Save(usize),
    Sinks(usize, usize),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => (0..3usize, 1..100usize, 1..=CHUNK).prop_map(|(i, n, c)| Op::Prompt(i, n, c)),
        3 => (0..3usize, 1..60usize).prop_map(|(i, n)| Op::Decode(i, n)),
        3 => (1..40usize).prop_map(Op::Together),
        2 => (0..3usize).prop_map(Op::Fork),
        1 => (0..3usize).prop_map(Op::Free),
        2 => (0..3usize, prop_oneof![0..=100usize, Just(100), 90..=100usize]).prop_map(|(i, s)| Op::Truncate(i, s)),
        1 => (0..3usize).prop_map(Op::Save),
        2 => (0..3usize, 0..120usize).prop_map(|(i, n)| Op::Sinks(i, n)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nothing_is_lost_and_nothing_attended_twice(kind in 0..9usize, ops in prop::collection::vec(op(), 1..24)) {
        let arena = arena(kind);
        let bytes = arena.bytes();
        let mut w = World { arena, plan: plan(kind), seqs: Vec::new(), next: 1 };
        for op in ops {
            if w.seqs.is_empty() {
                w.seqs.push((w.arena.admit(0).unwrap(), Naive::new()));
            }
            let n = w.seqs.len();
            let room = |w: &World, i: usize| match w.plan {
                KvPlan::Full => 400 - w.seqs[i].1.ids.len(),
                _ => usize::MAX,
            };
            match op {
                Op::Prompt(i, len, chunk) => {
                    let len = len.min(room(&w, i % n));
                    w.prompt(i % n, len, chunk);
                }
                Op::Decode(i, len) => {
                    for _ in 0..len.min(room(&w, i % n)) {
                        w.decode(&[i % n]);
                    }
                }
                Op::Together(len) => {
                    let all: Vec<usize> = (0..n).collect();
                    let room = all.iter().map(|i| room(&w, *i)).min().unwrap();
                    for _ in 0..len.min(room) {
                        w.decode(&all);
                    }
                }
                Op::Fork(i) => match w.arena.fork(w.seqs[i % n].0) {
                    Ok(id) => {
                        let naive = w.seqs[i % n].1.clone();
                        w.seqs.push((id, naive));
                    }
                    Err(e) => {
                        let full = matches!(e, EngineError::NoRoom { sequences: 3 });
                        prop_assert!(n == 3 && full);
                    }
                },
                Op::Free(i) => {
                    let (id, _) = w.seqs.remove(i % n);
                    w.arena.free(id).unwrap();
                    let freed = matches!(w.arena.free(id), Err(EngineError::NoSequence));
                    prop_assert!(freed);
                }
                Op::Truncate(i, share) => w.truncate(i % n, share),
                Op::Save(i) => w.save_and_load(i % n),
                Op::Sinks(i, sinks) => w.set_sinks(i % n, sinks),
            }
        }
        for (id, naive) in std::mem::take(&mut w.seqs) {
            prop_assert_eq!(w.arena.tokens(id).unwrap(), &naive.ids[..]);
            for parts in [7, naive.ids.len()] {
                let (got, want) = (w.arena.held(id, parts).unwrap(), naive.held(&w.plan, parts));
                prop_assert!(got.len() == want.len() && got.iter().zip(&want).all(|(g, w)| (g - w).abs() < 1e-5));
            }
            w.arena.free(id).unwrap();
        }
        prop_assert_eq!(w.arena.entries().0, 0);
        prop_assert_eq!(w.arena.bytes(), bytes);
    }
}

#[test]
fn what_does_not_fit_is_refused_and_nothing_changes() {
    let mut a = arena(0);
    let id = a.admit(0).unwrap();
    let tokens = [1u32; CHUNK];
    let rows = |tokens| [Rows { seq: id, tokens, prompt: 1 }];
    for _ in 0..400 / CHUNK {
        a.begin(&rows(&tokens)).unwrap();
        a.commit().unwrap();
    }
    assert!(matches!(a.begin(&rows(&tokens[..1])), Err(EngineError::Context { need: 401, ctx: 400 })));
    assert!(a.begin(&rows(&[])).is_err() && a.begin(&rows(&[1; CHUNK + 1])).is_err());
    assert!(a.begin(&[rows(&tokens[..1])[0], rows(&tokens[..1])[0]]).is_err());
    a.truncate(id, 2).unwrap();
    // Entries of the local layer before the last few are gone: all was forgotten.
    assert_eq!(a.tokens(id).unwrap().len(), 0);
    a.begin(&rows(&tokens[..3])).unwrap();
    assert_eq!(a.positions(0).1, [0, 1, 2]);
    assert!(a.admit(u64::MAX).is_err());
}
