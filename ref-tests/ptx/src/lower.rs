//! Statements to a compact form that runs without looking at text again: registers by number, labels by place, functions by pointer.

use crate::PtxError;
use crate::alu::{self, Function};
use crate::convert;
use crate::text::{self, Entry, Operand, Statement, Variable, bytes_of, fail};
use std::collections::HashMap;

/// A parsed file.
#[derive(Clone)]
pub struct Module {
    /// `.version`, as `8.1`.
    pub version: String,
    /// `.target`, as `sm_75`.
    pub target: String,
    kernels: Vec<Kernel>,
}

/// A decoded kernel.
#[derive(Clone)]
pub struct Kernel {
    pub(crate) name: String,
    pub(crate) code: Vec<Instruction>,
    pub(crate) registers: Vec<String>,
    /// Offset and size of each parameter.
    pub(crate) params: Vec<(usize, usize)>,
    pub(crate) param_bytes: usize,
    pub(crate) shared_bytes: usize,
    pub(crate) local_bytes: usize,
    pub(crate) max_threads: Option<u32>,
}

impl Module {
    /// Parses and decodes a PTX file.
    ///
    /// # Errors
    /// [`PtxError::Parse`] for anything not understood, with its line.
    pub fn parse(text: &str) -> Result<Self, PtxError> {
        let file = text::parse(text)?;
        let kernels = file.entries.iter().map(|e| lower(e, &file.variables)).collect::<Result<_, _>>()?;
        Ok(Self { version: file.version, target: file.target, kernels })
    }

    /// The kernel of this name.
    pub fn kernel(&self, name: &str) -> Option<&Kernel> {
        self.kernels.iter().find(|k| k.name == name)
    }

    /// All kernels, in the order of the text.
    pub fn kernels(&self) -> &[Kernel] {
        &self.kernels
    }
}

impl Kernel {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes of shared memory that it declares itself.
    pub fn shared_bytes(&self) -> usize {
        self.shared_bytes
    }

    /// Bytes of each parameter.
    pub fn parameters(&self) -> impl Iterator<Item = usize> + '_ {
        self.params.iter().map(|p| p.1)
    }
}

/// A source operand.
#[derive(Clone, Copy, Debug)]
pub enum Src {
    Reg(u32),
    Imm(u64),
    Special(Special),
}

/// Registers that the hardware fills.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Special {
    Tid(u8),
    Ntid(u8),
    Ctaid(u8),
    Nctaid(u8),
    Lane,
    Warp,
    MaskEq,
    MaskLt,
    MaskLe,
    MaskGt,
    MaskGe,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    Param,
    Global,
    Shared,
    Local,
    Generic,
}

/// Where an access goes: base + offset.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    pub space: Space,
    pub base: Src,
    pub offset: i64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shuffle {
    Up,
    Down,
    Butterfly,
    Index,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vote {
    All,
    Any,
    Uniform,
    Ballot,
}

/// Element types of `mma`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mma {
    /// m16n8k16, f16 inputs, f32 accumulators.
    F16,
    /// m16n8k16, bf16 inputs, f32 accumulators.
    Bf16,
    /// m16n8k32, s8 inputs, s32 accumulators.
    S8,
}

/// What an atomic operation makes of the old value, its operand and the second operand.
pub type Atomic = fn(u64, u64, u64) -> u64;

#[derive(Clone)]
pub enum Op {
    Function {
        f: Function,
        d: u32,
        keep: u64,
        src: [Src; 4],
    },
    Compare {
        f: fn(u64, u64) -> bool,
        d: u32,
        not_d: Option<u32>,
        a: Src,
        b: Src,
        with: Option<(Function, Src, bool)>,
    },
    Load {
        at: Place,
        bytes: u8,
        signed: bool,
        constant: bool,
        d: Box<[u32]>,
        keep: u64,
    },
    Store {
        at: Place,
        bytes: u8,
        src: Box<[Src]>,
    },
    Atomic {
        at: Place,
        bytes: u8,
        f: Atomic,
        d: Option<u32>,
        b: Src,
        c: Src,
    },
    Branch(u32),
    Exit,
    Barrier,
    WarpSync(Src),
    Shuffle {
        mode: Shuffle,
        d: u32,
        p: Option<u32>,
        a: Src,
        b: Src,
        c: Src,
        mask: Src,
    },
    Vote {
        mode: Vote,
        d: u32,
        a: Src,
        negate: bool,
        mask: Src,
    },
    ActiveMask(u32),
    CopyAsync {
        to: Place,
        from: Place,
        bytes: u8,
        fill: Option<Src>,
    },
    CopyCommit,
    /// Waits until at most so many groups are under way; `u32::MAX`: for everything, committed or not.
    CopyWait(u32),
    LoadMatrix {
        at: Place,
        transpose: bool,
        d: Box<[u32]>,
    },
    Mma {
        kind: Mma,
        d: [u32; 4],
        a: [Src; 4],
        b: [Src; 2],
        c: [Src; 4],
    },
    Nothing,
}

