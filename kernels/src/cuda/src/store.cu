// Rows of caches are written; one cache type a compilation (FORMAT). Blocks get the bits of quant's `quantize`.
#include "cached.cuh"

// The level nearest to x / scale, ties to even: quant/src/search.rs.
__device__ __forceinline__ float level(float x, float inverse, float lo, float hi) {
    float v = x * inverse;
    v = v > lo ? v : lo;
    v = v < hi ? v : hi;
    return nearest(v);
}

__device__ __forceinline__ float inverse_of(float scale) { return scale == 0.0f ? 0.0f : 1.0f / scale; }

// Rounded to f16 within its range, so many steps away from zero.
__device__ __forceinline__ float f16_beside(float x, int steps) {
    const int bits = (int)to_f16(fminf(fabsf(x), 65504.0f)) + steps;
    return copysignf(f16((u16)(bits < 0 ? 0 : bits > 0x7bff ? 0x7bff : bits)), x);
}

// Eight sums side by side, put together in quant's order.
__device__ __forceinline__ float add_eight(const float (&a)[8]) { return ((a[0] + a[4]) + (a[1] + a[5])) + ((a[2] + a[6]) + (a[3] + a[7])); }

// The squared error of storing the warp's 32 values with this lane's scale.
__device__ __forceinline__ float error_of(float x, float scale, float lo, float hi) {
    const float inverse = inverse_of(scale);
    float a[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < 32; i++) {
        const float v = __shfl_sync(ALL, x, i), e = v - (scale * level(v, inverse, lo, hi) + 0.0f);
        a[i % 8] += e * e;
    }
    return add_eight(a);
}

// Of every lane's scale that of least error, the first of equals.
__device__ __forceinline__ float least(float scale, float error) {
    const float most = 3.402823466e+38f;
    u32 lane = threadIdx.x % WARP;
#pragma unroll
    for (int half = 16; half > 0; half /= 2) {
        const float e = __shfl_xor_sync(ALL, error, half);
        const u32 l = __shfl_xor_sync(ALL, lane, half);
        if (e < error || (e == error && l < lane)) error = e, lane = l;
    }
    const float best = __shfl_sync(ALL, scale, lane);
    return error < most ? best : 0.0f;
}

// The value of largest magnitude of a warp.
__device__ __forceinline__ float extreme_of(float x) {
    float lo = x, hi = x;
#pragma unroll
    for (int half = 16; half > 0; half /= 2) {
        lo = fminf(lo, __shfl_xor_sync(ALL, lo, half));
        hi = fmaxf(hi, __shfl_xor_sync(ALL, hi, half));
    }
    return -lo > hi ? lo : hi;
}

#define LIMIT 4e8f // larger values are cut
#define NAN_BITS 0x7e00

// Value i of a row of `width`; of a block's type the warp's 32, a whole block.
__device__ __forceinline__ void put(F32, u8* row, u32, u32 i, float x) { ((float*)row)[i] = x; }
__device__ __forceinline__ void put(F16, u8* row, u32, u32 i, float x) { ((u16*)row)[i] = to_f16(x); }
__device__ __forceinline__ void put(BF16, u8* row, u32, u32 i, float x) { ((u16*)row)[i] = to_bf16(x); }

__device__ __forceinline__ void put(Q8_0, u8* row, u32 width, u32 i, float x) {
    const u32 lane = threadIdx.x % WARP;
    const bool broken = __any_sync(ALL, !(x - x == 0.0f));
    x = broken ? 0.0f : fminf(fmaxf(x, -LIMIT), LIMIT);
    const float d = fabsf(extreme_of(x)) / 127.0f;
    // Its rounding to f16 alone is chosen: lanes 0, 1, 2 try none, one step up, one down.
    const float scale = f16_beside(d, lane == 1 ? 1 : lane == 2 ? -1 : 0);
    const float error = error_of(x, scale, -127.0f, 127.0f);
    const float best = least(scale, lane < 3 ? error : 3.402823466e+38f);
    row[i] = broken ? 0 : (u8)(int)level(x, inverse_of(best), -127.0f, 127.0f);
    if (lane == 0) ((u16*)(row + width))[i / 32] = broken ? NAN_BITS : to_f16(best);
}

__device__ __forceinline__ void put(Q4_0, u8* row, u32 width, u32 i, float x) {
    const u32 lane = threadIdx.x % WARP;
    const bool broken = __any_sync(ALL, !(x - x == 0.0f));
    x = broken ? 0.0f : fminf(fmaxf(x, -LIMIT), LIMIT);
    const float extreme = extreme_of(x);
    // Each lane fits one of 32 scales by least squares: where the extreme value may come to lie, at either end.
    const float end = lane < 16 ? -8.0f : 8.0f;
    const float inverse = inverse_of(extreme / (end * (1.0f + (0.9f - (float)(lane % 16) * 0.16f) / 8.0f)));
    float qq[8], xq[8];
#pragma unroll
    for (int l = 0; l < 8; l++) qq[l] = xq[l] = 0.0f;
#pragma unroll
    for (int j = 0; j < 32; j++) {
        const float v = __shfl_sync(ALL, x, j), q = level(v, inverse, -8.0f, 7.0f);
        qq[j % 8] += q * q;
        xq[j % 8] += q * v;
    }
    const float squares = add_eight(qq), products = add_eight(xq);
    const float gain = squares > 0.0f ? products * products / squares : 0.0f, fit = products / squares;
    float fitted = extreme / -8.0f, most = 0.0f;
#pragma unroll
    for (int l = 0; l < 32; l++) {
        const float g = __shfl_sync(ALL, gain, l), f = __shfl_sync(ALL, fit, l);
        // By more than rounding.
        if (g > most * 1.000001f) most = g, fitted = f;
    }
    if (extreme == 0.0f) fitted = 0.0f;
    // The fit's neighbours, then scales that put the extreme value on a level.
    const float tried = lane < 3 ? f16_beside(fitted, lane == 1 ? 1 : lane == 2 ? -1 : 0) : f16_beside(extreme / ((float)lane - 11.0f), 0);
    const float scale = lane < 11 ? tried : 0.0f;
    const float error = error_of(x, scale, -8.0f, 7.0f);
    const float best = least(scale, lane < 11 ? error : 3.402823466e+38f);
    const u32 code = (u32)((int)level(x, inverse_of(best), -8.0f, 7.0f) + 8), other = __shfl_xor_sync(ALL, code, 16);
    if (lane < 16) row[16 * (i / 32) + lane] = broken ? 0 : (u8)(code | other << 4);
    if (lane == 0) ((u16*)(row + width / 2))[i / 32] = broken ? NAN_BITS : to_f16(best);
}

// Stores row i of x [n, cols] in slot slots[i]. Slots differ from each other. The grid: (cols / 256, n), 256 threads; along z a second cache,
// which takes the rows of y.
extern "C" __global__ void __launch_bounds__(256) cache_write(
    const float* x, u32 x_stride, u32 cols, u8* cache, u64 row_bytes, const float* y, u32 y_stride, u32 y_cols, u8* y_cache,
    u64 y_row_bytes, const u32* slots) {
    in_turn();
    const u32 i = blockIdx.x * 256 + threadIdx.x;
    if (blockIdx.z) x = y, x_stride = y_stride, cols = y_cols, cache = y_cache, row_bytes = y_row_bytes;
    if (i < cols) put(FORMAT(), cache + row_bytes * slots[blockIdx.y], cols, i, x[(u64)blockIdx.y * x_stride + i]);
}
