//! One instruction's text to its decoded form, or an error of parsing: nothing unknown is ever skipped. Knows names and modifiers; nothing
//! of kernels.

use super::Lower;
use crate::PtxError;
use crate::alu::{self, Function};
use crate::convert;
use crate::op::{Atomic, LOCAL_WINDOW, Mma, Op, SHARED_WINDOW, Shuffle, Space, Src, Vote};
use crate::text::{Operand, bytes_of};
use std::collections::HashMap;

impl Lower<'_> {
    pub(super) fn instruction(
        &self,
        op: &[&str],
        args: &[Operand],
        labels: &HashMap<String, u32>,
    ) -> Result<Op, PtxError> {
        let whole = op.join(".");
        let unknown = || self.fail(format!("unknown instruction {whole}"));
        let need = |n: usize| {
            if args.len() == n { Ok(()) } else { self.fail(format!("{whole} needs {n} operands")) }
        };
        let name = op[0];
        let mut mods: Vec<&str> = op[1..].to_vec();
        match name {
            "bra" => {
                need(1)?;
                if !matches!(mods[..], [] | ["uni"]) {
                    return unknown();
                }
                match &args[0] {
                    Operand::Name(n) if labels.contains_key(n) => Ok(Op::Branch(labels[n])),
                    o => self.fail(format!("no such label: {o:?}")),
                }
            }
            "ret" | "exit" => Ok(Op::Exit),
            "bar" | "barrier" => match (&mods[..], args) {
                (["sync"] | ["sync", "aligned"] | ["cta", "sync", "aligned"], [Operand::Imm(0)]) => {
                    Ok(Op::Barrier)
                }
                (["warp", "sync"], [m]) => Ok(Op::WarpSync(self.src(m)?)),
                _ => unknown(),
            },
            "membar" | "fence" => Ok(Op::Nothing),
            "griddepcontrol" => match (&mods[..], args) {
                (["wait"], []) => Ok(Op::WaitForGrids),
                // When others may begin changes no result that they may rely on.
                (["launch_dependents"], []) => Ok(Op::Nothing),
                _ => unknown(),
            },
            "prefetch" => match (&mods[..], args) {
                (["global", "L2"], [at]) => Ok(Op::Prefetch(self.place(Space::Global, at)?)),
                _ => unknown(),
            },
            "activemask" => Ok(Op::ActiveMask(self.dst(&args[0])?)),
            "ld" | "ldu" => self.load(&whole, mods, args),
            "st" => {
                need(2)?;
                let space = Self::space(&mut mods);
                let Some(bytes) = mods.pop().and_then(bytes_of) else { return unknown() };
                let vector = matches!(mods[..], ["v2"] | ["v4"]);
                if !(mods.is_empty() || vector) || space == Space::Param {
                    return unknown();
                }
                let src = self.list(&args[1], |o| self.src(o))?;
                Ok(Op::Store { at: self.place(space, &args[0])?, bytes: bytes as u8, src })
            }
            "atom" | "red" => self.atomic(&whole, mods, args),
            "cvta" => {
                need(2)?;
                let to = mods.first() == Some(&"to");
                let window = match mods.get(usize::from(to)) {
                    Some(&"shared") => SHARED_WINDOW,
                    Some(&"local") => LOCAL_WINDOW,
                    Some(&"global" | &"param") => 0,
                    _ => return unknown(),
                };
                let f = Function::Two(if to { u64::wrapping_sub } else { u64::wrapping_add });
                let src = [self.src(&args[1])?, Src::Imm(window), Src::Imm(0), Src::Imm(0)];
                Ok(Op::Function { f, d: self.dst(&args[0])?, keep: u64::MAX, src })
            }
            "setp" => self.setp(&whole, &mods, args),
            "shfl" => {
                need(5)?;
                let mode = match mods[..] {
                    ["sync", "up", "b32"] => Shuffle::Up,
                    ["sync", "down", "b32"] => Shuffle::Down,
                    ["sync", "bfly", "b32"] => Shuffle::Butterfly,
                    ["sync", "idx", "b32"] => Shuffle::Index,
                    _ => return unknown(),
                };
                let (d, p) = match &args[0] {
                    Operand::Pair(d, p) => (self.register(d)?, Some(self.register(p)?)),
                    o => (self.dst(o)?, None),
                };
                let [a, b, c, mask] = [1, 2, 3, 4].map(|i| self.src(&args[i]));
                Ok(Op::Shuffle { mode, d, p, a: a?, b: b?, c: c?, mask: mask? })
            }
            "vote" => {
                need(3)?;
                let mode = match mods[..] {
                    ["sync", "all", "pred"] => Vote::All,
                    ["sync", "any", "pred"] => Vote::Any,
                    ["sync", "uni", "pred"] => Vote::Uniform,
                    ["sync", "ballot", "b32"] => Vote::Ballot,
                    _ => return unknown(),
                };
                let (a, negate) = self.predicate(&args[1])?;
                Ok(Op::Vote { mode, d: self.dst(&args[0])?, a, negate, mask: self.src(&args[2])? })
            }
            "cp" => match mods[..] {
                ["async", "ca" | "cg", "shared" | "shared::cta", "global", ..] => {
                    let hints = |m: &&str| m.starts_with("L2::");
                    let bytes = match args.get(2) {
                        Some(Operand::Imm(n @ (4 | 8 | 16))) if mods[4..].iter().all(hints) => *n as u8,
                        _ => return unknown(),
                    };
                    if mods[1] == "cg" && bytes != 16 {
                        return self.fail("cp.async.cg copies 16 bytes");
                    }
                    let fill = args.get(3).map(|o| self.src(o)).transpose()?;
                    let (to, from) =
                        (self.place(Space::Shared, &args[0])?, self.place(Space::Global, &args[1])?);
                    Ok(Op::CopyAsync { to, from, bytes, fill })
                }
                ["async", "commit_group"] => Ok(Op::CopyCommit),
                ["async", "wait_all"] => Ok(Op::CopyWait(u32::MAX)),
                ["async", "wait_group"] => match args {
                    [Operand::Imm(n)] => Ok(Op::CopyWait(*n as u32)),
                    _ => unknown(),
                },
                _ => unknown(),
            },
            "ldmatrix" => {
                need(2)?;
                let (n, transpose) = match mods[..] {
                    ["sync", "aligned", "m8n8", n, "shared", "b16"] => (n, false),
                    ["sync", "aligned", "m8n8", n, "trans", "shared", "b16"] => (n, true),
                    _ => return unknown(),
                };
                let d = self.list(&args[0], |o| self.dst(o))?;
                if format!("x{}", d.len()) != n {
                    return self.fail(format!("{n} needs as many registers"));
                }
                Ok(Op::LoadMatrix { at: self.place(Space::Shared, &args[1])?, transpose, d })
            }
            "mma" => {
                need(4)?;
                let kind = match mods[..] {
                    ["sync", "aligned", "m16n8k16", "row", "col", "f32", "f16", "f16", "f32"] => Mma::F16,
                    ["sync", "aligned", "m16n8k16", "row", "col", "f32", "bf16", "bf16", "f32"] => Mma::Bf16,
                    ["sync", "aligned", shape, "row", "col", "s32", a @ ("u8" | "s8"), "s8", "s32"] => {
                        let unsigned = a == "u8";
                        match shape {
                            "m16n8k32" => Mma::Bytes { unsigned },
                            "m16n8k16" => Mma::BytesHalf { unsigned },
                            "m8n8k16" => Mma::BytesSmall { unsigned },
                            _ => return unknown(),
                        }
                    }
                    _ => return unknown(),
                };
                let d = self.list(&args[0], |o| self.dst(o))?;
                let [a, b, c] = [1, 2, 3].map(|i| self.list(&args[i], |o| self.src(o)));
                let (a, b, c) = (a?, b?, c?);
                if [a.len(), b.len(), c.len()] != kind.registers() || d.len() != c.len() {
                    return self.fail(format!("{whole} has too few or too many registers"));
                }
                Ok(Op::Mma { kind, d, a, b, c })
            }
            "cvt" => {
                let (Some(s), Some(d)) = (mods.pop(), mods.pop()) else { return unknown() };
                let Some(f) = convert::function(&mods, d, s) else { return unknown() };
                self.arithmetic(f, args, &whole)
            }
            // Two halves of a word, the first the lower.
            "mov" if mods == ["b32"] && matches!(args, [_, Operand::Vector(v)] if v.len() == 2) => {
                let v = self.list(&args[1], |o| self.src(o))?;
                let f = Function::Two(|a, b| a & 0xffff | (b & 0xffff) << 16);
                let src = [v[0], v[1], Src::Imm(0), Src::Imm(0)];
                Ok(Op::Function { f, d: self.dst(&args[0])?, keep: u64::MAX, src })
            }
            "mov" if matches!(args, [Operand::Vector(_), _] | [_, Operand::Vector(_)]) => {
                self.fail("mov with vectors is not known here")
            }
            _ => {
                let Some(ty) = mods.pop() else { return unknown() };
                let Some(f) = alu::function(name, &mods, ty) else { return unknown() };
                self.arithmetic(f, args, &whole)
            }
        }
    }

    fn arithmetic(&self, f: Function, args: &[Operand], whole: &str) -> Result<Op, PtxError> {
        let n = match f {
            Function::One(_) => 1,
            Function::Two(_) => 2,
            Function::Three(_) => 3,
            Function::Four(_) => 4,
        };
        if args.len() != n + 1 {
            return self.fail(format!("{whole} needs {} operands", n + 1));
        }
        let mut src = [Src::Imm(0); 4];
        for (s, o) in src.iter_mut().zip(&args[1..]) {
            *s = self.src(o)?;
        }
        let d = self.dst(&args[0])?;
        Ok(Op::Function { f, d, keep: self.keep(d), src })
    }

    /// A predicate operand; `!p` is read as a name that begins so.
    fn predicate(&self, o: &Operand) -> Result<(Src, bool), PtxError> {
        match o {
            Operand::Name(n) if n.starts_with('!') => Ok((Src::Reg(self.register(&n[1..])?), true)),
            o => Ok((self.src(o)?, false)),
        }
    }

    fn load(&self, whole: &str, mut mods: Vec<&str>, args: &[Operand]) -> Result<Op, PtxError> {
        let unknown = || self.fail(format!("unknown instruction {whole}"));
        let space = Self::space(&mut mods);
        let Some(ty) = mods.pop() else { return unknown() };
        let Some(bytes) = bytes_of(ty) else { return unknown() };
        let mut constant = false;
        for m in mods {
            match m {
                "nc" => constant = true,
                "v2" | "v4" | "volatile" | "ca" | "cg" | "cs" | "lu" | "L1::no_allocate" => {}
                _ => return unknown(),
            }
        }
        if args.len() != 2 {
            return self.fail(format!("{whole} needs 2 operands"));
        }
        let d = self.list(&args[0], |o| self.dst(o))?;
        let keep = self.keep(d[0]);
        let at = self.place(space, &args[1])?;
        Ok(Op::Load { at, bytes: bytes as u8, signed: ty.starts_with('s'), constant, d, keep })
    }

    fn setp(&self, whole: &str, mods: &[&str], args: &[Operand]) -> Result<Op, PtxError> {
        let unknown = || self.fail(format!("unknown instruction {whole}"));
        let (compare, join, ty) = match mods {
            [c, ty] => (*c, None, *ty),
            [c, j @ ("and" | "or" | "xor"), ty] => (*c, Some(*j), *ty),
            _ => return unknown(),
        };
        let Some(f) = alu::comparison(compare, ty) else { return unknown() };
        if args.len() != 3 + usize::from(join.is_some()) {
            return self.fail(format!("{whole} has too few or too many operands"));
        }
        let (d, not_d) = match &args[0] {
            Operand::Pair(p, q) => (self.register(p)?, Some(self.register(q)?)),
            o => (self.dst(o)?, None),
        };
        let with = match join {
            Some(j) => {
                let (p, negate) = self.predicate(&args[3])?;
                Some((alu::function(j, &[], "pred").expect("known"), p, negate))
            }
            None => None,
        };
        Ok(Op::Compare { f, d, not_d, a: self.src(&args[1])?, b: self.src(&args[2])?, with })
    }

    fn atomic(&self, whole: &str, mut mods: Vec<&str>, args: &[Operand]) -> Result<Op, PtxError> {
        let unknown = || self.fail(format!("unknown instruction {whole}"));
        let space = Self::space(&mut mods);
        let Some(ty) = mods.pop() else { return unknown() };
        mods.retain(|m| !matches!(*m, "relaxed" | "acq_rel" | "gpu" | "cta"));
        let [op] = mods[..] else { return unknown() };
        fn single(x: u64) -> f32 {
            f32::from_bits(x as u32)
        }
        let f: Atomic = match (op, ty) {
            ("add", "u32" | "s32") => |a, b, _| u64::from((a as u32).wrapping_add(b as u32)),
            ("add", "u64") => |a, b, _| a.wrapping_add(b),
            ("add", "f32") => |a, b, _| alu::out(single(a) + single(b)),
            ("min", "u32") => |a, b, _| u64::from((a as u32).min(b as u32)),
            ("min", "s32") => |a, b, _| u64::from((a as i32).min(b as i32) as u32),
            ("max", "u32") => |a, b, _| u64::from((a as u32).max(b as u32)),
            ("max", "s32") => |a, b, _| u64::from((a as i32).max(b as i32) as u32),
            ("min", "u64") => |a, b, _| a.min(b),
            ("max", "u64") => |a, b, _| a.max(b),
            ("and", "b32") => |a, b, _| a & b & 0xffff_ffff,
            ("or", "b32") => |a, b, _| (a | b) & 0xffff_ffff,
            ("xor", "b32") => |a, b, _| (a ^ b) & 0xffff_ffff,
            ("exch", "b32") => |_, b, _| b & 0xffff_ffff,
            ("exch", "b64") => |_, b, _| b,
            ("cas", "b32") => |a, b, c| if a == b & 0xffff_ffff { c & 0xffff_ffff } else { a },
            ("cas", "b64") => |a, b, c| if a == b { c } else { a },
            ("inc", "u32") => |a, b, _| if a >= b & 0xffff_ffff { 0 } else { a + 1 },
            _ => return unknown(),
        };
        let bytes = bytes_of(ty).expect("known") as u8;
        let returns = whole.starts_with("atom");
        let rest = &args[usize::from(returns)..];
        if rest.len() != if op == "cas" { 3 } else { 2 } {
            return self.fail(format!("{whole} has too few or too many operands"));
        }
        let d = if returns { Some(self.dst(&args[0])?) } else { None };
        let c = rest.get(2).map_or(Ok(Src::Imm(0)), |o| self.src(o))?;
        Ok(Op::Atomic { at: self.place(space, &rest[0])?, bytes, f, d, b: self.src(&rest[1])?, c })
    }
}
