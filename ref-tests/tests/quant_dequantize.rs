//! Dequantise is bit-exact with the `gguf` package: compares with the fixtures of quant/make_dequantize.py.
//! Must not know how a format is laid out: it goes through the format table alone.

use quant::{DType, FORMATS, Format};
use std::path::PathBuf;

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("quant/fixtures/dequantize").join(name)
}

/// The f32's bits; all NaNs are alike, as their sign and payload are not specified.
fn bits(x: f32) -> u32 {
    if x.is_nan() { 0x7fc0_0000 } else { x.to_bits() }
}

fn splitmix64(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn check_blocks(f: &Format) {
    let file = std::fs::read(fixture(&format!("{}.bin", f.name.to_uppercase()))).unwrap();
    let n = file.len() / (f.block_bytes + 4 * f.block_len);
    assert!(n > 8, "{}: only {n} blocks", f.name);
    let (blocks, want) = file.split_at(n * f.block_bytes);
    let mut got = vec![0.0; n * f.block_len];
    (f.dequantize)(blocks, &mut got);
    for (i, (got, want)) in got.iter().zip(want.chunks_exact(4)).enumerate() {
        let want = f32::from_le_bytes(want.try_into().unwrap());
        assert_eq!(
            bits(*got),
            bits(want),
            "{}: block {}, value {}: {got}, the gguf package reads {want}",
            f.name,
            i / f.block_len,
            i % f.block_len
        );
    }
}

#[test]
fn blocks_of_every_format() {
    for f in FORMATS {
        check_blocks(f);
    }
}

#[test]
fn hashes_over_many_blocks() {
    let table = std::fs::read_to_string(fixture("hashes.tsv")).unwrap();
    let rows = table.lines().filter(|l| !l.starts_with('#')).collect::<Vec<_>>();
    assert_eq!(rows.len(), FORMATS.len(), "a format without a hash");
    for row in rows {
        let [name, seed, blocks, want] = row.split('\t').collect::<Vec<_>>().try_into().unwrap();
        let f = DType::from_name(name).unwrap().format();
        let bytes = blocks.parse::<usize>().unwrap() * f.block_bytes;
        let src: Vec<u8> = if f.block_len == 1 && f.block_bytes == 2 {
            (0..=u16::MAX).flat_map(u16::to_le_bytes).collect()
        } else {
            let mut state = seed.parse().unwrap();
            (0..bytes.div_ceil(8)).flat_map(|_| splitmix64(&mut state).to_le_bytes()).take(bytes).collect()
        };
        let mut dst = vec![0.0; src.len() / f.block_bytes * f.block_len];
        (f.dequantize)(&src, &mut dst);
        let hash = dst
            .iter()
            .fold(0xcbf2_9ce4_8422_2325u64, |h, x| (h ^ u64::from(bits(*x))).wrapping_mul(0x100_0000_01b3));
        assert_eq!(format!("{hash:016x}"), want, "{name}");
    }
}
