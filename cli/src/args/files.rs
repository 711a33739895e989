//! Arguments of the commands that read files and write results: logits, tokenize, template, inspect, perplexity, quantize.

use super::shared::{BatchArg, CacheArgs, LoadArgs, ModelArgs, cores, parse_cache_type};
use crate::cmd::{inspect, logits, perplexity, quantize, template, tokenize};
use crate::text;
use anyhow::{Result, anyhow};
use clap::{ArgGroup, Args};
use engine::DType;
use engine::quantize as q;
use std::path::PathBuf;

/// Write the logits after every token of a sequence of ids
#[derive(Args)]
#[command(after_help = "Example:\n  \
    rsinfer tokenize model.gguf -p \"Hello\" --ids > ids.json\n  \
    rsinfer logits model.gguf --tokens-file ids.json --out logits.npy\n\n\
    The ids are used as they are: no BOS is added. Row i of the float32 array [n_tokens, n_vocab] holds the logits after\n\
    token i. The cache is f32 unless you say otherwise, since the command exists for comparing.")]
pub struct LogitsArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// A JSON array of token ids
    #[arg(long, value_name = "IDS.json")]
    tokens_file: PathBuf,
    /// The NumPy file to write
    #[arg(short, long, value_name = "OUT.npy")]
    out: PathBuf,
    #[command(flatten)]
    batch: BatchArg,
    #[command(flatten)]
    load: LoadArgs,
    #[command(flatten)]
    cache: CacheArgs,
}

impl LogitsArgs {
    pub fn resolve(self) -> Result<logits::Config> {
        Ok(logits::Config {
            load: self.load.resolve(self.model.source()?)?,
            session: self.cache.session(None, self.batch.get(), DType::F32),
            tokens_file: self.tokens_file,
            out: self.out,
        })
    }
}

/// Turn text into token ids
#[derive(Args)]
#[command(group = ArgGroup::new("text").required(true).args(["prompt", "file", "stdin"]))]
#[command(after_help = "Examples:\n  \
    rsinfer tokenize model.gguf -p \"Hello world\"            one line a token\n  \
    rsinfer tokenize model.gguf -f text.txt --ids            [1, 2, 3], alone on stdout\n\n\
    Files that hold a vocabulary and no tensors will do.")]
pub struct TokenizeArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The text
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: Option<String>,
    /// A file with the text, taken whole
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Read the text from standard input
    #[arg(long)]
    stdin: bool,
    /// Print the ids alone, as [1, 2, 3]
    #[arg(long)]
    ids: bool,
    /// Add no BOS (nor EOS), even where the vocabulary asks for it
    #[arg(long)]
    no_bos: bool,
    /// Read names of control tokens in the text as plain text
    #[arg(long)]
    no_parse_special: bool,
    /// Read \n, \t, \xHH ... in -p as the characters they stand for
    #[arg(short, long, overrides_with = "no_escape")]
    escape: bool,
    /// Leave backslashes as they are (the default)
    #[arg(long)]
    no_escape: bool,
    /// Print the number of tokens, too
    #[arg(long)]
    show_count: bool,
}

impl TokenizeArgs {
    pub fn resolve(self) -> Result<tokenize::Config> {
        let text = match (self.prompt, self.file) {
            (Some(p), _) if self.escape => text::unescape(&p),
            (Some(p), _) => p,
            (_, Some(path)) => text::read_file(&path)?,
            _ => text::read_stdin()?,
        };
        Ok(tokenize::Config {
            source: self.model.source()?,
            text,
            ids: self.ids,
            add_special: !self.no_bos,
            parse_special: !self.no_parse_special,
            show_count: self.show_count,
        })
    }
}

/// Render a conversation with the model's chat template
#[derive(Args)]
#[command(after_help = "Example:\n  \
    echo '[{\"role\": \"user\", \"content\": \"Hi\"}]' > m.json\n  \
    rsinfer template model.gguf --messages m.json --add-generation-prompt\n\n\
    Prints the prompt and nothing else, not even a line break.")]
pub struct TemplateArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// A JSON array of messages {role, content, ...}
    #[arg(long, value_name = "M.json")]
    messages: PathBuf,
    /// A JSON array of tools
    #[arg(long, value_name = "T.json")]
    tools: Option<PathBuf>,
    /// A Jinja template in place of the model's own
    #[arg(long, value_name = "T.jinja")]
    chat_template_file: Option<PathBuf>,
    /// End with the beginning of the assistant's turn
    #[arg(long)]
    add_generation_prompt: bool,
    /// More variables for the template, a JSON object
    #[arg(long, alias = "chat-template-kwargs", value_name = "JSON")]
    kwargs: Option<String>,
}

impl TemplateArgs {
    pub fn resolve(self) -> Result<template::Config> {
        let kwargs = match self.kwargs.as_deref().map(serde_json::from_str::<serde_json::Value>) {
            None => serde_json::Map::new(),
            Some(Ok(serde_json::Value::Object(map))) => map,
            Some(_) => super::usage("template", "--kwargs is not a JSON object"),
        };
        Ok(template::Config {
            source: self.model.source()?,
            messages: text::read_json(&self.messages)?,
            tools: self.tools.map(|p| text::read_json(&p)).transpose()?,
            template: self.chat_template_file.map(|p| text::read_file(&p)).transpose()?,
            add_generation_prompt: self.add_generation_prompt,
            kwargs,
        })
    }
}

/// Show what a GGUF file holds
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    rsinfer inspect model.gguf --tensors\n  \
    rsinfer inspect model.gguf --json | jq .parameters")]
