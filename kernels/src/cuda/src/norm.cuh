// The scale of an RMS norm, summed as the CPU does.
#pragma once
#include "common.cuh"

// 1 / rms of n values, by a block of at least 64 threads; every thread gets it. Squares are summed in 64 lanes, then a tree, then what is
// left of whole vectors of 16. Lanes ask for sixteen values at a time: what a row costs is waiting for memory.
__device__ __forceinline__ float inverse_rms(const float* x, u32 n, float eps) {
    __shared__ float lanes[64];
    __shared__ float inv;
    const u32 t = threadIdx.x, whole = n / 16 * 16;
    if (t < 64) {
        float acc = 0.0f;
#pragma unroll 16
        for (u32 i = t; i < whole; i += 64) acc = fmaf(x[i], x[i], acc);
        lanes[t] = acc;
    }
    __syncthreads();
    if (t < WARP) {
        const u32 l = t % 16;
        float sum = sum_lanes<16>((lanes[l] + lanes[16 + l]) + (lanes[32 + l] + lanes[48 + l]));
        if (t == 0) {
            for (u32 i = whole; i < n; i++) sum += x[i] * x[i];
            inv = 1.0f / sqrtf(sum / (float)n + eps);
        }
    }
    __syncthreads();
    return inv;
}
