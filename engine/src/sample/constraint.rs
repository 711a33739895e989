//! What a text is held to while it is generated: a grammar, a JSON schema. Knows nothing of how that is done.

use super::SampleError;

/// Says which tokens may come next, and is told which came. One constraint serves one answer.
///
/// A caller masks the logits, samples, and hands the token to [`Constraint::accept`]; end-of-generation tokens end the
/// answer and are not handed over.
pub trait Constraint: Send {
    /// Sets the logits (`[n_vocab]`) of all tokens that cannot come next to minus infinity. End-of-generation tokens stay
    /// where the text may end.
    ///
    /// # Errors
    /// [`SampleError::Constraint`]: the constraint became too complex, or no token can continue the text.
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), SampleError>;

    /// Takes the token that was chosen.
    ///
    /// # Errors
    /// [`SampleError::Constraint`]: a token that [`Constraint::mask`] had ruled out.
    fn accept(&mut self, token: u32) -> Result<(), SampleError>;

    /// Whether the text is complete and nothing can follow.
    fn is_done(&self) -> bool;
}
