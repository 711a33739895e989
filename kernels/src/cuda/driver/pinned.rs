//! Memory of the host that the driver has pinned: copies from it run beside the program. Weights go through two pieces of it in turns.

use super::{Driver, Handle};
use crate::cuda::gpu::{GpuError, PIECE, piece_by_piece};
use std::ptr;

/// Two pieces of [`PIECE`] bytes, and events: what was copied last from each is over.
pub(super) struct Pieces {
    at: [*mut u8; 2],
    over: [Handle; 2],
}

impl Default for Pieces {
    fn default() -> Self {
        Self { at: [ptr::null_mut(); 2], over: [ptr::null_mut(); 2] }
    }
}

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

    /// See `Gpu::stream`. Where nothing can be pinned, through memory that is not.
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
            _ => return piece_by_piece(self, at, least, fill),
        }
        for i in [0, 1].into_iter().cycle() {
            let over = pieces.over[i];
            // SAFETY: an event of `make`; one that was never recorded is over.
            self.call("cuEventSynchronize", |api| unsafe { (api.wait)(over) })?;
            // SAFETY: pinned, initialised, and read by no copy any more; the lock is held, so that there is no other reference.
            let piece = unsafe { std::slice::from_raw_parts_mut(pieces.at[i], PIECE) };
            let n = fill(piece);
            if n == 0 {
                break;
            }
            let some = &piece[..n];
            // SAFETY: reads pinned memory that stays as it is until the event.
            self.call("cuMemcpyHtoDAsync", |api| unsafe {
                (api.write)(at, some.as_ptr().cast(), n, self.stream)
            })?;
            // SAFETY: an event and the stream of the same context.
            self.call("cuEventRecord", |api| unsafe { (api.record)(over, self.stream) })?;
            at += n as u64;
        }
        Ok(())
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
