//! Sixteen f32 lanes: the vector type that attention, norms and activations are written in, once, for every ISA.
//!
//! The width is the same everywhere (one AVX-512 register, two of AVX2, an array elsewhere), and so is the order of every
//! horizontal sum, so that a result changes between ISAs only where one has a fused multiply-add and the other has not.
//! Knows nothing of attention, tensors or threads.

/// Lanes of a vector.
pub const W: usize = 16;

/// `n` rounded up to whole vectors.
pub const fn padded(n: usize) -> usize {
    n.div_ceil(W) * W
}

/// Asks for the cache line at `p` in the first-level cache (`FAR` 0) or the second (1); any address will do.
#[inline(always)]
pub fn prefetch<const FAR: u8>(p: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: part of x86-64's baseline; a prefetch never faults.
    unsafe {
        use std::arch::x86_64::*;
        if FAR == 0 { _mm_prefetch::<_MM_HINT_T0>(p.cast()) } else { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}

/// Work to be compiled once per ISA. Implementors mark `run` `#[inline(always)]`, so that it is compiled with the ISA's
/// features.
pub trait Kernel {
    /// What it returns.
    type Out;
    /// The work.
    fn run<S: Simd>(self, s: S) -> Self::Out;
}

/// A token of an ISA: it exists only where the CPU has it. Methods are lane by lane unless they say otherwise.
pub trait Simd: Copy + Send + Sync + 'static {
    /// Sixteen f32.
    type V: Copy;

    /// Runs `k` compiled for this ISA.
    fn vectorize<K: Kernel>(self, k: K) -> K::Out;

    /// `x` in every lane.
    fn splat(self, x: f32) -> Self::V;
    /// Reads 16 values.
    ///
    /// # Safety
    /// `p` must be readable for 16 values.
    unsafe fn load(self, p: *const f32) -> Self::V;
    /// Writes 16 values.
    ///
    /// # Safety
    /// `p` must be writable for 16 values.
    unsafe fn store(self, v: Self::V, p: *mut f32);
    /// Reads 16 IEEE halves.
    ///
    /// # Safety
    /// `p` must be readable for 32 bytes.
    unsafe fn load_f16(self, p: *const u8) -> Self::V;
    /// Writes 16 IEEE halves, rounded to nearest even.
    ///
    /// # Safety
    /// `p` must be writable for 32 bytes.
    unsafe fn store_f16(self, v: Self::V, p: *mut u8);
    /// Reads 16 bfloat16.
    ///
    /// # Safety
    /// `p` must be readable for 32 bytes.
    unsafe fn load_bf16(self, p: *const u8) -> Self::V;
    /// One IEEE half in every lane.
    ///
    /// # Safety
    /// `p` must be readable for two bytes.
    unsafe fn splat_f16(self, p: *const u8) -> Self::V;
    /// Reads 16 signed bytes.
    ///
    /// # Safety
    /// `p` must be readable for 16 bytes.
    unsafe fn load_i8(self, p: *const u8) -> Self::V;
    /// Reads the low (`HIGH` false) or high nibbles of 16 bytes as 0..=15.
    ///
    /// # Safety
    /// `p` must be readable for 16 bytes.
    unsafe fn load_u4<const HIGH: bool>(self, p: *const u8) -> Self::V;

    /// a + b.
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// a - b.
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// a b.
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// a / b.
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// a b + c, fused where the ISA can.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger; b where a is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// The smaller; b where a is NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// x where a < b, else y (y where either is NaN).
    fn pick(self, a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V;
    /// Nearest integer, ties to even; |a| <= 2^22.
    fn round(self, a: Self::V) -> Self::V;
    /// a 2^n for integer n <= 127; 0 where n <= -127.
    fn scale2(self, a: Self::V, n: Self::V) -> Self::V;
    /// Sum over the lanes: i and i + 8, then i + 4, i + 2, i + 1.
    fn sum(self, a: Self::V) -> f32;
    /// Lane j of the result is `sum(rows[j])`, to the bit.
    fn sums(self, rows: &[Self::V; W]) -> Self::V;
    /// Largest lane; NaN lanes do not count if any is a number.
    fn hmax(self, a: Self::V) -> f32;

    /// `c[i][j] (+)= sum_k a[i * a_row + k * a_k] b[k * b_row + j]`; see [`gemm`].
    ///
    /// # Safety
    /// As [`Gemm`] says.
    unsafe fn gemm(self, g: Gemm);
}

/// A float product whose columns lie in lanes: `c[i][j] (+)= sum_k a[i * a_row + k * a_k] b[k * b_row + j]`,
/// `i < rows`, `j < 16 * vectors`, k in ascending order with one accumulator per element, so that cutting the k range in
/// pieces gives the same bits.
#[derive(Clone, Copy)]
pub struct Gemm {
    /// Rows of a and c.
    pub rows: usize,
    /// Vectors in a row of b and c.
    pub vectors: usize,
    /// Terms.
    pub depth: usize,
    /// The broadcast operand, readable at every (i, k).
    pub a: *const f32,
    /// Distance between its rows.
    pub a_row: usize,
    /// Distance between its terms.
    pub a_k: usize,
    /// `[depth][b_row]`, readable for 16 * vectors in every row.
    pub b: *const f32,
    /// Distance between the rows of b.
    pub b_row: usize,
    /// `[rows][c_row]`, writable for 16 * vectors in every row; overlaps neither a nor b.
    pub c: *mut f32,
    /// Distance between the rows of c.
    pub c_row: usize,
    /// Start from c instead of zero.
    pub accumulate: bool,
}

/// One register tile of a [`Gemm`]: R rows, N vectors, at row i and vector j.
///
/// # Safety
/// As [`Gemm`] says, and i + R <= rows, j + N <= vectors.
#[inline(always)]
unsafe fn tile<S: Simd, const R: usize, const N: usize>(s: S, g: &Gemm, i: usize, j: usize) {
    // SAFETY: the caller keeps (i, j) inside the operands, whose extents Gemm's contract gives.
    unsafe {
        let mut acc = [[s.splat(0.0); N]; R];
        if g.accumulate {
            for (r, acc) in acc.iter_mut().enumerate() {
                for (n, acc) in acc.iter_mut().enumerate() {
                    *acc = s.load(g.c.add((i + r) * g.c_row + (j + n) * W));
                }
            }
        }
        for k in 0..g.depth {
            let b = g.b.add(k * g.b_row + j * W);
            let mut v = [s.splat(0.0); N];
            for (n, v) in v.iter_mut().enumerate() {
                *v = s.load(b.add(n * W));
            }
            let a = g.a.add(i * g.a_row + k * g.a_k);
            // The next rows' line: where terms lie far apart (values of a block), nothing else foresees it.
            prefetch::<0>(a.wrapping_add(R * g.a_row).cast());
            for (r, acc) in acc.iter_mut().enumerate() {
                let x = s.splat(*a.add(r * g.a_row));
                for (acc, v) in acc.iter_mut().zip(&v) {
                    *acc = s.fma(x, *v, *acc);
                }
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            for (n, acc) in acc.iter().enumerate() {
                s.store(*acc, g.c.add((i + r) * g.c_row + (j + n) * W));
            }
        }
    }
}

/// Columns `j..j + N` of a [`Gemm`] in tiles of R rows, the rest by halves.
///
/// # Safety
/// As [`Gemm`] says, and j + N <= vectors.
#[inline(always)]
unsafe fn columns<S: Simd, const R: usize, const N: usize>(s: S, g: &Gemm, j: usize) {
    let mut i = 0;
    // SAFETY: every tile lies inside rows x vectors.
    unsafe {
        while i + R <= g.rows {
            tile::<S, R, N>(s, g, i, j);
            i += R;
        }
        while i + 4 <= g.rows {
            tile::<S, 4, N>(s, g, i, j);
            i += 4;
        }
        while i + 2 <= g.rows {
            tile::<S, 2, N>(s, g, i, j);
            i += 2;
        }
        if i < g.rows {
            tile::<S, 1, N>(s, g, i, j);
        }
    }
}

/// The loops of [`Simd::gemm`]: pairs of vectors by R2 rows, an odd one by R1 rows.
///
/// # Safety
/// As [`Gemm`] says.
#[inline(always)]
pub unsafe fn gemm<S: Simd, const R1: usize, const R2: usize>(s: S, g: Gemm) {
    let mut j = 0;
    // SAFETY: j + N <= vectors.
    unsafe {
        while j + 2 <= g.vectors {
            columns::<S, R2, 2>(s, &g, j);
            j += 2;
        }
        if j < g.vectors {
            columns::<S, R1, 1>(s, &g, j);
        }
    }
}

/// Lanes as an array: every target, and the scalar twin of the others.
#[derive(Clone, Copy)]
pub struct Portable;

#[inline(always)]
fn map2(a: [f32; W], b: [f32; W], f: impl Fn(f32, f32) -> f32) -> [f32; W] {
    let mut o = [0.0; W];
    for i in 0..W {
        o[i] = f(a[i], b[i]);
    }
    o
}

impl Simd for Portable {
    type V = [f32; W];

    #[inline(always)]
    fn vectorize<K: Kernel>(self, k: K) -> K::Out {
        k.run(self)
    }
    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        [x; W]
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> Self::V {
        // SAFETY: the caller's.
        unsafe { p.cast::<[f32; W]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(self, v: Self::V, p: *mut f32) {
        // SAFETY: the caller's.
        unsafe { p.cast::<[f32; W]>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u8) -> Self::V {
        // SAFETY: the caller's.
        let h = unsafe { p.cast::<[[u8; 2]; W]>().read_unaligned() };
        h.map(|b| half::f16::from_le_bytes(b).to_f32_const())
    }
    #[inline(always)]
    unsafe fn store_f16(self, v: Self::V, p: *mut u8) {
        // SAFETY: the caller's.
        unsafe {
            p.cast::<[[u8; 2]; W]>().write_unaligned(v.map(|x| half::f16::from_f32_const(x).to_le_bytes()))
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u8) -> Self::V {
        // SAFETY: the caller's.
        let h = unsafe { p.cast::<[[u8; 2]; W]>().read_unaligned() };
        h.map(|b| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16))
    }
    #[inline(always)]
    unsafe fn splat_f16(self, p: *const u8) -> Self::V {
        // SAFETY: the caller's.
        [half::f16::from_le_bytes(unsafe { p.cast::<[u8; 2]>().read_unaligned() }).to_f32_const(); W]
    }
    #[inline(always)]
    unsafe fn load_i8(self, p: *const u8) -> Self::V {
        // SAFETY: the caller's.
        let b = unsafe { p.cast::<[i8; W]>().read_unaligned() };
        b.map(f32::from)
    }
    #[inline(always)]
    unsafe fn load_u4<const HIGH: bool>(self, p: *const u8) -> Self::V {
        // SAFETY: the caller's.
        let b = unsafe { p.cast::<[u8; W]>().read_unaligned() };
        b.map(|x| f32::from(if HIGH { x >> 4 } else { x & 15 }))
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        let mut o = c;
        for i in 0..W {
            o[i] += a[i] * b[i];
        }
        o
    }
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn pick(self, a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V {
        let mut o = y;
        for i in 0..W {
            o[i] = if a[i] < b[i] { x[i] } else { y[i] };
        }
        o
    }
    #[inline(always)]
    fn round(self, a: Self::V) -> Self::V {
        // Adding 1.5 2^23 leaves no bits for the fraction: the hardware's rounding (nearest even) does the work.
        const MAGIC: f32 = 12_582_912.0;
        a.map(|x| (x + MAGIC) - MAGIC)
    }
    #[inline(always)]
    fn scale2(self, a: Self::V, n: Self::V) -> Self::V {
        #[allow(clippy::manual_clamp)] // clamp would keep a NaN
        map2(a, n, |a, n| {
            // SAFETY: inside i32, and not NaN, for which max gives -127.
            let e = unsafe { n.max(-127.0).min(127.0).to_int_unchecked::<i32>() } + 127;
            a * f32::from_bits((e as u32) << 23)
        })
    }
    #[inline(always)]
    fn sum(self, a: Self::V) -> f32 {
        let mut v = a;
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                v[i] += v[i + half];
            }
        }
        v[0]
    }
    #[inline(always)]
    fn sums(self, rows: &[Self::V; W]) -> Self::V {
        rows.map(|r| self.sum(r))
    }
    #[inline(always)]
    fn hmax(self, a: Self::V) -> f32 {
        a.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    unsafe fn gemm(self, g: Gemm) {
        // SAFETY: the caller's.
        unsafe { gemm::<Self, 4, 2>(self, g) }
    }
}
