//! Tile products: rows of weights unpacked to bf16 (`widen`) in the order of the left operand, which is that of memory; the right
//! operand is a panel of activations. Tiles of 16 rows by 32 values by 16 tokens, four sums at a time.
//!
//! Tile registers and their configuration are a thread's own. Each `asm!` block here configures them, computes and releases
//! them: nothing of their state outlives a block, so that no promise about what the compiler does in between is needed, and
//! threads that do other work carry none of it (it would cost at every switch of threads).

use super::super::avx512::turned;
use super::widen::{Widen, widen};
use crate::KernelError;
use crate::cpu::scalar::{MAX_GROUP_BYTES, RUN};
use crate::cpu::scratch::grow;
use crate::cpu::tiles::{DEPTH, Line, Panel, ROWS, lines};
use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::RefCell;
use std::mem::MaybeUninit;

/// Rows of weights that are unpacked at once: with a run of each they fill a quarter of the second-level cache.
const ROWS_AT_ONCE: usize = 128;
/// Tiles of a run.
const TILES: usize = RUN / DEPTH;
/// Values of a group of weights.
const GROUP: usize = 256;
/// Lines of a tile.
const TILE: usize = 16;
/// Lines of the unpacked weights.
const LINES: usize = ROWS_AT_ONCE * TILES;

/// Bytes that a thread keeps.
pub const SCRATCH_BYTES: usize = LINES * size_of::<Line>();

thread_local! {
    static SCRATCH: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
}

/// Allocates them.
pub fn reserve() -> Result<(), KernelError> {
    SCRATCH.with_borrow_mut(|s| grow(s, LINES, Line::ZERO))
}

/// `ldtilecfg`'s operand: palette 1, all eight tiles 16 rows of 64 bytes.
#[repr(C, align(64))]
struct Config([u8; 64]);

static CONFIG: Config = {
    let mut c = [0; 64];
    c[0] = 1;
    let mut i = 0;
    while i < 8 {
        c[16 + 2 * i] = 64;
        c[48 + i] = 16;
        i += 1;
    }
    Config(c)
};

/// `asm!` that uses the tile registers and no stack.
macro_rules! tiles {
    ($($t:tt)*) => {
        asm!(
            "ldtilecfg [{config}]",
            $($t)*
            config = in(reg) &CONFIG,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack)
        )
    };
}

/// Two tiles of rows by two blocks of 16 tokens: sums of row tile i and block j in tile `2 * i + j` of `c`, a line per row of
/// weights.
///
/// # Safety
/// `a` and `b` hold `n` > 0 tiles each, one behind the other, `c` four; the CPU has the set and the system allows it.
#[inline(always)]
unsafe fn two_by_two(a: [*const Line; 2], b: [*const Line; 2], n: usize, c: *mut Line) {
    // SAFETY: the caller's promise; see the module.
    unsafe {
        tiles!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            "tileloadd tmm4, [{a0} + {step}]",
            "tileloadd tmm6, [{b0} + {step}]",
            "tileloadd tmm7, [{b1} + {step}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm5, [{a1} + {step}]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {a0}, 1024",
            "add {a1}, 1024",
            "add {b0}, 1024",
            "add {b1}, 1024",
            "dec {n}",
            "jnz 2b",
            "tilestored [{c} + {step}], tmm0",
            "tilestored [{c} + {step} + 1024], tmm1",
            "tilestored [{c} + {step} + 2048], tmm2",
            "tilestored [{c} + {step} + 3072], tmm3",
            "tilerelease",
            a0 = inout(reg) a[0] => _,
            a1 = inout(reg) a[1] => _,
            b0 = inout(reg) b[0] => _,
            b1 = inout(reg) b[1] => _,
            n = inout(reg) n => _,
            c = in(reg) c,
            step = in(reg) 64usize,
        );
    }
}

