//! One cell: a task done in a session with one policy and one budget. Knows nothing of files and reports.

use super::tasks::{Item, Judge, Task, Work, answer, is_right};
use crate::cmd::perplexity::log_sum_exp;
use anyhow::Result;
use engine::{GenerateOptions, Sampler, SamplerOptions, Session};
use serde_json::{Value, json};
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

/// When the question is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Ask {
    /// After the text was compressed: the policy cannot know what will be asked
    After,
    /// With the text: the policy sees the question before it compresses
    Before,
}

/// How tasks are done.
#[derive(Clone, Copy, Debug)]
pub struct Manner {
    pub ask: Ask,
    pub judge: Judge,
    /// At most so many tokens of an answer, thinking included.
    pub answer_tokens: usize,
    /// Tokens of a text that are read at once; after each piece the policy brings the cache to its budget.
    pub piece: usize,
}

/// A bucket's score.
#[derive(Clone, Copy, Debug, Default)]
pub struct Score {
    pub n: usize,
    sum: f64,
    sum2: f64,
}

impl Score {
    fn add(&mut self, x: f64) {
        self.n += 1;
        self.sum += x;
        self.sum2 += x * x;
    }

    fn and(self, o: Self) -> Self {
        Self { n: self.n + o.n, sum: self.sum + o.sum, sum2: self.sum2 + o.sum2 }
    }

    /// Share of right answers, with Wilson's bounds of 95% confidence (J. Am. Stat. Assoc. 22, 1927).
    pub fn share(&self) -> [f64; 3] {
        let (n, p, z) = (self.n as f64, self.sum / self.n as f64, 1.96);
        let middle = (p + z * z / (2.0 * n)) / (1.0 + z * z / n);
        let half = z / (1.0 + z * z / n) * (p * (1.0 - p) / n + z * z / (4.0 * n * n)).sqrt();
        [p, (middle - half).max(0.0), (middle + half).min(1.0)]
    }

    /// Perplexity, with bounds of 95% confidence from the standard error of the mean surprise.
    pub fn perplexity(&self) -> [f64; 3] {
        let (n, mean) = (self.n as f64, self.sum / self.n as f64);
        let var = (self.sum2 / n - mean * mean).max(0.0);
        let half = 1.96 * (var / (n - 1.0).max(1.0)).sqrt();
        [mean.exp(), (mean - half).exp(), (mean + half).exp()]
    }
}

/// What a cell found.
#[derive(Default)]
pub struct Found {
    /// Of each bucket.
    pub scores: Vec<Score>,
    pub prompt_tokens: usize,
    pub new_tokens: usize,
    /// Tokens that some layer forgot, all sequences together.
    pub evicted: u64,
    /// Bytes of the cache, which are allocated once for the longest sequence.
    pub bytes: u64,
    pub prompt_time: Duration,
    pub new_time: Duration,
    /// What was answered, one object a question.
    pub answers: Vec<Value>,
}

impl Found {
    /// All buckets together.
    pub fn all(&self) -> Score {
        self.scores.iter().fold(Score::default(), |a, s| a.and(*s))
    }
}

/// Does the task; `step` is called after every sequence.
pub fn measure(session: &mut Session, task: &Task, m: &Manner, mut step: impl FnMut()) -> Result<Found> {
    let scores = vec![Score::default(); task.buckets.len()];
    let mut found = Found { scores, bytes: session.cache_bytes() as u64, ..Found::default() };
    match &task.work {
        Work::Read(sequences) => {
            for s in sequences {
                read(session, s, m, &mut found)?;
                step();
            }
        }
        Work::Ask(items) => {
            let greedy = SamplerOptions { temperature: 0.0, seed: Some(0), ..SamplerOptions::default() };
            for item in items {
                let mut sampler = Sampler::new(greedy.clone())?;
                ask(session, &mut sampler, item, m, &mut found)?;
                step();
            }
        }
    }
    Ok(found)
}

/// Reads a sequence in pieces, scoring every token but the first.
fn read(session: &mut Session, sequence: &[u32], m: &Manner, found: &mut Found) -> Result<()> {
    session.truncate(0);
    let (length, buckets) = (sequence.len(), found.scores.len());
    let mut surprises = vec![0.0; length];
    let start = Instant::now();
    for (i, piece) in sequence.chunks(m.piece).enumerate() {
        session.eval_all(piece, |k, logits| {
            let next = i * m.piece + k + 1;
            if next < length {
                surprises[next] = log_sum_exp(logits) - f64::from(logits[sequence[next] as usize]);
            }
            Ok::<(), anyhow::Error>(())
        })?;
    }
    found.prompt_time += start.elapsed();
    found.prompt_tokens += length;
    found.evicted += session.evicted() as u64;
    for (at, x) in surprises.iter().enumerate().skip(1) {
        // The buckets' edges are rounded down: this is the last that begins at or before `at`.
        let bucket = (0..buckets).rfind(|b| b * length / buckets <= at).unwrap_or(0);
        found.scores[bucket].add(*x);
    }
    Ok(())
}

fn ask(
    session: &mut Session,
    sampler: &mut Sampler,
    item: &Item,
    m: &Manner,
    found: &mut Found,
) -> Result<()> {
    session.truncate(0);
    let start = Instant::now();
    if m.ask == Ask::After {
        session.eval(&item.tokens[..item.text])?;
    }
    let reading = start.elapsed();
    let options = GenerateOptions { max_tokens: Some(m.answer_tokens), ..GenerateOptions::default() };
    let done = session.generate(&item.tokens, sampler, &options, |_| ControlFlow::Continue(()))?;
    let said = session.model().vocab().decode(&done.tokens, true);
    let got = answer(&said);
    let right = is_right(m.judge, item, got);
    found.scores[item.bucket].add(f64::from(u8::from(right)));
    found.prompt_tokens += item.tokens.len();
    found.prompt_time += reading + done.prompt_time;
    // The first token comes from the prompt's logits: its pass is part of the prompt's time.
    found.new_tokens += done.new_tokens.saturating_sub(1);
    found.new_time += done.decode_time;
    found.evicted += done.evicted_tokens as u64;
    found.answers.push(json!({
        "question": item.question, "want": item.want, "got": got, "right": right, "said": said,
    }));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds() {
        let mut s = Score::default();
        (0..10).for_each(|i| s.add(f64::from(i % 2)));
        // Wilson's interval of 5 in 10: 0.2366, 0.7634 (R, binom::binom.confint(5, 10, methods = "wilson")).
        let [p, low, high] = s.share();
        assert!(p == 0.5 && (low - 0.2366).abs() < 1e-4 && (high - 0.7634).abs() < 1e-4, "{low} {high}");
        let mut s = Score::default();
        [1.0, 2.0, 3.0].iter().for_each(|x| s.add(*x));
        let [ppl, low, high] = s.perplexity();
        let error = 1.0 / 3.0_f64.sqrt();
        assert!((ppl.ln() - 2.0).abs() < 1e-12);
        assert!(
            (low.ln() - (2.0 - 1.96 * error)).abs() < 1e-12
                && (high.ln() - (2.0 + 1.96 * error)).abs() < 1e-12
        );
        assert!(Score::default().share()[0].is_nan());
    }
}
