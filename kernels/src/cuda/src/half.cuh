// Products of f32 precision on f16 tensor cores, and copies in stages, from sm_80 on: one side is f16 already, the other goes in two f16
// parts. The hardware adds an instruction's 16 products and its accumulator in an order and with a rounding of its own (towards zero): keep
// chains short, and add what they give as floats.
#pragma once
#include "mma.cuh"

// x and y as f16, x in the lower half.
__device__ __forceinline__ u32 halves(float x, float y) {
    u32 h;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(h) : "f"(y), "f"(x));
    return h;
}

// x and y as hi + lo, x in the lower halves: to 2^-22 of itself, or 2^-25 where that is more. Scale so that the largest lies near 2^14.
__device__ __forceinline__ void split(float x, float y, u32& hi, u32& lo) {
    hi = halves(x, y);
    const float y_rest = y - f16((u16)(hi >> 16));
    lo = halves(x - f16((u16)hi), y_rest);
}

// The power of two that brings `most`, the largest magnitude of a row, into [2^13, 2^14); 1 where that is 0 or not finite, 2^126 where it
// is tiny.
__device__ __forceinline__ float scale_for(float most) {
    const int e = (__float_as_int(most) >> 23) & 255;
    if (most == 0.0f || e == 255) return 1.0f;
    return __int_as_float(min(267 - e, 253) << 23);
}

// c += a b: 16 x 16 of a with 16 x 8 of b.
__device__ __forceinline__ void mma_f16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// As load_matrices, each matrix turned.
__device__ __forceinline__ void load_turned(u32 (&d)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(at));
}