/// Two tiles of rows by one block: sums of row tile i in lines `16 * i..` of `c`.
///
/// # Safety
/// As above; `c` holds two tiles.
#[inline(always)]
unsafe fn two_by_one(a: [*const Line; 2], b: *const Line, n: usize, c: *mut Line) {
    // SAFETY: as above.
    unsafe {
        tiles!(
            "tilezero tmm0",
            "tilezero tmm2",
            "2:",
            "tileloadd tmm6, [{b} + {step}]",
            "tileloadd tmm4, [{a0} + {step}]",
            "tileloadd tmm5, [{a1} + {step}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "add {a0}, 1024",
            "add {a1}, 1024",
            "add {b}, 1024",
            "dec {n}",
            "jnz 2b",
            "tilestored [{c} + {step}], tmm0",
            "tilestored [{c} + {step} + 1024], tmm2",
            "tilerelease",
            a0 = inout(reg) a[0] => _,
            a1 = inout(reg) a[1] => _,
            b = inout(reg) b => _,
            n = inout(reg) n => _,
            c = in(reg) c,
            step = in(reg) 64usize,
        );
    }
}

/// Two tiles of rows by three blocks: the fewest reads a product, with all registers in use.
///
/// # Safety
/// As above; `c` holds six tiles.
#[inline(always)]
unsafe fn two_by_three(a: [*const Line; 2], b: [*const Line; 3], n: usize, c: *mut Line) {
    // SAFETY: as above.
    unsafe {
        tiles!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "tilezero tmm4",
            "tilezero tmm5",
            "2:",
            "tileloadd tmm6, [{a0} + {step}]",
            "tileloadd tmm7, [{b0} + {step}]",
            "tdpbf16ps tmm0, tmm6, tmm7",
            "tileloadd tmm7, [{b1} + {step}]",
            "tdpbf16ps tmm1, tmm6, tmm7",
            "tileloadd tmm7, [{b2} + {step}]",
            "tdpbf16ps tmm2, tmm6, tmm7",
            "tileloadd tmm6, [{a1} + {step}]",
            "tdpbf16ps tmm5, tmm6, tmm7",
            "tileloadd tmm7, [{b1} + {step}]",
            "tdpbf16ps tmm4, tmm6, tmm7",
            "tileloadd tmm7, [{b0} + {step}]",
            "tdpbf16ps tmm3, tmm6, tmm7",
            "add {a0}, 1024",
            "add {a1}, 1024",
            "add {b0}, 1024",
            "add {b1}, 1024",
            "add {b2}, 1024",
            "dec {n}",
            "jnz 2b",
            "tilestored [{c} + {step}], tmm0",
            "tilestored [{c} + {step} + 1024], tmm1",
            "tilestored [{c} + {step} + 2048], tmm2",
            "tilestored [{c} + {step} + 3072], tmm3",
            "tilestored [{c} + {step} + 4096], tmm4",
            "tilestored [{c} + {step} + 5120], tmm5",
            "tilerelease",
            a0 = inout(reg) a[0] => _,
            a1 = inout(reg) a[1] => _,
            b0 = inout(reg) b[0] => _,
            b1 = inout(reg) b[1] => _,
            b2 = inout(reg) b[2] => _,
            n = inout(reg) n => _,
            c = in(reg) c,
            step = in(reg) 64usize,
        );
    }
}

/// Multiply-adds of a round of [`peak`].
pub const PEAK_ROUND: usize = 4 * 16 * 16 * 32;

/// Four independent chains of tile products, for `cpu::machine`.
///
/// # Safety
/// The CPU has the set and the system allows it; `rounds` > 0.
pub unsafe fn peak(rounds: usize) {
    // SAFETY: the caller's promise; see the module.
    unsafe {
        tiles!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "tilezero tmm4",
            "tilezero tmm5",
            "2:",
            "tdpbf16ps tmm0, tmm4, tmm5",
            "tdpbf16ps tmm1, tmm4, tmm5",
            "tdpbf16ps tmm2, tmm4, tmm5",
            "tdpbf16ps tmm3, tmm4, tmm5",
            "dec {n}",
            "jnz 2b",
            "tilerelease",
            n = inout(reg) rounds => _,
        );
    }
}

