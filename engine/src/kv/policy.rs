//! Which entries of a cache may be forgotten: [`KvPolicy`], what a policy may ask for and what it sees.
//!
//! Plain data: a policy scores the entries of one layer, or picks them itself; the cache does the recording, the moving and
//! the freeing. Knows nothing of slots, blocks, devices or models.
//!
//! A policy imports this module and nothing else. How to add one: docs/kv-policies.md.

pub use super::registry::{Evict, Make, ParamError, ParamInfo, Params, PolicyInfo, register};
pub use super::spec::Budget;
pub use super::vector::{add_scaled, dot, norm};
use std::fmt::{self, Debug};
use std::sync::Arc;

/// How a layer attends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttentionKind {
    /// Keys and values per kv head (multi-head, grouped and multi-query attention).
    Gqa,
    /// One latent and one shared rotary key per token, for all heads (DeepSeek's MLA).
    Mla,
}

/// The rotary part of keys and queries.
#[derive(Clone, Debug, PartialEq)]
pub struct Rotary {
    /// First rotated dimension of a key (MLA: of latent and rotary key put together, so the latent's width).
    pub start: usize,
    /// Radians per position, one per pair of dimensions.
    pub freqs: Arc<[f64]>,
    /// Pairs are (2i, 2i+1); otherwise (i, i + dims/2).
    pub adjacent: bool,
}

/// What is fixed about a layer.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerGeometry {
    /// The layer's number in the model.
    pub layer: usize,
    /// Layers of the model.
    pub n_layers: usize,
    /// How it attends.
    pub kind: AttentionKind,
    /// Query heads.
    pub heads: usize,
    /// Heads of the cache; 1 for MLA.
    pub kv_heads: usize,
    /// Dimensions of [`LayerView::keys`]: a head's key, or the latent.
    pub key: usize,
    /// Dimensions of [`LayerView::k_pe`]: the shared rotary key; 0 without MLA.
    pub k_pe: usize,
    /// Dimensions of [`LayerView::values`]: a head's value; 0 for MLA, whose values are projections of the latent.
    pub value: usize,
    /// Factor on the scores of attention.
    pub scale: f32,
    /// The rotation.
    pub rotary: Rotary,
    /// Whether queries can be recorded in the coordinates of keys (MLA: absorbed), see [`Needs::queries`].
    pub records_queries: bool,
}

/// What the cache must record or hand out for a policy. What is not asked for costs nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// [`LayerView::keys`] and, for MLA, [`LayerView::k_pe`].
    pub keys: bool,
    /// [`LayerView::values`].
    pub values: bool,
    /// [`LayerView::mass_total`].
    pub mass_total: bool,
    /// [`LayerView::mass_recent`] of this many latest queries; 0: none.
    pub mass_recent: usize,
    /// [`LayerView::queries`]: this many latest ones; 0: none.
    pub queries: usize,
    /// Nothing should be evicted before the prompt has been read, as far as memory allows: the end of the prompt judges it.
    pub whole_prompt: bool,
}

impl Needs {
    /// What serves both.
    pub fn and(self, o: Needs) -> Needs {
        Needs {
            keys: self.keys || o.keys,
            values: self.values || o.values,
            mass_total: self.mass_total || o.mass_total,
            mass_recent: self.mass_recent.max(o.mass_recent),
            queries: self.queries.max(o.queries),
            whole_prompt: self.whole_prompt || o.whole_prompt,
        }
    }
}

impl fmt::Display for Needs {
    /// In words, for lists.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let queries =
            |n: usize| if n == 1 { "the latest query".into() } else { format!("the latest {n} queries") };
        let mut words = Vec::new();
        words.extend(self.keys.then(|| "keys".to_string()));
        words.extend(self.values.then(|| "values".into()));
        words.extend(self.mass_total.then(|| "attention mass".into()));
        words.extend(
            (self.mass_recent > 0).then(|| format!("attention mass of {}", queries(self.mass_recent))),
        );
        words.extend((self.queries > 0).then(|| queries(self.queries)));
        words.extend(self.whole_prompt.then(|| "the whole prompt".into()));
        f.write_str(&if words.is_empty() { "nothing".into() } else { words.join(", ") })
    }
}

