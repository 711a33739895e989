//! What this machine can do at most: bytes read per second and multiply-adds per second, the yardsticks for the kernels.
//! Measured on the spot, since clocks and neighbours change; knows nothing of formats.

use super::Pool;
use super::isa::Isa;
use super::lanes::{Kernel, Simd};
#[cfg(target_arch = "x86_64")]
use super::x86_64::{amx, avx2, avx512};
use std::hint::black_box;
use std::time::{Duration, Instant};

/// Far larger than any cache.
const BYTES: usize = 512 << 20;
const PIECE: usize = 1 << 20;

/// Bytes per second that `threads` threads read from memory together: the best of five passes over 512 MiB, each thread
/// reading four streams at once with the widest vectors and fetching ahead, which is as fast as this kind of machine reads.
pub fn read_bandwidth(threads: usize) -> f64 {
    let pool = Pool::new(threads);
    let isa = Isa::current();
    // Not zeros: untouched zero pages would all be one page.
    let data: Vec<f32> = (0..BYTES / 4).map(|i| i as f32).collect();
    let pieces: Vec<&[f32]> = data.chunks(PIECE / 4).collect();
    best(threads, 5, BYTES as f64, || {
        pool.run(pieces.len(), |i| {
            black_box(isa.vectorize(Read(pieces[i])));
        });
    })
}

/// The sum of a piece, read as four streams.
struct Read<'a>(&'a [f32]);

impl Kernel for Read<'_> {
    type Out = f32;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        const LINE: usize = 64 / 4;
        let quarter = self.0.len() / 4;
        let mut sums = [s.splat(0.0); 4];
        for at in (0..quarter / LINE * LINE).step_by(LINE) {
            for (i, sum) in sums.iter_mut().enumerate() {
                // SAFETY: a line of quarter i of the piece; what is fetched ahead need not be there.
                unsafe {
                    let p = self.0.as_ptr().add(i * quarter + at);
                    #[cfg(target_arch = "x86_64")]
                    {
                        use std::arch::x86_64::*;
                        _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(2048 / 4).cast());
                    }
                    *sum = s.add(*sum, s.load(p));
                }
            }
        }
        s.sum(s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3])))
    }
}

/// Multiply-adds of int8 per second that `threads` threads do together on `isa` with nothing to load: `vpdpbusd` on AVX-512,
/// `vpmaddubsw`, `vpmaddwd` and `vpaddd` on AVX2. `None` where there is no such instruction to measure.
pub fn int8_peak(isa: Isa, threads: usize) -> Option<f64> {
    peak(isa, threads, Kind::Int8)
}

/// The same for f32 fused multiply-adds.
pub fn float_peak(isa: Isa, threads: usize) -> Option<f64> {
    peak(isa, threads, Kind::Float)
}

/// The same for bf16 tile products (`tdpbf16ps`); `None` where there are none.
pub fn tile_peak(isa: Isa, threads: usize) -> Option<f64> {
    peak(isa, threads, Kind::Tiles)
}

enum Kind {
    Int8,
    Float,
    Tiles,
}

/// Loops of a piece of work.
const ROUNDS: usize = 200_000;

fn peak(isa: Isa, threads: usize, kind: Kind) -> Option<f64> {
    let (work, per_round): (unsafe fn(usize), usize) = match (isa, kind) {
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx2(_), Kind::Int8) => (avx2::int8_peak, avx2::INT8_ROUND),
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx2(_), Kind::Float) => (avx2::float_peak, avx2::FLOAT_ROUND),
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512(_) | Isa::Amx(_), Kind::Int8) => (avx512::int8_peak, avx512::INT8_ROUND),
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512(_) | Isa::Amx(_), Kind::Float) => (avx512::float_peak, avx512::FLOAT_ROUND),
        #[cfg(target_arch = "x86_64")]
        (Isa::Amx(_), Kind::Tiles) => (amx::peak, amx::PEAK_ROUND),
        _ => return None,
    };
    let pool = Pool::new(threads);
    let pieces = 4 * threads;
    let operations = (pieces * ROUNDS * per_round) as f64;
    // SAFETY: the token in `isa` says that the CPU has the set.
    Some(best(threads, 5, operations, || pool.run(pieces, |_| unsafe { work(ROUNDS) })))
}

fn best(threads: usize, times: usize, amount: f64, mut f: impl FnMut()) -> f64 {
    f();
    let seconds = (0..times).map(|_| {
        let start = Clock::start(threads);
        f();
        start.seconds()
    });
    amount / seconds.fold(f64::INFINITY, f64::min)
}

/// Measures seconds: of one thread's work the time the processor gave to it, so that neighbours disturb less; of several
/// threads' the time that passed.
pub enum Clock {
    /// Processor time of the calling thread when it began.
    Thread(Duration),
    /// The time it began.
    Wall(Instant),
}

impl Clock {
    /// Starts it.
    pub fn start(threads: usize) -> Self {
        if threads == 1 { Self::Thread(thread_time()) } else { Self::Wall(Instant::now()) }
    }

    /// Seconds since.
    pub fn seconds(&self) -> f64 {
        match self {
            Self::Thread(start) => thread_time() - *start,
            Self::Wall(start) => start.elapsed(),
        }
        .as_secs_f64()
    }
}

#[cfg(unix)]
fn thread_time() -> Duration {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `t` is writable.
    let failed = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut t) };
    assert_eq!(failed, 0, "the clock of threads is part of POSIX");
    Duration::new(t.tv_sec as u64, t.tv_nsec as u32)
}

#[cfg(not(unix))]
fn thread_time() -> Duration {
    use std::sync::LazyLock;
    static BEGIN: LazyLock<Instant> = LazyLock::new(Instant::now);
    BEGIN.elapsed()
}
