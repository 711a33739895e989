//! The best values of a row, as every device orders them. Knows nothing of where rows lie.

use crate::backend::{Device, shape};
use crate::{KernelError, View};
use std::cmp::Ordering;

/// Values of a row that [`crate::Device::best`] finds at most: with more, to read the row is faster.
pub const MOST_BEST: usize = 128;

/// Appends the `k` largest of `row` with their places, best first, ties to the lower place; NaN is above all.
pub(crate) fn best_of(row: &[f32], k: usize, out: &mut Vec<(u32, f32)>) {
    let mut order: Vec<(u32, f32)> = (0..).zip(row.iter().copied()).collect();
    let key = |v: f32| (v.is_nan(), if v.is_nan() { 0.0 } else { v });
    let by_value = |a: &(u32, f32), b: &(u32, f32)| key(b.1).partial_cmp(&key(a.1));
    order.sort_by(|a, b| by_value(a, b).unwrap_or(Ordering::Equal).then(a.0.cmp(&b.0)));
    out.extend(order.iter().take(k));
}

impl Device {
    /// Appends the `k` largest values of each row with their columns, best first, ties to the lower column; NaN is above all. A GPU finds
    /// them itself: what is copied is k pairs a row. `k` is at most [`MOST_BEST`] and the number of columns.
    pub fn best(&self, x: View<'_>, k: usize, out: &mut Vec<(u32, f32)>) -> Result<(), KernelError> {
        shape((1..=x.cols().min(MOST_BEST)).contains(&k), "best", || format!("{k} of {} columns", x.cols()))?;
        self.near("best", [x.place()])?;
        self.0.best(x, k, out)
    }
}
