//! What a kernel must not do is an error that says where; what is not understood is refused.

use crate::{kernel, run};
use ptx::{Fault, Machine, Module, Param, PtxError};

/// The fault, its thread, and the text of its line.
fn fault(body: &str, threads: u32, memory: &[u8]) -> (Fault, u32, String) {
    match run(body, threads, memory) {
        Err(PtxError::Run { fault, thread, line, .. }) => {
            let text = kernel(&format!("{body}\n{}", crate::STORE));
            (fault, thread, text.lines().nth(line as usize - 1).unwrap().to_owned())
        }
        other => panic!("{body}: {other:?}"),
    }
}

#[test]
fn addresses() {
    let at = "mul.wide.u32 %rd2, %r0, 4;\nadd.s64 %rd2, %rd1, %rd2;\n";
    let (f, thread, line) = fault(&format!("{at}ld.global.u32 %r1, [%rd2];"), 32, &[1; 64]);
    assert!(matches!(f, Fault::OutOfBounds { space: "global", bytes: 4, .. }), "{f}");
    assert_eq!((thread, line.as_str()), (16, "ld.global.u32 %r1, [%rd2];"));
    let (f, thread, _) = fault(&format!("{at}mov.u32 %r1, 0;\nst.global.u32 [%rd2], %r1;"), 64, &[1; 252]);
    assert!(matches!(f, Fault::OutOfBounds { .. }));
    assert_eq!(thread, 63);
    let (f, ..) = fault("ld.global.u32 %r1, [%rd1+2];", 1, &[1; 64]);
    assert!(matches!(f, Fault::Misaligned { bytes: 4, .. }));
    let (f, ..) = fault("ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd1+8];", 1, &[1; 64]);
    assert!(matches!(f, Fault::Misaligned { bytes: 16, .. }));
    let (f, ..) = fault("ld.shared.u32 %r1, [buffer+1024];", 1, &[]);
    assert!(matches!(f, Fault::OutOfBounds { space: "shared", .. }));
    let (f, ..) = fault("mov.u64 %rd2, 0;\nld.global.u32 %r1, [%rd2];", 1, &[]);
    assert!(matches!(f, Fault::OutOfBounds { address: 0, .. }));
    let (f, ..) = fault("mov.u32 %r1, 0;\nst.global.u32 [%rd1-4], %r1;", 1, &[0; 8]);
    assert!(matches!(f, Fault::OutOfBounds { .. }));
}

#[test]
fn what_nothing_wrote() {
    let (f, ..) = fault("ld.global.u32 %r1, [%rd0];", 1, &[]);
    assert!(matches!(f, Fault::Uninitialised { space: "global", .. }));
    let (f, ..) = fault("ld.shared.u32 %r1, [buffer];", 1, &[]);
    assert!(matches!(f, Fault::Uninitialised { space: "shared", .. }));
    let (f, ..) = fault(".local .align 4 .b8 depot[8];\nld.local.u32 %r1, [depot];", 1, &[]);
    assert!(matches!(f, Fault::Uninitialised { space: "local", .. }));
    let (f, thread, _) = fault("setp.eq.u32 %p1, %r0, 3;\n@!%p1 mov.u32 %r2, 1;\nmov.u32 %r1, %r2;", 8, &[]);
    assert_eq!((f, thread), (Fault::UninitialisedRegister("%r2".into()), 3));
    let (f, ..) = fault("mov.u32 %r1, 0;\n@%p3 mov.u32 %r1, 1;", 1, &[]);
    assert_eq!(f, Fault::UninitialisedRegister("%p3".into()));
    let (f, ..) =
        fault("mov.u32 %r1, 5;\nst.global.u32 [%rd1], %r1;\nld.global.nc.u32 %r1, [%rd1];", 1, &[0; 4]);
    assert!(matches!(f, Fault::NotReadOnly(_)));
}

