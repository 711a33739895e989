//! Races in global memory: between blocks, which nothing orders, and within one, where barriers do.

use crate::kernel;
use ptx::{Fault, Machine, Module, Param, PtxError};

/// Runs `body` in `blocks` blocks of `threads` threads over 64 words of zeros behind each pointer; %r9 is the block, %rd2 the place of
/// word `block * threads + thread` of the first, %rd3 of word `thread`.
fn run(body: &str, blocks: u32, threads: u32) -> Result<Vec<u32>, PtxError> {
    let module = Module::parse(&text(body)).unwrap();
    let mut m = Machine::new();
    let (to, data) = (m.alloc(256), m.alloc(256));
    m.write(to, &[0; 256]).unwrap();
    m.write(data, &[0; 256]).unwrap();
    let args = [Param::U64(to), Param::U64(data)];
    // What a launch did is over when the next begins.
    for _ in 0..2 {
        m.launch(module.kernel("k").unwrap(), [1, blocks, 1], [threads, 1, 1], 0, &args)?;
    }
    let words = m.read(to, 256).unwrap();
    Ok(words.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect())
}

fn text(body: &str) -> String {
    kernel(&format!(
        "mov.u32 %r9, %ctaid.y;\nmov.u32 %r8, %ntid.x;\nmad.lo.u32 %r7, %r9, %r8, %r0;\nmul.wide.u32 %rd2, %r7, 4;\n\
         add.s64 %rd2, %rd0, %rd2;\nmul.wide.u32 %rd3, %r0, 4;\nadd.s64 %rd3, %rd0, %rd3;\nsetp.eq.u32 %p1, %r9, 1;\n\
         setp.eq.u32 %p2, %r0, 0;\n{body}\nret;"
    ))
}

/// Where it raced: the two lines, the block and thread of the second, what the fault says of the first.
struct Found {
    lines: [String; 2],
    second: ([u32; 3], u32),
    fault: Fault,
}

fn race(body: &str, blocks: u32, threads: u32) -> Found {
    match run(body, blocks, threads) {
        Err(PtxError::Run { line, block, thread, fault, .. }) => {
            let Fault::Race { line: other, .. } = fault else { panic!("{body}: {fault}") };
            let text = text(body);
            let at = |line: u32| text.lines().nth(line as usize - 1).unwrap().to_owned();
            Found { lines: [at(other), at(line)], second: (block, thread), fault }
        }
        other => panic!("{body}: {other:?}"),
    }
}

#[test]
fn blocks_that_keep_apart() {
    // Each adds to its own words; all read one that none writes.
    let body = "ld.global.u32 %r1, [%rd2];\nadd.u32 %r1, %r1, 3;\nst.global.u32 [%rd2], %r1;\nld.global.u32 %r2, [%rd1];";
    assert_eq!(run(body, 3, 8).unwrap()[..25], [[6; 24].as_slice(), &[0]].concat());
    // Bytes of one word, each another block's.
    let bytes = "cvt.u64.u32 %rd4, %r7;\nadd.s64 %rd4, %rd0, %rd4;\nst.global.u8 [%rd4], %r7;";
    assert_eq!(run(bytes, 4, 1).unwrap()[0], 0x0302_0100);
    // Sums by atomic operations.
    let sum = "red.global.add.u32 [%rd0], 1;\natom.global.add.u32 %r2, [%rd3+4], 2;";
    assert_eq!(run(sum, 5, 2).unwrap()[..3], [20, 20, 20]);
}

