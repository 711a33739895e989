//! Arithmetic as functions of register bits: an opcode and its type select one when a kernel is decoded.
//! Registers are 64 bits wide here; narrower values are zero-extended.

use crate::float16::{Half, bf16, f16};
use std::cmp::Ordering::{Equal, Greater, Less};

/// A function of one to three registers (or immediates).
#[derive(Clone, Copy)]
pub enum Function {
    One(fn(u64) -> u64),
    Two(fn(u64, u64) -> u64),
    Three(fn(u64, u64, u64) -> u64),
    Four(fn(u64, u64, u64, u64) -> u64),
}

use Function::{Four, One, Three, Two};

/// The only NaN that arithmetic makes on the hardware.
const NAN32: u32 = 0x7fff_ffff;

fn f(x: u64) -> f32 {
    f32::from_bits(x as u32)
}

pub fn out(x: f32) -> u64 {
    u64::from(if x.is_nan() { NAN32 } else { x.to_bits() })
}

/// `min` and `max`: a NaN loses to a number, -0 is below +0.
fn lesser(a: f32, b: f32) -> f32 {
    match (a.is_nan(), b.is_nan()) {
        (true, _) => b,
        (_, true) => a,
        _ if a == 0.0 && b == 0.0 => f32::from_bits(a.to_bits() | b.to_bits()),
        _ => a.min(b),
    }
}

fn greater(a: f32, b: f32) -> f32 {
    match (a.is_nan(), b.is_nan()) {
        (true, _) => b,
        (_, true) => a,
        _ if a == 0.0 && b == 0.0 => f32::from_bits(a.to_bits() & b.to_bits()),
        _ => a.max(b),
    }
}

/// `prmt` in its default mode: four bytes chosen of eight, bit 3 of a selector spreads the byte's sign.
fn permute(a: u64, b: u64, select: u64) -> u64 {
    let bytes = (a & 0xffff_ffff) | b << 32;
    (0..4).fold(0, |r, i| {
        let s = select >> (4 * i) & 15;
        let byte = bytes >> (8 * (s & 7)) & 255;
        let byte = if s & 8 == 0 {
            byte
        } else if byte & 128 != 0 {
            255
        } else {
            0
        };
        r | byte << (8 * i)
    })
}

fn dp4a<const A: bool, const B: bool>(a: u64, b: u64, c: u64) -> u64 {
    let part = |x: u64, i: u32, signed: bool| {
        let byte = (x >> (8 * i)) as u8;
        if signed { i32::from(byte as i8) } else { i32::from(byte) }
    };
    let dot: i32 = (0..4).map(|i| part(a, i, A) * part(b, i, B)).sum();
    u64::from((c as u32).wrapping_add(dot as u32))
}