/// One layer's entries when something must go. Slices that the policy did not ask for are empty.
#[derive(Clone, Copy, Debug)]
pub struct LayerView<'a> {
    /// What is fixed about the layer.
    pub geometry: &'a LayerGeometry,
    /// Entries held, the same number in every head.
    pub entries: usize,
    /// `[kv_heads, entries]`: original positions, ascending in each head.
    pub positions: &'a [u64],
    /// `[kv_heads, entries, key]`: keys as cached (rotated), or latents (normalised).
    pub keys: &'a [f32],
    /// `[entries, k_pe]`: MLA's rotated shared keys.
    pub k_pe: &'a [f32],
    /// `[kv_heads, entries, value]`.
    pub values: &'a [f32],
    /// `[kv_heads, entries]`: softmax probabilities, summed over all queries so far and the query heads of the kv head.
    pub mass_total: &'a [f32],
    /// `[kv_heads, entries]`: the same over the latest [`Needs::mass_recent`] queries (or as many as there were).
    pub mass_recent: &'a [f32],
    /// `[heads, query_positions.len(), key + k_pe]`: the latest queries, rotated at their positions, in the coordinates of
    /// keys (MLA: `[W_k^b q_nope | q_pe]`), the softmax scale not applied.
    pub queries: &'a [f32],
    /// Their positions, ascending.
    pub query_positions: &'a [u64],
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Position of the next token.
    pub next: u64,
}

impl<'a> LayerView<'a> {
    /// Positions of a head's entries, ascending.
    pub fn positions(&self, head: usize) -> &'a [u64] {
        &self.positions[head * self.entries..][..self.entries]
    }

    /// Keys or latents of a head, entry by entry.
    pub fn keys(&self, head: usize) -> std::slice::ChunksExact<'a, f32> {
        let width = self.geometry.key;
        self.keys[head * self.entries * width..][..self.entries * width].chunks_exact(width)
    }

    /// Values of a head, entry by entry; for MLA the latents that values are projections of.
    pub fn values(&self, head: usize) -> std::slice::ChunksExact<'a, f32> {
        if self.geometry.kind == AttentionKind::Mla {
            return self.keys(head);
        }
        let width = self.geometry.value;
        self.values[head * self.entries * width..][..self.entries * width].chunks_exact(width)
    }

    /// [`LayerView::mass_total`] of a head.
    pub fn mass_total(&self, head: usize) -> &'a [f32] {
        &self.mass_total[head * self.entries..][..self.entries]
    }

    /// [`LayerView::mass_recent`] of a head.
    pub fn mass_recent(&self, head: usize) -> &'a [f32] {
        &self.mass_recent[head * self.entries..][..self.entries]
    }

    /// The recorded queries of one query head, oldest first.
    pub fn queries(&self, head: usize) -> std::slice::ChunksExact<'a, f32> {
        let (n, width) = (self.query_positions.len(), self.geometry.key + self.geometry.k_pe);
        self.queries[head * n * width..][..n * width].chunks_exact(width)
    }

    /// The query heads that read kv head `head`.
    pub fn group(&self, head: usize) -> std::ops::Range<usize> {
        let n = self.geometry.heads / self.geometry.kv_heads;
        head * n..(head + 1) * n
    }

    /// Checks that all that was asked for is there, in the right size.
    fn check(&self, needs: Needs) -> Result<(), String> {
        let g = self.geometry;
        let (heads, n, m) = (g.kv_heads, self.entries, self.query_positions.len());
        let wanted = [
            ("positions", self.positions.len(), heads * n, true),
            ("keys", self.keys.len(), heads * n * g.key, needs.keys),
            ("k_pe", self.k_pe.len(), n * g.k_pe, needs.keys),
            ("values", self.values.len(), heads * n * g.value, needs.values),
            ("mass_total", self.mass_total.len(), heads * n, needs.mass_total),
            ("mass_recent", self.mass_recent.len(), heads * n, needs.mass_recent > 0),
            ("queries", self.queries.len(), g.heads * m * (g.key + g.k_pe), needs.queries > 0),
        ];
        match wanted.iter().find(|(_, len, wanted, needed)| *needed && len != wanted) {
            Some((name, len, wanted, _)) => Err(format!("{name} has {len} numbers, {wanted} are needed")),
            None => Ok(()),
        }
    }
}

/// Entries that stay whatever their score.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Protect {
    /// Those at original positions below this one. They must fit the budget.
    pub first: u64,
    /// This many latest entries, as far as the budget goes.
    pub recent: usize,
}

impl Protect {
    /// What serves both.
    pub fn and(self, o: Protect) -> Protect {
        Protect { first: self.first.max(o.first), recent: self.recent.max(o.recent) }
    }
}

/// What stays in a layer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Selection {
    /// Selections: one for all heads, or one per kv head.
    pub heads: usize,
    /// `[heads, kept]`: indices of entries, ascending in each head, as many in each.
    pub kept: Vec<u32>,
    /// `[heads, entries]`: the scores it was made by, for traces; empty if there were none.
    pub scores: Vec<f32>,
}

