// Kernels that begin while the one before ends (programmatic dependent launch), in texts for compute capability 9.0 and newer; in others all
// of this is nothing. Such a kernel begins when every block of the one before has begun and let it, and may find any number of them running.
// Before `earlier_done` a thread may touch only what none of these writes: weights, and what came from the host (docs/cuda.md). Every thread
// must come to it, or the kernel behind would not wait for those before this one.
#pragma once
#include "common.cuh"

#if __CUDA_ARCH__ >= 900
#define OVERLAPS 1
#else
#define OVERLAPS 0
#endif

// The kernel behind may begin. Called first: its blocks come when all of this grid have begun, so that they take room from none of them.
__device__ __forceinline__ void let_next_begin() {
#if OVERLAPS
    asm volatile("griddepcontrol.launch_dependents;" : : : "memory");
#endif
}

// All kernels before have ended, and what they wrote is here.
__device__ __forceinline__ void earlier_done() {
#if OVERLAPS
    asm volatile("griddepcontrol.wait;" : : : "memory");
#endif
}

// Both, where nothing can be done before.
__device__ __forceinline__ void in_turn() {
    let_next_begin();
    earlier_done();
}

// The line of 128 bytes around p to the second-level cache.
__device__ __forceinline__ void prefetch(const void* p) {
#if OVERLAPS
    asm volatile("prefetch.global.L2 [%0];" : : "l"(p));
#endif
}

// What this kernel does not write. Not by the read-only path where one that may still run can be writing it.
template <class T>
__device__ __forceinline__ T fetch(const T* p) {
#if OVERLAPS
    return *p;
#else
    return __ldg(p);
#endif
}