pub struct InspectArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// As JSON, with metadata and tensors in full
    #[arg(long)]
    json: bool,
    /// List the tensors
    #[arg(long)]
    tensors: bool,
}

impl InspectArgs {
    pub fn resolve(self) -> Result<inspect::Config> {
        Ok(inspect::Config { source: self.model.source()?, json: self.json, tensors: self.tensors })
    }
}

/// Measure perplexity, or the distance from another model's predictions, on a text
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    rsinfer perplexity model.gguf -f wiki.txt\n  \
    rsinfer perplexity f16.gguf -f wiki.txt --kl-divergence-base base.kld       write the predictions\n  \
    rsinfer perplexity q4.gguf --kl-divergence-base base.kld --kl-divergence    compare with them\n\n\
    llama-perplexity's method: chunks of -c tokens, BOS first, the second half of each scored. Base files are\n\
    interchangeable with llama-perplexity's.")]
pub struct PerplexityArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The text (a line break at its end is left out)
    #[arg(short, long, value_name = "FILE", required_unless_present = "kl_divergence")]
    file: Option<PathBuf>,
    /// Tokens in a chunk
    #[arg(short, long, default_value_t = 512, value_name = "N", value_parser = clap::value_parser!(u32).range(4..))]
    ctx_size: u32,
    /// Score only the first N chunks (-1: all)
    #[arg(long, default_value_t = -1, allow_negative_numbers = true, value_name = "N")]
    chunks: i64,
    /// Move on by N tokens between chunks and score the last N of each (0: the usual method)
    #[arg(long, default_value_t = 0, value_name = "N")]
    ppl_stride: usize,
    /// The file of predictions to write, or with --kl-divergence to compare with
    #[arg(long, alias = "save-all-logits", value_name = "FILE")]
    kl_divergence_base: Option<PathBuf>,
    /// Compare with the predictions in --kl-divergence-base
    #[arg(long, requires = "kl_divergence_base", conflicts_with = "ppl_stride")]
    kl_divergence: bool,
    #[command(flatten)]
    batch: BatchArg,
    #[command(flatten)]
    load: LoadArgs,
    #[command(flatten)]
    cache: CacheArgs,
}

impl PerplexityArgs {
    pub fn resolve(self) -> Result<perplexity::Config> {
        use perplexity::Mode;
        let n_ctx = self.ctx_size as usize;
        let mode = match (self.kl_divergence_base, self.file) {
            (Some(base), _) if self.kl_divergence => Mode::Divergence { base },
            (_, None) => super::usage("perplexity", "a text is needed: -f FILE"),
            (Some(_), _) if self.ppl_stride > 0 => {
                super::usage("perplexity", "--ppl-stride cannot be used with --kl-divergence-base")
            }
            (Some(base), Some(file)) => Mode::WriteBase { text: text::read_prompt_file(&file)?, base },
            (None, Some(file)) if self.ppl_stride > 0 => {
                Mode::Strided { text: text::read_prompt_file(&file)?, stride: self.ppl_stride }
            }
            (None, Some(file)) => Mode::Perplexity { text: text::read_prompt_file(&file)? },
        };
        Ok(perplexity::Config {
            load: self.load.resolve(self.model.source()?)?,
            session: self.cache.session(Some(n_ctx), self.batch.get(), DType::F16),
            n_ctx,
            chunks: self.chunks.try_into().ok(),
            mode,
        })
    }
}

/// Make a smaller file of a model
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    rsinfer quantize model-f16.gguf model-q4.gguf Q4_K_M\n  \
    rsinfer quantize model-f16.gguf model-q8.gguf Q8_0 --pure\n\n\
    Types and mixes are llama-quantize's: Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K_S Q3_K_M Q3_K_L Q4_K_S Q4_K_M Q5_K_S Q5_K_M\n\
    Q6_K F16 BF16 F32.")]
pub struct QuantizeArgs {
    /// A GGUF file in F32, F16 or BF16
    #[arg(value_name = "IN")]
    input: String,
    /// The file to write
    #[arg(value_name = "OUT")]
    output: PathBuf,
    /// The type or mix
    #[arg(value_name = "TYPE")]
    target: String,
    /// Threads [default: all cores]
    #[arg(value_name = "THREADS", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Every matrix in the type itself, no mix
    #[arg(long)]
    pure: bool,
    /// Allow input that is quantised already (errors add up)
    #[arg(long)]
    allow_requantize: bool,
    /// Leave output.weight as it is
    #[arg(long)]
    leave_output_tensor: bool,
    /// The type of output.weight
    #[arg(long, value_name = "TYPE", value_parser = parse_cache_type)]
    output_tensor_type: Option<DType>,
    /// The type of token_embd.weight
    #[arg(long, value_name = "TYPE", value_parser = parse_cache_type)]
    token_embedding_type: Option<DType>,
}

impl QuantizeArgs {
    pub fn resolve(self) -> Result<quantize::Config> {
        let target = q::Target::from_name(&self.target).ok_or_else(|| {
            let known: Vec<&str> = q::TARGETS.iter().map(|t| t.name).collect();
            anyhow!("unknown quantisation type {:?}; known: {}", self.target, known.join(", "))
        })?;
        let options = q::Options {
            pure: self.pure,
            allow_requantize: self.allow_requantize,
            leave_output_tensor: self.leave_output_tensor,
            output_tensor_type: self.output_tensor_type,
            token_embedding_type: self.token_embedding_type,
            threads: self.threads.map_or_else(cores, usize::from),
            ..q::Options::new(target)
        };
        Ok(quantize::Config {
            source: crate::model::Source::named(&self.input)?,
            output: self.output,
            options,
        })
    }
}