#[test]
fn blocks_that_meet() {
    // Each writes word t, the same value too.
    let found = race("mov.u32 %r1, 7;\nst.global.u32 [%rd3], %r1;", 2, 4);
    assert_eq!(found.lines, ["st.global.u32 [%rd3], %r1;"; 2]);
    assert_eq!(found.second, ([0, 1, 0], 0));
    let Fault::Race { address, access, before, block, other, .. } = found.fault else { unreachable!() };
    assert_eq!((address, access, before), (1 << 40, "write", "write"));
    assert_eq!((block, other), (Some([0; 3]), 0));
    // Block 1 reads what block 0 wrote, or will.
    for (body, access) in [
        ("@!%p1 st.global.u32 [%rd3], %r0;\n@%p1 ld.global.u32 %r1, [%rd3];", ["st.", "ld."]),
        ("@%p1 st.global.u32 [%rd3], %r0;\n@!%p1 ld.global.u32 %r1, [%rd3];", ["ld.", "st."]),
        ("@%p1 st.u8 [%rd3+2], %r0;\n@!%p1 ld.v4.u32 {%r1, %r2, %r3, %r4}, [%rd0];", ["ld.", "st."]),
    ] {
        let found = race(body, 3, 4);
        assert!(found.lines[0].contains(access[0]) && found.lines[1].contains(access[1]), "{body}");
        assert_eq!(found.second.0, [0, 1, 0], "{body}");
    }
    // A barrier is none between blocks, and so is a fence.
    for order in ["bar.sync 0;", "membar.gl;", "fence.acq_rel.gpu;"] {
        race(&format!("@!%p1 st.global.u32 [%rd3], %r0;\n{order}\n@%p1 ld.global.u32 %r1, [%rd3];"), 2, 4);
    }
    // An atomic operation and a plain access.
    let found = race("red.global.add.u32 [%rd3], 1;\n@%p1 ld.global.u32 %r1, [%rd0+12];", 2, 4);
    assert!(matches!(found.fault, Fault::Race { before: "atomic", other: 3, .. }));
    // A copy to shared memory reads.
    let copy = "mov.u64 %rd4, buffer;\n@%p2 cp.async.ca.shared.global [%rd4], [%rd0], 16;\n@%p1 st.global.u32 [%rd0+8], %r0;";
    assert!(race(copy, 2, 1).lines[0].contains("cp.async"));
}

#[test]
fn threads_of_a_block_need_a_barrier() {
    // Thread t reads what thread t + 1 wrote.
    let own =
        "setp.eq.u32 %p3, %r0, 63;\nst.global.u32 [%rd2], %r0;\nORDER\n@!%p3 ld.global.u32 %r1, [%rd2+4];";
    assert!(run(&own.replace("ORDER", "bar.sync 0;"), 1, 64).is_ok());
    let found = race(&own.replace("ORDER", "bar.warp.sync -1;"), 1, 64);
    assert!(matches!(found.fault, Fault::Race { block: None, .. }));
    assert!(matches!(
        race(&own.replace("ORDER", ""), 1, 64).fault,
        Fault::Race { block: None, other: 1, .. }
    ));
    // Synchronising some lanes orders these alone: it is taken for nothing.
    let some = "setp.lt.u32 %p3, %r0, 2;\n@%p3 bar.warp.sync 3;";
    race(&own.replace("ORDER", some), 1, 64);
}

/// By the read-only path nothing may be read that the kernel writes, before or after.
#[test]
fn what_is_read_only_stays() {
    let found = race("ld.global.nc.u32 %r1, [%rd2];\nst.global.u32 [%rd2], %r1;", 1, 1);
    assert!(found.lines[0].starts_with("ld.global.nc"));
    assert_eq!(
        found.fault.to_string(),
        "race at global #1+0: write, and non-coherent read by thread 0 at line 24, in any order"
    );
    race("@!%p1 ld.global.nc.u32 %r1, [%rd0];\n@%p1 st.global.u32 [%rd0], %r0;", 2, 1);
}

/// A count of blocks that are done, whose last one adds up what all have written: right on a GPU by its fences, and refused here.
#[test]
fn tickets_are_not_understood() {
    let body = "st.global.u32 [%rd2+4], %r7;\nmembar.gl;\natom.global.add.u32 %r1, [%rd0], 1;\nsetp.ne.u32 %p3, %r1, 1;\n\
                @%p3 bra OUT;\nmembar.gl;\nld.global.u32 %r2, [%rd0+4];\nOUT:";
    assert!(race(body, 2, 1).lines[1].starts_with("ld.global.u32 %r2"));
}