/// Lanes `4 * q..4 * q + 4` of 16 lines, each as a register: lane i of it from line i.
///
/// # Safety
/// As for all helpers here: inlined only into functions that have the instruction set; `from` is 16 lines.
#[inline(always)]
unsafe fn lanes(from: *const Line, q: usize) -> [__m512i; 4] {
    // SAFETY: the caller's promise; a line is 64 bytes.
    unsafe { turned::<64>(from.cast::<u8>().add(16 * q)) }
}

/// See `tiles::Writer::set`.
///
/// # Safety
/// The CPU has the set; at most 16 rows of one length, `to` holds `lines` of it.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2")]
pub unsafe fn interleave(rows: &[&[f32]], to: &mut [Line]) {
    let mut tile = [Line::ZERO; TILE];
    for (i, to) in to.chunks_exact_mut(TILE).enumerate() {
        for (row, line) in rows.iter().zip(&mut tile) {
            let part = &row[i * DEPTH..row.len().min((i + 1) * DEPTH)];
            let whole = (1u64 << part.len()) - 1;
            // SAFETY: lanes below the length; a line has 32 bf16.
            unsafe {
                let low = _mm512_maskz_loadu_ps(whole as u16, part.as_ptr());
                let high = _mm512_maskz_loadu_ps((whole >> 16) as u16, part.as_ptr().wrapping_add(16));
                let both: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(high, low));
                _mm512_store_si512(line.0.as_mut_ptr().cast(), both);
            }
        }
        for q in 0..4 {
            // SAFETY: 16 lines each.
            unsafe {
                let v = lanes(tile.as_ptr(), q);
                each!(j < 4, { _mm512_store_si512(to.as_mut_ptr().add(4 * q + j).cast(), v[j]) });
            }
        }
    }
}

/// Unpacks groups of 32 rows of weights (the last row repeated past the end) to two tiles of rows, `step` lines apart.
///
/// # Safety
/// `w` holds rows of `row_bytes`, `groups` groups of each from byte `from` on, the last perhaps not whole; `to` has room; the
/// CPU has the set.
#[target_feature(
    enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512bf16,avx2,fma,f16c"
)]
unsafe fn unpack<F: Widen>(
    w: &[u8],
    row_bytes: usize,
    from: usize,
    groups: usize,
    to: *mut Line,
    step: usize,
) {
    let last = w.len() / row_bytes - 1;
    let mut padded = [0u8; MAX_GROUP_BYTES];
    for v in 0..2 {
        for g in 0..groups {
            for r in 0..TILE {
                let row = (16 * v + r).min(last);
                let at = row * row_bytes + from + g * F::BYTES;
                let left = (row + 1) * row_bytes - at;
                // SAFETY: a whole group of the row, or what is left of it in a buffer that holds any group; fetching ahead reads
                // nothing.
                unsafe {
                    let mut p = w.as_ptr().add(at);
                    // The same of the next 32 rows.
                    let next = p.wrapping_add(w.len());
                    let mut ahead = 0;
                    while ahead < F::BYTES {
                        _mm_prefetch::<_MM_HINT_T1>(next.wrapping_add(ahead).cast());
                        ahead += 64;
                    }
                    if left < F::BYTES {
                        std::ptr::copy_nonoverlapping(p, padded.as_mut_ptr(), left);
                        p = padded.as_ptr();
                    }
                    widen::<F>(p, to.add(v * step + g * (GROUP / DEPTH) * TILE + r));
                }
            }
        }
    }
}

