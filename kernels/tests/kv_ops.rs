//! What a cache does with its own rows, against a naive one: rows of bytes, written, read, moved and rotated block by block
//! with the formats' own functions. Every cache type, column ranges, moves that overlap.

use kernels::cpu::CpuBackend;
use kernels::testing::Rng;
use kernels::*;
use proptest::prelude::*;
use quant::DType;
use std::ops::Range;

const SLOTS: usize = 40;
/// Two heads of 64: whole blocks of every type, and more than one task's share of columns.
const WIDTH: usize = 128;
const HEAD: usize = 64;

/// The naive cache: each row as it is stored.
struct Naive {
    dtype: DType,
    rows: Vec<Vec<u8>>,
}

impl Naive {
    fn new(dtype: DType) -> Self {
        let row = vec![0; dtype.row_bytes(WIDTH).unwrap()];
        Self { dtype, rows: vec![row; SLOTS] }
    }

    fn bytes(&self, cols: &Range<usize>) -> Range<usize> {
        let f = self.dtype.format();
        cols.start / f.block_len * f.block_bytes..cols.end / f.block_len * f.block_bytes
    }

    fn write(&mut self, slot: usize, cols: &Range<usize>, values: &[f32]) {
        let (bytes, f) = (self.bytes(cols), self.dtype.format());
        (f.quantize.unwrap())(values, &mut self.rows[slot][bytes], None);
    }

    fn read(&self, slot: usize, cols: &Range<usize>) -> Vec<f32> {
        let mut all = vec![0.0; WIDTH];
        (self.dtype.format().dequantize)(&self.rows[slot], &mut all);
        all[cols.clone()].to_vec()
    }

    fn copy(&mut self, from: usize, to: usize, cols: &Range<usize>) {
        let bytes = self.bytes(cols);
        let some = self.rows[from][bytes.clone()].to_vec();
        self.rows[to][bytes].copy_from_slice(&some);
    }
}

fn all(device: &Device, cache: &KvBuf) -> Vec<Vec<u8>> {
    let slots: Vec<u32> = (0..SLOTS as u32).collect();
    let mut out = vec![0; cache.bytes()];
    device.kv_save(cache, &slots, &mut out).unwrap();
    out.chunks_exact(cache.row_bytes()).map(Into::into).collect()
}

/// Columns that begin and end with whole blocks of every type, or anywhere for types without blocks.
fn columns(dtype: DType, rng: &mut Rng) -> Range<usize> {
    let step = dtype.format().block_len;
    let n = (WIDTH / step) as u64;
    let (a, b) = (rng.bits() % n, rng.bits() % n);
    a.min(b) as usize * step..(a.max(b) as usize + 1) * step
}

fn slot(rng: &mut Rng) -> u32 {
    (rng.bits() % SLOTS as u64) as u32
}

