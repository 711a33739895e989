//! A request to the engine and what comes back: tokens in, pieces of text out. Every dialect is a translation of these.

use super::failure::Failure;
use engine::text::thinking::{Part, ThinkTags};
use engine::{Constraint, SamplerOptions};
use std::time::Duration;

/// What to generate.
pub struct Generate {
    /// Not empty, and shorter than the context where that is the end.
    pub prompt: Vec<u32>,
    /// The first so many tokens, the system prompt, should stay when the context overflows; `None`: as the cache is made.
    pub head: Option<usize>,
    /// Log-probabilities of the prompt's tokens, too, but for so many of the first: all of it is computed.
    pub echo: Option<usize>,
    pub sampler: SamplerOptions,
    pub max_tokens: usize,
    /// Strings that end the answer; not part of it.
    pub stop: Vec<String>,
    pub ignore_eos: bool,
    /// Show control tokens as text.
    pub special: bool,
    /// Control tokens to show even so: those of tool calls.
    pub show: Vec<u32>,
    /// The tags around thinking, where it is to be told apart.
    pub think: Option<Think>,
    /// Log-probabilities, with so many alternatives each.
    pub logprobs: Option<usize>,
    pub constraint: Option<Box<dyn Constraint>>,
}

/// How an answer's thinking is found.
#[derive(Clone, Copy, Debug)]
pub struct Think {
    pub tags: ThinkTags,
    /// The prompt has opened it.
    pub opened: bool,
}

/// One thing that happens to a request, in this order: `Queued`, `Started`, `Chunk`s, then `Done` or `Failed`. A stream that
/// ends without either was cut off by the server's end.
#[derive(Clone, Debug)]
pub enum Event {
    /// It has a place in the queue.
    Queued,
    /// It has left the queue.
    Started,
    Chunk(Chunk),
    Done(Finish),
    Failed(Failure),
}

/// What a token brought. Text may be held back until it is certain, so parts may be empty.
#[derive(Clone, Debug, Default)]
pub struct Chunk {
    pub parts: Vec<Part>,
    pub token: Option<u32>,
    /// The token's; before the first one those of the prompt, where they are wanted.
    pub logprobs: Vec<TokenLogprob>,
}

/// A token's log-probability and those of the most probable ones.
#[derive(Clone, Debug)]
pub struct TokenLogprob {
    pub id: u32,
    pub bytes: Vec<u8>,
    /// NaN, which JSON writes as null: nothing came before it.
    pub logprob: f32,
    pub top: Vec<(u32, Vec<u8>, f32)>,
}

/// Why an answer ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The model, or the constraint, said so.
    Stop,
    /// A stop string.
    StopString(String),
    /// So many tokens were asked for, or the context is full and may not move on.
    Length,
}

/// The end of an answer.
#[derive(Clone, Debug)]
pub struct Finish {
    pub reason: Reason,
    pub prompt_tokens: usize,
    pub cached_tokens: usize,
    /// Tokens made, the end token not counted.
    pub new_tokens: usize,
    /// How many of them were thought.
    pub thought_tokens: usize,
    /// Tokens of the conversation that the model does not see any more.
    pub evicted: usize,
    /// How many of them are of what should have stayed: the system prompt is too long for the context.
    pub head_evicted: usize,
    pub queued: Duration,
    pub prompt_time: Duration,
    pub decode_time: Duration,
}
