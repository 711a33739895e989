//! Floating-point weights: 32 lanes in two registers per product. (Loops over arrays are written out: a closure handed to
//! `array::map` would not be inlined, since `map` itself is compiled without the instruction set.)

use super::tree;
use crate::KernelError;
use crate::cpu::scalar::{self, Float};
use crate::cpu::scratch::grow;
use std::arch::x86_64::*;

/// A float format these kernels can read.
pub trait Load: Float {
    /// Sixteen elements.
    ///
    /// # Safety
    /// They can be read; the CPU has AVX-512.
    unsafe fn load(p: *const u8) -> __m512;
    /// The first `n` < 16 elements, then zeros.
    ///
    /// # Safety
    /// As above.
    unsafe fn load_part(p: *const u8, n: usize) -> __m512;
}

#[inline(always)]
fn first(n: usize) -> u16 {
    ((1u32 << n.min(16)) - 1) as u16
}

impl Load for scalar::F32 {
    #[inline(always)]
    unsafe fn load(p: *const u8) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_loadu_ps(p.cast()) }
    }
    #[inline(always)]
    unsafe fn load_part(p: *const u8, n: usize) -> __m512 {
        // SAFETY: the caller's promise; masked lanes are not touched.
        unsafe { _mm512_maskz_loadu_ps(first(n), p.cast()) }
    }
}

impl Load for scalar::F16 {
    #[inline(always)]
    unsafe fn load(p: *const u8) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_part(p: *const u8, n: usize) -> __m512 {
        // SAFETY: the caller's promise; masked lanes are not touched.
        unsafe { _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p.cast())) }
    }
}

/// # Safety
/// As for all helpers here: inlined only into functions that have the instruction set.
#[inline(always)]
unsafe fn widen(v: __m256i) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(v))) }
}

