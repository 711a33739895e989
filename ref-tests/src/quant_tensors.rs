//! The seeded tensors on which quantisers are compared, the same as in quant/make_quantize.py to the bit.
//! Must not know of formats.

/// Rows of each tensor.
pub const ROWS: usize = 16;
/// Values of a row.
pub const COLS: usize = 1024;
const N: usize = ROWS * COLS;

/// Number `i` (from 0) of splitmix64 started at `seed`.
fn splitmix64(seed: u64, i: usize) -> u64 {
    let mut z = seed.wrapping_add((i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// In [0, 1).
fn uniform(seed: u64, i: usize) -> f64 {
    (splitmix64(seed, i) >> 40) as f64 / f64::from(1 << 24)
}

/// Twelve 16-bit uniforms, summed: mean 0, variance 1 (nearly), exact.
fn gaussian(seed: u64, i: usize) -> f64 {
    let sum: u64 =
        (0..3).flat_map(|k| [0, 16, 32, 48].map(|s| splitmix64(seed, 3 * i + k) >> s & 0xffff)).sum();
    (sum as f64 - 12.0 * 32767.5) / 65536.0
}

/// Name and values, [`ROWS`] x [`COLS`].
pub fn tensors() -> Vec<(&'static str, Vec<f32>)> {
    let g = gaussian;
    let make = |f: &dyn Fn(usize) -> f64| (0..N).map(|i| f(i) as f32).collect::<Vec<_>>();
    vec![
        ("gaussian", make(&|i| g(1, i) * 0.02)),
        ("heavy tails", make(&|i| g(2, i) * g(3, i) * g(4, i) * 0.01)),
        ("outliers", make(&|i| g(5, i) * if i % 97 == 0 { 0.6 } else { 0.02 })),
        ("zero", make(&|_| 0.0)),
        ("constant rows", make(&|i| g(6, i / COLS) * 0.1)),
        ("tiny", make(&|i| g(7, i) * 1e-6)),
        ("small", make(&|i| g(8, i) * 1e-4)),
        ("large", make(&|i| g(9, i) * 1e4)),
        ("beyond f16", make(&|i| g(10, i) * 1e7)),
        ("off centre", make(&|i| g(11, i) * 0.02 + 0.05)),
        ("scales that jump", make(&|i| g(12, i) / f64::from(1 << (i / 16 % 8)))),
        ("sparse", make(&|i| if uniform(13, i) < 0.9 { 0.0 } else { g(14, i) })),
        ("uniform", make(&|i| uniform(15, i) - 0.5)),
    ]
}

/// One weight a column, some large, some zero, as an importance matrix has them; repeated for every row.
pub fn importance() -> Vec<f32> {
    let column = |c: usize| {
        let square = gaussian(100, c) * gaussian(100, c);
        if c % 61 == 7 { 0.0 } else { (square * square + 0.01) as f32 }
    };
    (0..N).map(|i| column(i % COLS)).collect()
}