macro_rules! ints {
    ($u:ty, $s:ty, $wide:ty, $name:expr, $signed:expr, $mods:expr) => {{
        type U = $u;
        type S = $s;
        const BITS: u64 = U::BITS as u64;
        let (hi, wide) = ($mods.contains(&"hi"), $mods.contains(&"wide"));
        Some(match ($name, $signed) {
            ("add", _) => Two(|a, b| (a as U).wrapping_add(b as U).into()),
            ("sub", _) => Two(|a, b| (a as U).wrapping_sub(b as U).into()),
            ("mul", true) if hi => {
                Two(|a, b| ((i128::from(a as S) * i128::from(b as S)) >> BITS) as U as u64)
            }
            ("mul", false) if hi => {
                Two(|a, b| ((u128::from(a as U) * u128::from(b as U)) >> BITS) as U as u64)
            }
            ("mul", true) if wide => {
                Two(|a, b| (i64::from(a as S).wrapping_mul(i64::from(b as S)) as $wide).into())
            }
            ("mul", false) if wide => {
                Two(|a, b| (u64::from(a as U).wrapping_mul(u64::from(b as U)) as $wide).into())
            }
            ("mul", _) => Two(|a, b| (a as U).wrapping_mul(b as U).into()),
            ("mad", true) if hi => Three(|a, b, c| {
                (((i128::from(a as S) * i128::from(b as S)) >> BITS) as U).wrapping_add(c as U).into()
            }),
            ("mad", false) if hi => Three(|a, b, c| {
                (((u128::from(a as U) * u128::from(b as U)) >> BITS) as U).wrapping_add(c as U).into()
            }),
            ("mad", true) if wide => Three(|a, b, c| {
                (i64::from(a as S).wrapping_mul(i64::from(b as S)).wrapping_add(c as i64) as $wide).into()
            }),
            ("mad", false) if wide => Three(|a, b, c| {
                (u64::from(a as U).wrapping_mul(u64::from(b as U)).wrapping_add(c) as $wide).into()
            }),
            ("mad", _) => Three(|a, b, c| (a as U).wrapping_mul(b as U).wrapping_add(c as U).into()),
            // Division by zero gives all ones on the hardware; so does the remainder's quotient.
            ("div", true) => Two(|a, b| {
                (a as S)
                    .checked_div(b as S)
                    .map_or(if b as S == 0 { U::MAX } else { a as U }, |q| q as U)
                    .into()
            }),
            ("div", false) => Two(|a, b| (a as U).checked_div(b as U).unwrap_or(U::MAX).into()),
            ("rem", true) => Two(|a, b| {
                (a as S).checked_rem(b as S).map_or(if b as S == 0 { a as U } else { 0 }, |r| r as U).into()
            }),
            ("rem", false) => Two(|a, b| (a as U).checked_rem(b as U).unwrap_or(a as U).into()),
            ("min", true) => Two(|a, b| ((a as S).min(b as S) as U).into()),
            ("min", false) => Two(|a, b| (a as U).min(b as U).into()),
            ("max", true) => Two(|a, b| ((a as S).max(b as S) as U).into()),
            ("max", false) => Two(|a, b| (a as U).max(b as U).into()),
            ("neg", _) => One(|a| (a as U).wrapping_neg().into()),
            ("abs", true) => One(|a| ((a as S).wrapping_abs() as U).into()),
            ("and", _) => Two(|a, b| ((a & b) as U).into()),
            ("or", _) => Two(|a, b| ((a | b) as U).into()),
            ("xor", _) => Two(|a, b| ((a ^ b) as U).into()),
            ("not", _) => One(|a| (!a as U).into()),
            // Shift counts are unsigned 32-bit values, cut at the width.
            ("shl", _) => Two(|a, n| (a as U).checked_shl(n as u32).unwrap_or(0).into()),
            ("shr", true) => Two(|a, n| (((a as S) >> (n as u32).min(U::BITS - 1)) as U).into()),
            ("shr", false) => Two(|a, n| (a as U).checked_shr(n as u32).unwrap_or(0).into()),
            ("popc", _) => One(|a| (a as U).count_ones().into()),
            ("clz", _) => One(|a| (a as U).leading_zeros().into()),
            ("brev", _) => One(|a| (a as U).reverse_bits().into()),
            ("mov", _) => One(|a| (a as U).into()),
            ("selp", _) => Three(|a, b, p| (if p != 0 { a as U } else { b as U }).into()),
            _ => return None,
        })
    }};
}

macro_rules! halves {
    ($h:ident, $name:expr) => {
        Some(match $name {
            "add" => Two($h::add),
            "sub" => Two($h::sub),
            "mul" => Two($h::mul),
            "fma" => Three($h::fma),
            "min" => Two($h::min),
            "max" => Two($h::max),
            "neg" => One($h::neg),
            "abs" => One($h::abs),
            _ => return None,
        })
    };
}

macro_rules! pairs {
    ($h:ident, $name:expr) => {
        Some(match $name {
            "add" => Two(|a, b| $h::pair2(a, b, $h::add)),
            "sub" => Two(|a, b| $h::pair2(a, b, $h::sub)),
            "mul" => Two(|a, b| $h::pair2(a, b, $h::mul)),
            "fma" => Three(|a, b, c| $h::pair3(a, b, c, $h::fma)),
            "min" => Two(|a, b| $h::pair2(a, b, $h::min)),
            "max" => Two(|a, b| $h::pair2(a, b, $h::max)),
            "neg" => One(|a| $h::pair1(a, $h::neg)),
            "abs" => One(|a| $h::pair1(a, $h::abs)),
            _ => return None,
        })
    };
}

