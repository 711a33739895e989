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
use std::sync::OnceLock;

/// A device on a fresh interpreter with a GiB.
pub(crate) fn interpreted() -> (Device, Interpreted) {
    let gpu = Interpreted::new(1 << 30);
    (gpu.device().expect("the kernels load"), gpu)
}

/// A device to compute on: the GPU that is asked for, or else an interpreter. With `RSINFER_TEST_GPU_MIRROR` the interpreter computes, and
/// the GPU beside it, launch by launch: where a result of the GPU's is wrong, that says which kernel's.
pub(crate) fn gpu() -> Device {
    let Some(index) = mirror::asked().filter(|_| std::env::var_os("RSINFER_TEST_GPU_MIRROR").is_none())
    else {
        return Interpreted::mirrored(1 << 30).device().expect("the kernels load");
    };
    let open = || kernels::cuda::open(index).unwrap_or_else(|e| panic!("cuda:{index}: {e}"));
    // A context with no user goes, and to make one takes long.
    static KEPT: OnceLock<Box<dyn Gpu>> = OnceLock::new();
    KEPT.get_or_init(open);
    Device::new(CudaBackend::new(open(), &format!("cuda:{index}")).expect("the kernels load"))
}
