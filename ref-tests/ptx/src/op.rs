//! Decoded instructions, as warps run them. Knows registers by number and functions by pointer; nothing of text.

use crate::alu::Function;

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

/// Shapes and element types of `mma`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mma {
    /// m16n8k16, f16 inputs, f32 accumulators.
    F16,
    /// m16n8k16, bf16 inputs, f32 accumulators.
    Bf16,
    /// m16n8k32 of bytes, s32 accumulators; a is u8 (`unsigned`) or s8, b s8.
    Bytes { unsigned: bool },
    /// m16n8k16 of the same.
    BytesHalf { unsigned: bool },
    /// m8n8k16 of the same.
    BytesSmall { unsigned: bool },
}

impl Mma {
    /// Registers of a, b and c.
    pub fn registers(self) -> [usize; 3] {
        match self {
            Self::F16 | Self::Bf16 | Self::Bytes { .. } => [4, 2, 4],
            Self::BytesHalf { .. } => [2, 1, 4],
            Self::BytesSmall { .. } => [1, 1, 2],
        }
    }
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
        d: Box<[u32]>,
        a: Box<[Src]>,
        b: Box<[Src]>,
        c: Box<[Src]>,
    },
    /// To the second-level cache.
    Prefetch(Place),
    /// `griddepcontrol.wait`.
    WaitForGrids,
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
