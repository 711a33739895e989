//! What `rsinfer serve` does between HTTP and the engine.

pub mod constrain;
