//! A sequence in a file: what its cache holds, byte by byte, so that it goes on with the same bits.
//!
//! ```text
//! "rsinfrKV"  version u32  header length u32  header (JSON)
//! tokens u32 ...
//! per group: of a set the positions u64 [kv_heads, entries], masses f32, queries; then per layer the rows of both buffers
//! SHA-256 of all that
//! ```
//! Numbers are little-endian. Files are hostile: lengths are checked against the file and the checksum before anything in the
//! cache changes. Knows nothing of models but a fingerprint.

use super::arena::{Arena, Group, Held, LAST_BASE, LayerKv, SeqId};
use super::evict::{read_mass, write_mass};
use super::options::Kind;
use super::pool::BLOCK;
use super::ring::Ring;
use super::set::{Progress, Set};
use crate::EngineError;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::Path;

const MAGIC: &[u8; 8] = b"rsinfrKV";
const VERSION: u32 = 1;
/// Bytes of a header at most: far above any.
const HEADER: usize = 1 << 24;

/// What a file must agree on with the cache it is read into.
pub(crate) struct Origin<'a> {
    /// Of the model: its shape and samples of its weights.
    pub model: [u8; 32],
    /// The cache's configuration.
    pub kv: &'a str,
    /// Entries of the vocabulary.
    pub n_vocab: usize,
}

/// Hashes what passes.
struct Hashing<T> {
    inner: T,
    hash: Sha256,
}

impl<T: Write> Write for Hashing<T> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let n = self.inner.write(bytes)?;
        self.hash.update(&bytes[..n]);
        Ok(n)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// What the header says of a group's set; zeros for a ring.
#[derive(Clone, Copy, Default)]
struct SetHeader {
    entries: usize,
    evicted_at: usize,
    recent: usize,
    queries: usize,
}

impl Arena {
    fn types_text(&self) -> String {
        let layer = |l: &LayerKv| format!("{} {}", l.first.dtype().name(), l.second.dtype().name());
        self.layers.first().map(layer).unwrap_or_default()
    }

    /// Writes a sequence to a new file at `path`.
    pub(crate) fn save(&self, id: SeqId, origin: &Origin<'_>, path: &Path) -> Result<(), EngineError> {
        let s = self.get(id)?;
        let fail = |e: std::io::Error| failed(path, format!("cannot write it: {e}"));
        let groups = s.held.iter().map(|h| match h {
            Held::Ring(_) => json!({}),
            Held::Set(set) => json!({
                "entries": set.entries,
                "evicted_at": set.evicted_at,
                "recent": set.recent,
                "queries": set.queries.len(),
            }),
        });
        let p = s.progress;
        let header = json!({
            "model": hex(&origin.model),
            "kv": origin.kv,
            "types": self.types_text(),
            "base": s.base,
            "sinks": s.sinks,
            "tokens": s.tokens.len(),
            "progress": [p.reading.0, p.reading.1, p.prompt_end, p.decoded],
            "groups": groups.collect::<Vec<_>>(),
        });
        let header = header.to_string();
        // Under another name until it is whole.
        let part = path.with_extension("part");
        let file = File::create(&part).map_err(fail)?;
        let mut out = Hashing { inner: BufWriter::new(file), hash: Sha256::new() };
        let mut put = |bytes: &[u8]| out.write_all(bytes).map_err(fail);
        put(MAGIC)?;
        put(&VERSION.to_le_bytes())?;
        put(&(header.len() as u32).to_le_bytes())?;
        put(header.as_bytes())?;
        put(bytemuck::cast_slice(&s.tokens.iter().map(|t| t.to_le()).collect::<Vec<u32>>()))?;
        let floats = |v: &[f32]| -> Vec<u8> { v.iter().flat_map(|x| x.to_le_bytes()).collect() };
        for (group, held) in self.groups.iter().zip(&s.held) {
            let slots = saved_slots(group, held, s.sinks, s.tokens.len());
            if let Held::Set(set) = held {
                for p in &set.positions {
                    put(&p.iter().flat_map(|p| p.to_le_bytes()).collect::<Vec<u8>>())?;
                }
                let LayerKv { device, masses, .. } = &self.layers[group.layers[0]];
                for mass in [&masses.total, &masses.recent].into_iter().flatten() {
                    put(&floats(&read_mass(device, mass, &slots)?))?;
                }
                for (position, query) in &set.queries {
                    put(&position.to_le_bytes())?;
                    put(&floats(query))?;
                }
            }
            for &l in &group.layers {
                for buf in [&self.layers[l].first, &self.layers[l].second] {
                    for some in slots.chunks(PIECE) {
                        let mut bytes = vec![0; some.len() * buf.row_bytes()];
                        self.layers[l].device.kv_save(buf, some, &mut bytes)?;
                        put(&bytes)?;
                    }
                }
            }
        }
        let hash = out.hash.finalize();
        let mut file = out.inner;
        file.write_all(&hash).and_then(|()| file.flush()).map_err(fail)?;
        std::fs::rename(&part, path).map_err(fail)
    }

