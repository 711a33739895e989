//! Continuous batching: which rows of which sequences go into the next forward pass. Plain data: knows tokens and places in a
//! cache, nothing of models, caches, text or clients, and is tested without any of them.

mod scheduler;
mod sequence;
#[cfg(test)]
mod tests;

pub use scheduler::{Admission, Cancelled, Limits, Piece, Place, QueueFull, Scheduler, Start};
pub use sequence::Job;
