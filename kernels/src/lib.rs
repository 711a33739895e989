//! Compute backends of rsinfer. Knows buffers, shapes and numbers; nothing of files, models or tokens.

mod backend;
mod best;
mod buf;
pub mod cpu;
pub mod cuda;
mod host_bytes;
mod kv_ops;
mod limits;
mod meter;
mod pass;
#[doc(hidden)]
pub mod testing;
mod visible;

pub use backend::*;
pub use best::MOST_BEST;
pub use buf::{Buf, KvBuf, Place, Vector, View, ViewMut, Weight};
pub use host_bytes::HostBytes;
pub use limits::{Hidden, Limits};
pub use meter::{gpu_meter, meter};

/// What a backend can refuse.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KernelError {
    /// Operands do not fit each other.
    #[error("shapes do not fit: {0}")]
    Shape(String),
    /// Memory could not be had.
    #[error("cannot allocate {bytes} bytes for the {what}")]
    Memory {
        /// What for.
        what: &'static str,
        /// How much.
        bytes: usize,
    },
    /// Operands of one operation lie on different devices.
    #[error("{op}: its operands lie on different devices")]
    Place {
        /// The operation.
        op: &'static str,
    },
    /// A GPU, or what drives it, refused.
    #[error(transparent)]
    Gpu(#[from] cuda::GpuError),
    /// An instruction set asked for by name is not here.
    #[error("RSINFER_ISA={asked}: this CPU does not have it; it has {here}")]
    Isa {
        /// The name asked for.
        asked: String,
        /// What could be asked for.
        here: String,
    },
    /// A call asks for more working memory than was reserved.
    #[error(
        "{what} needs {bytes} bytes of scratch memory, {reserved} are reserved: reserve for larger limits"
    )]
    Scratch {
        /// What for.
        what: &'static str,
        /// How much it needs.
        bytes: usize,
        /// How much there is.
        reserved: usize,
    },
}
