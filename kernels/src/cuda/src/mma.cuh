// Integer products on tensor cores, fragments from shared memory, copies that run on their own. Written once for two targets: from
// sm_80 on with m16n8k32 and cp.async, on sm_75 with m8n8k16 and plain copies.
#pragma once
#include "common.cuh"

// An integer that, read as f32, is 3 2^22 + itself: accumulators start here, so that one exact subtraction makes them floats. For sums
// below 2^22. Of sums 2^up times too large the exponent takes that away.
#define MAGIC 0x4b400000u
__device__ __forceinline__ float float_of(int sum, u32 magic = MAGIC) { return __int_as_float(sum) - __int_as_float(magic); }
__device__ __forceinline__ u32 magic_of(u32 up) { return MAGIC - (up << 23); }

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(u32 (&d)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(at));
}

// c += a b: 8 x 16 bytes of a with 16 x 8 of b, signed, or (U) a unsigned.
template <bool U>
__device__ __forceinline__ void mma8(int& c0, int& c1, u32 a, u32 b) {
    if constexpr (U)
        asm("mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};" : "+r"(c0), "+r"(c1) : "r"(a), "r"(b));
    else
        asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};" : "+r"(c0), "+r"(c1) : "r"(a), "r"(b));
}

// c = magic + a b: 16 x 16 bytes of a (rows, registers of 8 rows each) with 16 x 8 of b.
template <bool U>
__device__ __forceinline__ void dot16(int (&c)[4], u32 a0, u32 a1, u32 b, u32 magic = MAGIC) {
#if __CUDA_ARCH__ >= 800
#define DOT16(A)                                                                                                                   \
    asm("mma.sync.aligned.m16n8k16.row.col.s32." A ".s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %7, %7, %7};"                   \
        : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3]) : "r"(a0), "r"(a1), "r"(b), "r"(magic))
    if constexpr (U) DOT16("u8");
    else DOT16("s8");
#else
    c[0] = c[1] = c[2] = c[3] = magic;
    mma8<U>(c[0], c[1], a0, b);
    mma8<U>(c[2], c[3], a1, b);
#endif
}

// The same for 16 x 32 of a with 32 x 8 of b.
template <bool U>
__device__ __forceinline__ void dot32(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, u32 magic = MAGIC) {
#if __CUDA_ARCH__ >= 800
#define DOT32(A)                                                                                                                   \
    asm("mma.sync.aligned.m16n8k32.row.col.s32." A ".s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"   \
        : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])                                                                           \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(magic))
    if constexpr (U) DOT32("u8");
    else DOT32("s8");
#else
    dot16<U>(c, a[0], a[1], b0, magic);
    mma8<U>(c[0], c[1], a[2], b1);
    mma8<U>(c[2], c[3], a[3], b1);
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

// BYTES (16, 4) to the shared address `to`, or zeros; 16 bytes that are read once keep out of the first-level cache.
template <int BYTES, bool ONCE>
__device__ __forceinline__ void copy_or_zero(u32 to, const void* from, bool live) {
#if __CUDA_ARCH__ >= 800
    const u32 read = live ? BYTES : 0;
    if constexpr (BYTES == 16 && ONCE)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" : : "r"(to), "l"(from), "r"(read));
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" : : "r"(to), "l"(from), "n"(BYTES), "r"(read));
#else
    if constexpr (BYTES == 16) {
        const uint4 v = live ? *(const uint4*)from : make_uint4(0, 0, 0, 0);
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" : : "r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
    } else {
        asm volatile("st.shared.u32 [%0], %1;" : : "r"(to), "r"(live ? *(const u32*)from : 0) : "memory");
    }
#endif
}

// Copies so far are a stage.
__device__ __forceinline__ void stage_begun() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" : : : "memory");
#endif
}

// Waits for all stages but the latest `later`.
template <int later>
__device__ __forceinline__ void stages_done() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" : : "n"(later) : "memory");
#endif
}
