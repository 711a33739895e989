//! Row operations, feed-forward layers and experts of the CPU backend through its public face: against f64 twins, and the
//! promise that neither threads nor neighbours change a row's bits.

use kernels::cpu::CpuBackend;
use kernels::*;
use quant::DType;

struct Rng(u64);

impl Rng {
    fn f32(&mut self) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
    fn fill(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.f32()).collect()
    }
}

fn device(threads: usize) -> Device {
    Device::new(CpuBackend::new(threads))
}

fn weight(dtype: DType, count: usize, rows: usize, cols: usize, rng: &mut Rng) -> (Weight, Vec<f64>) {
    let f = dtype.format();
    let mut bytes = vec![0; count * rows * dtype.row_bytes(cols).unwrap()];
    (f.quantize.unwrap())(&rng.fill(count * rows * cols), &mut bytes, None);
    let mut values = vec![0.0; count * rows * cols];
    (f.dequantize)(&bytes, &mut values);
    let w = Weight::host(dtype, count, rows, cols, HostBytes::from_vec(bytes)).unwrap();
    (w, values.into_iter().map(f64::from).collect())
}

/// One gated layer in f64.
fn layer(act: Activation, w: [&[f64]; 3], x: &[f64], hidden: usize) -> Vec<f64> {
    let d = x.len();
    let dot = |w: &[f64], x: &[f64]| w.iter().zip(x).map(|(w, x)| w * x).sum::<f64>();
    let h: Vec<f64> = (0..hidden)
        .map(|r| {
            let (g, u) = (dot(&w[0][r * d..][..d], x), dot(&w[1][r * d..][..d], x));
            let a = match act {
                Activation::Silu => g / (1.0 + (-g).exp()),
                Activation::GeluTanh => {
                    let inner = (2.0 / std::f64::consts::PI).sqrt() * (g + 0.044715 * g * g * g);
                    0.5 * g * (1.0 + inner.tanh())
                }
            };
            a * u
        })
        .collect();
    (0..d).map(|r| dot(&w[2][r * hidden..][..hidden], &h)).collect()
}

/// Rows that are decoded, rows of prompts, and both in one pass: where there are tile products, neighbours take other ones.
const PROMPTS: [fn(usize) -> u32; 3] = [|_| 0, |_| 100, |t| [0, 100, 100, 31, 32][t % 5]];

#[test]
fn experts_match_f64_and_bits_are_the_row_s_own() {
    let mut rng = Rng(11);
    let each = |prompt| [(DType::F32, prompt), (DType::Q8_0, prompt), (DType::Q4_1, prompt)];
    for (dtype, prompt) in PROMPTS.into_iter().flat_map(each) {
        for act in [Activation::Silu, Activation::GeluTanh] {
            let (d, hidden, wide, experts, used, n) = (64, 288, 544, 7, 3, 37);
            let (g, gv) = weight(dtype, experts, hidden, d, &mut rng);
            let (u, uv) = weight(dtype, experts, hidden, d, &mut rng);
            let (w, wv) = weight(dtype, experts, d, hidden, &mut rng);
            let (sg, sgv) = weight(dtype, 1, wide, d, &mut rng);
            let (su, suv) = weight(dtype, 1, wide, d, &mut rng);
            let (sw, swv) = weight(dtype, 1, d, wide, &mut rng);
            let f = Ffn { gate: &g, up: &u, down: &w, act };
            let s = Ffn { gate: &sg, up: &su, down: &sw, act };
            let x = rng.fill(n * d);
            let before = rng.fill(n * d);
            let ids: Vec<u32> = (0..n)
                .flat_map(|t| (0..used).map(move |k| ((t * 5 + k * 2 + t / 3) % experts) as u32))
                .collect();
            let routes = Routes::new(used, ids, rng.fill(n * used));
            let one = |t: usize| {
                let (ids, weights) = (&routes.ids[t * used..][..used], &routes.weights[t * used..][..used]);
                Routes::new(used, ids.to_vec(), weights.to_vec())
            };
            let run = |threads: usize, rows: std::ops::Range<usize>, routes: &Routes| {
                let mut out = before[rows.start * d..rows.end * d].to_vec();
                let x = View::from_host(&x[rows.start * d..rows.end * d], d);
                let prompts: Vec<u32> = rows.clone().map(prompt).collect();
                let dev = device(threads).for_rows(&prompts);
                dev.moe(f, routes, Some(s), x, ViewMut::from_host(&mut out, d), Write::Add).unwrap();
                let mut dense = before[rows.start * d..rows.end * d].to_vec();
                dev.ffn(s, x, ViewMut::from_host(&mut dense, d), Write::Set).unwrap();
                let mut product = vec![0.0; rows.len() * wide];
                dev.linear(&sg, x, ViewMut::from_host(&mut product, wide), Write::Set).unwrap();
                (out, dense, product)
            };
            let whole = run(1, 0..n, &routes);
            for threads in [2, 3] {
                assert!(whole == run(threads, 0..n, &routes));
            }
            for t in 0..n {
                let alone = run(2, t..t + 1, &one(t));
                assert!(alone.0 == whole.0[t * d..][..d] && alone.1 == whole.1[t * d..][..d], "token {t}");
                assert!(alone.2 == whole.2[t * wide..][..wide], "product of token {t}");
                let row: Vec<f64> = x[t * d..][..d].iter().map(|x| f64::from(*x)).collect();
                let shared = layer(act, [&sgv, &suv, &swv], &row, wide);
                let mut want: Vec<f64> =
                    before[t * d..][..d].iter().zip(&shared).map(|(b, s)| f64::from(*b) + s).collect();
                for k in 0..used {
                    let e = routes.ids[t * used + k] as usize;
                    let part = |w: &[f64]| w[e * d * hidden..][..d * hidden].to_vec();
                    let y = layer(act, [&part(&gv), &part(&uv), &part(&wv)], &row, hidden);
                    let p = f64::from(routes.weights[t * used + k]);
                    want.iter_mut().zip(y).for_each(|(w, y)| *w += p * y);
                }
                let size = want.iter().fold(0.0f64, |a, x| a.max(x.abs()));
                // Rounding of the hidden layer to int8: some 2 of 150 at these widths, in one standard deviation.
                let bar = if dtype == DType::F32 { 3e-6 } else { 6e-2 } * size;
                for (got, want) in whole.0[t * d..][..d].iter().zip(&want) {
                    assert!((f64::from(*got) - want).abs() < bar, "{dtype}: {got}, not {want}");
                }
            }
        }
    }
}

