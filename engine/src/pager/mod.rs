//! Mapped weights and the memory that is left for them. A forward pass says which layer it is at and which experts the router
//! chose; the pager asks the disk for what is not there, all at once, and gives up what was used longest ago before the system
//! would have to choose. Where everything fits it does next to nothing.
//!
//! - Experts: an LRU list, as large as the memory left when all else is there. (The system's own choice among mapped pages is
//!   worse, and finding it costs it more time than reading: docs/memory.md.)
//! - Layers without their experts are all used by every token: an LRU list of them would always lack the next one. As many as fit
//!   stay, the others are read ahead while the layer before them computes, and given up behind it.
//!
//! Knows tensors by name, files as ranges of bytes; nothing of what is computed. Everything here is about time: without it the
//! same bytes are read through page faults.

mod lru;
mod readers;
mod state;

pub use lru::ideal;

use crate::gguf::{Access, File, Map, TensorInfo};
use crate::plan::Part;
use crate::stages::Devices;
use kernels::Device;
use readers::{Piece, Readers};
use state::State;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

/// What is asked of a [`Pager`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PagerOptions {
    /// Bytes of the experts used most that stay in memory (locked, where the process may).
    pub pin: u64,
    /// Everything is left to the system: for measuring what the pager costs and gains.
    pub off: bool,
    /// Memory for mapped weights; `None`: what the system and its control groups leave, looked at again and again.
    pub memory: Option<u64>,
}

/// An expert that the router chose for a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The layer.
    pub layer: u32,
    /// The expert.
    pub expert: u32,
}

/// What a pager has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Paging {
    /// Bytes of all mapped files.
    pub mapped: u64,
    /// Memory for mapped weights when it was last looked at; `None`: they all fit.
    pub memory: Option<u64>,
    /// Bytes of experts believed to be in memory.
    pub experts_here: u64,
    /// Bytes of pinned experts, and whether they are locked.
    pub pinned: u64,
    /// Whether the system let pinned experts be locked; otherwise they are the last to be given up.
    pub locked: bool,
    /// Experts chosen, once for each pass.
    pub chosen: u64,
    /// Of these, those that had to be asked for.
    pub missed: u64,
    /// Bytes that were asked for, of experts and of layers.
    pub asked: u64,
    /// Experts given up.
    pub evicted: u64,
}

/// Experts of a layer: models have some hundreds.
const MOST_EXPERTS: usize = 1 << 16;

/// One tensor of all experts of a layer.
struct Stack {
    map: Arc<Map>,
    start: usize,
    each: usize,
}

/// The routed experts of a layer.
struct Experts {
    /// The number of the first one, counted over all layers.
    first: usize,
    count: usize,
    stacks: Vec<Stack>,
}

impl Experts {
    /// Bytes of one expert.
    fn each(&self) -> usize {
        self.stacks.iter().map(|s| s.each).sum()
    }

    /// The ranges of expert `e` of this layer.
    fn ranges(&self, e: usize) -> impl Iterator<Item = (&Arc<Map>, Range<usize>)> {
        self.stacks.iter().map(move |s| (&s.map, s.start + e * s.each..s.start + (e + 1) * s.each))
    }
}

/// What a layer is made of.
#[derive(Default)]
struct Layer {
    /// All but the experts.
    dense: Vec<Piece>,
    experts: Option<Experts>,
}

impl Layer {
    fn bytes(&self) -> usize {
        self.dense.iter().map(|p| p.1.len()).sum()
    }
}

/// See the module.
pub struct Pager {
    /// The transformer's layers, then the output.
    layers: Vec<Layer>,
    state: Mutex<State>,
    readers: Option<Readers>,
    mapped: u64,
}

