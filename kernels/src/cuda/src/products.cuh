// What a fragment of weights and one of activations add to running sums, on integer tensor cores.
#pragma once
#include "formats.cuh"

// Two dots a sub-block; minima a sub-block.
template <class F>
struct Parts {
    static const bool PAIRS = F::KIND == SCALE16 || F::KIND == MIN16;
    static const int MINS = F::KIND == MIN16 ? 2 : F::KIND == MIN ? 1 : 0;
};

// The scales of a sub-block of rows r and r + 8. Both integer scales of a row are one word: the upper halves of two floats, exact.
struct RowScales {
    float2 d;
    uint2 sc;
    float2 m[2];
};
__device__ __forceinline__ u32 both(const int (&sc)[2]) {
    return __float_as_uint((float)sc[0]) >> 16 | __float_as_uint((float)sc[1]) & 0xffff0000;
}

// Adds to the sums of rows r, r + 8 and columns 2c, 2c + 1 sub-block b of fragments fa and b0, b1, in the order of docs/numerics.md. x0 and x1:
// the columns' scales, as they follow each other in a `Block`, of MIN16 scale and half. Weights have the magic's power of two; U: unsigned.
template <class F, bool U>
__device__ __forceinline__ void add_products(
    float (&acc)[4], const u32 (&fa)[4], u32 b0, u32 b1, const RowScales& s, const float* x0, const float* x1, u32 b, u32 magic = MAGIC) {
    int one[4], two[4];
    if (Parts<F>::PAIRS) {
        dot16<U>(one, fa[0], fa[1], b0, magic);
        dot16<U>(two, fa[2], fa[3], b1, magic);
    } else {
        dot32<U>(one, fa, b0, b1, magic);
    }
#pragma unroll
    for (int e = 0; e < 4; e++) {
        const float* x = e % 2 ? x1 : x0;
        float dot = float_of(one[e], magic);
        if (Parts<F>::PAIRS) {
            const u32 sc = e < 2 ? s.sc.x : s.sc.y;
            // Below 2^24, hence exact; the zero keeps signs of zeros as integers have them.
            dot = fmaf(__uint_as_float(sc & 0xffff0000), float_of(two[e], magic), fmaf(__uint_as_float(sc << 16), dot, 0.0f));
        }
        float y = fmaf(dot, (e < 2 ? s.d.x : s.d.y) * x[b], acc[e]);
        if (Parts<F>::MINS == 1) y = fmaf(e < 2 ? s.m[0].x : s.m[0].y, x[8 + b], y);
        if (Parts<F>::MINS == 2) {
            y = fmaf(e < 2 ? s.m[0].x : s.m[0].y, x[8 + 2 * b], y);
            y = fmaf(e < 2 ? s.m[1].x : s.m[1].y, x[9 + 2 * b], y);
        }
        acc[e] = y;
    }
}

// The eight running sums of an output, SUM floats apart, meet.
template <class T>
__device__ __forceinline__ float sum_eight(const float* v, T SUM) {
    return ((v[0] + v[4 * SUM]) + (v[2 * SUM] + v[6 * SUM])) + ((v[SUM] + v[5 * SUM]) + (v[3 * SUM] + v[7 * SUM]));
}