#[test]
fn row_operations_match_f64_and_do_not_depend_on_threads() {
    let mut rng = Rng(12);
    for cols in [1usize, 8, 15, 16, 17, 64, 100, 255, 2048] {
        // Many rows take the parallel path.
        for n in [1usize, 3, 90] {
            let (x, w) = (rng.fill(n * cols), rng.fill(cols));
            let norm = |threads: usize| {
                let mut out = vec![0.0; n * cols];
                let (view, to) = (View::from_host(&x, cols), ViewMut::from_host(&mut out, cols));
                device(threads).rms_norm(view, &Vector::new(w.clone()), 1e-5, to).unwrap();
                let mut in_place = x.clone();
                let at = ViewMut::from_host(&mut in_place, cols);
                device(threads).rms_norm_heads(at, &Vector::new(w.clone()), 1e-5).unwrap();
                assert!(out == in_place);
                out
            };
            let out = norm(1);
            assert!(out == norm(2) && out == norm(3));
            for t in 0..n {
                let row = &x[t * cols..][..cols];
                let squares: f64 = row.iter().map(|x| f64::from(*x).powi(2)).sum();
                let inv = 1.0 / (squares / cols as f64 + 1e-5).sqrt();
                for (i, x) in row.iter().enumerate() {
                    let want = f64::from(*x) * inv * f64::from(w[i]);
                    assert!((f64::from(out[t * cols + i]) - want).abs() < 1e-6 * want.abs().max(1.0));
                }
            }
            let mut sum = x.clone();
            device(2).add(View::from_host(&out, cols), ViewMut::from_host(&mut sum, cols)).unwrap();
            assert!(sum.iter().zip(x.iter().zip(&out)).all(|(s, (a, b))| *s == a + b));
        }
    }
}

