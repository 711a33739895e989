//! Cache types: reading runs of cached rows into f32 scratch, and writing rows. One row of a table per type, one column per
//! ISA. Knows slots and columns; nothing of attention.

use super::Pool;
use super::isa::Isa;
use super::lanes::{Kernel, Simd, W, padded};
use super::scratch::Shared;
use crate::{KvBuf, View};
use quant::DType;
use std::ops::Range;

/// Columns `col..col + len` of `rows` cache rows from `slot` on, to f32 rows of `stride`, zeros up to whole vectors.
#[derive(Clone, Copy)]
pub struct Read<'a> {
    cache: &'a KvBuf,
    slot: usize,
    rows: usize,
    col: usize,
    len: usize,
    dst: *mut f32,
    stride: usize,
}

trait Codec {
    /// Elements of a block and its bytes.
    const BLOCK: (usize, usize);
    /// Elements `at..at + 16` of a row, `at` a multiple of 16.
    ///
    /// # Safety
    /// The row must hold them.
    unsafe fn lanes<S: Simd>(s: S, row: *const u8, at: usize) -> S::V;
}

struct F32;
struct F16;
struct Bf16;
struct Q8;
struct Q4;

impl Codec for F32 {
    const BLOCK: (usize, usize) = (1, 4);
    #[inline(always)]
    unsafe fn lanes<S: Simd>(s: S, row: *const u8, at: usize) -> S::V {
        // SAFETY: the caller's; loads are unaligned.
        unsafe { s.load(row.add(4 * at).cast()) }
    }
}

impl Codec for F16 {
    const BLOCK: (usize, usize) = (1, 2);
    #[inline(always)]
    unsafe fn lanes<S: Simd>(s: S, row: *const u8, at: usize) -> S::V {
        // SAFETY: the caller's.
        unsafe { s.load_f16(row.add(2 * at)) }
    }
}

impl Codec for Bf16 {
    const BLOCK: (usize, usize) = (1, 2);
    #[inline(always)]
    unsafe fn lanes<S: Simd>(s: S, row: *const u8, at: usize) -> S::V {
        // SAFETY: the caller's.
        unsafe { s.load_bf16(row.add(2 * at)) }
    }
}

impl Codec for Q8 {
    const BLOCK: (usize, usize) = (32, 34);
    #[inline(always)]
    unsafe fn lanes<S: Simd>(s: S, row: *const u8, at: usize) -> S::V {
        // SAFETY: a block is a half and 32 bytes; 16 lanes never straddle two.
        unsafe {
            let block = row.add(at / 32 * 34);
            s.mul(s.load_i8(block.add(2 + at % 32)), s.splat_f16(block))
        }
    }
}

impl Codec for Q4 {
    const BLOCK: (usize, usize) = (32, 18);
    #[inline(always)]
    unsafe fn lanes<S: Simd>(s: S, row: *const u8, at: usize) -> S::V {
        // SAFETY: a block is a half and 16 bytes: elements 0..16 in the low nibbles, 16..32 in the high ones.
        unsafe {
            let block = row.add(at / 32 * 18);
            let q = if at.is_multiple_of(32) {
                s.load_u4::<false>(block.add(2))
            } else {
                s.load_u4::<true>(block.add(2))
            };
            s.mul(s.sub(q, s.splat(8.0)), s.splat_f16(block))
        }
    }
}

struct ReadAs<'a, C>(Read<'a>, std::marker::PhantomData<C>);

impl<C: Codec> Kernel for ReadAs<'_, C> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let r = self.0;
        let whole = r.len / W * W;
        let aligned = C::BLOCK.0 == 1 || r.col.is_multiple_of(W);
        for i in 0..r.rows {
            let row = r.cache.row(r.slot + i).as_ptr();
            // SAFETY: `read` checked rows and columns against the cache and dst against rows * stride.
            unsafe {
                let dst = r.dst.add(i * r.stride);
                if aligned {
                    // Element-wise types may start anywhere: step the pointer, not the index.
                    let (row, col) =
                        if C::BLOCK.0 == 1 { (row.add(r.col * C::BLOCK.1), 0) } else { (row, r.col) };
                    let mut at = 0;
                    while at < whole {
                        s.store(C::lanes(s, row, col + at), dst.add(at));
                        at += W;
                    }
                }
                if !aligned || whole < r.len {
                    tail::<C>(&r, r.slot + i, if aligned { whole } else { 0 }, dst);
                }
            }
        }
    }
}

/// Elements from `at` on through the format's own reader, then zeros to the end of the vector.
///
/// # Safety
/// As [`ReadAs`].
#[inline(never)]
unsafe fn tail<C: Codec>(r: &Read<'_>, slot: usize, at: usize, dst: *mut f32) {
    let (block, bytes) = C::BLOCK;
    let mut values = [0.0f32; 32];
    let row = r.cache.row(slot);
    for j in at..padded(r.len) {
        let mut x = 0.0;
        if j < r.len {
            let b = (r.col + j) / block;
            (r.cache.dtype().format().dequantize)(&row[b * bytes..][..bytes], &mut values[..block]);
            x = values[(r.col + j) % block];
        }
        // SAFETY: j < padded(len) <= stride.
        unsafe { *dst.add(j) = x };
    }
}