    /// Reads what [`Arena::save`] wrote in place of the sequence `id`.
    ///
    /// # Errors
    /// [`EngineError::CacheFile`]: a file that is damaged, of another version, model or configuration; the sequence is
    /// untouched then. Should the file fail while its rows are read, after all checks, the sequence is empty.
    pub(crate) fn load(&mut self, id: SeqId, origin: &Origin<'_>, path: &Path) -> Result<(), EngineError> {
        self.get(id)?;
        let fail = |why: String| failed(path, why);
        let io = |e: std::io::Error| failed(path, format!("cannot read it: {e}"));
        let body = checked(path)?;
        let mut file = BufReader::new(File::open(path).map_err(io)?);
        let mut start = [0; 16];
        file.read_exact(&mut start).map_err(io)?;
        let header_len = u32::from_le_bytes([start[12], start[13], start[14], start[15]]) as usize;
        if header_len > HEADER || body < (16 + header_len) as u64 {
            return Err(fail("its header is longer than the file".into()));
        }
        let mut header = vec![0; header_len];
        file.read_exact(&mut header).map_err(io)?;
        let header: Value = serde_json::from_slice(&header).map_err(|e| fail(format!("its header: {e}")))?;
        let text = |key: &str| header[key].as_str().unwrap_or("?");
        let count = |v: &Value| v.as_u64().and_then(|n| usize::try_from(n).ok());
        if text("model") != hex(&origin.model) {
            return Err(fail("it is of another model".into()));
        }
        if text("kv") != origin.kv || text("types") != self.types_text() {
            let (theirs, ours) = (format!("--kv {} ({})", text("kv"), text("types")), origin.kv);
            return Err(fail(format!(
                "it was saved with {theirs}, this is --kv {ours} ({})",
                self.types_text()
            )));
        }
        let damaged = || fail("its header does not fit this cache".into());
        let len = count(&header["tokens"]).ok_or_else(damaged)?;
        let base = header["base"].as_u64().filter(|b| *b <= LAST_BASE).ok_or_else(damaged)?;
        let sinks = match &header["sinks"] {
            Value::Null => None,
            n => {
                let sound = |n: &usize| (1..=self.most_sinks()).contains(n) && n.is_multiple_of(BLOCK);
                Some(count(n).filter(sound).ok_or_else(damaged)?)
            }
        };
        // Before anything is counted by it.
        if (len as u64).checked_mul(4).is_none_or(|b| b > body) {
            return Err(fail("its length is not what its header says".into()));
        }
        if let Some(ctx) = self.options.end().filter(|end| len > *end) {
            return Err(EngineError::Context { need: len, ctx });
        }
        let p: Vec<usize> =
            header["progress"].as_array().ok_or_else(damaged)?.iter().filter_map(count).collect();
        let &[reading, read, prompt_end, decoded] = &p[..] else { return Err(damaged()) };
        if read > reading || prompt_end > len {
            return Err(damaged());
        }
        let progress = Progress { reading: (reading, read), prompt_end, decoded };
        let listed =
            header["groups"].as_array().filter(|g| g.len() == self.groups.len()).ok_or_else(damaged)?;
        let mut sets = Vec::new();
        for (v, g) in listed.iter().zip(&self.groups) {
            let Kind::Set(shape) = &g.kind else {
                sets.push(SetHeader::default());
                continue;
            };
            let field = |key: &str| count(&v[key]).ok_or_else(damaged);
            let h = SetHeader {
                entries: field("entries")?,
                evicted_at: field("evicted_at")?,
                recent: field("recent")?,
                queries: field("queries")?,
            };
            if h.entries > shape.capacity.min(len) || h.evicted_at > len || h.queries > shape.needs.queries {
                return Err(damaged());
            }
            sets.push(h);
        }
        if self.body_bytes(len, &sets).is_none_or(|b| b + 16 + header_len as u64 != body) {
            return Err(fail("its length is not what its header says".into()));
        }
        let tokens = read_u32(&mut file, len).map_err(io)?;
        if let Some(&id) = tokens.iter().find(|t| **t as usize >= origin.n_vocab) {
            return Err(EngineError::TokenId { id, n_vocab: origin.n_vocab });
        }
        self.truncate(id, 0)?;
        self.sequences[id.index as usize].as_mut().expect("checked").sinks = sinks;
        let restored = self.restore(id, &mut file, len, &sets);
        if restored.is_err() {
            self.truncate(id, 0)?;
        }
        restored.map_err(|e| e.unwrap_or_else(damaged))?;
        let s = self.sequences[id.index as usize].as_mut().expect("checked");
        (s.base, s.tokens, s.progress) = (base, tokens, progress);
        Ok(())
    }

