//! An answer as it comes, in pieces that know no dialect: thinking, text, tool calls.

use super::failure::Failure;
use super::models::Lease;
use super::options::Options;
use super::request::{Event, Finish, TokenLogprob};
use super::tools::{Parser, Piece, ToolCall};
use engine::text::thinking::Part;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// See the module. Dropping it cancels the request.
pub struct Answer {
    /// Keeps the model.
    pub lease: Arc<Lease>,
    /// The prompt's tokens.
    pub prompt: Vec<u32>,
    /// When it was asked for; loading the model comes after that.
    since: Instant,
    /// What was asked for.
    pub options: Arc<Options>,
    parser: Option<Parser>,
    events: mpsc::Receiver<Event>,
    finish: Option<Finish>,
    calls: usize,
    one_call: bool,
}

/// What comes next.
#[derive(Debug)]
pub enum Step {
    Said(Said),
    Done(End),
}

/// What a token brought; all may be empty.
#[derive(Debug, Default)]
pub struct Said {
    pub pieces: Vec<Piece>,
    pub token: Option<u32>,
    /// The token's; before the first one those of the prompt, where they are wanted.
    pub logprobs: Vec<TokenLogprob>,
}

/// The end of an answer.
#[derive(Clone, Debug)]
pub struct End {
    pub finish: Finish,
    /// Tools were called.
    pub calls: usize,
    pub load: Duration,
    pub total: Duration,
    /// The model was loaded anew for a larger context.
    pub reloaded: bool,
}

/// A whole answer.
#[derive(Debug, Default)]
pub struct Whole {
    pub thinking: String,
    pub text: String,
    pub calls: Vec<ToolCall>,
    pub tokens: Vec<u32>,
    pub logprobs: Vec<TokenLogprob>,
}

impl Whole {
    /// Adds what came.
    pub fn take(&mut self, said: Said) {
        self.tokens.extend(said.token);
        self.logprobs.extend(said.logprobs);
        for p in said.pieces {
            match p {
                Piece::Thinking(t) => self.thinking.push_str(&t),
                Piece::Text(t) => self.text.push_str(&t),
                Piece::Call(c) => self.calls.push(c),
            }
        }
    }
}

impl Answer {
    pub(super) fn new(
        lease: Arc<Lease>,
        prompt: Vec<u32>,
        since: Instant,
        options: Arc<Options>,
        parser: Option<Parser>,
        one_call: bool,
        events: mpsc::Receiver<Event>,
    ) -> Self {
        Self { lease, prompt, since, options, parser, events, finish: None, calls: 0, one_call }
    }

    /// Waits until it has a place in the queue.
    ///
    /// # Errors
    /// There is none.
    pub(super) async fn accepted(&mut self) -> Result<(), Failure> {
        match self.events.recv().await {
            Some(Event::Failed(f)) => Err(f),
            Some(_) => Ok(()),
            None => Err(broken()),
        }
    }

    /// The next step; after [`Step::Done`] or an error there is none.
    ///
    /// # Errors
    /// Why the answer broke off.
    pub async fn next(&mut self) -> Result<Step, Failure> {
        loop {
            if let Some(finish) = self.finish.take() {
                return Ok(Step::Done(End {
                    finish,
                    calls: self.calls,
                    load: self.lease.load_time,
                    total: self.since.elapsed(),
                    reloaded: self.lease.reloaded,
                }));
            }
            match self.events.recv().await {
                Some(Event::Queued | Event::Started) => {}
                Some(Event::Chunk(c)) => {
                    let pieces = c.parts.into_iter().flat_map(|p| self.parse(p)).collect();
                    return Ok(Step::Said(Said { pieces, token: c.token, logprobs: c.logprobs }));
                }
                Some(Event::Done(f)) => {
                    self.finish = Some(f);
                    let pieces = self.parser.as_mut().map(Parser::finish).unwrap_or_default();
                    let pieces = self.count(pieces);
                    if !pieces.is_empty() {
                        return Ok(Step::Said(Said { pieces, ..Said::default() }));
                    }
                }
                Some(Event::Failed(f)) => return Err(f),
                None => return Err(broken()),
            }
        }
    }

    fn parse(&mut self, part: Part) -> Vec<Piece> {
        let pieces = match (part, &mut self.parser) {
            (Part::Thinking(t), _) => vec![Piece::Thinking(t)],
            (Part::Answer(t), None) => vec![Piece::Text(t)],
            (Part::Answer(t), Some(p)) => p.push(&t),
        };
        self.count(pieces)
    }

    /// Counts calls; leaves out those that are not wanted.
    fn count(&mut self, mut pieces: Vec<Piece>) -> Vec<Piece> {
        pieces.retain(|p| {
            let call = matches!(p, Piece::Call(_));
            let wanted = !(call && self.one_call && self.calls > 0);
            self.calls += usize::from(call && wanted);
            wanted
        });
        pieces
    }

    /// Waits for all of it.
    ///
    /// # Errors
    /// Why it broke off.
    pub async fn whole(&mut self) -> Result<(Whole, End), Failure> {
        let mut all = Whole::default();
        loop {
            match self.next().await? {
                Step::Said(said) => all.take(said),
                Step::Done(end) => return Ok((all, end)),
            }
        }
    }
}

fn broken() -> Failure {
    Failure::Internal("the answer broke off; try again".into())
}
