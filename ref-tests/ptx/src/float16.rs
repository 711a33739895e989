//! Half-precision arithmetic as on the hardware: one rounding to nearest even, NaN results canonical.

/// A sixteen-bit float on register bits.
pub trait Half {
    /// The NaN that arithmetic makes.
    const NAN: u64;
    fn wide(x: u64) -> f64;
    fn narrow(x: f64) -> u64;

    fn put(x: f64) -> u64 {
        if x.is_nan() { Self::NAN } else { Self::narrow(x) }
    }
    fn add(a: u64, b: u64) -> u64 {
        Self::put(sum(Self::wide(a), Self::wide(b)))
    }
    fn sub(a: u64, b: u64) -> u64 {
        Self::put(sum(Self::wide(a), -Self::wide(b)))
    }
    fn mul(a: u64, b: u64) -> u64 {
        Self::put(Self::wide(a) * Self::wide(b))
    }
    fn fma(a: u64, b: u64, c: u64) -> u64 {
        // The product of two halves is exact in f64.
        Self::put(sum(Self::wide(a) * Self::wide(b), Self::wide(c)))
    }
    fn pick(a: u64, b: u64, lesser: bool) -> u64 {
        let (x, y) = (Self::wide(a), Self::wide(b));
        match (x.is_nan(), y.is_nan()) {
            (true, true) => Self::NAN,
            (true, _) => b & 0xffff,
            (_, true) => a & 0xffff,
            _ if x == 0.0 && y == 0.0 => {
                if lesser {
                    (a | b) & 0xffff
                } else {
                    a & b & 0xffff
                }
            }
            _ if (x < y) == lesser => a & 0xffff,
            _ => b & 0xffff,
        }
    }
    fn min(a: u64, b: u64) -> u64 {
        Self::pick(a, b, true)
    }
    fn max(a: u64, b: u64) -> u64 {
        Self::pick(a, b, false)
    }
    fn neg(a: u64) -> u64 {
        a & 0xffff ^ 0x8000
    }
    fn abs(a: u64) -> u64 {
        a & 0x7fff
    }
    fn pair1(a: u64, f: fn(u64) -> u64) -> u64 {
        f(a & 0xffff) | f(a >> 16 & 0xffff) << 16
    }
    fn pair2(a: u64, b: u64, f: fn(u64, u64) -> u64) -> u64 {
        f(a & 0xffff, b & 0xffff) | f(a >> 16 & 0xffff, b >> 16 & 0xffff) << 16
    }
    fn pair3(a: u64, b: u64, c: u64, f: fn(u64, u64, u64) -> u64) -> u64 {
        f(a & 0xffff, b & 0xffff, c & 0xffff) | f(a >> 16 & 0xffff, b >> 16 & 0xffff, c >> 16 & 0xffff) << 16
    }
}

/// a + b rounded to odd, so that a second rounding to fewer bits is as if there had been only one.
fn sum(a: f64, b: f64) -> f64 {
    let s = a + b;
    if !s.is_finite() {
        return s;
    }
    let t = s - a;
    let lost = (a - (s - t)) + (b - t);
    if lost == 0.0 || s.to_bits() & 1 == 1 {
        return s;
    }
    // One step towards what was lost; s is not 0, or nothing were lost.
    let away = (lost > 0.0) == (s > 0.0);
    f64::from_bits(if away { s.to_bits() + 1 } else { s.to_bits() - 1 })
}

/// A single, rounded to odd: what is narrowed further from there is rounded as if at once. (`half`'s own conversions from f64 look
/// at its upper 32 bits alone.)
fn single(x: f64) -> f32 {
    let s = x as f32;
    let back = f64::from(s);
    if back == x || !s.is_finite() || s.to_bits() & 1 == 1 {
        return s;
    }
    let away = (x > back) == (x > 0.0);
    f32::from_bits(if away { s.to_bits() + 1 } else { s.to_bits() - 1 })
}

/// IEEE half.
#[allow(non_camel_case_types)]
pub struct f16;
/// The upper half of a single.
#[allow(non_camel_case_types)]
pub struct bf16;

impl Half for f16 {
    const NAN: u64 = 0x7fff;
    fn wide(x: u64) -> f64 {
        half::f16::from_bits(x as u16).to_f64()
    }
    fn narrow(x: f64) -> u64 {
        half::f16::from_f32(single(x)).to_bits().into()
    }
}

impl Half for bf16 {
    const NAN: u64 = 0x7fff;
    fn wide(x: u64) -> f64 {
        half::bf16::from_bits(x as u16).to_f64()
    }
    fn narrow(x: f64) -> u64 {
        half::bf16::from_f32(single(x)).to_bits().into()
    }
}
