// Integer products on tensor cores, fragments from shared memory, copies that run on their own. Written once for two targets: from
// sm_80 on with m16n8k32 and cp.async, on sm_75 with m8n8k16 and plain copies.
#pragma once
#include "common.cuh"

// An integer that, read as f32, is 3 2^22 + itself: accumulators start here, so that one exact subtraction makes them floats. For sums
// below 2^22.
#define MAGIC 0x4b400000
__device__ __forceinline__ float float_of(int sum) { return __int_as_float(sum) - 12582912.0f; }

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(u32 (&d)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(at));
}

__device__ __forceinline__ void mma8(int& c0, int& c1, u32 a, u32 b) {
    asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};" : "+r"(c0), "+r"(c1) : "r"(a), "r"(b));
}

// c = MAGIC + a b: 16 x 16 bytes of a (rows, registers of 8 rows each) with 16 x 8 of b.
__device__ __forceinline__ void dot16(int (&c)[4], u32 a0, u32 a1, u32 b) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %7, %7, %7};"
        : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3]) : "r"(a0), "r"(a1), "r"(b), "r"(MAGIC));
#else
    c[0] = c[1] = c[2] = c[3] = MAGIC;
    mma8(c[0], c[1], a0, b);
    mma8(c[2], c[3], a1, b);
#endif
}

// The same for 16 x 32 of a with 32 x 8 of b.
__device__ __forceinline__ void dot32(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
        : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(MAGIC));
#else
    dot16(c, a[0], a[1], b0);
    mma8(c[0], c[1], a[2], b1);
    mma8(c[2], c[3], a[3], b1);
#endif
}

// 16 bytes to shared memory; there after `copies_done`.
__device__ __forceinline__ void copy16(void* to, const void* from) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"(shared_address(to)), "l"(from));
#else
    *(uint4*)to = *(const uint4*)from;
#endif
}

__device__ __forceinline__ void copies_done() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" : : : "memory");
#endif
}
