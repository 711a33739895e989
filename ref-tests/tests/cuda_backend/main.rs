//! The CUDA backend's host side without a GPU: the same code that would drive one, on the PTX interpreter. Whole forward passes of the tiny
//! reference models, every operation against the CPU backend, models over several devices, and faults at the seam. With
//! `RSINFER_TEST_GPU=cuda:0` all but the faults run on that GPU instead.

mod faults;
mod graphs;
mod models;
mod ops;
mod parts;
mod sampling;
mod split;

use kernels::Device;
use kernels::cuda::{CudaBackend, Gpu};
use ref_tests::gpu::Interpreted;
use ref_tests::mirror;

/// A device on a fresh interpreter with a GiB.
pub(crate) fn interpreted() -> (Device, Interpreted) {
    let gpu = Interpreted::new(1 << 30);
    (gpu.device().expect("the kernels load"), gpu)
}

/// The number of the GPU that computes in the interpreter's place, if any is to.
fn asked() -> Option<usize> {
    mirror::asked().filter(|_| std::env::var_os("RSINFER_TEST_GPU_MIRROR").is_none())
}

fn open(index: usize) -> Box<dyn Gpu> {
    kernels::cuda::open(index).unwrap_or_else(|e| panic!("cuda:{index}: {e}"))
}

fn device(gpu: Box<dyn Gpu>) -> Device {
    Device::new(CudaBackend::new(gpu, "cuda").expect("the kernels load"))
}

/// A device to compute on: the GPU that is asked for, or else an interpreter. With `RSINFER_TEST_GPU_MIRROR` the interpreter computes, and
/// the GPU beside it, launch by launch: where a result of the GPU's is wrong, that says which kernel's.
pub(crate) fn gpu() -> Device {
    device(asked().map_or_else(|| Box::new(Interpreted::mirrored(1 << 30)) as Box<dyn Gpu>, open))
}