    /// Bytes between the header and the checksum.
    fn body_bytes(&self, len: usize, sets: &[SetHeader]) -> Option<u64> {
        let mut sum = (len as u64).checked_mul(4)?;
        for (g, h) in self.groups.iter().zip(sets) {
            let entries = match &g.kind {
                Kind::Ring(reach) => reach.kept(len).count(),
                Kind::Set(_) => h.entries,
            } as u64;
            if let Kind::Set(shape) = &g.kind {
                let masses = &self.layers[g.layers[0]].masses;
                let masses = u64::from(masses.total.is_some()) + u64::from(masses.recent.is_some());
                sum = sum.checked_add(shape.geometry.kv_heads as u64 * entries * (8 + 4 * masses))?;
                let query = shape.geometry.heads * (shape.geometry.key + shape.geometry.k_pe);
                sum = sum.checked_add(h.queries as u64 * (8 + 4 * query as u64))?;
            }
            for &l in &g.layers {
                let row = self.layers[l].first.row_bytes() + self.layers[l].second.row_bytes();
                sum = sum.checked_add(entries.checked_mul(row as u64)?)?;
            }
        }
        Some(sum)
    }

    /// Fills an empty sequence. `None`: positions that cannot be.
    fn restore(
        &mut self,
        id: SeqId,
        file: &mut impl Read,
        len: usize,
        sets: &[SetHeader],
    ) -> Result<(), Option<EngineError>> {
        let io = |e: std::io::Error| Some(EngineError::Option(format!("cannot read the cache file: {e}")));
        let Self { layers, groups, sequences, .. } = self;
        let s = sequences[id.index as usize].as_mut().ok_or(Some(EngineError::NoSequence))?;
        for ((group, held), h) in groups.iter_mut().zip(&mut s.held).zip(sets) {
            match (&group.kind, &mut *held) {
                (Kind::Ring(reach), Held::Ring(ring)) => {
                    *ring = Ring::restore(&reach.with_sinks(s.sinks), &mut group.pool, len);
                }
                (Kind::Set(shape), Held::Set(set)) => {
                    let (heads, mut slots) = (shape.geometry.kv_heads, Vec::new());
                    *set = Set::new(shape);
                    set.extend(&mut group.pool, h.entries, &mut slots);
                    (set.entries, set.evicted_at, set.recent) = (h.entries, h.evicted_at, h.recent);
                    for positions in &mut set.positions {
                        *positions = read_u64(file, h.entries).map_err(io)?;
                        let sound = positions.windows(2).all(|w| w[0] < w[1]);
                        if !sound || positions.last().is_some_and(|p| *p >= len as u64) {
                            return Err(None);
                        }
                    }
                    let LayerKv { device, masses, .. } = &mut layers[group.layers[0]];
                    for mass in [&mut masses.total, &mut masses.recent].into_iter().flatten() {
                        let values = read_f32(file, heads * h.entries).map_err(io)?;
                        write_mass(device, mass, &slots, &values).map_err(Some)?;
                    }
                    for _ in 0..h.queries {
                        let position = read_u64(file, 1).map_err(io)?[0];
                        let width = shape.geometry.heads * (shape.geometry.key + shape.geometry.k_pe);
                        set.queries.push_back((position, read_f32(file, width).map_err(io)?));
                    }
                }
                _ => unreachable!("sequences are made from the groups"),
            }
            let slots = saved_slots(group, held, s.sinks, len);
            for &l in &group.layers {
                let LayerKv { device, first, second, .. } = &mut layers[l];
                for buf in [first, second] {
                    for some in slots.chunks(PIECE) {
                        let mut bytes = vec![0; some.len() * buf.row_bytes()];
                        file.read_exact(&mut bytes).map_err(io)?;
                        device.kv_load(buf, some, &bytes).map_err(|e| Some(e.into()))?;
                    }
                }
            }
        }
        Ok(())
    }
}

