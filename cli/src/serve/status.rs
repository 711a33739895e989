//! What a loaded model is doing, as its engine thread last said: for `/slots`, metrics and people.

use engine::SeqId;

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct Status {
    /// Requests that wait for a place.
    pub waiting: usize,
    /// Places for sequences.
    pub slots: Vec<SlotStatus>,
    /// Cache entries held and all there are, summed over layers.
    pub kv: (usize, usize),
}

/// One place.
#[derive(Clone, Debug, Default)]
pub struct SlotStatus {
    /// Its sequence in the cache; the latest request's stays, so that the next can go on from it.
    pub seq: Option<SeqId>,
    /// The request at work.
    pub job: Option<u64>,
    /// Tokens computed, those no longer seen included.
    pub cached: usize,
    /// Tokens of the prompt to come.
    pub prompt_left: usize,
    /// Tokens not seen any more.
    pub evicted: usize,
    /// Tokens of the answer so far.
    pub made: usize,
}
