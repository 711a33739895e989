//! What every policy gets for free: choosing the best, protection, checks.

use super::*;
use crate::kv::policies::testing::Layer;
use proptest::prelude::*;

/// Scores as given, by index.
#[derive(Debug)]
struct Given {
    scores: Vec<f32>,
    protect: Protect,
}

impl KvPolicy for Given {
    fn needs(&self) -> Needs {
        Needs { mass_total: true, ..Needs::default() }
    }

    fn protect(&self, _: &LayerView<'_>, _: usize) -> Protect {
        self.protect
    }

    fn score(&self, _: &LayerView<'_>, _: usize, out: &mut [f32]) {
        out.copy_from_slice(&self.scores);
    }
}

fn kept(scores: &[f32], protect: Protect, n: usize) -> Result<Vec<u32>, KvError> {
    let layer = Layer::gqa(1, 1, 4, scores.len());
    select(&Given { scores: scores.into(), protect }, &layer.view(), n).map(|s| s.head(0).to_vec())
}

#[test]
fn of_equals_the_later_stay() {
    let none = Protect::default();
    assert_eq!(kept(&[1.0, 1.0, 1.0, 1.0], none, 2).unwrap(), [2, 3]);
    assert_eq!(kept(&[0.0, -0.0, 0.0, -0.0, -1.0], none, 3).unwrap(), [1, 2, 3]);
    assert_eq!(kept(&[2.0, 1.0, f32::NEG_INFINITY, 1.0, f32::INFINITY], none, 3).unwrap(), [0, 3, 4]);
    assert_eq!(kept(&[3.0, 1.0, 2.0], none, 3).unwrap(), [0, 1, 2]);
}

#[test]
fn protected_entries_stay_within_the_budget() {
    let best = [9.0, 8.0, 0.0, 7.0, 6.0, 5.0, 0.0, 0.0];
    assert_eq!(kept(&best, Protect { first: 0, recent: 2 }, 4).unwrap(), [0, 1, 6, 7]);
    assert_eq!(kept(&best, Protect { first: 3, recent: 0 }, 4).unwrap(), [0, 1, 2, 3]);
    assert_eq!(kept(&best, Protect { first: 3, recent: 9 }, 4).unwrap(), [0, 1, 2, 7]);
    assert_eq!(kept(&best, Protect { first: 4, recent: 9 }, 4).unwrap(), [0, 1, 2, 3]);
    let e = kept(&best, Protect { first: 5, recent: 0 }, 4).unwrap_err();
    assert_eq!(e, KvError::Protected { layer: 3, protected: 5, budget: 4 });
    // Protection is of positions, not of places: after an eviction fewer of them are left.
    let mut layer = Layer::gqa(1, 1, 4, 8);
    layer.keep(&Selection { heads: 1, kept: vec![1, 5, 6, 7], scores: vec![] });
    let p = Given { scores: vec![0.0, 1.0, 2.0, 3.0], protect: Protect { first: 5, recent: 0 } };
    assert_eq!(select(&p, &layer.view(), 2).unwrap().head(0), [0, 3]);
}

#[test]
fn a_nan_is_named_and_nothing_is_chosen() {
    let e = kept(&[0.0, f32::NAN, 1.0], Protect::default(), 2).unwrap_err();
    assert_eq!(e, KvError::NanScore { layer: 3, head: 0, position: 1 });
    assert!(!e.to_string().contains('\n'));
    // Nobody asks for scores when everything may stay.
    assert_eq!(kept(&[f32::NAN, 1.0], Protect::default(), 2).unwrap(), [0, 1]);
}

#[test]
fn a_view_without_what_was_asked_for_is_refused() {
    let mut layer = Layer::gqa(2, 2, 4, 5);
    layer.mass_total.pop();
    let p = Given { scores: vec![0.0; 5], protect: Protect::default() };
    let e = select(&p, &layer.view(), 2).unwrap_err();
    assert!(matches!(&e, KvError::Shape { layer: 3, what } if what.contains("mass_total has 9")), "{e}");
}

/// A policy that picks for itself, and wrongly.
#[derive(Debug)]
struct Wrong(Selection);

impl KvPolicy for Wrong {
    fn needs(&self) -> Needs {
        Needs::default()
    }

    fn score(&self, _: &LayerView<'_>, _: usize, _: &mut [f32]) {}

    fn keep(&self, _: &LayerView<'_>, _: usize, _: Protect) -> Result<Selection, KvError> {
        Ok(self.0.clone())
    }
}

#[test]
fn impossible_selections_are_refused() {
    let layer = Layer::gqa(4, 2, 4, 6);
    let try_it = |heads, kept: &[u32], scores: usize| {
        let s = Selection { heads, kept: kept.into(), scores: vec![0.0; scores] };
        select(&Wrong(s), &layer.view(), 3)
    };
    assert!(try_it(1, &[0, 2, 5], 6).is_ok());
    assert!(try_it(2, &[0, 2, 4, 5], 12).is_ok());
    assert!(try_it(1, &[], 0).is_ok_and(|s| s.is_empty()));
    for (heads, kept, scores) in [
        (0, &[][..], 0),
        (3, &[0, 1, 2], 0),
        (2, &[0, 1, 2], 0),
        (1, &[0, 1, 2, 3], 0),
        (1, &[2, 1], 0),
        (1, &[1, 1], 0),
        (1, &[6], 0),
        (2, &[0, 1, 0, 6], 0),
        (1, &[0, 1], 5),
    ] {
        let e = try_it(heads, kept, scores);
        assert!(matches!(e, Err(KvError::Shape { layer: 3, .. })), "{heads} {kept:?} {scores}: {e:?}");
    }
}

proptest! {
    #[test]
    fn the_best_are_those_of_a_sort(
        scores in prop::collection::vec((-3i8..3).prop_map(f32::from), 1..60),
        first in 0u64..10,
        recent in 0usize..10,
        n in 10usize..60,
    ) {
        let got = kept(&scores, Protect { first, recent }, n).unwrap();
        let len = scores.len();
        if len <= n {
            prop_assert_eq!(got, (0..len as u32).collect::<Vec<_>>());
            return Ok(());
        }
        let first = first as usize;
        let recent = recent.min(n - first);
        let mut rest: Vec<usize> = (first..len - recent).collect();
        rest.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]).then(b.cmp(a)));
        rest.truncate(n - first - recent);
        rest.extend((0..first).chain(len - recent..len));
        rest.sort_unstable();
        prop_assert_eq!(got, rest.iter().map(|i| *i as u32).collect::<Vec<_>>());
    }
}
