//! What `rsinfer serve` does apart from HTTP: requests and answers that know no dialect, the engine thread of each loaded
//! model, the models that are loaded.

pub mod answer;
pub mod config;
pub mod constrain;
pub mod duration;
pub mod embed;
pub mod failure;
mod gbnf;
mod life;
pub mod metrics;
pub mod models;
pub mod options;
pub mod prompt;
pub mod request;
mod running;
pub mod status;
pub mod tools;
pub mod worker;
#[cfg(test)]
mod worker_tests;
