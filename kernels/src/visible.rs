//! What a query row sees of a cache: spans of slots. Knows nothing of what is stored there, nor of kernels.

/// A run of cache slots that a query sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// First slot.
    pub start: u32,
    /// Number of slots.
    pub len: u32,
    /// Whether these are attention sinks, scored with the query's second rotation where one is given.
    pub sink: bool,
}

/// What each query row of a batch sees: a short list of spans per row, in the order in which they are summed.
#[derive(Clone, Debug, Default)]
pub struct Visible {
    pub(crate) spans: Vec<Span>,
    ends: Vec<u32>,
    prompts: Vec<u32>,
    prompt: u32,
}

impl Visible {
    /// Forgets all rows, keeping the memory.
    pub fn clear(&mut self) {
        self.spans.clear();
        self.ends.clear();
        self.prompts.clear();
        self.prompt = 0;
    }

    /// Says of the rows pushed from now on that they belong to a request whose prompt adds `tokens` tokens (however it is cut
    /// into calls); 0, the default, that they are decoded one by one. A backend picks a row's kernel by this and by what the
    /// row sees, never by the call it is in, so that a row's bits do not depend on its neighbours. Wrong values cost time,
    /// never correctness.
    pub fn set_prompt(&mut self, tokens: usize) {
        self.prompt = u32::try_from(tokens).unwrap_or(u32::MAX);
    }

    /// Tokens of the prompt that row `i` is of, 0 for decoding.
    pub fn prompt(&self, i: usize) -> usize {
        self.prompts[i] as usize
    }

    /// The same of all rows.
    pub fn prompts(&self) -> &[u32] {
        &self.prompts
    }

    /// Adds the next query row; empty spans are dropped.
    pub fn push(&mut self, spans: impl IntoIterator<Item = Span>) {
        self.spans.extend(spans.into_iter().filter(|s| s.len > 0));
        self.ends.push(self.spans.len() as u32);
        self.prompts.push(self.prompt);
    }

    /// Number of query rows.
    pub fn rows(&self) -> usize {
        self.ends.len()
    }

    /// The spans of row `i`.
    pub fn row(&self, i: usize) -> &[Span] {
        let from = if i == 0 { 0 } else { self.ends[i - 1] };
        &self.spans[from as usize..self.ends[i] as usize]
    }

    /// Number of entries that row `i` sees.
    pub fn seen(&self, i: usize) -> usize {
        self.row(i).iter().map(|s| s.len as usize).sum()
    }
}
