//! Threads that part and meet: branches, loops, barriers, shuffles, votes, special registers.

use crate::{kernel, run};
use ptx::{Machine, Module, Param};

#[test]
fn branches_part_and_meet() {
    // Odd threads add 10, even ones 20; then all vote: they have met.
    let body = "and.b32 %r2, %r0, 1;\nsetp.eq.u32 %p1, %r2, 1;\nmov.u32 %r1, %r0;\n@%p1 bra ODD;\n\
                add.u32 %r1, %r1, 20;\nbra.uni MEET;\nODD:\nadd.u32 %r1, %r1, 10;\nMEET:\n\
                vote.sync.ballot.b32 %r3, %p1, -1;\nsetp.eq.u32 %p2, %r3, 0xaaaaaaaa;\n@!%p2 mov.u32 %r1, 0;";
    let want: Vec<u32> = (0..32).map(|t| t + if t % 2 == 1 { 10 } else { 20 }).collect();
    assert_eq!(run(body, 32, &[]).unwrap(), want);
}

#[test]
fn loops_end_at_their_own_time() {
    // Thread t adds 1 + ... + t.
    let body = "mov.u32 %r1, 0;\nmov.u32 %r2, 0;\nLOOP:\nsetp.ge.u32 %p1, %r2, %r0;\n@%p1 bra DONE;\n\
                add.u32 %r2, %r2, 1;\nadd.u32 %r1, %r1, %r2;\nbra LOOP;\nDONE:\nbar.warp.sync -1;";
    assert_eq!(run(body, 32, &[]).unwrap(), (0..32).map(|t| t * (t + 1) / 2).collect::<Vec<_>>());
}

/// A path placed behind the end of the kernel, as compilers do with the unlikely.
#[test]
fn paths_may_lie_anywhere() {
    let body = "mov.u32 %r1, 1;\nsetp.lt.u32 %p1, %r0, 3;\n@%p1 bra FAR;\nBACK:\nvote.sync.all.pred %p2, %p1, -1;\n\
                @%p2 mov.u32 %r1, 99;\nbra.uni END;\nFAR:\nmov.u32 %r1, 7;\nbra.uni BACK;\nEND:";
    let want: Vec<u32> = (0..32).map(|t| if t < 3 { 7 } else { 1 }).collect();
    assert_eq!(run(body, 32, &[]).unwrap(), want);
}

#[test]
fn threads_that_leave_are_not_waited_for() {
    let body = "mov.u32 %r1, %r0;\nsetp.lt.u32 %p1, %r0, 40;\n@%p1 bra STAY;\nbra.uni OUT;\nSTAY:\nbar.sync 0;\n\
                add.u32 %r1, %r1, 1;\nOUT:";
    let want: Vec<u32> = (0..70).map(|t| if t < 40 { t + 1 } else { t }).collect();
    assert_eq!(run(body, 70, &[]).unwrap(), want);
}

#[test]
fn barriers_order_shared_memory() {
    // Every thread reads its neighbour's value, across warps, twice.
    let body = "shl.b32 %r2, %r0, 2;\ncvt.u64.u32 %rd2, %r2;\nmov.u64 %rd3, buffer;\nadd.s64 %rd3, %rd3, %rd2;\n\
                st.shared.u32 [%rd3], %r0;\nbar.sync 0;\nadd.u32 %r3, %r0, 1;\nrem.u32 %r3, %r3, 96;\n\
                mul.wide.u32 %rd4, %r3, 4;\nmov.u64 %rd5, buffer;\nadd.s64 %rd4, %rd5, %rd4;\nld.shared.u32 %r1, [%rd4];\n\
                bar.sync 0;\nst.shared.u32 [%rd3], %r1;\nbar.sync 0;\nld.shared.u32 %r1, [%rd4];";
    assert_eq!(run(body, 96, &[]).unwrap(), (0..96).map(|t| (t + 2) % 96).collect::<Vec<_>>());
}

#[test]
fn shuffles_follow_the_manual() {
    let shuffle = |mode: &str, b: u32, c: u32| {
        let body = format!(
            "shfl.sync.{mode}.b32 %r2|%p1, %r0, {b}, {c}, -1;\nselp.u32 %r3, 1000, 0, %p1;\nadd.u32 %r1, %r2, %r3;"
        );
        run(&body, 32, &[]).unwrap()
    };
    let want =
        |f: fn(u32) -> Option<u32>| (0..32).map(|t| f(t).map_or(t, |s| 1000 + s)).collect::<Vec<u32>>();
    assert_eq!(shuffle("bfly", 5, 31), want(|t| Some(t ^ 5)));
    assert_eq!(shuffle("up", 3, 0), want(|t| t.checked_sub(3)));
    assert_eq!(shuffle("down", 3, 31), want(|t| (t + 3 < 32).then_some(t + 3)));
    assert_eq!(shuffle("idx", 9, 31), want(|_| Some(9)));
    // Segments of eight: the mask is in bits 8 to 12.
    assert_eq!(shuffle("down", 3, 24 << 8 | 31), want(|t| (t % 8 + 3 < 8).then_some(t + 3)));
    assert_eq!(shuffle("up", 3, 24 << 8), want(|t| (t % 8 >= 3).then(|| t - 3)));
    assert_eq!(shuffle("idx", 2, 24 << 8 | 31), want(|t| Some(t / 8 * 8 + 2)));
    assert_eq!(shuffle("bfly", 9, 24 << 8 | 31), want(|t| (t ^ 9 <= t / 8 * 8 + 7).then_some(t ^ 9)));
}

