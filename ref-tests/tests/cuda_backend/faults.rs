//! What a GPU may refuse, at any point: an error value, never a panic, and nothing held afterwards.

use crate::interpreted;
use engine::{EngineError, LoadOptions, Model, Session, SessionOptions};
use kernels::cuda::GpuError;
use kernels::{Buf, Device, KernelError, Limits, View, Weight, Write};
use ref_tests::fixture;
use ref_tests::gpu::{Fault, Interpreted};

/// Loads a tiny model, opens a session and evaluates a prompt of two tokens, then four one by one: the first launch by launch, the others
/// as a graph.
fn run(device: &Device) -> Result<(), EngineError> {
    let options = LoadOptions { threads: 1, devices: Some(device.clone().into()), ..Default::default() };
    let model = Model::load(&fixture("qwen3moe").join("model.gguf"), &options)?;
    let o = SessionOptions { ctx: 8, batch: 4, ..Default::default() };
    let mut session = Session::new(&model, &o)?;
    session.eval(&[1, 2])?;
    (3..7).try_for_each(|t| session.eval(&[t]).map(|_| ()))
}

fn reason(e: EngineError) -> GpuError {
    match e {
        EngineError::Kernel(KernelError::Gpu(e)) => e,
        other => panic!("not the GPU's error: {other}"),
    }
}

#[test]
fn any_call_may_fail() {
    let (dev, on) = interpreted();
    run(&dev).expect("without faults it runs");
    let counts = on.counts();
    assert_eq!((counts.graphs, counts.runs), (1, 3));
    let launches = counts.launches;
    assert_eq!(on.held(), dev.held());
    drop(dev);
    assert_eq!(on.held(), 0, "memory was given back");
    let mut seen = [0; 3];
    for n in (1..launches + 60).step_by(37).chain([1, 2, 3]) {
        for (kind, fault) in [Fault::Alloc(n), Fault::Launch(n), Fault::Lost(n)].into_iter().enumerate() {
            let on = Interpreted::new(1 << 30);
            let dev = on.device().expect("the kernels load");
            on.fail(fault);
            let Err(e) = run(&dev) else { continue };
            let e = reason(e);
            let right = match fault {
                Fault::Alloc(_) => matches!(e, GpuError::Memory { .. }),
                Fault::Launch(_) => matches!(e, GpuError::Driver { call: "launch", .. }),
                Fault::Lost(_) => matches!(e, GpuError::Lost { .. }),
                Fault::Graph(_) | Fault::Overlaps => false,
            };
            assert!(right, "{fault:?}: {e:?}");
            seen[kind] += 1;
            drop(dev);
            assert_eq!(on.held(), 0, "{fault:?}: memory was given back");
        }
    }
    assert!(seen.iter().all(|n| *n >= 3), "{seen:?}");
}

#[test]
fn what_does_not_fit_says_so() {
    let on = Interpreted::new(100_000);
    let error = reason(run(&on.device().expect("the kernels load")).expect_err("it is too small"));
    let GpuError::Memory { bytes, free, .. } = error else { panic!("{error:?}") };
    assert!(bytes as u64 > free);
    assert!(error.to_string().contains("smaller"), "{error}");
}

/// Operands of two devices never meet.
#[test]
fn devices_do_not_mix() {
    let (a, b) = (interpreted().0, interpreted().0);
    let cpu = Device::new(kernels::cpu::CpuBackend::new(1));
    let mixed = |r: Result<(), KernelError>| assert!(matches!(r, Err(KernelError::Place { .. })), "{r:?}");
    let buf = |d: &Device| -> Buf { d.alloc(2, 32).expect("memory") };
    let host = [0.0; 64];
    let (x, mut y) = (buf(&a), buf(&b));
    mixed(a.copy(x.view(2), y.view_mut(2)));
    mixed(b.copy(x.view(2), y.view_mut(2)));
    mixed(cpu.copy(x.view(2), buf(&cpu).view_mut(2)));
    mixed(a.copy(View::from_host(&host, 32), buf(&a).view_mut(2)));
    mixed(cpu.read(x.view(2), &mut [0.0; 64]));
    let bytes = kernels::HostBytes::from_vec(vec![0; 4 * 64]);
    let w = Weight::host(quant::DType::F32, 1, 2, 32, bytes).expect("a weight");
    let on_b = b.upload(w.clone()).expect("uploaded");
    for w in [&w, &on_b] {
        mixed(a.linear(w, x.view(2), a.alloc(2, 2).expect("memory").view_mut(2), Write::Set));
    }
    mixed(cpu.linear(
        &on_b,
        View::from_host(&host, 32),
        cpu.alloc(2, 2).expect("memory").view_mut(2),
        Write::Set,
    ));
}

/// Beyond what was reserved is an error, and what was reserved is what was said.
#[test]
fn scratch_is_what_was_reserved() {
    let (dev, on) = interpreted();
    let before = on.held();
    let l = Limits { tokens: 1, max_in: 64, max_out: 8, ..Limits::default() };
    dev.reserve(&l).expect("room");
    assert_eq!(on.held() - before, dev.scratch_bytes(&l));
    let bytes = vec![0; quant::DType::Q8_0.row_bytes(1024).expect("blocks") * 2];
    let w =
        Weight::host(quant::DType::Q8_0, 1, 2, 1024, kernels::HostBytes::from_vec(bytes)).expect("a weight");
    let w = dev.upload(w).expect("uploaded");
    let (x, mut out) = (dev.alloc(1, 1024).expect("memory"), dev.alloc(1, 2).expect("memory"));
    let r = dev.linear(&w, x.view(1), out.view_mut(1), Write::Set);
    assert!(matches!(r, Err(KernelError::Scratch { .. })), "{r:?}");
}