impl Load for scalar::BF16 {
    #[inline(always)]
    unsafe fn load(p: *const u8) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { widen(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_part(p: *const u8, n: usize) -> __m512 {
        // SAFETY: the caller's promise; masked lanes are not touched.
        unsafe { widen(_mm256_maskz_loadu_epi16(first(n), p.cast())) }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
#[inline]
fn tree32(a: [__m512; 2]) -> f32 {
    let s = _mm512_add_ps(a[0], a[1]);
    tree(_mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps::<1>(s)))
}

/// Adds `len` elements of `R` rows (`stride` bytes apart) times `C` columns to the lanes.
///
/// # Safety
/// They can be read.
#[inline(always)]
unsafe fn add<F: Load, const R: usize, const C: usize>(
    w: *const u8,
    stride: usize,
    x: [*const f32; C],
    len: usize,
    acc: &mut [[[__m512; 2]; C]; R],
) {
    let mut i = 0;
    // SAFETY: elements below `len` of rows below `R`.
    unsafe {
        while i + 32 <= len {
            each!(r < R, {
                let mut ahead = 1024;
                while ahead < 1024 + 32 * F::BYTES {
                    _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(r * stride + i * F::BYTES + ahead).cast());
                    ahead += 64;
                }
            });
            each!(h < 2, {
                let mut a = [_mm512_setzero_ps(); C];
                each!(c < C, { a[c] = _mm512_loadu_ps(x[c].add(i + 16 * h)) });
                each!(r < R, {
                    let b = F::load(w.add(r * stride + (i + 16 * h) * F::BYTES));
                    each!(c < C, { acc[r][c][h] = _mm512_fmadd_ps(b, a[c], acc[r][c][h]) });
                });
            });
            i += 32;
        }
        each!(h < 2, {
            let at = i + 16 * h;
            if at < len {
                let n = (len - at).min(16);
                let mut a = [_mm512_setzero_ps(); C];
                each!(c < C, { a[c] = _mm512_maskz_loadu_ps(first(n), x[c].add(at)) });
                each!(r < R, {
                    let b = F::load_part(w.add(r * stride + at * F::BYTES), n);
                    each!(c < C, { acc[r][c][h] = _mm512_fmadd_ps(b, a[c], acc[r][c][h]) });
                });
            }
        });
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
unsafe fn columns<F: Load, const R: usize, const C: usize>(
    w: &[u8],
    row_bytes: usize,
    x: [&[f32]; C],
    y: &mut [f32],
    at: usize,
) {
    let n = w.len() / row_bytes;
    let len = row_bytes / F::BYTES;
    let x = x.map(|x| x[..len].as_ptr());
    // Rows read at once lie far apart: streams without gaps are what the processor's prefetchers follow best.
    let part = n / R;
    for r in 0..part {
        let mut acc = [[[_mm512_setzero_ps(); 2]; C]; R];
        // SAFETY: rows r, r + part, ... are there, and `len` elements of each column.
        unsafe { add::<F, R, C>(w.as_ptr().add(r * row_bytes), part * row_bytes, x, len, &mut acc) };
        for i in 0..R {
            for c in 0..C {
                y[(at + c) * n + r + i * part] = tree32(acc[i][c]);
            }
        }
    }
    for r in R * part..n {
        let mut acc = [[[_mm512_setzero_ps(); 2]; C]; 1];
        // SAFETY: row r is there, and `len` elements of each column.
        unsafe { add::<F, 1, C>(w.as_ptr().add(r * row_bytes), row_bytes, x, len, &mut acc) };
        for c in 0..C {
            y[(at + c) * n + r] = tree32(acc[0][c]);
        }
    }
}

/// See `table::Rows`.
///
/// # Safety
/// The CPU has the set.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
pub unsafe fn few<F: Load>(w: &[u8], row_bytes: usize, x: &[&[f32]], y: &mut [f32]) {
    let mut at = 0;
    while at < x.len() {
        // SAFETY: the caller's promise; `columns` checks its slices.
        unsafe {
            match x.len() - at {
                1 => columns::<F, 4, 1>(w, row_bytes, [x[at]], y, at),
                2 => columns::<F, 4, 2>(w, row_bytes, [x[at], x[at + 1]], y, at),
                3 => columns::<F, 4, 3>(w, row_bytes, [x[at], x[at + 1], x[at + 2]], y, at),
                _ => columns::<F, 3, 4>(w, row_bytes, [x[at], x[at + 1], x[at + 2], x[at + 3]], y, at),
            }
        }
        at += 4;
    }
}

/// Columns whose lanes are held at once, elements of a row per pass, rows per pass. In the second-level cache: the widened
/// weights (128 KiB), the lanes (384 KiB) and the columns (96 KiB), all in the order in which they are read: rows and columns
/// as they come lie a power of two apart and would push each other out of the first-level cache.
const COLUMNS: usize = 48;
const LENGTH: usize = 512;
const ROWS: usize = 64;

/// A block of registers: rows by columns, of one half of the lanes.
const R: usize = 4;
const C: usize = 6;

/// Steps of a pass: each takes 32 elements, 16 to each half of the lanes.
const STEPS: usize = LENGTH / 32;

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Half([f32; 16]);

struct Scratch {
    /// `[half][row / R][step][R]`.
    w: Vec<Half>,
    /// `[half][column / C][step][C]`.
    x: Vec<Half>,
    /// `[half][column / C][row / R][C][R]`.
    lanes: Vec<Half>,
}

thread_local! {
    static SCRATCH: std::cell::RefCell<Scratch> =
        const { std::cell::RefCell::new(Scratch { w: vec![], x: vec![], lanes: vec![] }) };
}

const W_LINES: usize = 2 * ROWS * STEPS;
const X_LINES: usize = 2 * COLUMNS * STEPS;
const LANES_LINES: usize = 2 * ROWS * COLUMNS;

/// Bytes that a thread keeps.
pub const SCRATCH_BYTES: usize = (W_LINES + X_LINES + LANES_LINES) * size_of::<Half>();

impl Scratch {
    fn fill(&mut self) -> Result<(), KernelError> {
        grow(&mut self.w, W_LINES, Half([0.0; 16]))?;
        grow(&mut self.x, X_LINES, Half([0.0; 16]))?;
        grow(&mut self.lanes, LANES_LINES, Half([0.0; 16]))
    }
}

/// Allocates them.
pub fn reserve() -> Result<(), KernelError> {
    SCRATCH.with_borrow_mut(Scratch::fill)
}

/// Adds `steps` steps of `R` rows times `C` columns to one half of their lanes: half the lanes at a time, so that a register
/// loaded serves four or six products and not two or three.
///
/// # Safety
/// `w` is `[steps][R]`, `x` `[steps][C]`, `lanes` `[C][R]`; the CPU has the set.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
unsafe fn block(w: *const Half, x: *const Half, steps: usize, lanes: *mut Half) {
    let mut acc = [[_mm512_setzero_ps(); R]; C];
    // SAFETY: the caller's promise.
    unsafe {
        each!(c < C, {
            each!(r < R, { acc[c][r] = _mm512_load_ps(lanes.add(c * R + r).cast()) });
        });
        for k in 0..steps {
            let mut b = [_mm512_setzero_ps(); R];
            each!(r < R, { b[r] = _mm512_load_ps(w.add(R * k + r).cast()) });
            each!(c < C, {
                let a = _mm512_load_ps(x.add(C * k + c).cast());
                each!(r < R, { acc[c][r] = _mm512_fmadd_ps(b[r], a, acc[c][r]) });
            });
        }
        each!(c < C, {
            each!(r < R, { _mm512_store_ps(lanes.add(c * R + r).cast(), acc[c][r]) });
        });
    }
}

/// Widens `len` elements to line `i / 2 * step` of half `i % 2` for run i of 16; a run that is not whole is filled up with zeros.
///
/// # Safety
/// `from` holds `len` elements, `to` has room, its halves `half` lines apart; the CPU has the set.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
unsafe fn arrange<F: Load>(from: *const u8, len: usize, to: *mut Half, half: usize, step: usize) {
    let mut i = 0;
    while 16 * i < len {
        // SAFETY: the caller's promise.
        unsafe {
            let (p, left) = (from.add(16 * i * F::BYTES), len - 16 * i);
            let v = if left < 16 { F::load_part(p, left) } else { F::load(p) };
            _mm512_store_ps(to.add(i % 2 * half + i / 2 * step).cast(), v);
        }
        i += 1;
    }
}

/// The same as `few` for many columns: tiles of weights are widened once for a block of columns.
///
/// # Safety
/// The CPU has the set.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
pub unsafe fn many<F: Load>(w: &[u8], row_bytes: usize, x: &[&[f32]], y: &mut [f32]) {
    let n = w.len() / row_bytes;
    let len = row_bytes / F::BYTES;
    let mut s = SCRATCH.replace(Scratch { w: vec![], x: vec![], lanes: vec![] });
    s.fill().expect("reserved when a session opened, else small");
    for r0 in (0..n).step_by(ROWS) {
        let rows = ROWS.min(n - r0);
        for c0 in (0..x.len()).step_by(COLUMNS) {
            let cols = &x[c0..(c0 + COLUMNS).min(x.len())];
            s.lanes.fill(Half([0.0; 16]));
            for k0 in (0..len).step_by(LENGTH) {
                let k = LENGTH.min(len - k0);
                for r in 0..rows {
                    let from = (r0 + r) * row_bytes + k0 * F::BYTES;
                    let src = &w[from..from + k * F::BYTES];
                    let to = &mut s.w[r / R * STEPS * R + r % R..];
                    // SAFETY: `k` elements of the row, and its place in both halves.
                    unsafe { arrange::<F>(src.as_ptr(), k, to.as_mut_ptr(), ROWS * STEPS, R) };
                }
                for (c, x) in cols.iter().enumerate() {
                    let src = &x[k0..k0 + k];
                    let to = &mut s.x[c / C * STEPS * C + c % C..];
                    // SAFETY: as above.
                    unsafe {
                        arrange::<scalar::F32>(src.as_ptr().cast(), k, to.as_mut_ptr(), COLUMNS * STEPS, C);
                    }
                }
                for half in 0..2 {
                    let steps = k.saturating_sub(16 * half).div_ceil(32);
                    for t in 0..cols.len().div_ceil(C) {
                        for r in 0..rows.div_ceil(R) {
                            // SAFETY: blocks of rows and columns of the scratch; those past the last have old values and
                            // results that are not read.
                            unsafe {
                                let w = s.w.as_ptr().add((half * ROWS / R + r) * STEPS * R);
                                let x = s.x.as_ptr().add((half * COLUMNS / C + t) * STEPS * C);
                                block(w, x, steps, s.lanes.as_mut_ptr().add(lanes_at(half, t, R * r)));
                            }
                        }
                    }
                }
            }
            for c in 0..cols.len() {
                for r in 0..rows {
                    let at = |half| lanes_at(half, c / C, r) + c % C * R + r % R;
                    let (lo, hi) = (&s.lanes[at(0)].0, &s.lanes[at(1)].0);
                    // SAFETY: sixteen floats each.
                    let both = unsafe { [_mm512_loadu_ps(lo.as_ptr()), _mm512_loadu_ps(hi.as_ptr())] };
                    y[(c0 + c) * n + r0 + r] = tree32(both);
                }
            }
        }
    }
    SCRATCH.set(s);
}

/// Where the lanes of the rows around `r` and the `t`-th columns begin.
fn lanes_at(half: usize, t: usize, r: usize) -> usize {
    ((half * (COLUMNS / C) + t) * (ROWS / R) + r / R) * (R * C)
}