#[derive(Clone)]
pub struct Instruction {
    pub guard: Option<(u32, bool)>,
    pub op: Op,
    pub line: u32,
}

/// Address windows of generic addresses.
pub const SHARED_WINDOW: u64 = 1 << 36;
pub const LOCAL_WINDOW: u64 = 1 << 37;

struct Lower<'a> {
    names: HashMap<String, u32>,
    types: Vec<String>,
    registers: Vec<String>,
    variables: HashMap<String, (Space, u64)>,
    module: &'a [Variable],
    line: u32,
}

fn lower(e: &Entry, module: &[Variable]) -> Result<Kernel, PtxError> {
    let mut l = Lower {
        names: HashMap::new(),
        types: Vec::new(),
        registers: Vec::new(),
        variables: HashMap::new(),
        module,
        line: 0,
    };
    let mut params = Vec::new();
    let (mut param_bytes, mut shared_bytes, mut local_bytes) = (0usize, 0usize, 0usize);
    for p in &e.params {
        param_bytes = param_bytes.next_multiple_of(p.align.max(1));
        l.variables.insert(p.name.clone(), (Space::Param, param_bytes as u64));
        params.push((param_bytes, p.bytes));
        param_bytes += p.bytes;
    }
    let mut dynamic = Vec::new();
    let mut place = |l: &mut Lower<'_>, v: &Variable| {
        if v.dynamic {
            dynamic.push(v.name.clone());
            return;
        }
        let (space, total) = if v.space == ".shared" {
            (Space::Shared, &mut shared_bytes)
        } else {
            (Space::Local, &mut local_bytes)
        };
        *total = total.next_multiple_of(v.align.max(1));
        l.variables.insert(v.name.clone(), (space, *total as u64));
        *total += v.bytes;
    };
    for v in module.iter().filter(|v| v.space == ".shared") {
        place(&mut l, v);
    }
    let (mut labels, mut count) = (HashMap::new(), 0u32);
    for (line, s) in &e.body {
        l.line = *line;
        match s {
            Statement::Label(name) => {
                labels.insert(name.clone(), count);
            }
            Statement::Registers { prefix, count, ty } => l.declare(prefix, *count, ty),
            Statement::Variable(v) => place(&mut l, v),
            Statement::Instruction { .. } => count += 1,
        }
    }
    // Shared memory that the launch gives lies behind what the kernel declares.
    shared_bytes = shared_bytes.next_multiple_of(16);
    for name in dynamic {
        l.variables.insert(name, (Space::Shared, shared_bytes as u64));
    }
    let mut code = Vec::new();
    for (line, s) in &e.body {
        if let Statement::Instruction { guard, op, args } = s {
            l.line = *line;
            let guard = match guard {
                Some((p, negate)) => Some((l.register(p)?, *negate)),
                None => None,
            };
            let op: Vec<&str> = op.iter().map(String::as_str).collect();
            let op = l.instruction(&op, args, &labels)?;
            code.push(Instruction { guard, op, line: *line });
        }
    }
    // Falling off the end is leaving.
    code.push(Instruction { guard: None, op: Op::Exit, line: l.line });
    Ok(Kernel {
        name: e.name.clone(),
        code,
        registers: l.registers,
        params,
        param_bytes,
        shared_bytes,
        local_bytes: local_bytes.next_multiple_of(16),
        max_threads: e.max_threads,
    })
}