#[test]
fn rope_turns_pairs() {
    let mut rng = Rng(13);
    for style in [RopeStyle::Adjacent, RopeStyle::Halves] {
        for (n, heads) in [(1, 2), (200, 8)] {
            let at = RopeHeads { head_dim: 50, offset: 6, dims: 36, style };
            let x = rng.fill(n * heads * 50);
            let angles = rng.fill(n * 36);
            let run = |threads: usize| {
                let mut y = x.clone();
                let view = ViewMut::from_host(&mut y, heads * 50);
                device(threads).rope(view, at, View::from_host(&angles, 36)).unwrap();
                y
            };
            let y = run(1);
            assert!(y == run(2) && y == run(3));
            for t in 0..n {
                for h in 0..heads {
                    let at = (t * heads + h) * 50 + 6;
                    assert!(x[at - 6..at] == y[at - 6..at] && x[at + 36..at + 44] == y[at + 36..at + 44]);
                    for i in 0..18 {
                        let (a, b) =
                            if style == RopeStyle::Halves { (i, i + 18) } else { (2 * i, 2 * i + 1) };
                        let (c, s) = (f64::from(angles[t * 36 + i]), f64::from(angles[t * 36 + 18 + i]));
                        let (u, v) = (f64::from(x[at + a]), f64::from(x[at + b]));
                        assert!((f64::from(y[at + a]) - (u * c - v * s)).abs() < 1e-6);
                        assert!((f64::from(y[at + b]) - (u * s + v * c)).abs() < 1e-6);
                    }
                }
            }
        }
    }
}

#[test]
fn cache_rows_are_written_as_the_format_says() {
    let mut rng = Rng(14);
    for dtype in KvBuf::TYPES {
        for width in [32usize, 96, 512] {
            let dev = device(2);
            let mut cache = dev.alloc_kv(dtype, 5, width).unwrap();
            let x = rng.fill(2 * width);
            dev.kv_write(View::from_host(&x, width), &mut cache, &[4, 1]).unwrap();
            // Read back through attention to a single entry: the value row itself.
            for (row, slot) in [(0, 4), (1, 1)] {
                let mut v = Visible::default();
                v.push([Span { start: slot, len: 1, sink: false }]);
                let q = vec![0.0; width];
                let mut out = vec![0.0; width];
                let q = View::from_host(&q, width);
                let (k, value) = (&cache, &cache);
                let a = Attention {
                    heads: 1,
                    kv_heads: 1,
                    scale: 1.0,
                    q,
                    q_sink: None,
                    k,
                    v: value,
                    visible: &v,
                };
                dev.attention(a, ViewMut::from_host(&mut out, width)).unwrap();
                let mut bytes = vec![0; dtype.row_bytes(width).unwrap()];
                (dtype.format().quantize.unwrap())(&x[row * width..][..width], &mut bytes, None);
                let mut want = vec![0.0; width];
                (dtype.format().dequantize)(&bytes, &mut want);
                assert_eq!(out, want, "{dtype}");
            }
        }
    }
}

#[test]
fn attention_mass_checks_its_shape_and_adds() {
    let mut rng = Rng(15);
    let (dev, hd, slots) = (device(1), 16, 10);
    let mut cache = dev.alloc_kv(DType::F32, slots, 2 * hd).unwrap();
    let x = rng.fill(slots * 2 * hd);
    let ids: Vec<u32> = (0..slots as u32).collect();
    dev.kv_write(View::from_host(&x, 2 * hd), &mut cache, &ids).unwrap();
    let mut visible = Visible::default();
    visible.push([Span { start: 1, len: 8, sink: false }]);
    visible.push([Span { start: 1, len: 9, sink: false }]);
    let q = rng.fill(2 * 4 * hd);
    let (heads, kv_heads, q, k) = (4, 2, View::from_host(&q, 4 * hd), &cache);
    let a = Attention { heads, kv_heads, scale: 1.0, q, q_sink: None, k, v: k, visible: &visible };
    let mut out = vec![0.0; 2 * 4 * hd];
    let mut go = |mass: &mut [f32], cols: usize, rows| {
        let mass = Mass { out: ViewMut::from_host(mass, cols), rows };
        dev.attention_mass(a, ViewMut::from_host(&mut out, 4 * hd), Some(mass))
    };
    for (len, cols, rows) in [(10, 10, 0..2), (20, 5, 0..2), (20, 10, 0..3), (30, 10, 0..2)] {
        let e = go(&mut vec![0.0; len], cols, rows).unwrap_err();
        assert!(e.to_string().contains("attention mass"), "{e}");
    }
    let mut mass = vec![1.0; 2 * slots];
    go(&mut mass, slots, 1..2).unwrap();
    for head in mass.chunks_exact(slots) {
        assert!(head[0] == 1.0 && head[1..].iter().all(|x| *x > 1.0));
        assert!((head.iter().sum::<f32>() - 12.0).abs() < 1e-4, "two query heads gave 1 each");
    }
    go(&mut mass, slots, 0..0).unwrap();
    assert!((mass.iter().sum::<f32>() - 24.0).abs() < 1e-4, "no rows, no mass");
}
