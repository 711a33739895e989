//! The scheduler driven by a client that draws everything at random, with a cache that is only a list of tokens.

use super::*;
use proptest::prelude::*;
use std::collections::HashMap;
use std::sync::Arc;

const LIMITS: Limits = Limits { slots: 3, rows: 16, batch: 8, chunk: 5, queue: 4 };

fn job(id: u64, prompt: &[u32], exact: bool) -> Job {
    Job { id, prompt: Arc::from(prompt), exact, whole: false }
}

/// What a cache would hold: per place, tokens and whether each was a prompt's row after prompts' rows only.
#[derive(Default)]
struct World {
    slots: Vec<Vec<(u32, bool)>>,
    jobs: HashMap<u64, (Job, usize)>,
    admitted: Vec<u64>,
    /// Rows that each prompt got while it was not alone.
    finished: usize,
}

impl World {
    fn admit(&mut self, s: &mut Scheduler) {
        while let Some(a) = s.admit() {
            let prompt = self.jobs[&a.job].0.clone();
            let (past, keep) = match a.start {
                Start::Own { keep } => (self.slots[a.slot].clone(), keep),
                Start::Fork { of, keep } => {
                    assert_ne!(of, a.slot);
                    (self.slots[of].clone(), keep)
                }
            };
            self.slots[a.slot] = past[..keep].to_vec();
            assert!(keep < prompt.prompt.len());
            let kept: Vec<u32> = self.slots[a.slot].iter().map(|t| t.0).collect();
            assert_eq!(kept, prompt.prompt[..keep]);
            assert!(
                !prompt.exact || self.slots[a.slot].iter().all(|t| t.1),
                "an exact job uses decoded rows"
            );
            s.admitted(a.slot, keep);
            self.admitted.push(a.job);
        }
    }

    /// One pass; true if there was anything to do.
    fn pass(&mut self, s: &mut Scheduler, paused: impl Fn(usize) -> bool) -> bool {
        let before: Vec<Place> = s.places().collect();
        let mut pass = Vec::new();
        s.plan(&mut pass, |i| !paused(i));
        let rows = |p: &Piece| p.prompt.as_ref().map_or(1, |r| r.len());
        let all: usize = pass.iter().map(rows).sum();
        assert!(all <= LIMITS.rows);
        let decoding = pass.iter().filter(|p| p.prompt.is_none()).count();
        assert!(decoding == 0 || all - decoding <= LIMITS.chunk, "a prompt stalls others");
        let taken = |i: usize| pass.iter().find(|p| p.slot == i).map(rows);
        for (i, p) in before.iter().enumerate().filter(|(i, _)| !paused(*i)) {
            if let Some(_job) = p.job {
                let got = taken(i).expect("every sequence that can go on has a row");
                for (k, q) in before.iter().enumerate() {
                    if let (Some(other), true) = (taken(k), q.prompt_left > 0) {
                        let unfair =
                            p.prompt_left > 0 && got + 1 < other && got < p.prompt_left.min(LIMITS.batch);
                        assert!(!unfair, "{got} rows of {}, another has {other}", p.prompt_left);
                    }
                }
            }
        }
        for p in &pass {
            let cached = &mut self.slots[p.slot];
            let so_far = cached.iter().all(|t| t.1);
            cached.extend(s.tokens(p).iter().map(|&t| (t, p.prompt.is_some() && so_far)));
        }
        s.done(&pass);
        for p in pass.iter().filter(|p| p.logits) {
            let id = before[p.slot].job.expect("at work");
            let left = &mut self.jobs.get_mut(&id).expect("known").1;
            if *left == 0 {
                s.end(p.slot);
                self.finished += 1;
            } else {
                *left -= 1;
                // Tokens decoded look like those of prompts, so that prefixes reach into answers.
                s.push(p.slot, (*left % 2) as u32);
            }
        }
        !pass.is_empty()
    }
}

