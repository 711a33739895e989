//! The `rsinfer` command: arguments in, a result on stdout, messages on stderr.
//!
//! `args` turns raw arguments into resolved configurations; `cmd` does the work and never looks at flags. Errors are one
//! line on stderr and exit status 1 (2 for a command line that makes no sense); a reader that goes away is no error.

mod args;
mod chat;
mod cmd;
mod demo;
mod http;
mod memory;
mod model;
mod npy;
mod output;
mod serve;
mod store;
mod text;
mod trace;

use std::process::ExitCode;

fn main() -> ExitCode {
    let command = args::parse();
    match command.and_then(cmd::run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) if output::is_broken_pipe(&e) => ExitCode::SUCCESS,
        Err(e) => {
            // `{:#}` joins the causes with colons; a message must stay on its line whatever a file's strings hold.
            eprintln!("error: {}", output::one_line(&format!("{e:#}")));
            ExitCode::FAILURE
        }
    }
}
