//! Each block format unpacked to integers and scales. The layouts are those of ggml's `block_*` structures, drawn bit by bit
//! in `quant::formats`; here they are read as bytes, since a mapped row need not be aligned.

use super::{Format, Group, Kind};

/// No format's group is larger.
pub const MAX_GROUP_BYTES: usize = 292;

#[inline(always)]
fn f16(b: &[u8]) -> f32 {
    half::f16::from_le_bytes([b[0], b[1]]).to_f32()
}

/// The 16 values of IQ4_NL and IQ4_XS.
pub const IQ4: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];
/// Twice the 16 values of E2M1 (MXFP4).
pub const E2M1: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// Half the value of an E8M0 exponent, to go with [`E2M1`]: 2^(e - 128), down to the subnormals.
#[inline(always)]
pub fn e8m0_half(e: u8) -> f32 {
    f32::from_bits(if e < 2 { 0x0020_0000 << e } else { u32::from(e - 1) << 23 })
}

/// The eight 6-bit scales and minima of Q4_K and Q5_K.
#[inline(always)]
pub fn scales_k4(s: &[u8]) -> ([u8; 8], [u8; 8]) {
    let (mut sc, mut m) = ([0; 8], [0; 8]);
    for j in 0..4 {
        sc[j] = s[j] & 63;
        m[j] = s[j + 4] & 63;
        sc[j + 4] = (s[j + 8] & 15) | (s[j] >> 6) << 4;
        m[j + 4] = (s[j + 8] >> 4) | (s[j + 4] >> 6) << 4;
    }
    (sc, m)
}

/// The sixteen 6-bit scales of Q3_K, -32..32.
#[inline(always)]
pub fn scales_k3(s: &[u8]) -> [i8; 16] {
    std::array::from_fn(|i| {
        let low = if i < 8 { s[i] & 15 } else { s[i - 8] >> 4 };
        let high = s[8 + i % 4] >> (2 * (i / 4)) & 3;
        (low | high << 4) as i8 - 32
    })
}

