//! Arguments of `run`.

use super::shared::{BatchArg, CacheArgs, LoadArgs, SamplingArgs};
use crate::cmd::run::{ChatConfig, RunConfig};
use crate::serve::constrain::Format;
use crate::store::Store;
use crate::{text, trace};
use anyhow::{Context, Result, bail};
use clap::Args;
use engine::GenerateOptions;
use std::io::IsTerminal;
use std::path::PathBuf;

/// Answer a prompt, or chat on the terminal
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    rsinfer run demo -p \"Tell me a story.\"\n  \
    rsinfer run model.gguf \"Why is the sky blue?\" --temp 0 --verbose\n  \
    rsinfer run model.gguf -p \"Summarise this:\" < report.txt\n  \
    rsinfer run model.gguf --raw -p \"Once upon a time\" -n 100\n  \
    rsinfer run model.gguf                    (chat; /? lists the commands, Ctrl-D leaves)\n\n\
    Without a prompt and with standard input from a terminal it chats. Text on standard input is put before the prompt.\n\
    The answer goes to stdout, everything else to stderr; a model's thinking is shown dimmed on a terminal.")]
#[command(override_usage = "rsinfer run [OPTIONS] MODEL [PROMPT]")]
pub struct RunArgs {
    /// A GGUF file (any part of a split one), a stored model's name or `demo`; then, if you like, the prompt
    #[arg(value_name = "MODEL [PROMPT]", required_unless_present = "model")]
    words: Vec<String>,
    /// MODEL, as llama.cpp's tools spell it
    #[arg(short, long, value_name = "MODEL")]
    model: Option<String>,
    /// The prompt
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: Option<String>,
    /// A file with the prompt (a line break at its end is left out)
    #[arg(short, long, value_name = "FILE", conflicts_with = "prompt")]
    file: Option<PathBuf>,
    /// Read \n, \t, \xHH ... in -p and -sys as the characters they stand for
    #[arg(short, long, overrides_with = "no_escape")]
    escape: bool,
    /// Leave backslashes as they are (the default)
    #[arg(long)]
    no_escape: bool,
    /// Context size in tokens, 0 for what the model was trained for [default: that, but at most 4096]
    #[arg(short, long, value_name = "N")]
    ctx_size: Option<usize>,
    /// At most this many new tokens (-1, the default: until the model ends)
    #[arg(short, long, alias = "predict", allow_negative_numbers = true, value_name = "N")]
    n_predict: Option<i64>,
    #[command(flatten)]
    batch: BatchArg,
    #[command(flatten)]
    load: LoadArgs,
    #[command(flatten)]
    cache: CacheArgs,
    /// Where memory is short, choose smaller sizes that fit, and say which
    #[arg(long)]
    fit: bool,
    /// Go on when the model wants to end
    #[arg(long)]
    ignore_eos: bool,
    /// End the answer before this text (repeatable)
    #[arg(long, short = 'r', alias = "reverse-prompt", value_name = "TEXT", allow_hyphen_values = true)]
    stop: Vec<String>,
    /// No chat template: continue the prompt as it is
    #[arg(long, conflicts_with_all = ["system_prompt", "system_prompt_file", "chat_template_file", "kwargs", "think", "no_think"])]
    raw: bool,
    /// The system prompt (-sys)
    #[arg(long, alias = "system", value_name = "TEXT", allow_hyphen_values = true)]
    system_prompt: Option<String>,
    /// A file with the system prompt (-sysf)
    #[arg(long, value_name = "FILE", conflicts_with = "system_prompt")]
    system_prompt_file: Option<PathBuf>,
    /// A Jinja chat template in place of the model's own
    #[arg(long, value_name = "FILE")]
    chat_template_file: Option<PathBuf>,
    /// More variables for the chat template, a JSON object
    #[arg(long, alias = "chat-template-kwargs", value_name = "JSON")]
    kwargs: Option<String>,
    /// Ask the chat template for thinking
    #[arg(long, conflicts_with = "no_think")]
    think: bool,
    /// Ask the chat template for no thinking
    #[arg(long, alias = "nothink")]
    no_think: bool,
    /// Hold the answer to JSON (`json`), a JSON schema (itself or a file), `regex:RE`, `lark:FILE` or `gbnf:FILE`
    #[arg(long, value_name = "FORMAT")]
    format: Option<String>,
    /// Do not show the thinking
    #[arg(long, alias = "hide-thinking")]
    hidethinking: bool,
    /// Show control tokens in the answer
    #[arg(long)]
    special: bool,
    /// Write what the cache's policy evicted when (JSON lines), and attention masses (FILE.npy)
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Show timings and what was chosen
    #[arg(short, long)]
    verbose: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
}