impl Pager {
    /// A pager of the mapped parts of `file` that the host computes with; without any, one that does nothing.
    pub fn new(file: &File, on: &Devices, options: PagerOptions) -> Self {
        let layers = if options.off { Vec::new() } else { layers(file, on) };
        let mut sizes = Vec::new();
        for e in layers.iter().filter_map(|l| l.experts.as_ref()) {
            sizes.extend(std::iter::repeat_n(e.each(), e.count));
        }
        for layer in &layers {
            // Expert by expert, read-ahead would fetch what nobody chose.
            for s in layer.experts.iter().flat_map(|e| e.stacks.iter().map(move |s| (s, e.count))) {
                let _ = s.0.map.advise(s.0.start..s.0.start + s.0.each * s.1, Access::Random);
            }
        }
        let state = State::new(layers.iter().map(Layer::bytes).collect(), sizes, options);
        let mapped = (0..file.n_parts()).filter_map(|i| file.map(i)).map(|m| m.len() as u64).sum();
        let readers = (!layers.is_empty()).then(Readers::new);
        Self { layers, state: Mutex::new(state), readers, mapped }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Layer `i` is about to compute: asks for the next one, gives up the last one if it cannot stay.
    pub fn layer(&self, i: usize) {
        if self.layers.is_empty() {
            return;
        }
        let mut state = self.state();
        if i == 0 {
            let gone = state.begin_pass();
            self.give_up(&gone);
            if let Some(pins) = state.choose_pins() {
                self.pin(&mut state, &pins);
            }
        }
        let (asked, gone) = state.at_layer(i);
        drop(state);
        for l in gone {
            self.layers[l].dense.iter().for_each(|(map, range)| map.release(range.clone()));
        }
        if let Some(readers) = self.readers.as_ref().filter(|_| !asked.is_empty()) {
            let pieces = asked.iter().flat_map(|l| &self.layers[*l].dense);
            readers.later(pieces.flat_map(|(m, r)| pieces_of(m, r.clone())).collect());
        }
    }

    /// The router of layer `i` has chosen `ids` (any number of tokens, in any order): asks for those that are not here.
    pub fn experts(&self, i: usize, ids: &[u32]) {
        let Some(experts) = self.layers.get(i).and_then(|l| l.experts.as_ref()) else { return };
        let mut state = self.state();
        let choice = state.choose(i as u32, experts.first, experts.count, ids);
        drop(state);
        if choice.flipped {
            // More than memory holds at once: read-ahead by page faults, which forget what is behind.
            let access = if choice.crowded { Access::Normal } else { Access::Random };
            for s in &experts.stacks {
                let _ = s.map.advise(s.start..s.start + s.each * experts.count, access);
            }
        }
        self.give_up(&choice.gone);
        if let Some(readers) = self.readers.as_ref().filter(|_| !choice.missed.is_empty()) {
            // In the order of use: first the inner layers of all, then their last one.
            let n = experts.stacks.len();
            let of = |stacks: Range<usize>| {
                choice
                    .missed
                    .iter()
                    .flat_map(move |e| experts.ranges(*e).skip(stacks.start).take(stacks.len()))
            };
            let pieces = of(0..n.saturating_sub(1)).chain(of(n.saturating_sub(1)..n));
            readers.now(pieces.flat_map(|(m, r)| pieces_of(m, r)).collect());
        }
    }

    /// Begins or ends recording of what routers choose; returns what was recorded.
    pub fn record(&self, on: bool) -> Vec<Choice> {
        let mut state = self.state();
        std::mem::replace(&mut state.trace, on.then(Vec::new)).unwrap_or_default()
    }

    /// Bytes of one expert of layer `i`; 0 where there are none.
    pub fn expert_bytes(&self, i: usize) -> u64 {
        self.layers.get(i).and_then(|l| l.experts.as_ref()).map_or(0, |e| e.each() as u64)
    }

    /// How often each expert of layer `i` was chosen, counted in tokens.
    pub fn uses(&self, i: usize) -> Vec<u64> {
        let Some(e) = self.layers.get(i).and_then(|l| l.experts.as_ref()) else { return Vec::new() };
        self.state().uses[e.first..e.first + e.count].to_vec()
    }

    /// What was done so far.
    pub fn stats(&self) -> Paging {
        Paging { mapped: self.mapped, ..self.state().stats() }
    }

    /// The layer and number in it of an expert by its number over all.
    fn find(&self, e: usize) -> Option<(&Experts, usize)> {
        let mut all = self.layers.iter().filter_map(|l| l.experts.as_ref());
        all.find(|x| e < x.first + x.count).map(|x| (x, e - x.first))
    }

    fn give_up(&self, experts: &[usize]) {
        for (x, e) in experts.iter().filter_map(|e| self.find(*e)) {
            x.ranges(e).for_each(|(map, range)| map.release(range));
        }
    }

    /// Locks what is pinned from now on and unlocks what is not any more. Where nothing may be locked, they only leave the list of
    /// what can be given up.
    fn pin(&self, state: &mut State, pins: &state::Pins) {
        for (x, e) in pins.dropped.iter().filter_map(|e| self.find(*e)) {
            x.ranges(e).for_each(|(map, range)| map.unlock(range));
        }
        let mut locked = true;
        for (x, e) in pins.added.iter().filter_map(|e| self.find(*e)) {
            locked &= x.ranges(e).all(|(map, range)| map.lock(range).is_ok());
        }
        state.locked = locked;
    }
}

fn pieces_of(map: &Arc<Map>, range: Range<usize>) -> impl Iterator<Item = Piece> + use<> {
    let map = map.clone();
    map.pieces(range).map(move |r| (map.clone(), r))
}

/// The file's tensors that the host computes with, by layer, the output after the last; empty if nothing is mapped.
fn layers(file: &File, on: &Devices) -> Vec<Layer> {
    let layer = |t: &TensorInfo| Part::layer(&t.name);
    // A GPU holds its own copy.
    let here = |name: &str| on.of(name).is_none_or(Device::is_host);
    // What a file calls its layers is not to be trusted with memory: there are not more of them than tensors.
    let most = file.tensors().len();
    let count = file.tensors().iter().filter_map(layer).filter(|l| *l < most).max().map_or(0, |l| l + 1);
    let mut layers: Vec<Layer> = Vec::new();
    layers.resize_with(count + 1, Layer::default);
    let tied = file.tensor("output.weight").is_none() && here("output.weight");
    for t in file.tensors() {
        let Some(map) = file.map(t.part).filter(|_| here(&t.name)) else { continue };
        let range = t.offset as usize..(t.offset + t.n_bytes) as usize;
        let at = match layer(t) {
            Some(l) if l < count => l,
            // A few rows of the embeddings are read for a pass, unless they are the output too.
            _ if t.name == "token_embd.weight" && !tied => {
                let _ = map.advise(range, Access::Random);
                continue;
            }
            _ => count,
        };
        // Vectors are copied when the model is loaded.
        if t.dims.len() < 2 {
            continue;
        }
        let stacked = t.dims.get(2).copied().unwrap_or(1) as usize;
        if t.name.contains("_exps.") && stacked > 1 {
            let stack = Stack { map: map.clone(), start: range.start, each: range.len() / stacked };
            let x =
                layers[at].experts.get_or_insert(Experts { first: 0, count: stacked, stacks: Vec::new() });
            if x.count == stacked {
                // gate and up before down, as they are used.
                let last = t.name.contains("_down_");
                let place = if last { x.stacks.len() } else { 0 };
                x.stacks.insert(place, stack);
            }
        } else {
            layers[at].dense.push((map.clone(), range));
        }
    }
    if layers.iter().all(|l| l.dense.is_empty() && l.experts.is_none()) {
        return Vec::new();
    }
    // A file that claims more has other tensors under these names, which will not load.
    if layers.iter().filter_map(|l| l.experts.as_ref()).any(|e| e.count > MOST_EXPERTS) {
        return Vec::new();
    }
    let mut first = 0;
    for x in layers.iter_mut().filter_map(|l| l.experts.as_mut()) {
        x.first = first;
        first += x.count;
    }
    layers
}

#[cfg(test)]
mod tests;