impl Lower<'_> {
    fn declare(&mut self, prefix: &str, count: u32, ty: &str) {
        let mut add = |name: String| {
            self.names.insert(name.clone(), self.registers.len() as u32);
            self.registers.push(name);
            self.types.push(ty.trim_start_matches('.').into());
        };
        if count == u32::MAX {
            add(prefix.into());
        } else {
            (0..count).for_each(|i| add(format!("{prefix}{i}")));
        }
    }

    fn fail<T>(&self, what: impl Into<String>) -> Result<T, PtxError> {
        fail(self.line, what)
    }

    fn register(&self, name: &str) -> Result<u32, PtxError> {
        match self.names.get(name) {
            Some(r) => Ok(*r),
            None => self.fail(format!("{name} is no register")),
        }
    }

    fn dst(&self, o: &Operand) -> Result<u32, PtxError> {
        match o {
            Operand::Name(n) => self.register(n),
            _ => self.fail("a register is needed"),
        }
    }

    /// The bits that a register holds.
    fn keep(&self, r: u32) -> u64 {
        match self.types[r as usize].as_str() {
            "pred" => 1,
            t => match bytes_of(t) {
                Some(n) if n < 8 => (1 << (8 * n)) - 1,
                _ => u64::MAX,
            },
        }
    }

    fn src(&self, o: &Operand) -> Result<Src, PtxError> {
        let name = match o {
            Operand::Imm(n) => return Ok(Src::Imm(*n)),
            Operand::Name(n) => n,
            _ => return self.fail("a register or number is needed"),
        };
        if let Some(r) = self.names.get(name) {
            return Ok(Src::Reg(*r));
        }
        if let Some((_, at)) = self.variables.get(name) {
            return Ok(Src::Imm(*at));
        }
        if self.module.iter().any(|v| v.name == *name) {
            return self.fail(format!("module variable {name}: only kernels' own variables are known here"));
        }
        let axis = |kind: fn(u8) -> Special| match name.split_once('.').map(|p| p.1) {
            Some("x") => Ok(Src::Special(kind(0))),
            Some("y") => Ok(Src::Special(kind(1))),
            Some("z") => Ok(Src::Special(kind(2))),
            _ => self.fail(format!("unknown register {name}")),
        };
        match name.split('.').next().unwrap_or("") {
            "%tid" => axis(Special::Tid),
            "%ntid" => axis(Special::Ntid),
            "%ctaid" => axis(Special::Ctaid),
            "%nctaid" => axis(Special::Nctaid),
            "%laneid" => Ok(Src::Special(Special::Lane)),
            "%warpid" => Ok(Src::Special(Special::Warp)),
            "%lanemask_eq" => Ok(Src::Special(Special::MaskEq)),
            "%lanemask_lt" => Ok(Src::Special(Special::MaskLt)),
            "%lanemask_le" => Ok(Src::Special(Special::MaskLe)),
            "%lanemask_gt" => Ok(Src::Special(Special::MaskGt)),
            "%lanemask_ge" => Ok(Src::Special(Special::MaskGe)),
            _ => self.fail(format!("unknown operand {name}")),
        }
    }

    fn list<T>(
        &self,
        o: &Operand,
        f: impl Fn(&Operand) -> Result<T, PtxError>,
    ) -> Result<Box<[T]>, PtxError> {
        match o {
            Operand::Vector(v) => v.iter().map(f).collect(),
            o => Ok([f(o)?].into()),
        }
    }

    fn array<T, const N: usize>(
        &self,
        o: &Operand,
        f: impl Fn(&Operand) -> Result<T, PtxError>,
    ) -> Result<[T; N], PtxError> {
        let Ok(a) = self.list(o, f)?.into_vec().try_into() else {
            return self.fail(format!("{N} registers are needed"));
        };
        Ok(a)
    }

    fn place(&self, space: Space, o: &Operand) -> Result<Place, PtxError> {
        let Operand::Address(base, offset) = o else { return self.fail("an address is needed") };
        let base = match base {
            Some(b) => self.src(&Operand::Name(b.clone()))?,
            None => Src::Imm(0),
        };
        Ok(Place { space, base, offset: *offset })
    }

    /// Takes an address space out of the modifiers.
    fn space(mods: &mut Vec<&str>) -> Space {
        for (i, m) in mods.iter().enumerate() {
            let space = match *m {
                "param" => Space::Param,
                "global" => Space::Global,
                "shared" | "shared::cta" => Space::Shared,
                "local" => Space::Local,
                _ => continue,
            };
            mods.remove(i);
            return space;
        }
        Space::Generic
    }

    fn instruction(
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
                    ["sync", "aligned", "m16n8k32", "row", "col", "s32", "s8", "s8", "s32"] => Mma::S8,
                    _ => return unknown(),
                };
                let (d, a) = (self.array(&args[0], |o| self.dst(o))?, self.array(&args[1], |o| self.src(o))?);
                let (b, c) = (self.array(&args[2], |o| self.src(o))?, self.array(&args[3], |o| self.src(o))?);
                Ok(Op::Mma { kind, d, a, b, c })
            }
            "cvt" => {
                let (Some(s), Some(d)) = (mods.pop(), mods.pop()) else { return unknown() };
                let Some(f) = convert::function(&mods, d, s) else { return unknown() };
                self.arithmetic(f, args, &whole)
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
