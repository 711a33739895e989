// Operations on rows of activations: norms, rotary embedding, gated activation, sums, gathers, the best logit. Each gives the bits of its
// CPU twin in kernels/src/cpu/ops.rs.
#include "common.cuh"

// out[r][h] = x[r][h] / rms(x[r][h]) * w for heads of n values; a whole row is one head. The grid: (heads, rows), 256 threads.
// Squares are summed in 64 lanes as the CPU does; x and out may be the same.
extern "C" __global__ void __launch_bounds__(256) rms_norm(
    const float* x, u32 x_stride, const float* w, u32 n, float eps, float* out, u32 out_stride) {
    __shared__ float lanes[64];
    __shared__ float inv;
    const u32 t = threadIdx.x, whole = n / 16 * 16;
    x += (u64)blockIdx.y * x_stride + (u64)blockIdx.x * n;
    out += (u64)blockIdx.y * out_stride + (u64)blockIdx.x * n;
    if (t < 64) {
        float acc = 0.0f;
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
    for (u32 i = t; i < n; i += 256) out[i] = x[i] * inv * w[i];
}

// Rotates pair p of every head in place by the angles of its row: cos_sin[r] = cos[half], then sin[half]. Pairs are (2p, 2p+1), or
// (p, p + half) with `halves`. The grid: (heads * half / 128, rows), 128 threads.
extern "C" __global__ void __launch_bounds__(128) rope(
    float* x, u32 x_stride, u32 heads, u32 head_dim, u32 offset, u32 half, u32 halves, const float* cos_sin, u32 cs_stride) {
    const u32 i = blockIdx.x * 128 + threadIdx.x, h = i / half, p = i % half;
    if (h >= heads) return;
    const float* cs = cos_sin + (u64)blockIdx.y * cs_stride;
    float* a = x + (u64)blockIdx.y * x_stride + (u64)h * head_dim + offset + (halves ? p : 2 * p);
    float* b = a + (halves ? half : 1);
    const float u = *a, v = *b, c = cs[p], s = cs[half + p];
    *a = u * c - v * s;
    *b = u * s + v * c;
}

// gate = act(gate) * up; act 0 SiLU, 1 GELU (tanh form). The grid: (cols / 256, rows), 256 threads.
extern "C" __global__ void __launch_bounds__(256) glu(
    float* gate, u32 gate_stride, const float* up, u32 up_stride, u32 cols, u32 act) {
    const u32 i = blockIdx.x * 256 + threadIdx.x;
    if (i >= cols) return;
    float* g = gate + (u64)blockIdx.y * gate_stride + i;
    const float x = *g;
    float y;
    if (act == 0) {
        y = x * sigmoid(x);
    } else {
        const float cubic = fmaf(x * x, 0.044715f, 1.0f);
        y = x * sigmoid((x * (2.0f * 0.7978846f)) * cubic);
    }
    *g = y * up[(u64)blockIdx.y * up_stride + i];
}

// out[r] = x[rows[r]] (r where there are no rows), or with `add` out[r] += x[...]. The grid: (cols / 256, rows), 256 threads.
extern "C" __global__ void __launch_bounds__(256) gather(
    const float* x, u32 x_stride, const u32* rows, u32 cols, float* out, u32 out_stride, u32 add) {
    const u32 i = blockIdx.x * 256 + threadIdx.x, r = blockIdx.y;
    if (i >= cols) return;
    const float v = x[(u64)(rows ? rows[r] : r) * x_stride + i];
    float* o = out + (u64)r * out_stride + i;
    *o = add ? *o + v : v;
}

// y[r] (=|+=) shared[r] + sum_k weight[r][k] expert[r * used + k], in this order, products not fused; weights from the router.
// The grid: (cols / 256, rows), 256 threads. There may be no shared rows.
extern "C" __global__ void __launch_bounds__(256) mix_experts(
    const float* experts, const float* weights, u32 used, const float* shared, u32 cols, float* out, u32 out_stride, u32 add) {
    const u32 i = blockIdx.x * 256 + threadIdx.x, r = blockIdx.y;
    if (i >= cols) return;
    float y = shared ? shared[(u64)r * cols + i] : 0.0f;
    for (u32 k = 0; k < used; k++) y = y + weights[r * used + k] * experts[((u64)r * used + k) * cols + i];
    float* o = out + (u64)r * out_stride + i;
    *o = add ? *o + y : y;
}

// The larger of two candidates, the lower index of equals; NaN never wins.
__device__ __forceinline__ void take(float& best, u32& at, float v, u32 i) {
    if (v > best || (v == best && i < at)) best = v, at = i;
}

__device__ __forceinline__ void take_lanes(float& best, u32& at) {
#pragma unroll
    for (int half = 16; half > 0; half /= 2) {
        const float v = __shfl_xor_sync(ALL, best, half);
        const u32 i = __shfl_xor_sync(ALL, at, half);
        take(best, at, v, i);
    }
}

// ids[r] = index of the largest of x[r], the lowest of equals, 0 where all are NaN. The grid: (1, rows), 256 threads.
extern "C" __global__ void __launch_bounds__(256) argmax(const float* x, u32 x_stride, u32 n, u32* ids) {
    __shared__ float values[8];
    __shared__ u32 places[8];
    const u32 t = threadIdx.x;
    const float none = __int_as_float(0xff800000);
    x += (u64)blockIdx.y * x_stride;
    float best = none;
    u32 at = n;
    for (u32 i = t; i < n; i += 256) take(best, at, x[i], i);
    take_lanes(best, at);
    if (t % WARP == 0) {
        values[t / WARP] = best;
        places[t / WARP] = at;
    }
    __syncthreads();
    if (t >= WARP) return;
    best = t < 8 ? values[t] : none;
    at = t < 8 ? places[t] : n;
    take_lanes(best, at);
    if (t == 0) ids[blockIdx.y] = at < n ? at : 0;
}
