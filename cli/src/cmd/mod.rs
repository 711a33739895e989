//! The commands: each takes a resolved configuration and does its work through the engine's public API.

pub mod bench;
pub mod inspect;
mod kld;
pub mod kv_eval;
pub mod logits;
pub mod perplexity;
pub mod plan;
pub mod quantize;
pub mod remote;
pub mod run;
pub mod serve;
pub mod store;
pub mod template;
pub mod tokenize;

/// What the command line asked for.
pub enum Command {
    Run(Box<run::RunConfig>),
    Logits(logits::Config),
    Tokenize(tokenize::Config),
    Template(template::Config),
    Inspect(inspect::Config),
    Perplexity(perplexity::Config),
    Plan(Box<plan::Config>),
    Bench(bench::Config),
    KvEval(kv_eval::Config),
    Quantize(quantize::Config),
    Serve(Box<crate::serve::config::Config>),
    Store(store::Config),
    Remote(remote::Config),
}

/// Does it.
pub fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Run(c) => run::run(*c),
        Command::Logits(c) => logits::run(&c),
        Command::Tokenize(c) => tokenize::run(&c),
        Command::Template(c) => template::run(&c),
        Command::Inspect(c) => inspect::run(&c),
        Command::Plan(c) => plan::run(&c),
        Command::Perplexity(c) => perplexity::run(&c),
        Command::Bench(c) => bench::run(&c),
        Command::KvEval(c) => kv_eval::run(&c),
        Command::Quantize(c) => quantize::run(&c),
        Command::Serve(c) => serve::run(*c),
        Command::Store(c) => store::run(&c),
        Command::Remote(c) => remote::run(&c),
    }
}
