//! Memory of the host that the driver has pinned: copies from it run beside the program, and what they read stays until they have. All that
//! goes to the GPU outside of graphs, or comes from it, goes through two pieces of it in turns: of other memory an asynchronous copy may
//! read when its caller has long changed it ("CUDA Driver API", "API synchronization behavior").

use super::{Driver, Handle};
use crate::cuda::gpu::{Gpu, GpuError, PIECE, piece_by_piece};
use std::ptr;

/// Two pieces of [`PIECE`] bytes, and events: what was copied from each is over.
pub(super) struct Pieces {
    at: [*mut u8; 2],
    over: [Handle; 2],
    /// The one that is filled, and how far.
    now: usize,
    used: usize,
}

impl Default for Pieces {
    fn default() -> Self {
        Self { at: [ptr::null_mut(); 2], over: [ptr::null_mut(); 2], now: 0, used: 0 }
    }
}

/// Copies in a piece begin at multiples of this.
const ALIGN: usize = 256;

impl Driver {
    /// Pinned memory of so many zeros.
    pub(super) fn pin(&self, bytes: usize) -> Result<*mut u8, GpuError> {
        let mut at = ptr::null_mut();
        // SAFETY: writes an address; given back by `unpin`.
        self.call("cuMemHostAlloc", |api| unsafe { (api.pin)(&mut at, bytes, 0) })?;
        // SAFETY: so many bytes, which nothing else knows of yet.
        unsafe { ptr::write_bytes(at.cast::<u8>(), 0, bytes) };
        Ok(at.cast())
    }

    /// Gives it back; null is none.
    pub(super) fn unpin(&self, at: *mut u8) {
        if !at.is_null() {
            // SAFETY: of `pin`, and nothing reads it any more. A GPU that is lost has nothing to give back.
            let _ = self.call("cuMemFreeHost", |api| unsafe { (api.unpin)(at.cast()) });
        }
    }

    fn make(&self, p: &mut Pieces) -> Result<(), GpuError> {
        for i in 0..2 {
            if p.over[i].is_null() {
                // SAFETY: writes a handle. 2: it takes no time.
                self.call("cuEventCreate", |api| unsafe { (api.event)(&mut p.over[i], 2) })?;
            }
            if p.at[i].is_null() {
                p.at[i] = self.pin(PIECE)?;
            }
        }
        Ok(())
    }

    /// Room for `bytes` (at most [`PIECE`]) that no copy reads any more.
    fn room<'a>(&self, p: &'a mut Pieces, bytes: usize) -> Result<&'a mut [u8], GpuError> {
        if p.used + bytes > PIECE {
            // SAFETY: an event and the stream of the same context.
            self.call("cuEventRecord", |api| unsafe { (api.record)(p.over[p.now], self.stream) })?;
            (p.now, p.used) = (1 - p.now, 0);
            // SAFETY: an event of `make`; one that was never recorded is over.
            self.call("cuEventSynchronize", |api| unsafe { (api.wait)(p.over[p.now]) })?;
        }
        // SAFETY: pinned, initialised, within the piece and behind all that copies under way read; `p` is borrowed as long.
        Ok(unsafe { std::slice::from_raw_parts_mut(p.at[p.now].add(p.used), bytes) })
    }

    /// Copies to `at` the first `bytes` of what [`Self::room`] gave.
    fn send(&self, p: &mut Pieces, at: u64, bytes: usize) -> Result<(), GpuError> {
        // SAFETY: reads pinned memory that stays as it is until `room` has waited for the piece's event.
        self.call("cuMemcpyHtoDAsync", |api| unsafe {
            (api.write)(at, p.at[p.now].add(p.used).cast(), bytes, self.stream)
        })?;
        p.used = (p.used + bytes).next_multiple_of(ALIGN);
        Ok(())
    }

    /// See `Gpu::write`. Where nothing can be pinned the copy is waited for.
    pub(super) fn write_pieces(&self, at: u64, bytes: &[u8]) -> Result<(), GpuError> {
        let p = &mut *self.pieces.lock().unwrap_or_else(|e| e.into_inner());
        match self.make(p) {
            Ok(()) => {}
            Err(e @ GpuError::Lost { .. }) => return Err(e),
            Err(_) => {
                // SAFETY: `bytes` outlive the wait.
                self.call("cuMemcpyHtoDAsync", |api| unsafe {
                    (api.write)(at, bytes.as_ptr().cast(), bytes.len(), self.stream)
                })?;
                return self.synchronize();
            }
        }
        for (i, some) in bytes.chunks(PIECE).enumerate() {
            self.room(p, some.len())?.copy_from_slice(some);
            self.send(p, at + (i * PIECE) as u64, some.len())?;
        }
        Ok(())
    }

    /// See `Gpu::read`: pinned memory takes a copy many times as fast. Where nothing can be pinned, directly.
    pub(super) fn read_pieces(&self, at: u64, bytes: &mut [u8]) -> Result<(), GpuError> {
        let p = &mut *self.pieces.lock().unwrap_or_else(|e| e.into_inner());
        let copy = |at: u64, to: &mut [u8]| {
            // SAFETY: writes `to`, which outlives the wait; a copy that the driver refused writes nothing.
            self.call("cuMemcpyDtoHAsync", |api| unsafe {
                (api.read)(to.as_mut_ptr().cast(), at, to.len(), self.stream)
            })?;
            self.synchronize()
        };
        match self.make(p) {
            Ok(()) => {}
            Err(e @ GpuError::Lost { .. }) => return Err(e),
            Err(_) => return copy(at, bytes),
        }
        for (i, some) in bytes.chunks_mut(PIECE).enumerate() {
            let here = self.room(p, some.len())?;
            copy(at + (i * PIECE) as u64, here)?;
            some.copy_from_slice(here);
            // All copies are over.
            p.used = 0;
        }
        Ok(())
    }

    /// See `Gpu::stream`.
    pub(super) fn stream_pieces(
        &self,
        mut at: u64,
        least: usize,
        fill: &mut dyn FnMut(&mut [u8]) -> usize,
    ) -> Result<(), GpuError> {
        let mut pieces = self.pieces.lock().unwrap_or_else(|e| e.into_inner());
        match self.make(&mut pieces) {
            Err(e @ GpuError::Lost { .. }) => return Err(e),
            Ok(()) if least <= PIECE => {}
            _ => {
                drop(pieces);
                return piece_by_piece(self, at, least, fill);
            }
        }
        loop {
            let piece = self.room(&mut pieces, PIECE)?;
            let n = fill(piece);
            let n = piece[..n].len();
            if n == 0 {
                return Ok(());
            }
            self.send(&mut pieces, at, n)?;
            at += n as u64;
        }
    }

    /// Gives the pieces back; nothing is copied any more.
    pub(super) fn forget_pieces(&self) {
        let pieces = std::mem::take(&mut *self.pieces.lock().unwrap_or_else(|e| e.into_inner()));
        pieces.at.into_iter().for_each(|at| self.unpin(at));
        for over in pieces.over.into_iter().filter(|e| !e.is_null()) {
            // SAFETY: of `make`.
            let _ = self.call("cuEventDestroy", |api| unsafe { (api.destroy_event)(over) });
        }
    }
}
