//! Embeddings on a loaded model's engine thread, a batch at a time, between the passes of others. Knows no dialect.

use super::failure::Failure;
use super::models::Lease;
use super::prompt::{App, Ask};
use super::worker::Worker;
use crate::store::Resolved;
use engine::text::EncodeOptions;
use engine::{Embedding, Pooling};
use tokio::sync::oneshot;

/// Texts of a request at most.
pub const MOST_TEXTS: usize = 2048;

/// A text, or its tokens.
#[derive(Clone, Debug, PartialEq)]
pub enum Text {
    Text(String),
    Tokens(Vec<u32>),
}

/// Vectors of length 1, and what they cost.
pub struct Embedded {
    pub vectors: Vec<Vec<f32>>,
    pub tokens: usize,
    pub lease: Lease,
}

impl App {
    /// Embeds texts. `dimensions`: only so many of the first, scaled to length 1 again. Texts longer than the context are
    /// cut, or (`ask.truncate` false) refused.
    ///
    /// # Errors
    /// What does not fit, what the engine reports.
    pub async fn embed(
        &self,
        model: &Resolved,
        ask: &Ask,
        texts: Vec<Text>,
        dimensions: Option<usize>,
    ) -> Result<Embedded, Failure> {
        if texts.len() > MOST_TEXTS {
            return Err(Failure::field("input", format!("at most {MOST_TEXTS} texts are possible")));
        }
        let lease = self.load(model, ask).await?;
        let loaded = lease.loaded.worker.model();
        let width = loaded.info().d_model;
        if let Some(n) = dimensions.filter(|n| !(1..=width).contains(n)) {
            return Err(Failure::field(
                "dimensions",
                format!("{n} is not between 1 and {width}, the model's"),
            ));
        }
        let pooling = Pooling::of(loaded.file().metadata()).map_err(|e| Failure::invalid(e.to_string()))?;
        let (mut vectors, mut tokens) = (Vec::with_capacity(texts.len()), 0);
        for text in texts {
            let mut ids = match text {
                Text::Tokens(ids) => ids,
                Text::Text(t) => {
                    loaded.vocab().encode(&t, EncodeOptions { add_special: true, parse_special: false })
                }
            };
            if ids.len() > lease.loaded.ctx {
                if !ask.truncate {
                    return Err(Failure::TooLong { prompt: ids.len(), ctx: lease.loaded.ctx });
                }
                ids.truncate(lease.loaded.ctx);
            }
            tokens += ids.len();
            let n_vocab = loaded.info().n_vocab;
            if let Some(id) = ids.iter().find(|t| **t as usize >= n_vocab) {
                return Err(Failure::invalid(format!(
                    "token {id} is out of range: the vocabulary has {n_vocab}"
                )));
            }
            if ids.is_empty() {
                return Err(Failure::field("input", "a text without tokens cannot be embedded"));
            }
            let bytes =
                Embedding::bytes(&lease.loaded.worker.model(), ids.len()).map_err(Failure::internal)?;
            let _memory = self.models.lend(bytes)?;
            let mut vector = one(&lease.loaded.worker, ids, pooling).await?;
            if let Some(n) = dimensions {
                vector.truncate(n);
                let length = vector.iter().map(|x| x * x).sum::<f32>().sqrt().max(f32::MIN_POSITIVE);
                vector.iter_mut().for_each(|x| *x /= length);
            }
            vectors.push(vector);
        }
        Ok(Embedded { vectors, tokens, lease })
    }
}

async fn one(worker: &Worker, ids: Vec<u32>, pooling: Pooling) -> Result<Vec<f32>, Failure> {
    let model = worker.model();
    let mut begun =
        on_engine(worker, move || Embedding::new(&model, ids, pooling)).await?.map_err(Failure::internal)?;
    loop {
        let (next, stepped) = on_engine(worker, move || {
            let stepped = begun.step();
            (begun, stepped)
        })
        .await?;
        begun = next;
        if let Some(vector) = stepped.map_err(Failure::internal)? {
            return Ok(vector);
        }
    }
}

/// Runs something between two passes.
async fn on_engine<T: Send + 'static>(
    worker: &Worker,
    f: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Failure> {
    let (tell, told) = oneshot::channel();
    worker.call(Box::new(move |_| drop(tell.send(f()))));
    told.await.map_err(|_| Failure::Internal("the embedding failed; try again".into()))
}