/// Rows copied at a time.
const PIECE: usize = 256;

fn failed(path: &Path, why: String) -> EngineError {
    EngineError::CacheFile { path: path.display().to_string(), why }
}

/// The slots whose rows a file holds, of a sequence of `len` tokens.
fn saved_slots(group: &Group, held: &Held, sinks: Option<usize>, len: usize) -> Vec<u32> {
    match (&group.kind, held) {
        (Kind::Ring(reach), Held::Ring(r)) => {
            let reach = reach.with_sinks(sinks);
            reach.kept(len).map(|i| r.slot(&reach, i)).collect()
        }
        (_, Held::Set(set)) => set.slots(set.entries),
        _ => Vec::new(),
    }
}

/// Checks magic, version and checksum; the length without the checksum.
fn checked(path: &Path) -> Result<u64, EngineError> {
    let io = |e: std::io::Error| failed(path, format!("cannot read it: {e}"));
    let file = File::open(path).map_err(io)?;
    let size = file.metadata().map_err(io)?.len();
    let Some(body) = size.checked_sub(32).filter(|b| *b >= 16) else {
        return Err(failed(path, "it is too short for a saved cache".into()));
    };
    let mut file = BufReader::new(file);
    let mut start = [0; 16];
    file.read_exact(&mut start).map_err(io)?;
    if &start[..8] != MAGIC {
        return Err(failed(path, "it is no saved cache".into()));
    }
    let version = u32::from_le_bytes([start[8], start[9], start[10], start[11]]);
    if version != VERSION {
        return Err(failed(path, format!("it is of version {version}, this program knows {VERSION}")));
    }
    let mut hash = Sha256::new();
    hash.update(start);
    let mut left = body - 16;
    let mut some = vec![0; 1 << 16];
    while left > 0 {
        let n = left.min(some.len() as u64) as usize;
        file.read_exact(&mut some[..n]).map_err(io)?;
        hash.update(&some[..n]);
        left -= n as u64;
    }
    let mut sum = [0; 32];
    file.read_exact(&mut sum).map_err(io)?;
    if hash.finalize()[..] != sum {
        return Err(failed(path, "it is damaged: its checksum is wrong".into()));
    }
    Ok(body)
}

fn read_u32(file: &mut impl Read, n: usize) -> std::io::Result<Vec<u32>> {
    let mut words = Vec::new();
    words.try_reserve_exact(n)?;
    words.resize(n, 0);
    file.read_exact(bytemuck::cast_slice_mut(&mut words))?;
    words.iter_mut().for_each(|w| *w = u32::from_le(*w));
    Ok(words)
}

fn read_f32(file: &mut impl Read, n: usize) -> std::io::Result<Vec<f32>> {
    Ok(read_u32(file, n)?.into_iter().map(f32::from_bits).collect())
}

fn read_u64(file: &mut impl Read, n: usize) -> std::io::Result<Vec<u64>> {
    let words = read_u32(file, 2 * n)?;
    let mut all = Vec::new();
    all.try_reserve_exact(n)?;
    all.extend(words.chunks_exact(2).map(|w| u64::from(w[0]) | u64::from(w[1]) << 32));
    Ok(all)
}