/// One random operation on both.
fn step(device: &Device, cache: &mut KvBuf, naive: &mut Naive, rng: &mut Rng) {
    match rng.bits() % 5 {
        0 | 1 => {
            let slots: Vec<u32> = (0..1 + rng.bits() % 6).map(|_| slot(rng)).collect();
            let x = rng.activations(slots.len() * WIDTH);
            device.kv_write(View::from_host(&x, WIDTH), cache, &slots).unwrap();
            for (s, row) in slots.iter().zip(x.chunks_exact(WIDTH)) {
                naive.write(*s as usize, &(0..WIDTH), row);
            }
        }
        // Chains, cycles and repetitions: in order, a later one sees what an earlier one wrote.
        2 => {
            let cols = columns(naive.dtype, rng);
            let moves: Vec<(u32, u32)> = (0..1 + rng.bits() % 12).map(|_| (slot(rng), slot(rng))).collect();
            device.kv_move(cache, &moves, cols.clone()).unwrap();
            moves.iter().for_each(|&(from, to)| naive.copy(from as usize, to as usize, &cols));
        }
        // As an eviction moves what stays: down, over what goes, in order.
        3 => {
            let cols = columns(naive.dtype, rng);
            let kept: Vec<u32> = (0..SLOTS as u32).filter(|_| !rng.bits().is_multiple_of(3)).collect();
            let moves: Vec<(u32, u32)> = kept.iter().copied().zip(0..).collect();
            let want: Vec<_> = kept.iter().map(|&s| naive.read(s as usize, &cols)).collect();
            device.kv_move(cache, &moves, cols.clone()).unwrap();
            moves.iter().for_each(|&(from, to)| naive.copy(from as usize, to as usize, &cols));
            for (i, want) in want.iter().enumerate() {
                assert_eq!(&naive.read(i, &cols), want, "the naive cache itself");
            }
        }
        _ => {
            let from: Vec<u32> = (0..1 + rng.bits() % 6).map(|_| slot(rng)).collect();
            let to: Vec<u32> = from.iter().map(|_| slot(rng)).collect();
            let mut bytes = vec![0; from.len() * cache.row_bytes()];
            device.kv_save(cache, &from, &mut bytes).unwrap();
            for (s, row) in from.iter().zip(bytes.chunks_exact(cache.row_bytes())) {
                assert_eq!(row, naive.rows[*s as usize], "saved");
            }
            device.kv_load(cache, &to, &bytes).unwrap();
            to.iter().zip(bytes.chunks_exact(cache.row_bytes())).for_each(|(s, row)| {
                naive.rows[*s as usize] = row.to_vec();
            });
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn any_sequence_of_operations_leaves_what_the_naive_cache_holds(seed in any::<u64>(), threads in 1usize..4) {
        let device = Device::new(CpuBackend::new(threads));
        for dtype in KvBuf::TYPES {
            let mut rng = Rng(seed);
            let mut cache = device.alloc_kv(dtype, SLOTS, WIDTH).unwrap();
            let mut naive = Naive::new(dtype);
            for _ in 0..12 {
                step(&device, &mut cache, &mut naive, &mut rng);
            }
            prop_assert!(all(&device, &cache) == naive.rows, "{}", dtype.name());
            // Reading takes any columns, whole blocks or not.
            let (a, b) = ((rng.bits() % WIDTH as u64) as usize, (rng.bits() % WIDTH as u64) as usize);
            let cols = a.min(b)..a.max(b) + 1;
            let slots: Vec<u32> = (0..5).map(|_| slot(&mut rng)).collect();
            let mut values = vec![0.0; slots.len() * cols.len()];
            device.kv_read(&cache, &slots, cols.clone(), &mut values).unwrap();
            for (s, got) in slots.iter().zip(values.chunks_exact(cols.len())) {
                prop_assert_eq!(got, &naive.read(*s as usize, &cols)[..], "{} {:?}", dtype.name(), &cols);
            }
        }
    }
}

/// How far a value may be from the one that was rounded to it, in shares of the largest of its block.
fn step_of(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 1e-6,
        DType::F16 => 6e-4,
        DType::BF16 => 5e-3,
        DType::Q8_0 => 0.6 / 127.0,
        // The largest value is -8 steps: the other side reaches 7, and is cut by as much as one.
        DType::Q4_0 => 1.01 / 7.0,
        _ => unreachable!("not a cache type"),
    }
}

#[test]
fn rotations_are_those_of_the_formula_and_touch_their_columns_alone() {
    let device = Device::new(CpuBackend::new(2));
    let mut rng = Rng(5);
    for dtype in KvBuf::TYPES {
        for style in [RopeStyle::Adjacent, RopeStyle::Halves] {
            // All of a head, as llama's; its last part, as MLA's rotary dimensions beside the latent.
            for (cols, offset, dims) in [(0..WIDTH, 0, HEAD), (HEAD..WIDTH, 0, HEAD), (0..WIDTH, 32, 32)] {
                let mut cache = device.alloc_kv(dtype, SLOTS, WIDTH).unwrap();
                let every: Vec<u32> = (0..SLOTS as u32).collect();
                let x: Vec<f32> = (0..SLOTS * WIDTH).map(|_| rng.unit()).collect();
                device.kv_write(View::from_host(&x, WIDTH), &mut cache, &every).unwrap();
                let before = all(&device, &cache);
                let mut naive = Naive { dtype, rows: before.clone() };
                let slots = [3u32, 39, 0, 17];
                let angles: Vec<f64> = slots
                    .iter()
                    .flat_map(|s| (0..dims / 2).map(move |i| f64::from(*s) * 0.7 - i as f64 * 0.3))
                    .collect();
                let cos_sin: Vec<f32> = angles
                    .chunks_exact(dims / 2)
                    .flat_map(|a| a.iter().map(|a| a.cos()).chain(a.iter().map(|a| a.sin())))
                    .map(|v| v as f32)
                    .collect();
                let heads = RopeHeads { head_dim: HEAD, offset, dims, style };
                let view = View::from_host(&cos_sin, dims);
                device.kv_rotate(&mut cache, &slots, cols.clone(), heads, view).unwrap();
                let after = all(&device, &cache);
                for s in 0..SLOTS {
                    let what = format!("{} {style:?} {cols:?} offset {offset}, slot {s}", dtype.name());
                    let row = slots.iter().position(|r| *r as usize == s);
                    let Some(row) = row else {
                        assert!(after[s] == before[s], "{what}: changed");
                        continue;
                    };
                    let outside = naive.bytes(&cols);
                    assert!(after[s][..outside.start] == before[s][..outside.start], "{what}: before");
                    assert!(after[s][outside.end..] == before[s][outside.end..], "{what}: behind");
                    let mut want: Vec<f64> = naive.read(s, &cols).into_iter().map(f64::from).collect();
                    for head in want.chunks_exact_mut(HEAD) {
                        for (i, a) in angles[row * dims / 2..][..dims / 2].iter().enumerate() {
                            let (p, q) = match style {
                                RopeStyle::Adjacent => (2 * i, 2 * i + 1),
                                RopeStyle::Halves => (i, i + dims / 2),
                            };
                            let (u, v) = (head[offset + p], head[offset + q]);
                            head[offset + p] = u * a.cos() - v * a.sin();
                            head[offset + q] = u * a.sin() + v * a.cos();
                        }
                    }
                    naive.rows[s] = after[s].clone();
                    let got = naive.read(s, &cols);
                    let block = dtype.format().block_len;
                    for (got, want) in got.chunks(block).zip(want.chunks(block)) {
                        let scale = want.iter().fold(0.0f64, |m, v| m.max(v.abs()));
                        for (g, w) in got.iter().zip(want) {
                            let error = (f64::from(*g) - w).abs();
                            assert!(error <= step_of(dtype) * scale + 1e-7, "{what}: {g}, not {w}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_turn_by_nothing_changes_nothing_where_elements_are_stored() {
    let device = Device::new(CpuBackend::new(1));
    let x = Rng(9).activations(WIDTH);
    let angles: Vec<f32> = (0..HEAD).map(|i| if i < HEAD / 2 { 1.0 } else { 0.0 }).collect();
    let heads = RopeHeads { head_dim: HEAD, offset: 0, dims: HEAD, style: RopeStyle::Halves };
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let mut cache = device.alloc_kv(dtype, SLOTS, WIDTH).unwrap();
        device.kv_write(View::from_host(&x, WIDTH), &mut cache, &[7]).unwrap();
        let before = all(&device, &cache);
        device.kv_rotate(&mut cache, &[7], 0..WIDTH, heads, View::from_host(&angles, HEAD)).unwrap();
        let same = |a: &[u8], b: &[u8]| {
            // -0.0 + 0.0 is 0.0.
            let mut values = [vec![0.0f32; WIDTH], vec![0.0f32; WIDTH]];
            (dtype.format().dequantize)(a, &mut values[0]);
            (dtype.format().dequantize)(b, &mut values[1]);
            values[0] == values[1]
        };
        assert!(before.iter().zip(all(&device, &cache)).all(|(a, b)| same(a, &b)), "{}", dtype.name());
    }
}

#[test]
fn what_does_not_fit_is_refused_and_nothing_is_touched() {
    let device = Device::new(CpuBackend::new(1));
    let mut cache = device.alloc_kv(DType::Q8_0, SLOTS, WIDTH).unwrap();
    let x = Rng(2).activations(WIDTH * SLOTS);
    let every: Vec<u32> = (0..SLOTS as u32).collect();
    device.kv_write(View::from_host(&x, WIDTH), &mut cache, &every).unwrap();
    let before = all(&device, &cache);
    let outside = SLOTS as u32;
    for moves in [[(0, 1), (outside, 2)], [(0, 1), (2, outside)]] {
        assert!(device.kv_move(&mut cache, &moves, 0..WIDTH).is_err());
    }
    // Not whole blocks, backwards, behind the end.
    #[allow(clippy::reversed_empty_ranges)]
    for cols in [0..16, 16..WIDTH, 64..32, 0..WIDTH + 32] {
        assert!(device.kv_move(&mut cache, &[(0, 1)], cols).is_err());
    }
    let angles = vec![1.0; HEAD];
    let view = || View::from_host(&angles, HEAD);
    let heads = RopeHeads { head_dim: HEAD, offset: 0, dims: HEAD, style: RopeStyle::Halves };
    let wide = RopeHeads { offset: 2, ..heads };
    assert!(device.kv_rotate(&mut cache, &[outside], 0..WIDTH, heads, view()).is_err());
    assert!(device.kv_rotate(&mut cache, &[0], 0..32, heads, view()).is_err());
    assert!(device.kv_rotate(&mut cache, &[0], 0..WIDTH, wide, view()).is_err());
    assert!(device.kv_rotate(&mut cache, &[0, 1], 0..WIDTH, heads, view()).is_err());
    let row = cache.row_bytes();
    assert!(device.kv_save(&cache, &[0, 1], &mut vec![0; row]).is_err());
    assert!(device.kv_save(&cache, &[outside], &mut vec![0; row]).is_err());
    assert!(device.kv_load(&mut cache, &[0], &vec![0; row - 1]).is_err());
    assert!(device.kv_load(&mut cache, &[outside], &vec![0; row]).is_err());
    assert!(device.kv_read(&cache, &[0], 0..WIDTH, &mut [0.0]).is_err());
    assert!(device.kv_read(&cache, &[outside], 0..1, &mut [0.0]).is_err());
    assert!(all(&device, &cache) == before);
}