#[test]
fn votes() {
    let vote = |mode: &str| {
        let body = format!(
            "setp.lt.u32 %p1, %r0, 4;\nvote.sync.{mode}.pred %p2, %p1, -1;\nvote.sync.{mode}.pred %p3, !%p1, -1;\n\
             selp.u32 %r1, 1, 0, %p2;\n@%p3 add.u32 %r1, %r1, 2;"
        );
        run(&body, 32, &[]).unwrap()[0]
    };
    assert_eq!((vote("all"), vote("any"), vote("uni")), (0, 3, 0));
    let body = "setp.lt.u32 %p1, %r0, 4;\n@%p1 bra IN;\nmov.u32 %r1, 0;\nbra.uni OUT;\nIN:\nactivemask.b32 %r1;\nOUT:";
    assert_eq!(run(body, 32, &[]).unwrap()[..5], [15, 15, 15, 15, 0]);
}

#[test]
fn special_registers() {
    let text = kernel(
        "mov.u32 %r2, %tid.y;\nmov.u32 %r3, %ntid.x;\nmad.lo.u32 %r4, %r2, %r3, %r0;\nmov.u32 %r5, %ctaid.x;\n\
         mov.u32 %r6, %ctaid.z;\nmov.u32 %r7, %nctaid.x;\nmad.lo.u32 %r8, %r6, %r7, %r5;\nmov.u32 %r9, %laneid;\n\
         mov.u32 %r10, %warpid;\nmad.lo.u32 %r11, %r10, 32, %r9;\nmov.u32 %r12, %lanemask_lt;\npopc.b32 %r13, %r12;\n\
         mov.u32 %r14, %lanemask_ge;\npopc.b32 %r15, %r14;\nmov.u32 %r16, %lanemask_eq;\nclz.b32 %r17, %r16;\n\
         mov.u32 %r20, %lanemask_le;\nmov.u32 %r21, %lanemask_gt;\nadd.u32 %r22, %r20, %r21;\n\
         mul.lo.u32 %r18, %r8, 64;\nadd.u32 %r18, %r18, %r4;\nmul.wide.u32 %rd2, %r18, 16;\nadd.s64 %rd2, %rd0, %rd2;\n\
         st.global.v4.u32 [%rd2], {%r11, %r13, %r15, %r22};\nret;",
    );
    let module = Module::parse(&text).unwrap();
    let mut m = Machine::new();
    let out = m.alloc(6 * 64 * 16);
    let k = module.kernel("k").unwrap();
    m.launch(k, [3, 1, 2], [16, 4, 1], 0, &[Param::U64(out), Param::U64(0)]).unwrap();
    let got = m.read(out, 6 * 64 * 16).unwrap();
    for (i, row) in got.chunks_exact(16).enumerate() {
        let row: Vec<u32> = row.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect();
        let t = i as u32 % 64;
        assert_eq!(row, [t, t % 32, 32 - t % 32, u32::MAX]);
    }
}

#[test]
fn copies_take_effect_when_waited_for() {
    let data: Vec<u8> = (0..128).collect();
    let body = "mul.wide.u32 %rd2, %r0, 16;\nadd.s64 %rd3, %rd1, %rd2;\nmov.u64 %rd4, buffer;\nadd.s64 %rd4, %rd4, %rd2;\n\
                cp.async.cg.shared.global [%rd4], [%rd3], 16;\ncp.async.commit_group;\n\
                cp.async.ca.shared.global [%rd4+256], [%rd3], 8, 4;\ncp.async.commit_group;\n\
                cp.async.wait_group 1;\nld.shared.u32 %r2, [%rd4+4];\ncp.async.wait_all;\n\
                ld.shared.u32 %r3, [%rd4+256];\nld.shared.u32 %r4, [%rd4+260];\nsub.u32 %r1, %r2, %r3;\nadd.u32 %r1, %r1, %r4;";
    assert_eq!(run(body, 8, &data).unwrap(), [0x0404_0404; 8]);
}

/// Where nothing is waited for, waiting is nothing; prefetching never is anything. Threads may come to it one by one.
#[test]
fn waiting_for_grids_changes_nothing() {
    let body = "griddepcontrol.launch_dependents;\nprefetch.global.L2 [%rd1+4];\nsetp.lt.u32 %p1, %r0, 3;\n@%p1 griddepcontrol.wait;\n\
                griddepcontrol.wait;\nld.global.u32 %r1, [%rd1];";
    assert_eq!(run(body, 8, &[5, 0, 0, 0, 1, 1, 1, 1]).unwrap(), [5; 8]);
}
