// What every kernel uses: fixed-width types, exact conversions, reductions in the order of docs/numerics.md.
//
// Compiled with -fmad=false: a multiply-add is fused only where fmaf says so. No instruction whose result the PTX manual leaves
// open (ex2.approx, rcp.approx, ...) is used, so that a kernel's bits are those of its CPU twin, of every GPU and of the PTX
// interpreter (ref-tests/ptx).
#pragma once

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define WARP 32
#define ALL 0xffffffffu

__device__ __forceinline__ float f16(u16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}

__device__ __forceinline__ u16 to_f16(float f) {
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}

__device__ __forceinline__ float bf16(u16 h) { return __uint_as_float((u32)h << 16); }

// Rounded to nearest, ties to even; NaN stays NaN.
__device__ __forceinline__ u16 to_bf16(float f) {
    u32 u = __float_as_uint(f);
    if (f != f) return (u16)((u >> 16) | 0x40);
    return (u16)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// c + the sum of the products of four signed bytes.
__device__ __forceinline__ int dot4(u32 a, u32 b, int c) {
    int d;
    asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// Nearest integer, ties to even; |x| <= 2^22.
__device__ __forceinline__ float nearest(float x) {
    const float magic = 12582912.0f;
    return (x + magic) - magic;
}

// x 2^n for whole n <= 127; 0 where n <= -127 (kernels/src/cpu/lanes.rs, scale2).
__device__ __forceinline__ float scale2(float x, float n) {
    int e = (int)fminf(fmaxf(n, -127.0f), 127.0f) + 127;
    return x * __uint_as_float((u32)e << 23);
}

// e^x: kernels/src/cpu/math.rs, exp.
__device__ __forceinline__ float exp_exact(float x) {
    float y = fminf(89.0f, fmaxf(-105.0f, x));
    float n = nearest(y * 1.442695040888963407f);
    float r = fmaf(n, 2.1219444e-4f, fmaf(n, -0.6933594f, y));
    float p = 0.0013843557f;
    p = fmaf(p, r, 0.008374236f);
    p = fmaf(p, r, 0.04166801f);
    p = fmaf(p, r, 0.1666643f);
    p = fmaf(p, r, 0.49999994f);
    p = fmaf(p, r, 1.0f);
    p = fmaf(p, r, 1.0f);
    float half = nearest(n * 0.5f);
    float v = scale2(scale2(p, half), n - half);
    return x < __int_as_float(0x7f800000) ? v : x + v;
}

// 1 / (1 + e^-x).
__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + exp_exact(0.0f - x)); }

// The gate of a feed-forward layer: 0 SiLU, 1 GELU (tanh form).
__device__ __forceinline__ float activation(float x, u32 act) {
    if (act == 0) return x * sigmoid(x);
    const float cubic = fmaf(x * x, 0.044715f, 1.0f);
    return x * sigmoid((x * (2.0f * 0.7978846f)) * cubic);
}

// The sum over `width` neighbouring lanes, i and i + width / 2 first; every lane gets it.
template <int width>
__device__ __forceinline__ float sum_lanes(float v) {
#pragma unroll
    for (int half = width / 2; half > 0; half /= 2) v += __shfl_xor_sync(ALL, v, half);
    return v;
}
