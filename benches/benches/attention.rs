//! Attention on the CPU alone, in the head geometries of public models: decoding at depth, and prompts. Every line is a median,
//! with the bytes of cache per second against the memory's own, and the multiply-adds per second against the f32 peak, both
//! measured in the same run. Decoding goes round several layers' caches, as a model does, so that none stays in a core's own
//! caches.
//!
//! `cargo bench -p rsinfer-benches --bench attention -- [part of a name ...]`; threads: `RSINFER_THREADS`, all cores otherwise.
//!
//! Multiply-adds are those of the form taken: decoding of latent attention is absorbed (latent + rotary key for the score, latent
//! for the sum, and both up-projections), prompts that or expanded (each head's keys and values made once per call).

use kernels::cpu::{CpuBackend, isa::Isa, machine};
use kernels::*;
use quant::DType;
use std::time::{Duration, Instant};

/// Bytes of cache that decoding goes round, at least.
const ROUND: usize = 96 << 20;
/// Time of a case.
const TIME: Duration = Duration::from_millis(700);

fn values(n: usize) -> Vec<f32> {
    let mut s = 1u32;
    let next = move |_| {
        s = s.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (s >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(next).collect()
}

fn cache(dev: &Device, dtype: DType, slots: usize, width: usize) -> KvBuf {
    let mut c = dev.alloc_kv(dtype, slots, width).unwrap();
    let row = values(width + slots);
    for s in 0..slots {
        dev.kv_write(View::from_host(&row[s..][..width], width), &mut c, &[s as u32]).unwrap();
    }
    c
}

/// Row i sees `depth + i + 1` entries.
fn visible(n: usize, depth: usize, prompt: usize) -> Visible {
    let mut v = Visible::default();
    v.set_prompt(prompt);
    for i in 0..n {
        v.push([Span { start: 0, len: (depth + i + 1) as u32, sink: false }]);
    }
    v
}

/// Layers whose caches are gone round.
fn layers(n: usize, bytes: usize) -> usize {
    if n > 1 { 1 } else { ROUND.div_ceil(bytes).min(64) }
}

struct Bench {
    dev: Device,
    only: Vec<String>,
    bandwidth: f64,
    peak: Option<f64>,
}

impl Bench {
    fn new() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let threads = std::env::var("RSINFER_THREADS").ok().and_then(|t| t.parse().ok()).unwrap_or(cores);
        // What cargo passes to benches is not a name.
        let only = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
        let (bandwidth, peak) =
            (machine::read_bandwidth(threads), machine::float_peak(Isa::current(), threads));
        let dev = Device::new(CpuBackend::new(threads));
        let macs = peak.map_or("not measured".into(), |p| format!("{:.0} GMAC/s", p / 1e9));
        println!("{}: reads {:.1} GB/s, f32 peak {macs}", dev.name(), bandwidth / 1e9);
        println!("{:44} {:>10} {:>7} {:>6} {:>8} {:>6}", "", "us", "GB/s", "", "GMAC/s", "");
        Self { dev, only, bandwidth, peak }
    }

    fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|o| name.contains(o))
    }

    /// Times `f(i)`, i counting up.
    fn run(&self, name: &str, bytes: usize, macs: usize, mut f: impl FnMut(usize)) {
        (0..3).for_each(&mut f);
        let (mut times, start) = (Vec::new(), Instant::now());
        while start.elapsed() < TIME || times.len() < 3 {
            let one = Instant::now();
            f(times.len());
            times.push(one.elapsed());
        }
        times.sort();
        let t = times[times.len() / 2].as_secs_f64();
        let (b, m) = (bytes as f64 / t, macs as f64 / t);
        let share = self.peak.map_or(String::new(), |p| format!("{:.0}%", 100.0 * m / p));
        println!(
            "{name:44} {:10.1} {:7.2} {:5.0}% {:8.1} {share:>6}",
            t * 1e6,
            b / 1e9,
            100.0 * b / self.bandwidth,
            m / 1e9
        );
    }

    fn grouped(&self, model: &str, heads: usize, kv_heads: usize, hd: usize) {
        for dtype in [DType::F16, DType::Q8_0] {
            for (n, depth) in [(1, 511), (1, 4095), (1, 16383), (512, 0), (512, 3584)] {
                let name = format!("{model}/{dtype}/n{n}/depth{}", depth + n);
                if !self.wants(&name) {
                    continue;
                }
                let slots = depth + n;
                let bytes = 2 * KvBuf::size(dtype, slots, kv_heads * hd).unwrap();
                let kv: Vec<_> = (0..layers(n, bytes))
                    .map(|_| {
                        let one = || cache(&self.dev, dtype, slots, kv_heads * hd);
                        (one(), one())
                    })
                    .collect();
                let q = values(n * heads * hd);
                let visible = visible(n, depth, if n > 1 { n } else { 0 });
                let mut out = vec![0.0; n * heads * hd];
                let mut mass = vec![0.0; kv_heads * slots];
                let seen: usize = (0..n).map(|i| visible.seen(i)).sum();
                for counted in [None, Some(0..n)] {
                    let name = format!("{name}{}", if counted.is_some() { "/mass" } else { "" });
                    self.run(&name, bytes, seen * heads * hd * 2, |i| {
                        let (k, v) = &kv[i % kv.len()];
                        let q = View::from_host(&q, heads * hd);
                        let a = Attention {
                            heads,
                            kv_heads,
                            scale: 0.125,
                            q,
                            q_sink: None,
                            k,
                            v,
                            visible: &visible,
                        };
                        let out = ViewMut::from_host(&mut out, heads * hd);
                        let to = ViewMut::from_host(&mut mass, slots);
                        let mass = counted.clone().map(|rows| Mass { out: to, rows });
                        self.dev.attention_mass(a, out, mass).unwrap();
                    });
                }
            }
        }
    }

    fn latent(&self, model: &str, heads: usize) {
        let (nope, rope, value, latent) = (128, 64, 128, 512);
        let weight = |count: usize, rows: usize, cols: usize| {
            let q8 = DType::Q8_0;
            let mut bytes = vec![0; count * rows * q8.row_bytes(cols).unwrap()];
            (q8.format().quantize.unwrap())(&values(count * rows * cols), &mut bytes, None);
            Weight::host(q8, count, rows, cols, HostBytes::from_vec(bytes)).unwrap()
        };
        let hd = nope + rope;
        for (form, n, depth) in [
            ("split", 1, 0),
            ("split", 1, 511),
            ("split", 1, 4095),
            ("split", 1, 16383),
            ("joint", 1, 0),
            ("split", 64, 3584),
            ("split", 512, 0),
            ("split", 512, 3584),
        ] {
            let name = format!("{model}/{form}/n{n}/depth{}", depth + n);
            if !self.wants(&name) {
                continue;
            }
            let (k_b, v_b) = (weight(heads, latent, nope), weight(heads, value, latent));
            let kv_b = weight(1, heads * (nope + value), latent);
            let up = if form == "split" {
                MlaUp::Split { k_b: &k_b, v_b: &v_b }
            } else {
                MlaUp::Joint { kv_b: &kv_b }
            };
            let slots = depth + n;
            let f16 = DType::F16;
            let bytes = KvBuf::size(f16, slots, latent).unwrap() + KvBuf::size(f16, slots, rope).unwrap();
            let kv: Vec<_> = (0..layers(n, bytes))
                .map(|_| (cache(&self.dev, f16, slots, latent), cache(&self.dev, f16, slots, rope)))
                .collect();
            let q = values(n * heads * hd);
            let visible = visible(n, depth, if n > 1 { n } else { 0 });
            let mut out = vec![0.0; n * heads * value];
            let mut mass = vec![0.0; slots];
            let seen: usize = (0..n).map(|i| visible.seen(i)).sum();
            // The cheaper form, as the backend chooses.
            let absorbed = n * latent * (nope + value) + seen * (2 * latent + rope);
            let expanded = slots * latent * (nope + value) + seen * (hd + value);
            let macs = if n == 1 { absorbed } else { absorbed.min(expanded) };
            for counted in [None, Some(0..n)] {
                let name = format!("{name}{}", if counted.is_some() { "/mass" } else { "" });
                self.run(&name, bytes + k_b.n_bytes() + v_b.n_bytes(), heads * macs, |i| {
                    let (latent, k_pe) = &kv[i % kv.len()];
                    let m = Mla {
                        heads,
                        nope,
                        rope,
                        value,
                        scale: 0.07,
                        q: View::from_host(&q, heads * hd),
                        q_sink: None,
                        latent,
                        k_pe,
                        up,
                        visible: &visible,
                    };
                    let out = ViewMut::from_host(&mut out, heads * value);
                    let to = ViewMut::from_host(&mut mass, slots);
                    let mass = counted.clone().map(|rows| Mass { out: to, rows });
                    self.dev.mla_mass(m, out, mass).unwrap();
                });
            }
        }
    }

    /// Storing a prompt's rows.
    fn write(&self) {
        let (n, width) = (512, 512);
        let x = values(n * width);
        let slots: Vec<u32> = (0..n as u32).collect();
        for dtype in KvBuf::TYPES {
            let name = format!("kv_write/{dtype}/n{n}");
            if self.wants(&name) {
                let mut c = self.dev.alloc_kv(dtype, n, width).unwrap();
                self.run(&name, n * width * 4, 0, |_| {
                    self.dev.kv_write(View::from_host(&x, width), &mut c, &slots).unwrap()
                });
            }
        }
    }
}

fn main() {
    let b = Bench::new();
    b.latent("v2-lite", 16);
    b.latent("v3", 128);
    b.grouped("llama-1b", 32, 8, 64);
    b.grouped("gemma-1b", 4, 1, 256);
    b.write();
}
