// Activations rounded to int8 per 32 values, bit for bit as kernels/src/cpu/round.rs does it (docs/numerics.md).
#include "block.cuh"

// x [rows, len] to blocks of 256, the last filled up with zeros. The grid: (blocks of a row, rows), 256 threads; a warp rounds a
// sub-block of 32, one value a lane.
extern "C" __global__ void __launch_bounds__(256) round_rows(const float* x, u32 x_stride, u32 len, Block* out, u32 out_stride) {
    const u32 lane = threadIdx.x % WARP, b = threadIdx.x / WARP, at = blockIdx.x * 256 + threadIdx.x;
    const float v = at < len ? x[(u64)blockIdx.y * x_stride + at] : 0.0f;
    Block& o = out[(u64)blockIdx.y * out_stride + blockIdx.x];
    const bool poison = __any_sync(ALL, !(v - v == 0.0f));
    float max = fabsf(v);
#pragma unroll
    for (int half = 16; half > 0; half /= 2) max = fmaxf(max, __shfl_xor_sync(ALL, max, half));
    float up = 0.0f;
    if (!poison && max > 1e-30f) {
        // Of eight scales that make the largest value a whole number of steps, the one of least squared error.
        const float unit = 1.0f / max;
        float best = 0.0f, least = 0.0f;
#pragma unroll
        for (int l = 0; l < 8; l++) {
            const float level = 127.0f - l;
            const float e = v - nearest(v * (level * unit)) * (max * (1.0f / level));
            const float error = sum_lanes<32>(e * e);
            if (l == 0 || error < least) least = error, best = level;
        }
        up = unit * best;
    }
    // Then the least-squares scale for the integers it gave.
    const float clean = up == 0.0f ? 0.0f : v;
    const float r = nearest(clean * up);
    const float xr = sum_lanes<32>(clean * r), rr = sum_lanes<32>(r * r), half = sum_lanes<16>(r);
    const float other = __shfl_xor_sync(ALL, half, 16);
    const float scale = poison ? __int_as_float(0x7fc00000) : up == 0.0f ? 0.0f : xr / rr;
    o.q[threadIdx.x] = (i8)(int)r;
    if (lane % 16 == 0) {
        o.half[2 * b + lane / 16] = scale * half;
        o.isum[2 * b + lane / 16] = (int)half;
    }
    if (lane == 0) {
        o.scale[b] = scale;
        o.sum[b] = scale * (half + other);
    }
}