/// Formats of 32 values a block: bytes, kind, and how block `b` (bytes `s`) becomes `q` (32 values), `d` and `m`.
macro_rules! small {
    ($($(#[$doc:meta])* $name:ident: $bytes:literal, $kind:ident, |$s:ident, $q:ident, $d:ident, $m:ident| $body:block)*) => {$(
        $(#[$doc])*
        #[allow(non_camel_case_types)]
        pub struct $name;
        impl Format for $name {
            const BLOCK_BYTES: usize = $bytes;
            const BLOCKS: usize = 8;
            const KIND: Kind = Kind::$kind;
            #[inline(always)]
            fn unpack(src: &[u8], g: &mut Group) {
                for (b, $s) in src.chunks_exact($bytes).enumerate() {
                    let $q = &mut g.q[32 * b..][..32];
                    let $d = &mut g.d[b];
                    #[allow(unused_variables)]
                    let $m = &mut g.m[b];
                    $body
                }
            }
        }
    )*};
}

/// Low nibbles are values 0..16, high nibbles 16..32.
#[inline(always)]
fn nibbles(s: &[u8], q: &mut [i8], f: impl Fn(u8) -> i8) {
    for i in 0..16 {
        q[i] = f(s[i] & 15);
        q[i + 16] = f(s[i] >> 4);
    }
}

/// The same with a fifth bit from a mask of 32.
#[inline(always)]
fn fives(h: &[u8], s: &[u8], q: &mut [i8], zero: i8) {
    let h = u32::from_le_bytes([h[0], h[1], h[2], h[3]]);
    for i in 0..16 {
        q[i] = (s[i] & 15 | ((h >> i & 1) << 4) as u8) as i8 - zero;
        q[i + 16] = (s[i] >> 4 | ((h >> (i + 16) & 1) << 4) as u8) as i8 - zero;
    }
}

small! {
    /// d (q - 8), 4 bits.
    Q4_0: 18, Plain, |s, q, d, m| { *d = f16(s); nibbles(&s[2..], q, |v| v as i8 - 8); }
    /// d q + m, 4 bits.
    Q4_1: 20, Min, |s, q, d, m| { (*d, *m) = (f16(s), f16(&s[2..])); nibbles(&s[4..], q, |v| v as i8); }
    /// d (q - 16), 5 bits.
    Q5_0: 22, Plain, |s, q, d, m| { *d = f16(s); fives(&s[2..], &s[6..], q, 16); }
    /// d q + m, 5 bits.
    Q5_1: 24, Min, |s, q, d, m| { (*d, *m) = (f16(s), f16(&s[2..])); fives(&s[4..], &s[8..], q, 0); }
    /// d q, 8 bits.
    Q8_0: 34, Plain, |s, q, d, m| {
        *d = f16(s);
        for (q, &v) in q.iter_mut().zip(&s[2..]) { *q = v as i8; }
    }
    /// d table\[q\], 4 bits.
    IQ4_NL: 18, Plain, |s, q, d, m| { *d = f16(s); nibbles(&s[2..], q, |v| IQ4[v as usize]); }
    /// 2^e table\[q\], 4 bits (OCP Microscaling Formats 1.0).
    MXFP4: 17, Plain, |s, q, d, m| { *d = e8m0_half(s[0]); nibbles(&s[1..], q, |v| E2M1[v as usize]); }
}

/// Formats of 256 values a block.
macro_rules! large {
    ($($(#[$doc:meta])* $name:ident: $bytes:literal, $kind:ident, |$s:ident, $g:ident| $body:block)*) => {$(
        $(#[$doc])*
        #[allow(non_camel_case_types)]
        pub struct $name;
        impl Format for $name {
            const BLOCK_BYTES: usize = $bytes;
            const BLOCKS: usize = 1;
            const KIND: Kind = Kind::$kind;
            #[inline(always)]
            fn unpack($s: &[u8], $g: &mut Group) $body
        }
    )*};
}

/// Two bits of 128 values lie in 32 bytes: value 32j + l in bits 2j of byte l.
#[inline(always)]
fn crumbs(qs: &[u8], i: usize) -> u8 {
    qs[32 * (i / 128) + i % 32] >> (2 * (i / 32 % 4)) & 3
}

/// Four bits of 64 values lie in 32 bytes: value 32j + l in bits 4j of byte l.
#[inline(always)]
fn halves(qs: &[u8], i: usize) -> u8 {
    qs[32 * (i / 64) + i % 32] >> (4 * (i / 32 % 2)) & 15
}

large! {
    /// 2 bits, 4-bit scales and minima per 16.
    Q2_K: 84, Min16, |s, g| {
        let (d, dmin) = (f16(&s[80..]), f16(&s[82..]));
        g.d = [d; 8];
        for (i, s) in s[..16].iter().enumerate() {
            g.sc[i] = i32::from(s & 15);
            g.m[i] = -(dmin * f32::from(s >> 4));
        }
        for i in 0..256 { g.q[i] = crumbs(&s[16..80], i) as i8; }
    }
    /// 3 bits, 6-bit scales per 16.
    Q3_K: 110, Scale16, |s, g| {
        g.d = [f16(&s[108..]); 8];
        g.sc = scales_k3(&s[96..108]).map(i32::from);
        for i in 0..256 {
            let high = s[i % 32] >> (i / 32) & 1;
            g.q[i] = (crumbs(&s[32..96], i) | high << 2) as i8 - 4;
        }
    }
    /// 4 bits, 6-bit scales and minima per 32.
    Q4_K: 144, Min, |s, g| {
        let (d, dmin) = (f16(s), f16(&s[2..]));
        let (sc, m) = scales_k4(&s[4..16]);
        for b in 0..8 { (g.d[b], g.m[b]) = (d * f32::from(sc[b]), -(dmin * f32::from(m[b]))); }
        for i in 0..256 { g.q[i] = halves(&s[16..], i) as i8; }
    }
    /// 5 bits, 6-bit scales and minima per 32.
    Q5_K: 176, Min, |s, g| {
        let (d, dmin) = (f16(s), f16(&s[2..]));
        let (sc, m) = scales_k4(&s[4..16]);
        for b in 0..8 { (g.d[b], g.m[b]) = (d * f32::from(sc[b]), -(dmin * f32::from(m[b]))); }
        for i in 0..256 { g.q[i] = (halves(&s[48..], i) | (s[16 + i % 32] >> (i / 32) & 1) << 4) as i8; }
    }
    /// 6 bits, 8-bit scales per 16.
    Q6_K: 210, Scale16, |s, g| {
        g.d = [f16(&s[208..]); 8];
        for i in 0..16 { g.sc[i] = i32::from(s[192 + i] as i8); }
        for i in 0..256 {
            let (h, l) = (i / 128, i % 128);
            let low = s[64 * h + l % 64] >> (4 * (l / 64)) & 15;
            let high = s[128 + 32 * h + l % 32] >> (2 * (l / 32)) & 3;
            g.q[i] = (low | high << 4) as i8 - 32;
        }
    }
    /// d q, 8 bits, d in f32 (the sums that follow are not read).
    Q8_K: 292, Plain, |s, g| {
        g.d = [f32::from_le_bytes([s[0], s[1], s[2], s[3]]); 8];
        for (q, &v) in g.q.iter_mut().zip(&s[4..260]) { *q = v as i8; }
    }
    /// d (ls - 32) table\[q\], 4 bits, 6-bit scales per 32.
    IQ4_XS: 136, Plain, |s, g| {
        let (d, high) = (f16(s), u16::from_le_bytes([s[2], s[3]]));
        for b in 0..8 {
            let ls = s[4 + b / 2] >> (4 * (b % 2)) & 15 | ((high >> (2 * b) & 3) << 4) as u8;
            g.d[b] = d * (f32::from(ls) - 32.0);
            nibbles(&s[8 + 16 * b..], &mut g.q[32 * b..][..32], |v| IQ4[v as usize]);
        }
    }
}