#[test]
fn races() {
    let neighbour = "mul.wide.u32 %rd2, %r0, 4;\nmov.u64 %rd3, buffer;\nadd.s64 %rd3, %rd3, %rd2;\nst.shared.u32 [%rd3], %r0;\n";
    // Thread 32 reads what thread 31 of another warp wrote.
    let body =
        format!("{neighbour}setp.ne.u32 %p1, %r0, 32;\nmov.u32 %r1, 0;\n@!%p1 ld.shared.u32 %r1, [%rd3-4];");
    let (f, thread, _) = fault(&body, 64, &[]);
    assert!(matches!(f, Fault::Race { other: 31, before: "write", .. }), "{f}");
    assert_eq!(thread, 32);
    // Within a warp, too: lanes do not run in step.
    let body =
        format!("{neighbour}mov.u32 %r1, 0;\nsetp.eq.u32 %p1, %r0, 5;\n@%p1 ld.shared.u32 %r1, [%rd3-4];");
    assert!(matches!(fault(&body, 32, &[]).0, Fault::Race { other: 4, .. }));
    let ordered = body.replace("mov.u32 %r1, 0;", "mov.u32 %r1, 0;\nbar.warp.sync -1;");
    assert!(run(&ordered, 32, &[]).is_ok());
    // Two lanes write one place.
    let (f, ..) = fault("st.shared.u32 [buffer], %r0;\nmov.u32 %r1, 0;", 2, &[]);
    assert!(matches!(f, Fault::Race { access: "write", before: "write", .. }));
    // A barrier too few: the first value may still be read when the second is written.
    let body = "setp.eq.u32 %p1, %r0, 0;\n@%p1 st.shared.u32 [buffer], %r0;\nbar.sync 0;\nld.shared.u32 %r1, [buffer];\n\
                @%p1 st.shared.u32 [buffer], %r1;";
    assert!(
        matches!(fault(body, 64, &[]).0, Fault::Race { access: "write", before: "read", .. })
            || run(body, 64, &[]).is_ok()
    );
    let last = body.replace("%p1, %r0, 0", "%p1, %r0, 63");
    assert!(matches!(fault(&last, 64, &[]).0, Fault::Race { access: "write", before: "read", .. }));
}

#[test]
fn barriers_that_not_all_can_reach() {
    let body = "mov.u32 %r1, 0;\nsetp.lt.u32 %p1, %r0, 16;\n@%p1 bra A;\nbar.sync 0;\nbra.uni END;\nA:\nbar.sync 0;\nEND:";
    assert!(matches!(fault(body, 32, &[]).0, Fault::BarrierDivergence(_)));
    let across = body.replace("%r0, 16", "%r0, 32");
    assert!(matches!(fault(&across, 64, &[]).0, Fault::BarrierDivergence(_)));
    let vote = "mov.u32 %r1, 0;\nsetp.lt.u32 %p1, %r0, 16;\n@%p1 bra A;\nvote.sync.ballot.b32 %r1, %p1, -1;\nbra.uni END;\nA:\n\
                vote.sync.ballot.b32 %r1, %p1, -1;\nEND:";
    assert!(matches!(fault(vote, 32, &[]).0, Fault::SyncDivergence(..)));
}

#[test]
fn masks_and_shuffles() {
    let (f, ..) =
        fault("setp.lt.u32 %p1, %r0, 4;\nmov.u32 %r1, 0;\n@!%p1 vote.sync.ballot.b32 %r1, %p1, 15;", 32, &[]);
    assert!(matches!(f, Fault::SyncMask(15, _)));
    let (f, thread, _) = fault("shfl.sync.bfly.b32 %r1, %r0, 16, 31, -1;", 20, &[]);
    assert_eq!((f, thread), (Fault::ShuffleSource(20), 4));
    let mma = "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r1, %r2, %r3, %r4}, {%r0, %r0, %r0, %r0}, {%r0, %r0}, \
               {%r0, %r0, %r0, %r0};";
    assert!(matches!(fault(mma, 31, &[]).0, Fault::SyncMask(..)));
}

#[test]
fn copies_under_way() {
    let copy =
        "mov.u64 %rd4, buffer;\ncp.async.ca.shared.global [%rd4], [%rd1], 16;\ncp.async.commit_group;\n";
    let (f, ..) = fault(&format!("{copy}ld.shared.u32 %r1, [%rd4];"), 1, &[1; 16]);
    assert!(matches!(f, Fault::Uninitialised { space: "shared", .. }));
    let (f, ..) = fault(&format!("{copy}cp.async.wait_group 1;\nld.shared.u32 %r1, [%rd4];"), 1, &[1; 16]);
    assert!(matches!(f, Fault::Uninitialised { .. }));
    assert_eq!(
        run(&format!("{copy}cp.async.wait_group 0;\nld.shared.u32 %r1, [%rd4];"), 1, &[1; 16]).unwrap(),
        [0x0101_0101]
    );
    // Of no bytes the address may be any.
    let none = "mov.u64 %rd4, buffer;\nmov.u64 %rd5, 0;\ncp.async.cg.shared.global [%rd4], [%rd5], 16, 0;\n\
                cp.async.wait_all;\nld.shared.u32 %r1, [%rd4+12];";
    assert_eq!(run(none, 1, &[1; 16]).unwrap(), [0]);
    // Another thread needs a barrier besides.
    let other = "mov.u64 %rd4, buffer;\nsetp.eq.u32 %p1, %r0, 0;\n@%p1 cp.async.ca.shared.global [%rd4], [%rd1], 16;\n\
                 cp.async.wait_all;\nld.shared.u32 %r1, [%rd4];";
    assert!(matches!(fault(other, 2, &[1; 16]).0, Fault::Race { other: 0, .. }));
    let (f, ..) =
        fault("mov.u64 %rd4, buffer;\ncp.async.ca.shared.global [%rd4+4], [%rd1], 16;", 1, &[1; 16]);
    assert!(matches!(f, Fault::Misaligned { space: "shared", .. }));
}