/// Adds (or sets) sums of 16 rows by 16 tokens, a line per row, to `y[token * n + row]` for `rows` rows and `tokens` tokens.
///
/// # Safety
/// `c` is a tile; `y` holds the results; the CPU has the set.
#[inline(always)]
unsafe fn put(c: *const Line, y: *mut f32, n: usize, (rows, tokens): (usize, usize), add: bool) {
    let mask = 0xffffu16 >> (16 - rows);
    for q in 0..tokens.div_ceil(4) {
        // SAFETY: the caller's promise.
        unsafe {
            let v = lanes(c, q);
            each!(j < 4, {
                if 4 * q + j < tokens {
                    let to = y.add((4 * q + j) * n);
                    let mut v = _mm512_castsi512_ps(v[j]);
                    if add {
                        v = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), v);
                    }
                    _mm512_mask_storeu_ps(to, mask, v);
                }
            });
        }
    }
}

/// See `table::Tiled`.
///
/// # Safety
/// The CPU has the set and the system allows it.
#[target_feature(
    enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512bf16,avx2,fma,f16c"
)]
pub unsafe fn rows<F: Widen>(w: &[u8], row_bytes: usize, x: Panel<'_>, y: &mut [f32]) {
    let n = w.len() / row_bytes;
    let (blocks, block) = (x.rows.div_ceil(ROWS), lines(x.cols));
    assert!(y.len() == n * x.rows && x.lines.len() == blocks * block);
    // As whole groups: unpacking may go on to the end of one.
    let step = RUN.min(x.cols).next_multiple_of(GROUP) / DEPTH * TILE;
    let at_once = (LINES / (2 * step)).min(ROWS_AT_ONCE / 32) * 32;
    let mut s = SCRATCH.replace(Vec::new());
    grow(&mut s, LINES, Line::ZERO).expect("reserved when a session opened, else small");
    let mut sums = MaybeUninit::<[Line; 6 * TILE]>::uninit();
    let c = sums.as_mut_ptr().cast::<Line>();
    for r0 in (0..n).step_by(at_once) {
        let pairs = at_once.min(n - r0).div_ceil(32);
        for from in (0..x.cols).step_by(RUN) {
            let cols = RUN.min(x.cols - from);
            for i in 0..pairs {
                let r = r0 + 32 * i;
                let part = &w[r * row_bytes..(r + 32).min(n) * row_bytes];
                // SAFETY: `cols` values of each row, in an area for `at_once` rows of as many groups.
                unsafe {
                    let to = s.as_mut_ptr().add(2 * i * step);
                    unpack::<F>(part, row_bytes, from / GROUP * F::BYTES, cols.div_ceil(GROUP), to, step);
                }
            }
            let mut b = 0;
            while b < blocks {
                let across = match blocks - b {
                    1 => 1,
                    2 | 4 => 2,
                    _ => 3,
                };
                for i in 0..pairs {
                    let r = r0 + 32 * i;
                    // SAFETY: tiles of two times 16 rows, as just unpacked, and of up to three blocks of the panel, of which there are
                    // `cols` values from `from` on; `c` holds six.
                    unsafe {
                        let a = s.as_ptr().add(2 * i * step);
                        let a = [a, a.add(step)];
                        let p = x.lines.as_ptr().add(b * block + from / DEPTH * TILE);
                        let tiles = cols.div_ceil(DEPTH);
                        match across {
                            1 => two_by_one(a, p, tiles, c),
                            2 => two_by_two(a, [p, p.add(block)], tiles, c),
                            _ => two_by_three(a, [p, p.add(block), p.add(2 * block)], tiles, c),
                        }
                        for (v, r) in [r, r + 16].into_iter().enumerate().filter(|(_, r)| *r < n) {
                            for t in 0..across {
                                let token = (b + t) * ROWS;
                                let size = (16.min(n - r), ROWS.min(x.rows - token));
                                let to = y.as_mut_ptr().add(token * n + r);
                                put(c.add((v * across + t) * TILE), to, n, size, from > 0);
                            }
                        }
                    }
                }
                b += across;
            }
        }
    }
    SCRATCH.set(s);
}
