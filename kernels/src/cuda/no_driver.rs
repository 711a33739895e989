//! Where the program is built without the driver's interface (no cargo feature `cuda`).

use super::gpu::{Gpu, GpuError, GpuInfo};

/// There are none.
///
/// # Errors
/// Always.
pub fn devices() -> Result<Vec<GpuInfo>, GpuError> {
    Err(GpuError::NotBuilt)
}

/// There is none.
///
/// # Errors
/// Always.
pub fn open(_: usize) -> Result<Box<dyn Gpu>, GpuError> {
    Err(GpuError::NotBuilt)
}
