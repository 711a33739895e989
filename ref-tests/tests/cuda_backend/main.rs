//! The CUDA backend's host side without a GPU: the same code that would drive one, on the PTX interpreter. Whole forward passes of the tiny
//! reference models, every operation against the CPU backend, and faults at the seam. With `RSINFER_TEST_GPU=cuda:0` all but the faults run
//! on that GPU instead.

mod faults;
mod models;
mod ops;

use kernels::Device;
use kernels::cuda::CudaBackend;
use ref_tests::gpu::Interpreted;

/// A device on a fresh interpreter with a GiB.
pub(crate) fn interpreted() -> (Device, Interpreted) {
    let gpu = Interpreted::new(1 << 30);
    (gpu.device().expect("the kernels load"), gpu)
}

/// A device to compute on: the GPU that is asked for, or else an interpreter.
pub(crate) fn gpu() -> Device {
    let Ok(name) = std::env::var("RSINFER_TEST_GPU") else { return interpreted().0 };
    let index = name.strip_prefix("cuda:").and_then(|n| n.parse().ok()).expect("RSINFER_TEST_GPU is cuda:N");
    let gpu = kernels::cuda::open(index).unwrap_or_else(|e| panic!("{name}: {e}"));
    Device::new(CudaBackend::new(gpu, &name).expect("the kernels load"))
}