/// The function of an instruction with one result: its name, the modifiers in between, its type.
pub fn function(name: &str, mods: &[&str], ty: &str) -> Option<Function> {
    let allowed: &[&str] = match (name, ty) {
        ("mul" | "mad", "u16" | "s16" | "u32" | "s32") => &["lo", "hi", "wide"],
        ("mul" | "mad", "u64" | "s64") => &["lo", "hi"],
        ("add" | "sub" | "mul" | "fma" | "div" | "rcp" | "sqrt", "f32") => &["rn"],
        ("add" | "sub" | "mul" | "fma", _) => &["rn"],
        // `dp4a.atype.btype`: the type of a is the modifier.
        ("dp4a", _) => &["s32", "u32"],
        ("shf", _) => &["l", "r", "wrap", "clamp"],
        _ => &[],
    };
    if mods.iter().any(|m| !allowed.contains(m)) {
        return None;
    }
    // Rounding is part of the meaning: division and the like without one are approximations.
    if ty == "f32" && matches!(name, "fma" | "div" | "rcp" | "sqrt") && !mods.contains(&"rn") {
        return None;
    }
    match (name, ty) {
        ("dp4a", _) => {
            return Some(Three(match (mods.first()?, ty) {
                (&"s32", "s32") => dp4a::<true, true>,
                (&"s32", "u32") => dp4a::<true, false>,
                (&"u32", "s32") => dp4a::<false, true>,
                (&"u32", "u32") => dp4a::<false, false>,
                _ => return None,
            }));
        }
        ("prmt", "b32") => return Some(Three(permute)),
        ("lop3", "b32") => {
            return Some(Four(|a, b, c, table| {
                (0..32).fold(0, |r, i| {
                    let index = (a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1);
                    r | (table >> index & 1) << i
                })
            }));
        }
        ("bfi", "b32") => {
            return Some(Four(|a, b, at, len| {
                let (at, len) = (at & 255, len & 255);
                let ones = if len >= 32 { u64::MAX } else { (1 << len) - 1 };
                let mask = if at >= 32 { 0 } else { (ones << at) & 0xffff_ffff };
                (b & !mask & 0xffff_ffff) | (a.checked_shl(at as u32).unwrap_or(0) & mask)
            }));
        }
        ("bfe", "u32") => {
            return Some(Three(|a, at, len| {
                let (at, len) = (at & 255, len & 255);
                let x = (a & 0xffff_ffff).checked_shr(at as u32).unwrap_or(0);
                if len >= 32 { x } else { x & ((1 << len) - 1) }
            }));
        }
        ("bfe", "s32") => {
            return Some(Three(|a, at, len| {
                let (at, len) = (at & 255, len & 255);
                if len == 0 {
                    return 0;
                }
                let x = i64::from(a as u32 as i32) >> at.min(63);
                let keep = len.min(32) as u32;
                u64::from(((x << (64 - keep)) >> (64 - keep)) as u32)
            }));
        }
        ("shf", "b32") => {
            let (left, wrap) = (mods.contains(&"l"), mods.contains(&"wrap"));
            return Some(Three(match (left, wrap) {
                (true, true) => |a, b, n| ((b << 32 | a & 0xffff_ffff) << (n & 31)) >> 32 & 0xffff_ffff,
                (true, false) => |a, b, n| {
                    let n = (n & 0xffff_ffff).min(32);
                    (u128::from(b << 32 | a & 0xffff_ffff) << n >> 32) as u64 & 0xffff_ffff
                },
                (false, true) => |a, b, n| (b << 32 | a & 0xffff_ffff) >> (n & 31) & 0xffff_ffff,
                (false, false) => {
                    |a, b, n| (b << 32 | a & 0xffff_ffff) >> (n & 0xffff_ffff).min(32) & 0xffff_ffff
                }
            }));
        }
        _ => {}
    }
    let signed = ty.starts_with('s');
    match ty {
        "f32" => Some(match name {
            "add" => Two(|a, b| out(f(a) + f(b))),
            "sub" => Two(|a, b| out(f(a) - f(b))),
            "mul" => Two(|a, b| out(f(a) * f(b))),
            "div" => Two(|a, b| out(f(a) / f(b))),
            "fma" => Three(|a, b, c| out(f(a).mul_add(f(b), f(c)))),
            "rcp" => One(|a| out(1.0 / f(a))),
            "sqrt" => One(|a| out(f(a).sqrt())),
            "min" => Two(|a, b| out(lesser(f(a), f(b)))),
            "max" => Two(|a, b| out(greater(f(a), f(b)))),
            "neg" => One(|a| a & 0xffff_ffff ^ 0x8000_0000),
            "abs" => One(|a| a & 0x7fff_ffff),
            "mov" => One(|a| a & 0xffff_ffff),
            "selp" => Three(|a, b, p| if p != 0 { a & 0xffff_ffff } else { b & 0xffff_ffff }),
            _ => return None,
        }),
        "f16" => halves!(f16, name),
        "bf16" => halves!(bf16, name),
        "f16x2" => pairs!(f16, name),
        "bf16x2" => pairs!(bf16, name),
        "pred" => Some(match name {
            "and" => Two(|a, b| a & b),
            "or" => Two(|a, b| a | b),
            "xor" => Two(|a, b| a ^ b),
            "not" => One(|a| a ^ 1),
            "mov" => One(|a| a & 1),
            _ => return None,
        }),
        "b16" | "u16" | "s16" => ints!(u16, i16, u32, name, signed, mods),
        "b32" | "u32" | "s32" => ints!(u32, i32, u64, name, signed, mods),
        "f64" if matches!(name, "mov" | "selp") => ints!(u64, i64, u64, name, false, mods),
        "b64" | "u64" | "s64" => ints!(u64, i64, u64, name, signed, mods),
        _ => None,
    }
}

