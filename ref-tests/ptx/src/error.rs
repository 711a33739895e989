//! What can go wrong: a file that is not understood, or a thread that does what it must not.

use crate::memory::SHIFT;

/// An error of parsing or running.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PtxError {
    /// The text is not PTX, or not of the part known here.
    #[error("line {line}: {what}")]
    Parse {
        /// Line of the text, from 1.
        line: u32,
        /// What is wrong with it.
        what: String,
    },
    /// A launch that does not fit its kernel.
    #[error("launch of {kernel}: {what}")]
    Launch {
        /// The kernel's name.
        kernel: String,
        /// What does not fit.
        what: String,
    },
    /// A thread did what it must not.
    #[error("{kernel}, line {line}, block {block:?}, thread {thread}: {fault}")]
    Run {
        /// The kernel's name.
        kernel: String,
        /// Line of the text, from 1.
        line: u32,
        /// Block index.
        block: [u32; 3],
        /// Thread of the block, linear.
        thread: u32,
        /// What it did.
        fault: Fault,
    },
    /// Host access to device memory that is not there, or was never written.
    #[error("host access to {bytes} bytes at {address:#x}: {fault}")]
    Host {
        /// Where.
        address: u64,
        /// How many.
        bytes: usize,
        /// Why not.
        fault: Fault,
    },
}

/// What a thread must not do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// Outside every allocation, or of the block's shared or the thread's local memory.
    #[error("{space} access of {bytes} bytes at {address:#x} is out of bounds")]
    OutOfBounds {
        /// Address space.
        space: &'static str,
        /// Address.
        address: u64,
        /// Bytes.
        bytes: usize,
    },
    /// Not a multiple of the access's size.
    #[error("{space} access of {bytes} bytes at {address:#x} is misaligned")]
    Misaligned {
        /// Address space.
        space: &'static str,
        /// Address.
        address: u64,
        /// Bytes.
        bytes: usize,
    },
    /// Bytes that nothing wrote (or that a `cp.async` not yet waited for is to write).
    #[error("{space} read at {address:#x} of bytes that were never written")]
    Uninitialised {
        /// Address space.
        space: &'static str,
        /// Address.
        address: u64,
    },
    /// A register that this thread did not write.
    #[error("register {0} is read before it is written")]
    UninitialisedRegister(String),
    /// `ld.global.nc` of bytes written by this launch, or by one that it may overlap.
    #[error("non-coherent read at {0:#x} of bytes that this launch, or one it may overlap, wrote")]
    NotReadOnly(u64),
    /// Before `griddepcontrol.wait`, in a launch that may begin while those before it run: a write, or a read of what one of them wrote.
    #[error("{access} at {address:#x} before griddepcontrol.wait{}", by.as_ref().map_or(String::new(), |k| format!(", of what {k} wrote")))]
    Early {
        /// `read` or `write`.
        access: &'static str,
        /// Address.
        address: u64,
        /// Of a read: the kernel that wrote there.
        by: Option<String>,
    },
    /// A thread that ends without `griddepcontrol.wait` in such a launch: whoever waits for this grid does not wait for those before it.
    #[error("ends without griddepcontrol.wait")]
    NoWait,
    /// Two threads at one place, one of which writes, and nothing that orders them: no barrier, or they are of different blocks.
    #[error(
        "race at {}: {access}, and {before} by thread {other}{} at line {line}, in any order",
        place(*address),
        block.map_or(String::new(), |b| format!(" of block {b:?}"))
    )]
    Race {
        /// Address, of global memory from 2^40 on.
        address: u64,
        /// `write`, `read` or `atomic`.
        access: &'static str,
        /// What another did before: the same, or `non-coherent read`, which any write races with.
        before: &'static str,
        /// The block of the other, unless it is the same one.
        block: Option<[u32; 3]>,
        /// The other thread.
        other: u32,
        /// Where it did so: line of the text, from 1.
        line: u32,
    },
    /// A barrier that some threads of the block cannot reach.
    #[error("barrier divergence: {0}")]
    BarrierDivergence(String),
    /// A `.sync` instruction that some threads of its mask cannot reach.
    #[error("threads of mask {0:#010x} wait for lanes {1:#010x}, which wait elsewhere")]
    SyncDivergence(u32, u32),
    /// The executing lane is not in the mask, or lanes give different ones.
    #[error("the membership mask {0:#010x} does not fit the lanes {1:#010x} that execute the instruction")]
    SyncMask(u32, u32),
    /// A shuffle from a lane that does not take part.
    #[error("shuffle from lane {0}, which does not take part")]
    ShuffleSource(u32),
    /// Too many instructions.
    #[error("still running after {0} warp instructions")]
    Endless(u64),
    /// A value that an instruction cannot take.
    #[error("{0}")]
    Value(String),
}

/// Global memory by allocation: `#3+64` is byte 64 of the third.
fn place(address: u64) -> String {
    match address >> SHIFT {
        0 => format!("shared address {address:#x}"),
        n => format!("global #{n}+{}", address & ((1 << SHIFT) - 1)),
    }
}