impl Selection {
    /// Everything stays.
    pub fn all(entries: usize) -> Self {
        Self { heads: 1, kept: (0..entries as u32).collect(), scores: Vec::new() }
    }

    /// Entries that stay, per head.
    pub fn len(&self) -> usize {
        self.kept.len().checked_div(self.heads).unwrap_or(0)
    }

    /// Nothing stays.
    pub fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }

    /// The entries of kv head `head` that stay, ascending.
    pub fn head(&self, head: usize) -> &[u32] {
        let (n, head) = (self.len(), if self.heads == 1 { 0 } else { head });
        &self.kept[head * n..][..n]
    }

    fn check(&self, view: &LayerView<'_>, n: usize) -> Result<(), String> {
        let heads = view.geometry.kv_heads;
        if self.heads != 1 && self.heads != heads {
            return Err(format!("it chose for {} heads, the layer has {heads}", self.heads));
        }
        if !self.kept.len().is_multiple_of(self.heads) || self.len() > n {
            return Err(format!("it kept {} entries in {} heads, {n} may stay", self.kept.len(), self.heads));
        }
        let sound = |kept: &[u32]| {
            kept.windows(2).all(|w| w[0] < w[1]) && kept.last().is_none_or(|l| (*l as usize) < view.entries)
        };
        if !(0..self.heads).all(|h| sound(self.head(h))) {
            return Err(format!("what it kept is not an ascending list of indices below {}", view.entries));
        }
        if !self.scores.is_empty() && self.scores.len() != self.heads * view.entries {
            return Err(format!("it gave {} scores for {} entries", self.scores.len(), view.entries));
        }
        Ok(())
    }
}

/// Where a layer's budget comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerBudget {
    /// The layer's rank among those that the policy serves.
    pub layer: usize,
    /// How many it serves.
    pub n_layers: usize,
    /// Entries per layer that the user asked for.
    pub base: usize,
    /// Tokens of the session's context: no layer ever holds more.
    pub ctx: usize,
}

/// What may be forgotten. The same view must always give the same answer: results are reproducible.
pub trait KvPolicy: Send + Sync + Debug {
    /// What the cache must record.
    fn needs(&self) -> Needs;

    /// Whether it can serve such a layer; asked once, at load.
    ///
    /// # Errors
    /// Why not, to follow the words "... cannot serve layer 3:".
    fn supports(&self, geometry: &LayerGeometry) -> Result<(), String> {
        let _ = geometry;
        Ok(())
    }

    /// Whether kv heads may keep different entries; otherwise there is one selection per layer and `score` is called for
    /// head 0 alone.
    fn per_head(&self) -> bool {
        true
    }

    /// Entries that a layer may keep.
    fn budget(&self, b: LayerBudget) -> usize {
        b.base
    }

    /// Entries that stay in any case, when `n` may.
    fn protect(&self, view: &LayerView<'_>, n: usize) -> Protect {
        let _ = (view, n);
        Protect::default()
    }

    /// One score per entry of a kv head; higher ones stay. A NaN is reported as the policy's error.
    fn score(&self, view: &LayerView<'_>, head: usize, out: &mut [f32]);

    /// Picks at most `n` entries, `protect`'s among them. By default the best by score, the later of equals.
    ///
    /// # Errors
    /// As [`keep_best`].
    fn keep(&self, view: &LayerView<'_>, n: usize, protect: Protect) -> Result<Selection, KvError> {
        keep_best(self, view, n, protect)
    }
}

/// What can go wrong between a cache and its policy. The sequence is as it was before.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KvError {
    /// A `--kv` string that says nothing sensible.
    #[error(transparent)]
    Spec(#[from] super::spec::SpecError),
    /// A policy that cannot serve a layer.
    #[error("kv policy {policy} cannot serve layer {layer}: {why}")]
    Unsupported {
        /// The policy's `--kv` string.
        policy: String,
        /// The layer.
        layer: usize,
        /// Why not.
        why: String,
    },
    /// A budget, window or layer list that the model or the context makes impossible.
    #[error("kv policy {policy}: {why}")]
    Budget {
        /// The policy's `--kv` string.
        policy: String,
        /// What does not fit.
        why: String,
    },
    /// No memory for what the choice is made by.
    #[error("cannot allocate {bytes} bytes for the kv policy")]
    Memory {
        /// Bytes asked for.
        bytes: usize,
    },
    /// A score that is no number.
    #[error(
        "the kv policy's score of position {position} in layer {layer}, head {head} is NaN: nothing was evicted"
    )]
    NanScore {
        /// The layer.
        layer: usize,
        /// The kv head.
        head: usize,
        /// The entry's original position.
        position: u64,
    },
    /// More entries must stay than may.
    #[error(
        "{protected} entries of layer {layer} must stay by the kv policy, its budget is {budget}: raise the budget"
    )]
    Protected {
        /// The layer.
        layer: usize,
        /// Entries at protected positions.
        protected: usize,
        /// The layer's budget.
        budget: usize,
    },
    /// A view or a selection of the wrong shape: a bug of the cache or of the policy.
    #[error("layer {layer} and its kv policy do not understand each other: {what}")]
    Shape {
        /// The layer.
        layer: usize,
        /// What is wrong.
        what: String,
    },
    /// A name that cannot be registered.
    #[error("cannot register kv policy {name:?}: {why}")]
    Register {
        /// The name.
        name: String,
        /// Why not.
        why: String,
    },
}

