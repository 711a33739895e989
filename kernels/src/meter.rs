//! A device that allocates nothing and adds up what it was asked for: the code that allocates a model's buffers, run on it, says
//! how large they are. It computes nothing.

use crate::backend::*;
use crate::{Buf, KernelError, KvBuf, Limits, Vector, View, ViewMut, Weight, cpu, cuda};
use quant::DType;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

struct Meter {
    /// Of a CPU with so many threads; `None`: of a GPU.
    threads: Option<usize>,
    asked: Arc<AtomicUsize>,
}

/// The stand-in for a CPU with `threads` threads, and the bytes of activations and caches it was asked for so far.
pub fn meter(threads: usize) -> (Device, Arc<AtomicUsize>) {
    let asked = Arc::new(AtomicUsize::new(0));
    (Device::new(Meter { threads: Some(threads.max(1)), asked: asked.clone() }), asked)
}

/// The stand-in for a GPU, and the bytes of weights, activations and caches it was asked for so far.
pub fn gpu_meter() -> (Device, Arc<AtomicUsize>) {
    let asked = Arc::new(AtomicUsize::new(0));
    (Device::new(Meter { threads: None, asked: asked.clone() }), asked)
}

fn refuse<T>() -> Result<T, KernelError> {
    Err(KernelError::Shape("a device for planning computes nothing".into()))
}

impl Backend for Meter {
    fn name(&self) -> String {
        self.threads.map_or("plan of a GPU".into(), |n| format!("plan of {n} threads"))
    }

    fn scratch_bytes(&self, limits: &Limits) -> usize {
        self.threads.map_or_else(|| cuda::scratch_bytes(limits), |n| cpu::scratch_bytes(limits, n))
    }

    fn reserve(&self, _: &Limits) -> Result<(), KernelError> {
        Ok(())
    }

    fn alloc(&self, rows: usize, cols: usize) -> Result<Buf, KernelError> {
        let b = Buf::unbacked(rows, cols);
        self.asked.fetch_add(b.bytes(), Relaxed);
        Ok(b)
    }

    fn alloc_kv(&self, dtype: DType, slots: usize, width: usize) -> Result<KvBuf, KernelError> {
        let b = KvBuf::unbacked(dtype, slots, width)?;
        let bytes = if self.threads.is_some() { b.bytes() } else { cuda::kv_bytes(dtype, slots, width)? };
        self.asked.fetch_add(bytes, Relaxed);
        Ok(b)
    }

    fn upload(&self, host: Weight) -> Result<Weight, KernelError> {
        if self.threads.is_none() {
            self.asked.fetch_add(cuda::weight_bytes(&host), Relaxed);
        }
        Ok(host)
    }

    fn upload_vector(&self, host: Vector) -> Result<Vector, KernelError> {
        if self.threads.is_none() {
            self.asked.fetch_add(4 * host.len(), Relaxed);
        }
        Ok(host)
    }

    fn write(&self, _: ViewMut<'_>, _: &[f32]) -> Result<(), KernelError> {
        refuse()
    }

    fn read(&self, _: View<'_>, _: &mut [f32]) -> Result<(), KernelError> {
        refuse()
    }

    fn best(&self, _: View<'_>, _: usize, _: &mut Vec<(u32, f32)>) -> Result<(), KernelError> {
        refuse()
    }

    fn gather(&self, _: View<'_>, _: &[u32], _: ViewMut<'_>) -> Result<(), KernelError> {
        refuse()
    }

    fn copy(&self, _: View<'_>, _: ViewMut<'_>) -> Result<(), KernelError> {
        refuse()
    }

    fn embed(&self, _: &Weight, _: &[u32], _: f32, _: ViewMut<'_>) -> Result<(), KernelError> {
        refuse()
    }

    fn rms_norm(&self, _: View<'_>, _: &Vector, _: f32, _: ViewMut<'_>) -> Result<(), KernelError> {
        refuse()
    }

    fn rms_norm_heads(&self, _: ViewMut<'_>, _: &Vector, _: f32) -> Result<(), KernelError> {
        refuse()
    }

    fn add(&self, _: View<'_>, _: ViewMut<'_>) -> Result<(), KernelError> {
        refuse()
    }

    fn rope(&self, _: ViewMut<'_>, _: RopeHeads, _: View<'_>) -> Result<(), KernelError> {
        refuse()
    }

    fn matmul(&self, _: &[u32], _: View<'_>, _: &mut [Product<'_>]) -> Result<(), KernelError> {
        refuse()
    }

    fn ffn(&self, _: &[u32], _: Ffn<'_>, _: View<'_>, _: ViewMut<'_>, _: Write) -> Result<(), KernelError> {
        refuse()
    }

    fn route(&self, _: Router<'_>, _: View<'_>, _: &mut Routes) -> Result<(), KernelError> {
        refuse()
    }

    fn moe(
        &self,
        _: &[u32],
        _: Ffn<'_>,
        _: &Routes,
        _: Option<Ffn<'_>>,
        _: View<'_>,
        _: ViewMut<'_>,
        _: Write,
    ) -> Result<(), KernelError> {
        refuse()
    }

    fn kv_write(&self, _: View<'_>, _: &mut KvBuf, _: &[u32]) -> Result<(), KernelError> {
        refuse()
    }

    fn kv_move(&self, _: &mut KvBuf, _: &[(u32, u32)], _: Range<usize>) -> Result<(), KernelError> {
        refuse()
    }

    fn kv_read(&self, _: &KvBuf, _: &[u32], _: Range<usize>, _: &mut [f32]) -> Result<(), KernelError> {
        refuse()
    }

    fn kv_rotate(
        &self,
        _: &mut KvBuf,
        _: &[u32],
        _: Range<usize>,
        _: RopeHeads,
        _: View<'_>,
    ) -> Result<(), KernelError> {
        refuse()
    }

    fn kv_save(&self, _: &KvBuf, _: &[u32], _: &mut [u8]) -> Result<(), KernelError> {
        refuse()
    }

    fn kv_load(&self, _: &mut KvBuf, _: &[u32], _: &[u8]) -> Result<(), KernelError> {
        refuse()
    }

    fn attention(&self, _: Attention<'_>, _: ViewMut<'_>, _: Option<Mass<'_>>) -> Result<(), KernelError> {
        refuse()
    }

    fn mla(&self, _: Mla<'_>, _: ViewMut<'_>, _: Option<Mass<'_>>) -> Result<(), KernelError> {
        refuse()
    }
}
