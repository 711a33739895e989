//! The driver's functions as NVIDIA's own header declares them: what `cuda/driver.rs` and `driver/graph.rs` say again in Rust is held against
//! facts that a C compiler printed (gcc for x86-64, cuda.h and cudaTypedefs.h of CUDA 12.9). Structures: `graph`.

use super::{Functions, attribute, code, graph};

/// Exported names and the arguments of the version that each is: `p` a pointer or handle, else bytes.
const SIGNATURES: &str = "
    cuInit 4
    cuDriverGetVersion p
    cuGetErrorName 4p
    cuGetErrorString 4p
    cuDeviceGetCount p
    cuDeviceGet p4
    cuDeviceGetName p44
    cuDeviceGetAttribute p44
    cuDevicePrimaryCtxRetain p4
    cuDevicePrimaryCtxRelease_v2 4
    cuCtxSetCurrent p
    cuStreamCreate p4
    cuStreamDestroy_v2 p
    cuStreamSynchronize p
    cuMemGetInfo_v2 pp
    cuMemAlloc_v2 p8
    cuMemFree_v2 8
    cuMemsetD8Async 818p
    cuMemcpyHtoDAsync_v2 8p8p
    cuMemcpyDtoHAsync_v2 p88p
    cuModuleLoadDataEx pp4pp
    cuMemHostAlloc p84
    cuMemFreeHost p
    cuEventCreate p4
    cuEventRecord pp
    cuEventSynchronize p
    cuEventDestroy_v2 p
    cuModuleUnload p
    cuModuleGetFunction ppp
    cuFuncGetAttribute p4p
    cuFuncSetAttribute p44
    cuLaunchKernel p4444444ppp
    cuLaunchKernelEx pppp
    cuGraphCreate p4
    cuGraphAddKernelNode_v2 ppp8p
    cuGraphAddMemcpyNode ppp8pp
    cuGraphAddDependencies_v2 pppp8
    cuGraphKernelNodeSetAttribute p4p
    cuGraphInstantiateWithFlags pp8
    cuGraphExecKernelNodeSetParams_v2 ppp
    cuGraphLaunch pp
    cuGraphExecDestroy p
    cuGraphDestroy p
";

#[test]
fn functions_have_the_headers_arguments() {
    let known: Vec<(&str, &str)> = SIGNATURES.lines().filter_map(|l| l.trim().split_once(' ')).collect();
    for (symbol, args) in
        Functions::SYMBOLS.iter().chain(graph::Functions::SYMBOLS).chain(graph::Edges::SYMBOLS)
    {
        let letter = |(ty, size): &(&str, usize)| {
            if ty.starts_with('*') || *ty == "Handle" { "p".to_owned() } else { size.to_string() }
        };
        let ours: String = args.iter().map(letter).collect();
        let want = known.iter().find(|k| k.0 == *symbol);
        assert_eq!(want.map(|k| k.1), Some(&*ours), "{symbol}: add what cuda.h says of it");
    }
}

/// CUDA_ERROR_* and CU_DEVICE_ATTRIBUTE_* by their names there.
#[test]
fn numbers_are_the_headers() {
    assert_eq!((code::OUT_OF_MEMORY, code::NO_DEVICE), (2, 100));
    // COMPUTE_CAPABILITY_MAJOR, _MINOR, MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, KERNEL_EXEC_TIMEOUT.
    assert_eq!((attribute::MAJOR, attribute::MINOR, attribute::SHARED, attribute::TIMEOUT), (75, 76, 97, 17));
    // Of which the header says that the process, or the context, cannot go on.
    let sticky = [
        ("CONTAINED", 226),
        ("ILLEGAL_ADDRESS", 700),
        ("LAUNCH_TIMEOUT", 702),
        ("ASSERT", 710),
        ("HARDWARE_STACK_ERROR", 714),
        ("ILLEGAL_INSTRUCTION", 715),
        ("MISALIGNED_ADDRESS", 716),
        ("INVALID_ADDRESS_SPACE", 717),
        ("INVALID_PC", 718),
        ("LAUNCH_FAILED", 719),
        ("MPS_CLIENT_TERMINATED", 810),
    ];
    for (name, c) in sticky {
        assert!(code::LOST.contains(&c), "{name}");
    }
    // And these are refusals of a call, after which others go on: INVALID_VALUE, OUT_OF_MEMORY, LAUNCH_OUT_OF_RESOURCES, NOT_SUPPORTED.
    for c in [1, 2, 701, 801] {
        assert!(!code::LOST.contains(&c), "{c}");
    }
    // INVALID_IMAGE, NO_BINARY_FOR_GPU, INVALID_PTX, JIT_COMPILER_NOT_FOUND, UNSUPPORTED_PTX_VERSION, JIT_COMPILATION_DISABLED.
    assert_eq!(code::REFUSED, [200, 209, 218, 221, 222, 223]);
}
