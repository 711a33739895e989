// Activations rounded to int8 per 32 values, bit for bit as kernels/src/cpu/round.rs does it (docs/numerics.md); as they are, or what a
// norm or a gate makes of them, so that neither takes a launch and a pass of its own. And those of prompts rounded to f16.
#include "block.cuh"
#include "half.cuh"
#include "norm.cuh"
#include "overlap.cuh"

// One value a thread, 256 of them, to block blockIdx.x of row blockIdx.y: a warp rounds a sub-block of 32.
__device__ __forceinline__ void round_block(float v, Block* out, u32 out_stride) {
    const u32 lane = threadIdx.x % WARP, b = threadIdx.x / WARP;
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

// x [rows, len] to blocks of 256, the last filled up with zeros. The grid: (blocks of a row, rows), 256 threads.
extern "C" __global__ void __launch_bounds__(256) round_rows(const float* x, u32 x_stride, u32 len, Block* out, u32 out_stride) {
    in_turn();
    const u32 at = blockIdx.x * 256 + threadIdx.x;
    round_block(at < len ? x[(u64)blockIdx.y * x_stride + at] : 0.0f, out, out_stride);
}

// The same of act(gate) * up: `glu` (rows.cu) and `round_rows` in one.
extern "C" __global__ void __launch_bounds__(256) round_glu(
    const float* gate, u32 gate_stride, const float* up, u32 up_stride, u32 len, u32 act, Block* out, u32 out_stride) {
    in_turn();
    const u32 at = blockIdx.x * 256 + threadIdx.x;
    const u64 row = blockIdx.y;
    round_block(at < len ? activation(gate[row * gate_stride + at], act) * up[row * up_stride + at] : 0.0f, out, out_stride);
}

// The same of x / rms(x) * w: `rms_norm` of whole rows and `round_rows` in one; the norm itself goes to y where that is given. Every block
// sums the row's squares anew: it lies in the second-level cache.
extern "C" __global__ void __launch_bounds__(256) round_norm(
    const float* x, u32 x_stride, const float* w, u32 len, float eps, float* y, u32 y_stride, Block* out, u32 out_stride) {
    let_next_begin();
    const u32 at = blockIdx.x * 256 + threadIdx.x;
    const float by = at < len ? w[at] : 0.0f;
    earlier_done();
    x += (u64)blockIdx.y * x_stride;
    const float inv = inverse_rms(x, len, eps), v = at < len ? x[at] * inv * by : 0.0f;
    if (y && at < len) y[(u64)blockIdx.y * y_stride + at] = v;
    round_block(v, out, out_stride);
}

// x [rows, len] in f16 under a power of two for each row that brings its largest finite value near 2^14; what undoes it goes to `scales`. The
// last 32 values are filled up with zeros; rows are out_stride bytes apart. The grid: (rows), up to 256 threads.
extern "C" __global__ void __launch_bounds__(256) half_rows(const float* x, u32 x_stride, u32 len, u8* out, u32 out_stride, float* scales) {
    in_turn();
    __shared__ float most[256 / WARP];
    const u32 t = threadIdx.x, threads = blockDim.x;
    x += (u64)blockIdx.x * x_stride;
    out += (u64)blockIdx.x * out_stride;
    float max = 0.0f;
    for (u32 i = t; i < len; i += threads)
        if (x[i] - x[i] == 0.0f) max = fmaxf(max, fabsf(x[i]));
#pragma unroll
    for (int half = WARP / 2; half > 0; half /= 2) max = fmaxf(max, __shfl_xor_sync(ALL, max, half));
    if (t % WARP == 0) most[t / WARP] = max;
    __syncthreads();
    for (u32 w = 0; w < threads / WARP; w++) max = fmaxf(max, most[w]);
    const float scale = scale_for(max);
    if (t == 0) scales[blockIdx.x] = 1.0f / scale;
    for (u32 i = 2 * t; i < (len + 31) / 32 * 32; i += 2 * threads) {
        const u16 one = i < len ? to_f16(x[i] * scale) : 0, two = i + 1 < len ? to_f16(x[i + 1] * scale) : 0;
        *(u32*)(out + 2 * i) = one | (u32)two << 16;
    }
}
