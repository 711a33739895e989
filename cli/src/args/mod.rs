//! The command line: clap definitions, and their resolution into the configurations that `cmd` works from. No command looks
//! at a flag again.

mod argv;
mod bench;
mod files;
mod kv_eval;
mod place;
mod plan;
mod run;
mod serve;
mod shared;
mod store;

use crate::cmd::Command;
use anyhow::Result;
use clap::{CommandFactory, Parser, Subcommand};

#[derive(Parser)]
#[command(
    name = "rsinfer",
    version,
    about = "Runs language models from GGUF files",
    long_about = "Runs language models from GGUF files, on the CPU or a NVIDIA GPU.\n\nWherever a MODEL is asked for, \
                  it is a file, the name of a stored model (rsinfer's or Ollama's, see `rsinfer list`), or `demo`, the \
                  small model that comes with the program.",
    after_help = "Examples:\n  \
        rsinfer run demo -p \"Tell me a story.\"        an answer from the embedded model\n  \
        rsinfer run model.gguf                        chat on the terminal\n  \
        rsinfer serve                                 a server for Ollama's and OpenAI's clients\n  \
        rsinfer inspect model.gguf                    what a file holds\n  \
        rsinfer plan model.gguf -c 32768              where every byte would go\n  \
        rsinfer bench model.gguf -p 512 -n 128        how fast it runs here\n\n\
        `rsinfer COMMAND --help` explains a command.",
    // The flags that an error offers are pasted behind those given: the last one counts.
    args_override_self = true,
    arg_required_else_help = true,
    disable_help_subcommand = true
)]
struct Cli {
    #[command(subcommand)]
    command: Sub,
}

#[derive(Subcommand)]
enum Sub {
    Run(Box<run::RunArgs>),
    Serve(Box<serve::ServeArgs>),
    Logits(files::LogitsArgs),
    Tokenize(files::TokenizeArgs),
    Template(files::TemplateArgs),
    Inspect(files::InspectArgs),
    Plan(Box<plan::PlanArgs>),
    Perplexity(files::PerplexityArgs),
    Bench(bench::BenchArgs),
    KvEval(kv_eval::KvEvalArgs),
    Quantize(files::QuantizeArgs),
    Create(store::CreateArgs),
    #[command(alias = "ls")]
    List(store::ListArgs),
    Show(store::ShowArgs),
    Rm(store::RmArgs),
    Cp(store::CpArgs),
    Ps(store::PsArgs),
    Stop(store::StopArgs),
}

/// Reads the process's arguments. Help, version and usage errors end the process here, as clap does it.
pub fn parse() -> Result<Command> {
    let cli = Cli::parse_from(argv::normalize(std::env::args_os()));
    Ok(match cli.command {
        Sub::Run(a) => Command::Run(Box::new(a.resolve()?)),
        Sub::Serve(a) => Command::Serve(Box::new(a.resolve()?)),
        Sub::Logits(a) => Command::Logits(a.resolve()?),
        Sub::Tokenize(a) => Command::Tokenize(a.resolve()?),
        Sub::Template(a) => Command::Template(a.resolve()?),
        Sub::Plan(a) => Command::Plan(Box::new(a.resolve()?)),
        Sub::Inspect(a) => Command::Inspect(a.resolve()?),
        Sub::Perplexity(a) => Command::Perplexity(a.resolve()?),
        Sub::Bench(a) => Command::Bench(a.resolve()?),
        Sub::KvEval(a) => Command::KvEval(a.resolve()?),
        Sub::Quantize(a) => Command::Quantize(a.resolve()?),
        Sub::Create(a) => Command::Store(a.resolve()?),
        Sub::List(a) => Command::Store(a.resolve()),
        Sub::Show(a) => Command::Store(a.resolve()),
        Sub::Rm(a) => Command::Store(a.resolve()),
        Sub::Cp(a) => Command::Store(a.resolve()),
        Sub::Ps(a) => Command::Remote(a.resolve()),
        Sub::Stop(a) => Command::Remote(a.resolve()),
    })
}

/// A usage error in clap's form, with exit status 2.
fn usage(command: &str, message: impl std::fmt::Display) -> ! {
    let mut cli = Cli::command();
    cli.build();
    let sub = cli.find_subcommand_mut(command).expect("the names are those of the enum above");
    sub.error(clap::error::ErrorKind::ValueValidation, message).exit()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn definitions_are_sound() {
        Cli::command().debug_assert();
    }
}
