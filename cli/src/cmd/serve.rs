//! `serve`: the HTTP server. Sets up the log and the runtime; the rest is in `serve` and `http`.

use crate::serve::config::Config;
use anyhow::{Context, Result};
use std::io::IsTerminal;
use tracing::level_filters::LevelFilter;

pub fn run(c: Config) -> Result<()> {
    let level = match c.debug {
        0 => LevelFilter::INFO,
        1 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    let log =
        tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(std::io::stderr().is_terminal());
    // Nobody else has set one.
    let _ = log.with_max_level(level).with_target(false).try_init();
    // The engine's threads compute; these only wait and write.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.context("cannot start the server's threads")?;
    let done = runtime.block_on(crate::http::serve(c));
    // Engines that are still at work are not waited for.
    runtime.shutdown_background();
    done
}