#[test]
fn endless_loops_end() {
    let (f, ..) = fault("mov.u32 %r1, 0;\nLOOP:\nbra LOOP;", 1, &[]);
    assert_eq!(f, Fault::Endless(100_000));
}

#[test]
fn text_that_is_not_understood_is_refused_with_its_line() {
    let refused = |body: &str, what: &str| match Module::parse(&kernel(body)).map(|_| ()) {
        Err(PtxError::Parse { line: 15, what: w }) => assert!(w.contains(what), "{w}"),
        other => panic!("{body}: {other:?}"),
    };
    refused("ex2.approx.f32 %f1, %f2;", "ex2.approx.f32");
    refused("add.ftz.f32 %f1, %f2, %f3;", "add.ftz.f32");
    refused("div.full.f32 %f1, %f2, %f3;", "div.full.f32");
    refused("div.f32 %f1, %f2, %f3;", "div.f32");
    refused("mov.u32 %r1, %clock;", "%clock");
    refused("mov.u32 %r1, %nowhere;", "%nowhere");
    refused("bra NOWHERE;", "NOWHERE");
    refused("add.u32 %r1, %r2;", "3 operands");
    refused("bar.sync 1;", "bar.sync");
    refused("ld.global.relaxed.u32 %r1, [%rd0];", "relaxed");
    refused("cp.async.cg.shared.global [%rd1], [%rd0], 8;", "16 bytes");
    assert!(Module::parse("nonsense").is_err());
    assert!(Module::parse(".version 8.1\n.entry k(").is_err());
}

#[test]
fn launches_are_checked() {
    let module = Module::parse(&kernel("ret;")).unwrap();
    let k = module.kernel("k").unwrap();
    let mut m = Machine::new();
    let both = [Param::U64(0), Param::U64(0)];
    assert!(m.launch(k, [1; 3], [32, 1, 1], 0, &both).is_ok());
    for (grid, block, params) in [
        ([1; 3], [32, 1, 1], &both[..1]),
        ([1; 3], [32, 1, 1], &[Param::U64(0), Param::U32(0)][..]),
        ([0, 1, 1], [32, 1, 1], &both[..]),
        ([1; 3], [1025, 1, 1], &both[..]),
        ([1, 65_536, 1], [32, 1, 1], &both[..]),
    ] {
        assert!(matches!(m.launch(k, grid, block, 0, params), Err(PtxError::Launch { .. })));
    }
    let p = m.alloc(8);
    assert!(matches!(m.read(p, 8), Err(PtxError::Host { fault: Fault::Uninitialised { .. }, .. })));
    assert!(m.write(p + 4, &[0; 8]).is_err());
    m.write(p, &[1; 4]).unwrap();
    assert_eq!(m.peek(p, 5).unwrap(), [Some(1), Some(1), Some(1), Some(1), None]);
    m.free(p).unwrap();
    assert!(m.read(p, 1).is_err() && m.free(p).is_err());
}

/// Kernels of the two pointers `to` (%rd0) and `data` (%rd1).
fn module(bodies: &[(&str, &str)]) -> Module {
    let head = kernel("").lines().take(3).fold(String::new(), |s, l| s + l + "\n");
    let one = |(name, body): &(&str, &str)| {
        let text = kernel(body).replace(".entry k(", &format!(".entry {name}("));
        text.lines().skip(3).fold(String::new(), |s, l| s + l + "\n")
    };
    Module::parse(&(head + &bodies.iter().map(one).collect::<String>())).unwrap()
}

