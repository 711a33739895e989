// What kernels of prompts' attention share: their tiles, and the softmax in powers of two (docs/numerics.md).
#pragma once
#include "common.cuh"

#define CUT 4194304.0f
#define UNSEEN (-2.0f * CUT)

// Rows row .. row + rows of the call, and what they see: segments first .. first + count, and for each, from `ranges` on, every row's
// slots.
struct Tile {
    u32 row, rows, first, count, ranges;
};
struct Segment {
    u32 start, end, sink;
};

// 2^f, |f| <= 1/2.
__device__ __forceinline__ float exp2_near(float f) {
    float p = 0.00015353359f;
    p = fmaf(p, f, 0.0013398875f);
    p = fmaf(p, f, 0.009618437f);
    p = fmaf(p, f, 0.055503324f);
    p = fmaf(p, f, 0.24022648f);
    p = fmaf(p, f, 0.6931472f);
    return fmaf(p, f, 1.0f);
}

// x = n + f, |f| <= 1/2: 2^f, and n (cpu/math.rs, exp2_parts).
__device__ __forceinline__ float exp2_parts(float x, float& n) {
    n = nearest(x);
    return exp2_near(x - n);
}