proptest! {
    #[test]
    fn everyone_is_served(
        jobs in prop::collection::vec((prop::collection::vec(0u32..2, 1..40), 0usize..6, any::<bool>(), 0usize..4, 0u8..10), 1..30),
        pauses in prop::collection::vec(0usize..9, 1..50),
    ) {
        let mut s = Scheduler::new(LIMITS);
        let mut w = World { slots: vec![Vec::new(); LIMITS.slots], ..World::default() };
        let (mut accepted, mut cancelled) = (Vec::new(), 0);
        for (id, (prompt, answer, exact, passes, cancel)) in jobs.into_iter().enumerate() {
            let j = job(id as u64, &prompt, exact);
            if s.submit(j.clone()).is_ok() {
                accepted.push(j.id);
                w.jobs.insert(j.id, (j, answer));
            } else {
                prop_assert!(s.waiting() >= LIMITS.queue);
            }
            if cancel == 0 && let Some(&victim) = accepted.last() {
                match s.cancel(victim) {
                    Some(Cancelled::Waiting) => { accepted.pop(); cancelled += 1; w.jobs.remove(&victim); }
                    Some(Cancelled::Running(_)) => cancelled += 1,
                    None => {}
                }
                prop_assert!(s.places().all(|p| p.job != Some(victim)), "gone at once");
                if !w.admitted.contains(&victim) && w.jobs.contains_key(&victim) { unreachable!() }
            }
            for p in 0..passes {
                w.admit(&mut s);
                let paused = pauses[(id + p) % pauses.len()];
                w.pass(&mut s, |i| i == paused);
            }
        }
        let mut guard = 0;
        while !s.is_idle() {
            w.admit(&mut s);
            prop_assert!(w.pass(&mut s, |_| false), "jobs wait and nothing happens");
            guard += 1;
            prop_assert!(guard < 3000);
        }
        prop_assert_eq!(&w.admitted, &accepted, "first come, first served");
        let running_cancelled = accepted.len() - w.finished;
        prop_assert!(running_cancelled <= cancelled);
    }
}

#[test]
fn a_long_prompt_stalls_nobody() {
    let mut s = Scheduler::new(LIMITS);
    let mut w = World { slots: vec![Vec::new(); 3], ..World::default() };
    for (id, prompt, answer) in [(1, vec![7; 3], 50), (2, vec![9; 400], 0)] {
        let j = job(id, &prompt, false);
        s.submit(j.clone()).unwrap();
        w.jobs.insert(id, (j, answer));
        w.admit(&mut s);
        w.pass(&mut s, |_| false);
    }
    let mut passes = 0;
    while s.places().any(|p| p.job == Some(1)) {
        assert!(w.pass(&mut s, |_| false));
        passes += 1;
    }
    // A token every pass: 50 of them, one made by the pass in which the second prompt began.
    assert!(passes <= 50, "{passes}");
    assert!(s.places().any(|p| p.job == Some(2) && p.prompt_left > 0));
}

#[test]
fn conversations_are_continued_and_shared() {
    let mut s = Scheduler::new(LIMITS);
    let mut w = World { slots: vec![Vec::new(); 3], ..World::default() };
    let system: Vec<u32> = (100..120).collect();
    let run = |s: &mut Scheduler, w: &mut World, id: u64, tail: &[u32], exact: bool| {
        let prompt = [&system[..], tail].concat();
        let j = job(id, &prompt, exact);
        w.jobs.insert(id, (j.clone(), 4));
        s.submit(j).unwrap();
        let a = s.admit().unwrap();
        let keep = match a.start {
            Start::Own { keep } => {
                w.slots[a.slot].truncate(keep);
                keep
            }
            Start::Fork { of, keep } => {
                w.slots[a.slot] = w.slots[of][..keep].to_vec();
                keep
            }
        };
        s.admitted(a.slot, keep);
        while !s.is_idle() {
            w.pass(s, |_| false);
        }
        (a.start, w.slots[a.slot].iter().map(|t| t.0).collect::<Vec<u32>>())
    };
    let (start, said) = run(&mut s, &mut w, 1, &[1; 30], false);
    assert_eq!(start, Start::Own { keep: 0 });
    // Another conversation with the same system prompt leaves the first one whole.
    let (start, _) = run(&mut s, &mut w, 2, &[2; 5], false);
    assert_eq!(start, Start::Fork { of: 0, keep: 20 });
    // The first goes on from its answer; where the seed decides, from its prompt.
    let tail = [&said[20..], &[5, 5]].concat();
    let (start, _) = run(&mut s, &mut w, 3, &tail, true);
    assert_eq!(start, Start::Own { keep: 50 });
    let (start, _) = run(&mut s, &mut w, 4, &[&tail[..], &[6]].concat(), false);
    assert_eq!(start, Start::Own { keep: 20 + tail.len() });
    // Who wants to see every row computed gets none that is cached.
    s.submit(Job { whole: true, ..job(5, &system, false) }).unwrap();
    assert_eq!(s.admit().unwrap().start, Start::Own { keep: 0 });
}

#[test]
fn the_queue_has_an_end() {
    let mut s = Scheduler::new(LIMITS);
    for id in 0..7 {
        assert_eq!(s.submit(job(id, &[1], false)), Ok(()), "{id}");
    }
    assert_eq!(s.submit(job(7, &[1], false)), Err(QueueFull));
    assert_eq!(s.cancel(3), Some(Cancelled::Waiting));
    assert_eq!(s.submit(job(8, &[1], false)), Ok(()));
    assert_eq!(s.cancel(99), None);
}
