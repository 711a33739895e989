//! Arguments of `kv-eval`.

use super::shared::{CacheTypeArgs, LoadArgs};
use crate::cmd::kv_eval::{Ask, Config, Eval, Judge, Manner, Sizes, TaskSpec, Wording, plan};
use crate::model::Source;
use anyhow::{Result, anyhow, bail};
use clap::Args;
use engine::DType;
use std::path::PathBuf;

/// Compare what KV cache policies make a model forget
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    rsinfer kv-eval --list\n  \
    rsinfer kv-eval demo --policies full,random,h2o,snapkv --budgets 64,25%,50% --tasks recall,passkey --out lab\n  \
    rsinfer kv-eval model.gguf --policies \"sinks:4+window,pyramid(snapkv)\" --tasks ppl:book.txt --out lab\n\n\
    Every policy gets the same text and questions. Results are appended to OUT/results.csv as they come: the same command\n\
    goes on where it was stopped, and one with more policies, budgets or tasks adds to them. OUT/report.html shows them.\n\n\
    A policy compresses the text when it has been read, then the question is asked (--ask after): it cannot know what will\n\
    be asked. With --ask before it sees the question first, which is far easier for policies that watch attention.")]
pub struct KvEvalArgs {
    /// A GGUF file, or `demo`
    #[arg(value_name = "MODEL", required_unless_present_any = ["list", "model_flag"])]
    model: Option<String>,
    /// MODEL, as llama.cpp's tools spell it
    #[arg(short = 'm', long = "model", value_name = "MODEL", conflicts_with = "model")]
    model_flag: Option<String>,
    /// List the policies: parameters, needs, papers
    #[arg(long)]
    list: bool,
    /// Policies as --kv takes them, without budgets; `all` (repeatable)
    #[arg(long, value_name = "POLICY,...", default_value = "all")]
    policies: Vec<String>,
    /// Entries per layer, or shares of the task's longest sequence (repeatable)
    #[arg(long, value_name = "N|P%,...", default_value = "64,128,256,25%,50%")]
    budgets: Vec<String>,
    /// ppl:FILE, recall, passkey (repeatable)
    #[arg(long, value_name = "TASK,...", default_value = "recall,passkey", value_delimiter = ',')]
    tasks: Vec<String>,
    /// The folder for results.csv, report.html and plots
    #[arg(short, long, value_name = "DIR", required_unless_present = "list")]
    out: Option<PathBuf>,
    /// When the question is asked
    #[arg(long, value_enum, default_value = "after")]
    ask: Ask,
    /// How answers are judged [default: exact for `demo`, else contains]
    #[arg(long, value_enum)]
    judge: Option<Judge>,
    /// At most so many tokens of an answer, thinking included
    #[arg(long, default_value_t = 60, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    answer_tokens: u32,
    /// Prompt tokens computed at once; ppl evicts after every so many
    #[arg(short, long, default_value_t = 32, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65536))]
    batch_size: u32,
    /// Also write what was evicted when, and attention masses, into OUT/trace
    #[arg(long)]
    trace: bool,
    /// Same seed, same stories and questions
    #[arg(short, long, default_value_t = 1, value_name = "N")]
    seed: u64,
    #[command(flatten)]
    sizes: SizeArgs,
    #[command(flatten)]
    load: LoadArgs,
    #[command(flatten)]
    cache: CacheTypeArgs,
}

#[derive(Args)]
#[command(next_help_heading = "Sizes of the tasks")]
struct SizeArgs {
    /// recall: questions
    #[arg(long, default_value_t = 90, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    questions: u32,
    /// recall: facts in a story
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100))]
    facts: u32,
    /// recall: other sentences in a story, taken in turns
    #[arg(long, default_value = "6,10,16", value_name = "N,...", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    fillers: Vec<u32>,
    /// passkey: where the number stands, in percent
    #[arg(long, default_value = "0,25,50,75,100", value_name = "N,...", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(0..=100))]
    depths: Vec<u32>,
    /// passkey: numbers at each depth
    #[arg(long, default_value_t = 12, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    passkeys: u32,
    /// passkey: tokens of the text
    #[arg(long, default_value_t = 200, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    passkey_length: u32,
    /// passkey: the sentence; {colour} {thing} {name} {number} are filled in
    #[arg(long, value_name = "TEXT")]
    passkey_fact: Option<String>,
    /// passkey: the question
    #[arg(long, value_name = "TEXT")]
    passkey_question: Option<String>,
    /// passkey: the answer, for --judge exact
    #[arg(long, value_name = "TEXT")]
    passkey_answer: Option<String>,
    /// ppl: tokens of a sequence
    #[arg(long, default_value_t = 1024, value_name = "N", value_parser = clap::value_parser!(u32).range(16..=10_000_000))]
    ppl_length: u32,
    /// ppl: sequences, at most
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    ppl_sequences: u32,
}

impl SizeArgs {
    fn resolve(self, seed: u64) -> Result<Sizes> {
        let default = Wording::default();
        let wording = Wording {
            fact: self.passkey_fact.unwrap_or(default.fact),
            question: self.passkey_question.unwrap_or(default.question),
            answer: self.passkey_answer.unwrap_or(default.answer),
        };
        if !wording.fact.contains("{number}") {
            bail!("--passkey-fact must say where the number goes: {{number}}");
        }
        let many = |v: Vec<u32>| v.into_iter().map(|n| n as usize).collect();
        Ok(Sizes {
            seed,
            questions: self.questions as usize,
            facts: self.facts as usize,
            fillers: many(self.fillers),
            depths: many(self.depths),
            passkeys: self.passkeys as usize,
            passkey_length: self.passkey_length as usize,
            wording,
            ppl_length: self.ppl_length as usize,
            ppl_sequences: self.ppl_sequences as usize,
        })
    }
}

impl KvEvalArgs {
    pub fn resolve(self) -> Result<Config> {
        if self.list {
            return Ok(Config::List);
        }
        let name = self.model.or(self.model_flag).expect("clap asks for one of the two");
        let source = Source::named(&name)?;
        let mut tasks = Vec::new();
        for t in &self.tasks {
            let task = TaskSpec::parse(t.trim()).map_err(|e| anyhow!("--tasks: {e}"))?;
            if tasks.iter().any(|o: &TaskSpec| o.name() == task.name()) {
                bail!("--tasks: two tasks would have the name {:?}", task.name());
            }
            tasks.push(task);
        }
        let judge = self.judge.unwrap_or(if source == Source::Demo { Judge::Exact } else { Judge::Contains });
        let batch = self.batch_size as usize;
        Ok(Config::Eval(Box::new(Eval {
            load: self.load.resolve(source)?,
            session: self.cache.session(None, batch, DType::F16),
            policies: plan::policies(&self.policies)?,
            budgets: plan::budgets(&self.budgets)?,
            tasks,
            manner: Manner { ask: self.ask, judge, answer_tokens: self.answer_tokens as usize, piece: batch },
            sizes: self.sizes.resolve(self.seed)?,
            trace: self.trace,
            out: self.out.expect("clap asks for it"),
        })))
    }
}