type Reader = fn(Isa, Read<'_>);

fn reader<C: Codec>(isa: Isa, r: Read<'_>) {
    isa.vectorize(ReadAs::<C>(r, std::marker::PhantomData));
}

/// The table of cache types: how each is read.
static READERS: [(DType, Reader); 5] = [
    (DType::F32, reader::<F32>),
    (DType::F16, reader::<F16>),
    (DType::BF16, reader::<Bf16>),
    (DType::Q8_0, reader::<Q8>),
    (DType::Q4_0, reader::<Q4>),
];

/// Reads columns `col..col + len` of `rows` rows from `slot` on into rows of `stride` floats, zero-padded to whole vectors.
///
/// # Safety
/// `dst` must be writable for `rows * stride` floats.
pub unsafe fn read(
    isa: Isa,
    cache: &KvBuf,
    slot: usize,
    rows: usize,
    col: usize,
    len: usize,
    dst: *mut f32,
    stride: usize,
) {
    assert!(slot + rows <= cache.slots() && col + len <= cache.width() && padded(len) <= stride);
    let dtype = cache.dtype();
    let (_, reader) = READERS.iter().find(|(d, _)| *d == dtype).expect("KvBuf takes only these types");
    reader(isa, Read { cache, slot, rows, col, len, dst, stride });
}

/// The bytes of `n` rows from `slot` on.
pub fn bytes(cache: &KvBuf, slot: usize, n: usize) -> &[u8] {
    let row = cache.data.len() / cache.slots();
    &cache.data[slot * row..][..n * row]
}

/// Stores row i of `x` in slot `slots[i]`. Tasks share out columns, not rows: two rows may go to the same slot, and the later
/// one stays.
pub fn write(pool: &Pool, isa: Isa, x: View<'_>, cache: &mut KvBuf, slots: &[u32]) {
    struct Halves<'a>(&'a [f32], &'a mut [u8]);
    impl Kernel for Halves<'_> {
        type Out = usize;
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> usize {
            let whole = self.0.len() / W * W;
            assert!(self.1.len() == 2 * self.0.len());
            let mut at = 0;
            while at < whole {
                // SAFETY: at + 16 <= len of both.
                unsafe { s.store_f16(s.load(self.0.as_ptr().add(at)), self.1.as_mut_ptr().add(2 * at)) };
                at += W;
            }
            whole
        }
    }
    let format = cache.dtype().format();
    let quantize = format.quantize.expect("every cache type can be written");
    let halves = cache.dtype() == DType::F16 && !matches!(isa, Isa::Portable | Isa::Scalar);
    // Rounding to blocks searches scales, some hundred operations a value; elements are stored as fast as memory takes them.
    let tasks = if format.block_len > 1 { 4 * pool.threads() } else { 1 };
    let (width, row_bytes) = (cache.width(), cache.row(0).len());
    let step = (width / tasks).max(1).next_multiple_of(COLUMNS).min(width);
    let data = Shared(cache.data.as_mut_ptr());
    pool.share(width.div_ceil(step), slots.len() * width * 64, |i| {
        let cols = i * step..width.min((i + 1) * step);
        let bytes = cols.start / format.block_len * format.block_bytes
            ..cols.end / format.block_len * format.block_bytes;
        for (i, slot) in slots.iter().enumerate() {
            let x = &x.row(i)[cols.clone()];
            // SAFETY: `Device::kv_write` checked the slots; whole blocks of a row, which no other task has.
            let row = unsafe {
                let at = data.at(*slot as usize * row_bytes + bytes.start);
                std::slice::from_raw_parts_mut(at, bytes.len())
            };
            let done = if halves { isa.vectorize(Halves(x, &mut *row)) } else { 0 };
            if done < x.len() {
                quantize(&x[done..], &mut row[2 * done..], None);
            }
        }
    });
}

/// Columns of a task's share of a row: whole blocks and whole cache lines of every type.
const COLUMNS: usize = 64;

/// Columns `cols` of a slot into `out`, of their length exactly.
pub fn read_row(isa: Isa, cache: &KvBuf, slot: usize, cols: &Range<usize>, out: &mut [f32]) {
    assert!(out.len() == cols.len());
    let mut some = [0.0f32; 512];
    let mut at = 0;
    // In pieces, since the reader writes whole vectors.
    while at < out.len() {
        let n = some.len().min(out.len() - at);
        // SAFETY: n <= 512, a multiple of a vector's length.
        unsafe { read(isa, cache, slot, 1, cols.start + at, n, some.as_mut_ptr(), some.len()) };
        out[at..at + n].copy_from_slice(&some[..n]);
        at += n;
    }
}

/// Stores columns `cols`, whole blocks, of a slot.
pub fn write_cols(x: &[f32], cache: &mut KvBuf, slot: usize, cols: &Range<usize>) {
    let quantize = cache.dtype().format().quantize.expect("every cache type can be written");
    let bytes = cache.byte_range(cols).expect("checked to be whole blocks");
    quantize(x, &mut cache.row_mut(slot)[bytes], None);
}

/// Copies columns `cols`, whole blocks, from slot to slot.
pub fn copy(cache: &mut KvBuf, moves: &[(u32, u32)], cols: &Range<usize>) {
    let bytes = cache.byte_range(cols).expect("checked to be whole blocks");
    let row = cache.row_bytes();
    for &(from, to) in moves {
        let from = from as usize * row;
        cache.data.copy_within(from + bytes.start..from + bytes.end, to as usize * row + bytes.start);
    }
}
