//! The pager's decisions for layers and experts of given sizes, and on files of its own.

use super::state::State;
use super::*;
use crate::gguf::{NewTensor, OpenMode, encode};
use quant::DType;

fn state(layers: &[usize], experts: usize, room: u64) -> State {
    let mut s = State::new(
        layers.to_vec(),
        vec![100; experts],
        PagerOptions { memory: Some(room), ..PagerOptions::default() },
    );
    assert!(s.begin_pass().is_empty());
    s
}

/// Layers asked for and given up in a pass.
fn pass(s: &mut State, layers: usize) -> (Vec<usize>, Vec<usize>) {
    let (mut asked, mut gone) = (Vec::new(), Vec::new());
    for i in 0..layers {
        let (a, g) = s.at_layer(i);
        asked.extend(a);
        gone.extend(g);
    }
    (asked, gone)
}

#[test]
fn what_fits_is_asked_for_once() {
    let mut s = state(&[10, 10, 10, 5], 8, 10_000);
    assert_eq!(pass(&mut s, 3), (vec![0, 1, 2, 3], vec![]));
    assert_eq!(pass(&mut s, 3), (vec![], vec![]));
    assert_eq!(s.choose(1, 0, 8, &[3, 1, 3]).missed, [1, 3]);
    let again = s.choose(1, 0, 8, &[1, 2]);
    assert_eq!((again.missed, again.gone.len()), (vec![2], 0));
    assert_eq!(s.stats().memory, None);
    assert_eq!(&s.uses[..4], [0, 2, 1, 2]);
}

#[test]
fn experts_get_what_layers_leave() {
    // 35 for layers: 400 for experts, four of them.
    let mut s = state(&[10, 10, 10, 5], 16, 435);
    assert_eq!(s.stats().memory, Some(435));
    assert!(s.choose(0, 0, 8, &[0, 1]).gone.is_empty());
    assert!(s.choose(1, 8, 8, &[0, 1]).gone.is_empty());
    assert_eq!(s.choose(0, 0, 8, &[0, 2]).gone, [1]);
    assert_eq!(s.choose(1, 8, 8, &[1, 5]).gone, [8]);
    assert_eq!(s.stats().experts_here, 400);
    // Five at once are more than there is room for: the system reads them, and nothing of the others is kept.
    let all = s.choose(0, 0, 8, &[0, 1, 2, 3, 4]);
    assert!(all.crowded && all.flipped && all.missed.is_empty());
    assert_eq!(all.gone, [9, 13]);
    let few = s.choose(0, 0, 8, &[7]);
    assert!(!few.crowded && few.flipped);
    assert_eq!(few.missed, [7]);
}

#[test]
fn layers_that_do_not_fit_are_streamed() {
    // Room for six of ten layers: four stay, the one that computes and the next take the rest.
    let mut s = state(&[[10; 10].as_slice(), &[0]].concat(), 0, 60);
    let (first, _) = pass(&mut s, 10);
    assert_eq!(first, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
    let (asked, gone) = pass(&mut s, 10);
    assert_eq!((asked, gone), (vec![4, 5, 6, 7, 8, 9], vec![9, 4, 5, 6, 7, 8]));
}

#[test]
fn the_experts_used_most_are_pinned() {
    let mut s = State::new(
        vec![0, 0],
        vec![100; 8],
        PagerOptions { pin: 250, memory: Some(500), ..PagerOptions::default() },
    );
    s.begin_pass();
    s.choose(0, 0, 8, &[1, 1, 1, 2, 2, 3]);
    let pins = s.choose_pins().expect("something to pin");
    assert_eq!((pins.added, pins.dropped), (vec![1, 2], vec![]));
    assert!(s.choose_pins().is_none());
    for e in [4, 5, 6, 7, 4, 5, 6] {
        s.choose(0, 0, 8, &[e]);
    }
    // 1 and 2 have stayed: touching them misses nothing.
    assert!(s.choose(0, 0, 8, &[1, 2]).missed.is_empty());
    assert_eq!(s.stats().pinned, 200);
}

/// A file with two layers of four experts.
fn file() -> (tempfile::TempDir, File) {
    let dir = tempfile::tempdir().unwrap();
    let mut tensors = vec![("output.weight".to_owned(), vec![32u64, 64])];
    for l in 0..2 {
        tensors.push((format!("blk.{l}.attn_q.weight"), vec![32, 32]));
        tensors.push((format!("blk.{l}.attn_norm.weight"), vec![32]));
        for t in ["down", "gate", "up"] {
            tensors.push((format!("blk.{l}.ffn_{t}_exps.weight"), vec![32, 256, 4]));
        }
    }
    let data: Vec<u8> = (0..1 << 20).map(|i| (i / 3) as u8).collect();
    let tensors: Vec<(NewTensor, &[u8])> = tensors
        .into_iter()
        .map(|(name, dims)| {
            let bytes = &data[..dims.iter().product::<u64>() as usize * 4];
            (NewTensor { name, dtype: DType::F32, dims }, bytes)
        })
        .collect();
    let path = dir.path().join("m.gguf");
    std::fs::write(&path, encode(&Default::default(), &tensors).unwrap()).unwrap();
    let file = File::open(&path, OpenMode::Mmap).unwrap();
    (dir, file)
}

fn host() -> Devices {
    Device::new(kernels::cpu::CpuBackend::new(1)).into()
}

#[test]
fn a_file_is_read_as_before_under_any_memory() {
    let (_dir, file) = file();
    let sum = |f: &File| f.tensors().iter().flat_map(|t| f.bytes(t).to_vec()).map(u64::from).sum::<u64>();
    let want = sum(&file);
    for memory in [0, 100_000, 250_000, 1 << 30] {
        let pager = Pager::new(
            &file,
            &host(),
            PagerOptions { pin: 100_000, memory: Some(memory), ..PagerOptions::default() },
        );
        pager.record(true);
        assert_eq!(pager.expert_bytes(0), 3 * 32 * 256 * 4);
        for i in 0..20u32 {
            for l in 0..2 {
                pager.layer(l);
                pager.experts(l, &[i % 4, (i * i + 1) % 4]);
                assert_eq!(sum(&file), want);
            }
        }
        let (stats, trace) = (pager.stats(), pager.record(false));
        assert_eq!(stats.chosen as usize, trace.len());
        assert_eq!(stats.memory.is_none(), memory == 1 << 30);
        assert_eq!(pager.uses(1).iter().sum::<u64>(), 40);
        assert!(pager.uses(2).is_empty());
        if stats.memory.is_none() {
            assert_eq!((stats.missed, stats.evicted), (8, 0));
        }
    }
}

#[test]
fn without_a_map_nothing_is_done() {
    let (_dir, mapped) = file();
    let file = File::open(mapped.path(), OpenMode::Read).unwrap();
    let pager = Pager::new(&file, &host(), PagerOptions::default());
    pager.layer(0);
    pager.experts(0, &[1]);
    assert_eq!(pager.stats(), Paging::default());
}
