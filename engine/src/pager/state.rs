//! What a pager knows and decides. Plain data: layers and experts by number, bytes; no files.

use super::lru::Lru;
use super::{Choice, PagerOptions, Paging};
use crate::plan::room_for_files;
use crate::usage::Usage;
use std::time::{Duration, Instant};

/// How often the memory that is left is looked at: it takes some ten microseconds.
const EVERY: Duration = Duration::from_millis(500);

/// Page faults that had to read in such a time after which what is believed to be here is asked for again: somebody else took
/// memory away.
const FAULTS: u64 = 256;

/// What follows from a router's choice.
pub struct Chosen {
    /// Numbers within the layer of those to ask for.
    pub missed: Vec<usize>,
    /// Numbers over all layers of those to give up.
    pub gone: Vec<usize>,
    /// There is not memory enough for all that were chosen.
    pub crowded: bool,
    /// It is otherwise than at the last choice in this layer.
    pub flipped: bool,
}

/// Experts by their number over all layers.
pub struct Pins {
    pub added: Vec<usize>,
    pub dropped: Vec<usize>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Not asked for yet.
    New,
    /// In memory to stay.
    Stays,
    /// Read for every pass.
    Streamed,
}

pub struct State {
    options: PagerOptions,
    experts: Lru,
    /// Tokens that chose each expert.
    pub uses: Vec<u64>,
    /// When each expert was last asked for, as a count of losses: it may have gone since.
    asked_at: Vec<u32>,
    losses: u32,
    /// Bytes of each layer without its experts, the output last; and what is done with it.
    layers: Vec<(usize, Place)>,
    /// By layer: whether the last choice there was more than memory holds.
    crowded: Vec<bool>,
    /// Bytes for experts; `None`: everything fits.
    capacity: Option<usize>,
    memory: Option<u64>,
    looked: Option<Instant>,
    faults: u64,
    pinned: u64,
    pub locked: bool,
    stats: Paging,
    pub trace: Option<Vec<Choice>>,
    chosen: Vec<usize>,
}

impl State {
    /// `layers`: bytes of each layer without experts, the output last; `experts`: bytes of each, layer after layer.
    pub fn new(layers: Vec<usize>, experts: Vec<usize>, options: PagerOptions) -> Self {
        let n = experts.len();
        Self {
            options,
            experts: Lru::new(experts),
            uses: vec![0; n],
            asked_at: vec![0; n],
            losses: 0,
            crowded: vec![false; layers.len()],
            layers: layers.into_iter().map(|b| (b, Place::New)).collect(),
            capacity: None,
            memory: None,
            looked: None,
            faults: 0,
            pinned: 0,
            locked: false,
            stats: Paging::default(),
            trace: None,
            chosen: Vec::with_capacity(n),
        }
    }

    /// Looks at the memory that is left, now and then. Returns the experts to give up.
    pub fn begin_pass(&mut self) -> Vec<usize> {
        if self.layers.is_empty() || self.looked.is_some_and(|t| t.elapsed() < EVERY) {
            return Vec::new();
        }
        let faults = Usage::now().map_or(0, |u| u.major_faults);
        if self.looked.is_some() && faults - self.faults.min(faults) > FAULTS {
            self.losses += 1;
            for l in self.layers.iter_mut().filter(|l| l.1 == Place::Stays) {
                l.1 = Place::New;
            }
        }
        self.faults = faults;
        self.looked = Some(Instant::now());
        // Pages on their way, and what others of the same group may want at once.
        let spare = |room: u64| room.saturating_sub(room / 64 + (8 << 20));
        let room = self.options.memory.or_else(|| room_for_files().map(spare));
        self.divide(room.map(|r| usize::try_from(r).unwrap_or(usize::MAX)));
        let (mut gone, capacity) = (Vec::new(), self.capacity.unwrap_or(usize::MAX));
        self.experts.shrink(capacity, 0, |e| gone.push(e));
        self.stats.evicted += gone.len() as u64;
        gone
    }

    /// Divides `room` among layers and experts.
    fn divide(&mut self, room: Option<usize>) {
        let dense: usize = self.layers.iter().map(|l| l.0).sum();
        let experts: usize = (0..self.experts.len()).map(|e| self.experts.bytes(e)).sum();
        let room = room.unwrap_or(usize::MAX);
        let fits = dense.saturating_add(experts) <= room;
        self.memory = (!fits).then_some(room as u64);
        // Experts are read by choice, layers by every token: layers first, if they leave experts a quarter.
        let for_layers = if experts == 0 { room } else { room - room / 4 };
        let all = fits || dense <= for_layers;
        // Otherwise the layer that computes and the one that is on its way take room, too.
        let largest = self.layers.iter().map(|l| l.0).max().unwrap_or(0);
        let mut left = if all { usize::MAX } else { for_layers.saturating_sub(2 * largest) };
        let mut staying = 0;
        // The output, last in the list, is as good as any other; the first layers stay.
        for (bytes, place) in &mut self.layers {
            let stays = *bytes <= left;
            if stays {
                left -= *bytes;
                staying += *bytes;
            } else {
                left = 0;
            }
            *place = match (stays, *place) {
                (true, Place::Stays) => Place::Stays,
                (true, _) => Place::New,
                (false, _) => Place::Streamed,
            };
        }
        let layers = if all { dense } else { (staying + 2 * largest).min(room) };
        self.capacity = (!fits).then(|| room - layers.min(room));
    }