impl RunArgs {
    pub fn resolve(self) -> Result<RunConfig> {
        let mut words = self.words.into_iter();
        let name = self.model.or_else(|| words.next()).expect("clap asks for one of the two");
        let entry = Store::from_env().named(&name)?;
        let stored = &entry.params;
        let words: Vec<String> = words.collect();
        let escaped = |s: String| if self.escape { text::unescape(&s) } else { s };
        let mut parts = Vec::new();
        if !std::io::stdin().is_terminal() {
            parts.push(text::read_stdin()?);
        }
        parts.extend(self.prompt.map(escaped));
        if let Some(path) = &self.file {
            parts.push(text::read_prompt_file(path)?);
        }
        parts.push(words.join(" "));
        parts.retain(|p| !p.is_empty());
        let prompt = (!parts.is_empty()).then(|| parts.join(" "));
        if prompt.is_none() && !std::io::stdin().is_terminal() && !self.raw {
            bail!("there is no prompt: give one with -p, or text on standard input");
        }
        let kwargs = match self.kwargs.as_deref().map(serde_json::from_str::<serde_json::Value>) {
            None => serde_json::Map::new(),
            Some(Ok(serde_json::Value::Object(map))) => map,
            Some(_) => super::usage("run", "--kwargs is not a JSON object"),
        };
        let system = match &self.system_prompt_file {
            Some(path) => Some(text::read_prompt_file(path)?),
            None => self.system_prompt.map(escaped).or(entry.system),
        };
        let ctx = self.ctx_size.or_else(|| stored.size("num_ctx"));
        let mut session = self.cache.session_of(stored, ctx, self.batch.get_of(stored));
        if self.trace.is_some() {
            if prompt.is_none() && !self.raw {
                super::usage("run", "--trace is of one answer: give a prompt");
            }
            session.kv = session.kv.recording(trace::needs());
        }
        let format = self.format.as_deref().map(read_format).transpose()?;
        Ok(RunConfig {
            fit: self.fit,
            load: self.load.resolve_of(stored, entry.source)?,
            session,
            sampler: self.sampling.resolve(stored),
            generate: GenerateOptions {
                max_tokens: match self.n_predict {
                    Some(n) => n.try_into().ok(),
                    None => stored.size("num_predict"),
                },
                stop: if self.stop.is_empty() { stored.stop() } else { self.stop },
                ignore_eos: self.ignore_eos || stored.boolean("ignore_eos") == Some(true),
                special: self.special,
                show: Vec::new(),
            },
            prompt,
            raw: self.raw,
            format,
            chat: ChatConfig {
                system,
                template: self
                    .chat_template_file
                    .map(|p| text::read_file(&p))
                    .transpose()?
                    .or(entry.template),
                messages: entry.messages,
                kwargs,
                think: if self.think { Some(true) } else { self.no_think.then_some(false) },
            },
            hide_thinking: self.hidethinking,
            trace: self.trace,
            verbose: self.verbose,
        })
    }
}

/// `json`, a schema or a file with one, `regex:RE`, `lark:FILE`, `gbnf:FILE`.
fn read_format(s: &str) -> Result<Format> {
    Ok(match s.split_once(':') {
        Some(("regex", re)) => Format::Regex(re.into()),
        Some(("lark", path)) => Format::Lark(text::read_file(path.as_ref())?),
        Some(("gbnf", path)) => Format::Gbnf(text::read_file(path.as_ref())?),
        _ if s == "json" => Format::Json,
        _ if s.trim_start().starts_with('{') => {
            Format::Schema(serde_json::from_str(s).context("--format: not JSON")?)
        }
        _ => Format::Schema(text::read_json(s.as_ref()).context("--format: no file with a JSON schema")?),
    })
}
