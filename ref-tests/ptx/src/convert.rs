//! `cvt`: conversions between integers and floats, with the roundings of the ISA.

use crate::alu::{Function, out};
use crate::float16::{Half, bf16, f16};
use Function::{One, Two};

fn f(x: u64) -> f32 {
    f32::from_bits(x as u32)
}

/// Source bits as a wide integer, by the source's type.
fn widen(ty: &str) -> Option<fn(u64) -> i128> {
    Some(match ty {
        "u8" | "b8" => |x| i128::from(x as u8),
        "s8" => |x| i128::from(x as i8),
        "u16" | "b16" => |x| i128::from(x as u16),
        "s16" => |x| i128::from(x as i16),
        "u32" | "b32" => |x| i128::from(x as u32),
        "s32" => |x| i128::from(x as i32),
        "u64" | "b64" => |x| i128::from(x),
        "s64" => |x| i128::from(x as i64),
        _ => return None,
    })
}

macro_rules! int_to_int {
    ($($d:literal $D:ty, $($s:literal $S:ty),+;)+) => {
        fn int_to_int(d: &str, s: &str) -> Option<Function> {
            // A narrow result fills its register by its own sign.
            Some(One(match (d, s) {
                $($(($d, $s) => |x| (x as $S as $D) as i64 as u64,)+)+
                _ => return None,
            }))
        }
    };
}

int_to_int! {
    "u8" u8, "u8" u8, "s8" i8, "u16" u16, "s16" i16, "u32" u32, "s32" i32, "u64" u64, "s64" i64;
    "s8" i8, "u8" u8, "s8" i8, "u16" u16, "s16" i16, "u32" u32, "s32" i32, "u64" u64, "s64" i64;
    "u16" u16, "u8" u8, "s8" i8, "u16" u16, "s16" i16, "u32" u32, "s32" i32, "u64" u64, "s64" i64;
    "s16" i16, "u8" u8, "s8" i8, "u16" u16, "s16" i16, "u32" u32, "s32" i32, "u64" u64, "s64" i64;
    "u32" u32, "u8" u8, "s8" i8, "u16" u16, "s16" i16, "u32" u32, "s32" i32, "u64" u64, "s64" i64;
    "s32" i32, "u8" u8, "s8" i8, "u16" u16, "s16" i16, "u32" u32, "s32" i32, "u64" u64, "s64" i64;
    "u64" u64, "u8" u8, "s8" i8, "u16" u16, "s16" i16, "u32" u32, "s32" i32, "u64" u64, "s64" i64;
    "s64" i64, "u8" u8, "s8" i8, "u16" u16, "s16" i16, "u32" u32, "s32" i32, "u64" u64, "s64" i64;
}

/// The function of `cvt.<mods>.<d>.<s>`; the caller cuts the result to the width of the register.
pub fn function(mods: &[&str], d: &str, s: &str) -> Option<Function> {
    let only = |m: &str| mods == [m];
    if widen(d).is_some() && widen(s).is_some() {
        return if mods.is_empty() { int_to_int(d, s) } else { None };
    }
    Some(match (d, s) {
        ("f32", "f16") if mods.is_empty() => One(|x| out(f16::wide(x) as f32)),
        ("f32", "bf16") if mods.is_empty() => One(|x| out(bf16::wide(x) as f32)),
        ("f16", "f32") if only("rn") => One(|x| f16::put(f(x).into())),
        ("bf16", "f32") if only("rn") => One(|x| bf16::put(f(x).into())),
        // The first source is the upper half.
        ("f16x2", "f32") if only("rn") => Two(|a, b| f16::put(f(a).into()) << 16 | f16::put(f(b).into())),
        ("bf16x2", "f32") if only("rn") => Two(|a, b| bf16::put(f(a).into()) << 16 | bf16::put(f(b).into())),
        ("f32", "f32") => One(match mods {
            ["rni"] => |x| out(f(x).round_ties_even()),
            ["rzi"] => |x| out(f(x).trunc()),
            ["rmi"] => |x| out(f(x).floor()),
            ["rpi"] => |x| out(f(x).ceil()),
            _ => return None,
        }),
        ("f32", "u8" | "u16" | "u32") if only("rn") => One(match s {
            "u8" => |x| out(f32::from(x as u8)),
            "u16" => |x| out(f32::from(x as u16)),
            _ => |x| out(x as u32 as f32),
        }),
        ("f32", "s8" | "s16" | "s32") if only("rn") => One(match s {
            "s8" => |x| out(f32::from(x as i8)),
            "s16" => |x| out(f32::from(x as i16)),
            _ => |x| out(x as i32 as f32),
        }),
        ("f32", "u64") if only("rn") => One(|x| out(x as f32)),
        ("f32", "s64") if only("rn") => One(|x| out(x as i64 as f32)),
        // Too large a value becomes the nearest that fits, NaN zero: what `as` does, too.
        ("s32", "f32") => One(match mods {
            ["rzi"] => |x| u64::from(f(x) as i32 as u32),
            ["rni"] => |x| u64::from(f(x).round_ties_even() as i32 as u32),
            ["rmi"] => |x| u64::from(f(x).floor() as i32 as u32),
            ["rpi"] => |x| u64::from(f(x).ceil() as i32 as u32),
            _ => return None,
        }),
        ("u32", "f32") => One(match mods {
            ["rzi"] => |x| u64::from(f(x) as u32),
            ["rni"] => |x| u64::from(f(x).round_ties_even() as u32),
            ["rmi"] => |x| u64::from(f(x).floor() as u32),
            ["rpi"] => |x| u64::from(f(x).ceil() as u32),
            _ => return None,
        }),
        ("s64", "f32") if only("rzi") => One(|x| f(x) as i64 as u64),
        ("u64", "f32") if only("rzi") => One(|x| f(x) as u64),
        _ => return None,
    })
}
