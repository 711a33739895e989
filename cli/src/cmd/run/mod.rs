//! `run`: an answer to one prompt, or a conversation on the terminal.

mod conversation;
mod display;
mod repl;
mod settings;

use crate::model::{LoadConfig, SessionConfig};
use crate::output;
use crate::serve::constrain::Format;
use crate::trace::Trace;
use anyhow::Result;
use conversation::Conversation;
use engine::pager::Paging;
use engine::{FinishReason, GenerateOptions, Generated, MemoryReport, SamplerOptions, Usage};
use serde_json::{Map, Value};
use std::path::PathBuf;
use std::time::Duration;

/// What to run and how.
#[derive(Clone)]
pub struct RunConfig {
    pub load: LoadConfig,
    pub session: SessionConfig,
    /// Choose what fits the memory.
    pub fit: bool,
    pub sampler: SamplerOptions,
    pub generate: GenerateOptions,
    /// `None`: a conversation on the terminal (with `raw` and no terminal: the empty text).
    pub prompt: Option<String>,
    /// No chat template.
    pub raw: bool,
    /// What the answer is held to.
    pub format: Option<Format>,
    pub chat: ChatConfig,
    pub hide_thinking: bool,
    /// Where to tell of evictions.
    pub trace: Option<PathBuf>,
    pub verbose: bool,
}

/// How a conversation is rendered.
#[derive(Clone, Default)]
pub struct ChatConfig {
    pub system: Option<String>,
    /// What the conversation begins with.
    pub messages: Vec<Value>,
    /// Jinja source in place of the model's own template.
    pub template: Option<String>,
    pub kwargs: Map<String, Value>,
    /// Ask the template for thinking, or for none; `None` leaves it to the template.
    pub think: Option<bool>,
}

pub fn run(c: RunConfig) -> Result<()> {
    let interactive = c.prompt.is_none() && std::io::IsTerminal::is_terminal(&std::io::stdin());
    let mut conversation = Conversation::open(c)?;
    if interactive {
        return repl::run(conversation);
    }
    let trace = conversation.trace()?;
    let prompt = conversation.config.prompt.clone().unwrap_or_default();
    let done = conversation.say(&prompt, || false)?;
    conversation.explain(&done);
    trace.map_or(Ok(()), Trace::finish)
}

/// What the user should know about the end of an answer, in one line; `None` if it ended as it should.
fn ending(reason: &FinishReason, ctx: usize, ctx_train: usize) -> Option<String> {
    let more = |n: usize| {
        if n < ctx_train { format!("; a larger one: -c {}", (2 * n).min(ctx_train)) } else { String::new() }
    };
    match reason {
        FinishReason::ContextFull => Some(format!(
            "the context of {ctx} tokens is full, the answer is cut off{}; without end: --kv sinks:4+window:{}",
            more(ctx),
            ctx.saturating_sub(4).max(8)
        )),
        _ => None,
    }
}

/// Ollama's lines of `--verbose`, with bytes read per second added.
fn timings(g: &Generated, load: Duration, read_bytes: f64) -> String {
    let computed = g.prompt_tokens - g.cached_tokens;
    let rate = |n: usize, t: Duration| n as f64 / t.as_secs_f64().max(1e-9);
    let total = load + g.prompt_time + g.decode_time;
    let cached = if g.cached_tokens > 0 { format!(", {} cached", g.cached_tokens) } else { String::new() };
    // The first new token comes from the prompt's logits: its pass is part of the prompt's time.
    let passes = g.new_tokens.saturating_sub(1);
    let decode = rate(passes, g.decode_time);
    let mut lines = vec![
        ("total duration:", output::duration(total)),
        ("load duration:", output::duration(load)),
        ("prompt eval count:", format!("{computed} token(s){cached}")),
        ("prompt eval duration:", output::duration(g.prompt_time)),
        ("prompt eval rate:", format!("{:.2} tokens/s", rate(computed, g.prompt_time))),
        ("eval count:", format!("{} token(s)", g.new_tokens)),
        ("eval duration:", output::duration(g.decode_time)),
        ("eval rate:", format!("{:.2} tokens/s", rate(g.new_tokens, g.decode_time))),
    ];
    lines.push(("evicted:", format!("{} token(s) by {}", g.evicted_tokens, g.policy)));
    if passes > 0 {
        lines.push(("read rate:", format!("{:.2} GB/s of weights and cache", decode * read_bytes / 1e9)));
    }
    lines.iter().map(|(name, value)| format!("{name:<22}{value}\n")).collect()
}

/// Lines of `--verbose` about memory; `before`: the process before the answer.
fn memory(m: &MemoryReport, before: Option<Usage>, g: &Generated) -> String {
    let mut lines = Vec::new();
    let size = output::bytes;
    if let Some(u) = m.usage {
        let room = m.paging.memory.map_or(String::new(), |r| format!(", {} of memory for them", size(r)));
        let weights = format!("{} mapped, {} resident{room}", size(m.paging.mapped), size(u.resident_file));
        lines.push(("weights:", weights));
        lines.push(("other memory:", size(u.resident_anon)));
    }
    lines.push(("kv cache:", format!("{} of {} used", size(m.kv_used), size(m.kv_reserved))));
    if m.paging.chosen > 0 {
        let Paging { chosen, missed, evicted, pinned, locked, .. } = m.paging;
        let pins = match (pinned, locked) {
            (0, _) => String::new(),
            (n, true) => format!(", {} pinned", size(n)),
            (n, false) => format!(", {} pinned but not locked (ulimit -l)", size(n)),
        };
        lines.push(("experts:", format!("{chosen} chosen, {missed} read ahead, {evicted} given up{pins}")));
    }
    if let (Some(before), Some(now)) = (before, m.usage) {
        let d = now.since(before);
        let tokens = (g.prompt_tokens - g.cached_tokens + g.new_tokens.saturating_sub(1)).max(1) as u64;
        lines.push(("page faults:", format!("{} that read, {} others", d.major_faults, d.minor_faults)));
        lines.push(("read from disk:", format!("{} a token", size(d.disk_read / tokens))));
    }
    lines.iter().map(|(name, value)| format!("{name:<22}{value}\n")).collect()
}
