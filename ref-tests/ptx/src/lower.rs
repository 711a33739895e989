//! Statements to a compact form that runs without looking at text again (`op`): kernels, registers by number, labels and variables by
//! place. Instructions are `decode`'s.

mod decode;

use crate::PtxError;
use crate::op::{Instruction, Op, Place, Space, Special, Src};
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
}