/// `first` writes the first word of `to`, `second` adds to it; both wait. What they do before is what is wrong.
#[test]
fn launches_that_overlap() {
    let wait = "griddepcontrol.wait;\n";
    let add = "ld.global.u32 %r1, [%rd0];\nadd.u32 %r1, %r1, 1;\nst.global.u32 [%rd0], %r1;\n";
    let put = format!("{wait}mov.u32 %r1, 7;\nst.global.u32 [%rd0], %r1;");
    // The body of the second, launched over the first and `between` others; the word.
    let over = |body: &str, between: usize| {
        let module = module(&[("first", &put), ("second", body), ("idle", wait)]);
        let mut m = Machine::new();
        let (to, data) = (m.alloc(4), m.alloc(32));
        m.write(to, &[0; 4]).unwrap();
        m.write(data, &[1; 32]).unwrap();
        let args = [Param::U64(to), Param::U64(data)];
        let k = |name| module.kernel(name).unwrap();
        m.launch(k("first"), [1; 3], [1; 3], 0, &args).unwrap();
        for _ in 0..between {
            m.launch_overlapping(k("idle"), [1; 3], [1; 3], 0, &args).unwrap();
        }
        m.launch_overlapping(k("second"), [1; 3], [1; 3], 0, &args)?;
        // The same all alone.
        m.launch(k("second"), [1; 3], [1; 3], 0, &args).unwrap();
        Ok(m.read(to, 4).unwrap()[0])
    };
    let fault = |body: &str, between: usize| match over(body, between) {
        Err(PtxError::Run { fault, .. }) => fault,
        other => panic!("{body}: {other:?}"),
    };
    assert_eq!(over(&format!("{wait}{add}"), 0), Ok(9));
    // Weights may be read before, by any load, and other memory prefetched.
    let weights = "ld.global.nc.u32 %r2, [%rd1];\nld.global.u32 %r2, [%rd1+4];\nprefetch.global.L2 [%rd0];\n\
                   mov.u64 %rd4, buffer;\ncp.async.ca.shared.global [%rd4], [%rd1+8], 4;\ncp.async.wait_all;\n";
    assert_eq!(over(&format!("{weights}{wait}{add}"), 0), Ok(9));
    // A kernel that waits for nothing but the one before does not make the others' writes any safer.
    for (between, name) in [(0, "first"), (3, "first"), (300, "an earlier kernel")] {
        let early = fault(&format!("{add}{wait}"), between);
        let Fault::Early { access: "read", address, by: Some(by) } = early else { panic!("{early}") };
        assert_eq!((address, by.as_str()), (1 << 40, name), "{between}");
    }
    let write = "mov.u32 %r1, 1;\n";
    for access in [
        "st.global.u32 [%rd0], %r1;\n",
        "st.u32 [%rd0], %r1;\n",
        "red.global.add.u32 [%rd0], %r1;\n",
        "atom.global.add.u32 %r2, [%rd1], %r1;\n",
    ] {
        let early = fault(&format!("{write}{access}{wait}"), 0);
        assert!(matches!(early, Fault::Early { access: "write", by: None, .. }), "{access}: {early}");
    }
    let copy = "mov.u64 %rd4, buffer;\ncp.async.ca.shared.global [%rd4], [%rd0], 4;\ncp.async.wait_all;\n";
    assert!(matches!(fault(&format!("{copy}{wait}"), 0), Fault::Early { access: "read", .. }));
    // By the read-only path not even afterwards: what is read there must not change while the kernel runs.
    let constant = format!("{wait}ld.global.nc.u32 %r1, [%rd0];");
    assert!(matches!(fault(&constant, 3), Fault::NotReadOnly(_)));
    // Threads that never wait, on any path.
    assert_eq!(fault("ret;", 0), Fault::NoWait);
    assert_eq!(fault(&format!("setp.eq.u32 %p1, %r0, 0;\n@%p1 ret;\n{wait}"), 0), Fault::NoWait);
    assert_eq!(
        fault(&format!("setp.eq.u32 %p1, %r0, 1;\n@%p1 {wait}{add}"), 0).to_string().split(' ').next(),
        Some("read")
    );
}

/// What is said to be under way is.
#[test]
fn memory_in_flight() {
    let early = module(&[("k", "ld.global.u32 %r1, [%rd1];\ngriddepcontrol.wait;")]);
    let mut m = Machine::new();
    let (to, data) = (m.alloc(4), m.alloc(4));
    m.write(data, &[1; 4]).unwrap();
    let args = [Param::U64(to), Param::U64(data)];
    let mut run = |flying: &[u64]| {
        m.in_flight(flying).unwrap();
        m.launch_overlapping(early.kernel("k").unwrap(), [1; 3], [1; 3], 0, &args)
    };
    assert!(run(&[to]).is_ok());
    let Err(e @ PtxError::Run { .. }) = run(&[data]) else { panic!("it was read") };
    assert!(
        e.to_string()
            .ends_with("read at 0x20000000000 before griddepcontrol.wait, of what another kernel wrote"),
        "{e}"
    );
    assert!(m.in_flight(&[4]).is_err());
}