/// The comparison of `setp` and `set`.
pub fn comparison(op: &str, ty: &str) -> Option<fn(u64, u64) -> bool> {
    macro_rules! ints {
        ($t:ty) => {
            Some(match op {
                "eq" => |a, b| a as $t == b as $t,
                "ne" => |a, b| a as $t != b as $t,
                "lt" | "lo" => |a, b| (a as $t) < b as $t,
                "le" | "ls" => |a, b| a as $t <= b as $t,
                "gt" | "hi" => |a, b| a as $t > b as $t,
                "ge" | "hs" => |a, b| a as $t >= b as $t,
                _ => return None,
            })
        };
    }
    match ty {
        "u16" | "b16" => ints!(u16),
        "s16" => ints!(i16),
        "u32" | "b32" => ints!(u32),
        "s32" => ints!(i32),
        "u64" | "b64" => ints!(u64),
        "s64" => ints!(i64),
        "f32" => Some(match op {
            "eq" => |a, b| f(a) == f(b),
            "ne" => |a, b| f(a) < f(b) || f(a) > f(b),
            "lt" => |a, b| f(a) < f(b),
            "le" => |a, b| f(a) <= f(b),
            "gt" => |a, b| f(a) > f(b),
            "ge" => |a, b| f(a) >= f(b),
            // The unordered ones hold where either is NaN.
            "equ" => |a, b| f(a) == f(b) || f(a).is_nan() || f(b).is_nan(),
            "neu" => |a, b| f(a) != f(b),
            "ltu" => |a, b| !matches!(f(a).partial_cmp(&f(b)), Some(Equal | Greater)),
            "leu" => |a, b| f(a).partial_cmp(&f(b)) != Some(Greater),
            "gtu" => |a, b| !matches!(f(a).partial_cmp(&f(b)), Some(Equal | Less)),
            "geu" => |a, b| f(a).partial_cmp(&f(b)) != Some(Less),
            "num" => |a, b| !f(a).is_nan() && !f(b).is_nan(),
            "nan" => |a, b| f(a).is_nan() || f(b).is_nan(),
            _ => return None,
        }),
        _ => None,
    }
}
