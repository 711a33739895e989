//! One request at work: from a row of logits to the next token and the text it makes certain. Knows nothing of other requests.

use super::failure::Failure;
use super::request::{Chunk, Event, Finish, Generate, Reason, TokenLogprob};
use engine::Constraint;
use engine::sample::logprobs;
use engine::text::thinking::{Part, Splitter};
use engine::text::{StopScanner, StreamDecoder, Vocab};
use engine::{Logits, Sampler, SamplerOptions};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// A request on its way to the engine.
pub struct Ticket {
    pub id: u64,
    pub request: Generate,
    pub out: mpsc::Sender<Event>,
    pub since: Instant,
}

/// See the module.
pub struct Running<'m> {
    pub out: mpsc::Sender<Event>,
    pub prompt_tokens: usize,
    vocab: &'m Vocab,
    sampler: Sampler,
    decoder: StreamDecoder<'m>,
    scanner: StopScanner,
    splitter: Option<Splitter>,
    stop: Vec<String>,
    constraint: Option<Box<dyn Constraint>>,
    max_tokens: usize,
    ignore_eos: bool,
    logprobs: Option<usize>,
    head: usize,
    /// The prompt, where its log-probabilities are wanted, but for so many of the first; and those that are known.
    echo: Option<(Vec<u32>, usize, Vec<TokenLogprob>)>,
    pub made: usize,
    thought: usize,
    cached: usize,
    queued: Duration,
    admitted: Instant,
    /// When the first logits and the latest token came.
    first: Option<Instant>,
    latest: Instant,
    /// Since when its reader has had no room.
    pub stalled: Option<Instant>,
}

/// What a row of logits led to.
pub enum Taken {
    /// This token is to be computed next.
    Next(u32),
    Ended(Reason),
}

/// Whether an answer must be the same whatever was computed before it.
pub fn is_exact(o: &SamplerOptions) -> bool {
    o.seed.is_some() || o.temperature == 0.0
}

impl<'m> Running<'m> {
    /// Begins a request whose prompt is cached as far as `cached`.
    pub fn new(vocab: &'m Vocab, t: Ticket, cached: usize) -> Result<Self, Failure> {
        let Ticket { request: r, out, since, .. } = t;
        let mut sampler = Sampler::new(r.sampler).map_err(|e| Failure::invalid(e.to_string()))?;
        sampler.prime(&r.prompt);
        let tags = r.think.map(|t| t.tags.tokens(vocab)).unwrap_or_default();
        let now = Instant::now();
        Ok(Self {
            out,
            prompt_tokens: r.prompt.len(),
            head: r.head.unwrap_or(0),
            echo: r.echo.map(|skip| (r.prompt, skip, Vec::new())),
            vocab,
            sampler,
            decoder: StreamDecoder::new(vocab, r.special).showing(tags.into_iter().chain(r.show)),
            scanner: StopScanner::new(&r.stop),
            splitter: r.think.map(|t| Splitter::new(t.tags, t.opened)),
            stop: r.stop,
            constraint: r.constraint,
            max_tokens: r.max_tokens,
            ignore_eos: r.ignore_eos,
            logprobs: r.logprobs,
            made: 0,
            thought: 0,
            cached,
            queued: now - since,
            admitted: now,
            first: None,
            latest: now,
            stalled: None,
        })
    }

    /// How many of the best logits choose its next token; `None`: all are needed.
    pub fn few(&self) -> Option<usize> {
        let whole = self.constraint.is_some() || self.logprobs.is_some();
        self.sampler.few(self.vocab.len()).filter(|_| !whole)
    }