    /// Layer `i` begins: the layers to ask for, and those to give up.
    pub fn at_layer(&mut self, i: usize) -> (Vec<usize>, Vec<usize>) {
        let n = self.layers.len();
        let streamed = |l: usize| self.layers[l].1 == Place::Streamed;
        // Before the first layer came the output of the last pass, and its last layer.
        let behind = if i == 0 { n.saturating_sub(2)..n } else { i - 1..i };
        let gone = behind.filter(|l| n > 2 && streamed(*l)).collect();
        let mut asked = Vec::new();
        // After the last layer come the output and the next pass; the output itself is not announced.
        let next = if i + 2 >= n { vec![n - 1, 0] } else { vec![i + 1] };
        let here = (i == 0 && self.layers[0].1 == Place::New).then_some(0);
        for l in here.into_iter().chain(next) {
            let place = &mut self.layers[l].1;
            if *place == Place::Stays || asked.contains(&l) {
                continue;
            }
            if *place == Place::New {
                *place = Place::Stays;
            }
            asked.push(l);
        }
        self.stats.asked += asked.iter().map(|l| self.layers[*l].0 as u64).sum::<u64>();
        (asked, gone)
    }

    /// The router of layer `layer`, whose `count` experts begin with number `first`, chose `ids`.
    pub fn choose(&mut self, layer: u32, first: usize, count: usize, ids: &[u32]) -> Chosen {
        self.chosen.clear();
        for &id in ids.iter().filter(|id| (**id as usize) < count) {
            self.uses[first + id as usize] += 1;
            self.chosen.push(first + id as usize);
        }
        self.chosen.sort_unstable();
        self.chosen.dedup();
        if let Some(trace) = &mut self.trace {
            let choice = |e: &usize| Choice { layer, expert: (e - first) as u32 };
            trace.extend(self.chosen.iter().map(choice));
        }
        let bytes: usize = self.chosen.iter().map(|e| self.experts.bytes(*e)).sum();
        let capacity = self.capacity.unwrap_or(usize::MAX);
        let crowded = bytes > capacity;
        let flipped = std::mem::replace(&mut self.crowded[layer as usize], crowded) != crowded;
        let mut missed = Vec::new();
        for &e in &self.chosen {
            if !self.experts.touch(e) || self.asked_at[e] != self.losses {
                self.asked_at[e] = self.losses;
                missed.push(e - first);
                self.stats.asked += self.experts.bytes(e) as u64;
            }
        }
        let mut gone = Vec::new();
        self.experts.shrink(capacity, if crowded { 0 } else { self.chosen.len() }, |e| gone.push(e));
        self.stats.chosen += self.chosen.len() as u64;
        self.stats.missed += missed.len() as u64;
        if crowded {
            // Those chosen are read by page faults; what they leave behind is the system's to forget.
            gone.retain(|e| !self.chosen.contains(e));
            missed.clear();
        }
        self.stats.evicted += gone.len() as u64;
        Chosen { missed, gone, crowded, flipped }
    }

    /// Which experts to pin from now on; `None`: as before. Only those that are here: nothing is read for it.
    pub fn choose_pins(&mut self) -> Option<Pins> {
        let most = self.options.pin.min(self.capacity.map_or(u64::MAX, |c| c as u64 / 4 * 3));
        if most == 0 || self.looked.is_some_and(|t| t.elapsed() > Duration::from_millis(50)) {
            return None;
        }
        let mut order: Vec<usize> = (0..self.experts.len())
            .filter(|e| self.uses[*e] > 0 && (self.experts.here(*e) || self.experts.pinned(*e)))
            .collect();
        // What is pinned stays until something else is used clearly more.
        let weight =
            |e: usize| self.uses[e] * 8 + if self.experts.pinned(e) { self.uses[e] * 2 + 8 } else { 0 };
        order.sort_by_key(|e| (std::cmp::Reverse(weight(*e)), *e));
        let (mut bytes, mut keep) = (0u64, vec![false; self.experts.len()]);
        for e in order {
            let b = self.experts.bytes(e) as u64;
            if bytes + b > most {
                break;
            }
            bytes += b;
            keep[e] = true;
        }
        let (mut added, mut dropped) = (Vec::new(), Vec::new());
        for (e, keep) in keep.into_iter().enumerate() {
            if keep != self.experts.pinned(e) {
                self.experts.pin(e, keep);
                if keep { &mut added } else { &mut dropped }.push(e);
            }
        }
        self.pinned = bytes;
        (!added.is_empty() || !dropped.is_empty()).then_some(Pins { added, dropped })
    }

    pub fn stats(&self) -> Paging {
        Paging {
            memory: self.memory,
            experts_here: self.experts.used() as u64,
            pinned: self.pinned,
            locked: self.locked,
            ..self.stats
        }
    }
}