/// Asks `policy` which `n` entries stay; checks the view and the answer. With `n` or fewer entries all stay, unasked.
///
/// # Errors
/// A view without what the policy needs, a selection that is none, and what [`KvPolicy::keep`] reports.
pub fn select(policy: &dyn KvPolicy, view: &LayerView<'_>, n: usize) -> Result<Selection, KvError> {
    if view.entries <= n {
        return Ok(Selection::all(view.entries));
    }
    let shape = |what| KvError::Shape { layer: view.geometry.layer, what };
    view.check(policy.needs()).map_err(shape)?;
    let selection = policy.keep(view, n, policy.protect(view, n))?;
    selection.check(view, n).map_err(shape)?;
    Ok(selection)
}

/// The protected entries and the best of the others by [`KvPolicy::score`], `n` in all, in time linear in the entries.
///
/// # Errors
/// [`KvError::NanScore`]; [`KvError::Protected`] if the first entries that must stay are more than `n`.
pub fn keep_best<P: KvPolicy + ?Sized>(
    policy: &P,
    view: &LayerView<'_>,
    n: usize,
    protect: Protect,
) -> Result<Selection, KvError> {
    if view.entries == 0 {
        return Ok(Selection::all(0));
    }
    let heads = if policy.per_head() { view.geometry.kv_heads } else { 1 };
    let layer = view.geometry.layer;
    let mut scores = room(heads * view.entries)?;
    scores.resize(heads * view.entries, 0.0);
    let mut kept = room(heads * n.min(view.entries))?;
    let mut ranks = room(view.entries)?;
    for (head, scores) in scores.chunks_exact_mut(view.entries).enumerate() {
        policy.score(view, head, scores);
        let positions = view.positions(head);
        if let Some(i) = scores.iter().position(|s| s.is_nan()) {
            return Err(KvError::NanScore { layer, head, position: positions[i] });
        }
        let first = positions.partition_point(|p| *p < protect.first);
        if first > n {
            return Err(KvError::Protected { layer, protected: first, budget: n });
        }
        let recent = protect.recent.min(n - first).min(view.entries - first);
        let middle = first..view.entries - recent;
        let wanted = (n - first - recent).min(middle.len());
        ranks.clear();
        ranks.extend(middle.clone().map(|i| rank(scores[i], i)));
        let least = match wanted.checked_sub(1) {
            None => u64::MAX,
            Some(last) => *ranks.select_nth_unstable_by(last, |a, b| b.cmp(a)).1,
        };
        kept.extend(0..first as u32);
        kept.extend(middle.clone().filter(|i| rank(scores[*i], *i) >= least).map(|i| i as u32));
        kept.extend(middle.end as u32..view.entries as u32);
    }
    Ok(Selection { heads, kept, scores })
}

/// An empty list with room for `n` entries: there are as many as a sequence has tokens.
fn room<T>(n: usize) -> Result<Vec<T>, KvError> {
    let mut list = Vec::new();
    let bytes = n.saturating_mul(size_of::<T>());
    list.try_reserve_exact(n).map_err(|_| KvError::Memory { bytes })?;
    Ok(list)
}

/// A number that orders entries by score, then by index; no two are equal, and none is `u64::MAX`.
fn rank(score: f32, i: usize) -> u64 {
    // Sign and magnitude to an unsigned order; adding zero makes one of both zeros.
    let bits = (score + 0.0).to_bits();
    let ordered = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
    u64::from(ordered) << 32 | i as u64
}

#[cfg(test)]
#[path = "policy_tests.rs"]
mod tests;