    /// Chooses the next token from a row of logits, which it may change, and sends what it makes certain.
    pub fn take(&mut self, mut logits: Logits<'_>) -> Result<Taken, Failure> {
        let now = Instant::now();
        if self.first.is_none() {
            self.first = Some(now);
            metrics::histogram!("rsinfer_time_to_first_token_seconds")
                .record(now - self.admitted + self.queued);
        } else {
            metrics::histogram!("rsinfer_inter_token_seconds").record(now - self.latest);
        }
        self.latest = now;
        if let Some((_, _, logprobs)) = self.echo.take() {
            self.send(Event::Chunk(Chunk { logprobs, ..Chunk::default() }));
        }
        if self.max_tokens == 0 {
            return Ok(Taken::Ended(Reason::Length));
        }
        let mut raw = None;
        let fail = |e: engine::SampleError| Failure::Internal(e.to_string());
        if let Logits::Whole(logits) = &mut logits {
            raw = self.logprobs.map(|_| logits.to_vec());
            if let Some(c) = &mut self.constraint {
                c.mask(logits).map_err(fail)?;
            }
        }
        let token = self.sampler.choose(logits).map_err(fail)?;
        if self.vocab.is_eog(token) && !self.ignore_eos {
            return Ok(Taken::Ended(Reason::Stop));
        }
        self.sampler.accept(token);
        if let Some(c) = &mut self.constraint {
            c.accept(token).map_err(fail)?;
        }
        self.made += 1;
        let logprobs = raw.map(|raw| self.logprob(token, &raw)).into_iter().collect();
        let text = self.decoder.push(token);
        let scanned = self.scanner.push(&text);
        self.thought += usize::from(self.splitter.as_ref().is_some_and(Splitter::is_thinking));
        let parts = self.split(&scanned.text);
        self.send(Event::Chunk(Chunk { parts, token: Some(token), logprobs }));
        if let Some(i) = scanned.stopped {
            return Ok(Taken::Ended(Reason::StopString(self.stop[i].clone())));
        }
        if self.constraint.as_ref().is_some_and(|c| c.is_done()) {
            return Ok(Taken::Ended(Reason::Stop));
        }
        if self.made >= self.max_tokens {
            return Ok(Taken::Ended(Reason::Length));
        }
        Ok(Taken::Next(token))
    }

    /// A token's log-probability where the logits before it are `logits`.
    fn logprob(&self, token: u32, logits: &[f32]) -> TokenLogprob {
        let p = logprobs(logits, token, self.logprobs.unwrap_or(0));
        let bytes = |id: u32| self.vocab.bytes(id).unwrap_or_default().into_owned();
        let top = p.top.into_iter().map(|(id, p)| (id, bytes(id), p)).collect();
        TokenLogprob { id: token, bytes: bytes(token), logprob: p.logprob, top }
    }

    /// Whether [`Running::echo`] is to be called.
    pub fn echoes(&self) -> bool {
        self.echo.is_some()
    }

    /// Takes the logits of the prompt's row `i`.
    pub fn echo(&mut self, i: usize, logits: &[f32]) {
        let Some((prompt, skip, mut known)) = self.echo.take() else { return };
        if i == 0 && skip == 0 {
            let first = self.logprob(prompt[0], logits);
            known.push(TokenLogprob { logprob: f32::NAN, top: Vec::new(), ..first });
        }
        known.extend(prompt.get(i + 1).map(|&next| self.logprob(next, logits)));
        self.echo = Some((prompt, skip, known));
    }

    fn split(&mut self, text: &str) -> Vec<Part> {
        match &mut self.splitter {
            Some(s) => s.push(text),
            None if text.is_empty() => Vec::new(),
            None => vec![Part::Answer(text.to_owned())],
        }
    }

    /// Sends; a reader that went away is noticed elsewhere, and one without room was given none to compute.
    fn send(&self, e: Event) {
        let _ = self.out.try_send(e);
    }

    /// Tokens of the prompt that were cached before.
    pub fn cached(&self) -> usize {
        self.cached
    }

    /// Ends the request: what was held back, then why it ended. `sinks` of its first tokens cannot be evicted.
    pub fn finish(mut self, reason: Reason, evicted: usize, sinks: usize) {
        let mut parts = Vec::new();
        let mut reason = reason;
        if !matches!(reason, Reason::StopString(_)) {
            let text = self.decoder.finish();
            for scanned in [self.scanner.push(&text), self.scanner.finish()] {
                parts.extend(self.split(&scanned.text));
                if let Some(i) = scanned.stopped {
                    reason = Reason::StopString(self.stop[i].clone());
                    break;
                }
            }
        }
        parts.extend(self.splitter.as_mut().map(Splitter::finish).unwrap_or_default());
        if !parts.is_empty() {
            self.send(Event::Chunk(Chunk { parts, ..Chunk::default() }));
        }
        let first = self.first.unwrap_or(self.latest);
        metrics::counter!("rsinfer_requests_total", "outcome" => "done").increment(1);
        metrics::counter!("rsinfer_tokens_evicted_total").increment(evicted as u64);
        self.send(Event::Done(Finish {
            reason,
            prompt_tokens: self.prompt_tokens,
            cached_tokens: self.cached,
            new_tokens: self.made,
            thought_tokens: self.thought,
            evicted,
            head_evicted: self.head.saturating_sub(sinks).min(evicted),
            queued: self.queued,
            prompt_time: first - self.admitted,
            decode_time: self.latest - first,
        }));
    }

    /// Ends the request with an error.
    pub fn fail(self, f: Failure) {
        metrics::counter!("rsinfer_requests_total", "outcome" => "failed").increment(1);
        self.send(Event::Failed(f));
    }
}
