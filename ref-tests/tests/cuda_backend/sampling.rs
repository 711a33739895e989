//! Sampling on a GPU: the tokens that whole rows of logits give, of the few that are read.

use crate::interpreted;
use crate::models::{load, options};
use engine::{GenerateOptions, Sampler, SamplerOptions, Session};
use quant::DType;
use ref_tests::gpu::{Counts, Interpreted};
use std::ops::ControlFlow;

const PROMPT: [u32; 3] = [1, 5, 9];
const TOKENS: usize = 5;

fn start(o: &SamplerOptions) -> (Session, Sampler, Interpreted) {
    let (dev, on) = interpreted();
    let model = load("llama3", Some(dev.into()));
    let session = Session::new(&model, &options(16, 8, DType::F16)).expect("a session");
    (session, Sampler::new(o.clone()).expect("a sampler"), on)
}

/// The tokens behind the prompt, of whole rows.
fn whole(o: &SamplerOptions) -> Vec<u32> {
    let (mut session, mut sampler, _) = start(o);
    sampler.prime(&PROMPT);
    let mut next = PROMPT.to_vec();
    let choose = |_| {
        let token = sampler.sample(session.eval(&next).expect("evaluation")).expect("a token");
        sampler.accept(token);
        next = vec![token];
        token
    };
    (0..TOKENS).map(choose).collect()
}

/// The same of what a generation reads, what that cost, and the entries of the vocabulary.
fn generated(o: &SamplerOptions) -> (Vec<u32>, Counts, usize) {
    let (mut session, mut sampler, on) = start(o);
    let limits = GenerateOptions { max_tokens: Some(TOKENS), ignore_eos: true, ..Default::default() };
    let before = on.counts();
    let made = session.generate(&PROMPT, &mut sampler, &limits, |_| ControlFlow::Continue(()));
    (made.expect("tokens").tokens, on.counts() - before, session.model().info().n_vocab)
}

#[test]
fn few_logits_give_the_same_tokens() {
    let o = || SamplerOptions { seed: Some(3), top_k: 20, ..Default::default() };
    for (o, few) in [
        (SamplerOptions::greedy(), Some(1)),
        (o(), Some(20)),
        (SamplerOptions { temperature: 3.0, typical_p: 0.9, ..o() }, Some(20)),
        (SamplerOptions { top_k: 0, ..o() }, None),
        (SamplerOptions { presence_penalty: -1.0, ..o() }, None),
    ] {
        let (got, counts, n_vocab) = generated(&o);
        assert_eq!(got, whole(&o), "{o:?}");
        let each = few.map_or(4 * n_vocab, |k| 8 * k);
        assert_eq!((counts.read, counts.waits), (TOKENS * each, TOKENS), "{o:?}");
        // The prompt's, the first decoded token's, and graphs from there.
        assert_eq!((counts.graphs, counts.runs), (1, TOKENS - 2));
    }
    // With penalties as many more as there are tokens seen, which grow: a graph still serves.
    let o = SamplerOptions { repeat_penalty: 1.3, frequency_penalty: 0.2, ..o() };
    let (got, counts, _) = generated(&o);
    assert_eq!(got, whole(&o));
    assert!(counts.read >= TOKENS * 8 * 23 && counts.read <= TOKENS * 8 * 28, "{counts:?}");
    assert_eq!((counts.graphs, counts.runs, counts.waits), (1, TOKENS - 2, TOKENS));
}
