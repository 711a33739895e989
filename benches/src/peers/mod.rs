//! The comparison with llama.cpp, made anew on any machine: models by [`crate::synth`], ours and the peer's runs in turns,
//! medians, shares of the machine's own limits measured in the same rounds. `src/bin/peers.rs` is its command.

mod case;
mod plot;
mod process;
mod table;

pub use case::{Case, Work};
pub use plot::draw;
pub use process::{Limits, Peer, Programs, Run, WATCH, watch};
pub use table::{markdown, replace_between};

use serde::{Deserialize, Serialize};

/// Tokens per second of one round, and what the machine could do in it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Round {
    /// Ours.
    pub ours: f64,
    /// llama.cpp's; `None` where it could not run the test.
    pub peer: Option<f64>,
    /// Tokens per second at the machine's limit: its read bandwidth over the bytes a decoded token reads, or its peak of
    /// multiply-adds over those of a prompt's token.
    pub limit: f64,
}

/// What is measured of a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// A prompt of so many tokens.
    Prompt(usize),
    /// Decoding after so many tokens of context.
    Decode {
        /// Tokens in the cache before.
        depth: usize,
        /// Tokens decoded.
        tokens: usize,
    },
}

/// A test of a model, with all its rounds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Test {
    /// What it is.
    pub kind: Kind,
    /// Bytes read (decode) or multiply-adds done (prompt) per token.
    pub work: f64,
    /// The rounds.
    pub rounds: Vec<Round>,
}

/// How the peer runs a model: llama.cpp's AMX kernels have no place for the products of latent attention, and its scheduler
/// ends in an assertion.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum PeerForm {
    /// With its defaults.
    #[default]
    Default,
    /// Built without AMX.
    WithoutAmx,
    /// With the weights as they lie in the file, for none of its kernels repacked.
    NotRepacked,
}

impl PeerForm {
    /// What a reader of its figures must know.
    pub fn note(self) -> &'static str {
        match self {
            Self::Default => "with its defaults",
            Self::WithoutAmx => "built without AMX",
            Self::NotRepacked => "without repacked weights",
        }
    }
}

/// A model's tests.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// The model's name.
    pub model: String,
    /// Its types.
    pub types: String,
    /// Its file's length.
    pub file_bytes: u64,
    /// Whether prompts are measured against the peak of f32 (float files) instead of int8.
    pub float: bool,
    /// What the peer needed to run it.
    pub peer_form: PeerForm,
    /// The tests.
    pub tests: Vec<Test>,
}

/// Everything that was measured, and where.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Results {
    /// Day of the measurement.
    pub date: String,
    /// The processor, and our backend's name.
    pub machine: String,
    /// The peer with its version.
    pub peer: String,
    /// Threads of both.
    pub threads: usize,
    /// Largest share of the processor that other programs took during a measurement.
    pub others: f64,
    /// Medians over the rounds.
    pub limits: Limits,
    /// The models.
    pub models: Vec<Measured>,
}

/// The middle one, or the mean of the middle two; `None` of nothing.
pub fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut v: Vec<f64> = values.into_iter().collect();
    v.sort_by(f64::total_cmp);
    let n = v.len();
    if n == 0 { None } else { Some((v[(n - 1) / 2] + v[n / 2]) / 2.0) }
}

impl Test {
    /// Our median rate.
    pub fn ours(&self) -> f64 {
        median(self.rounds.iter().map(|r| r.ours)).unwrap_or(f64::NAN)
    }

    /// The peer's median rate.
    pub fn peer(&self) -> Option<f64> {
        median(self.rounds.iter().filter_map(|r| r.peer))
    }

    /// Ours over the peer's: the median of the rounds' ratios.
    pub fn ratio(&self) -> Option<f64> {
        median(self.rounds.iter().filter_map(|r| r.peer.map(|p| r.ours / p)))
    }

    /// Our share of the limit: the median of the rounds' shares.
    pub fn share(&self) -> f64 {
        median(self.rounds.iter().map(|r| r.ours / r.limit)).unwrap_or(f64::NAN)
    }

    /// The peer's share.
    pub fn peer_share(&self) -> Option<f64> {
        median(self.rounds.iter().filter_map(|r| r.peer.map(|p| p / r.limit)))
    }

    /// How far apart our rounds lie: largest over smallest, minus 1.
    pub fn spread(&self) -> f64 {
        let of = |f: fn(f64, f64) -> f64, start| self.rounds.iter().map(|r| r.ours).fold(start, f);
        of(f64::max, f64::MIN) / of(f64::min, f64::MAX) - 1.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median([]), None);
        assert_eq!(median([3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median([4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }

    #[test]
    fn ratios_are_taken_round_by_round() {
        let round = |ours, peer, limit| Round { ours, peer, limit };
        let rounds =
            vec![round(10.0, Some(5.0), 20.0), round(20.0, Some(10.0), 25.0), round(30.0, None, 100.0)];
        let t = Test { kind: Kind::Prompt(8), work: 1.0, rounds };
        assert_eq!((t.ours(), t.peer(), t.ratio()), (20.0, Some(7.5), Some(2.0)));
        assert_eq!((t.share(), t.peer_share()), (0.5, Some(0.325)));
        assert_eq!(t.spread(), 2.0);
    }
}
