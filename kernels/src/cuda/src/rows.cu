// Operations on rows of activations: norms, rotary embedding, gated activation, sums, gathers, the best logits. Each gives the bits of its
// CPU twin in kernels/src/cpu/ops.rs.
#include "norm.cuh"
#include "overlap.cuh"

// out[r][h] = x[r][h] / rms(x[r][h]) * w for heads of n values; a whole row is one head. The grid: (heads, rows), 256 threads.
// x and out may be the same.
extern "C" __global__ void __launch_bounds__(256) rms_norm(
    const float* x, u32 x_stride, const float* w, u32 n, float eps, float* out, u32 out_stride) {
    let_next_begin();
    if (32 * threadIdx.x < n) prefetch(w + 32 * threadIdx.x);
    earlier_done();
    x += (u64)blockIdx.y * x_stride + (u64)blockIdx.x * n;
    out += (u64)blockIdx.y * out_stride + (u64)blockIdx.x * n;
    const float inv = inverse_rms(x, n, eps);
#pragma unroll 8
    for (u32 i = threadIdx.x; i < n; i += 256) out[i] = x[i] * inv * w[i];
}

// Rotates pair p of every head in place by the angles of its row: cos_sin[r] = cos[half], then sin[half]. Pairs are (2p, 2p+1), or
// (p, p + half) with `halves`. The heads of y follow those of x. The grid: ((heads + y_heads) * half / 128, rows), 128 threads.
extern "C" __global__ void __launch_bounds__(128) rope(
    float* x, u32 x_stride, u32 heads, u32 head_dim, u32 offset, float* y, u32 y_stride, u32 y_heads, u32 y_head_dim, u32 y_offset,
    u32 half, u32 halves, const float* cos_sin, u32 cs_stride) {
    in_turn();
    const u32 i = blockIdx.x * 128 + threadIdx.x, p = i % half;
    u32 h = i / half;
    if (h >= heads + y_heads) return;
    if (h >= heads) h -= heads, x = y, x_stride = y_stride, head_dim = y_head_dim, offset = y_offset;
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
    in_turn();
    const u32 i = blockIdx.x * 256 + threadIdx.x;
    if (i >= cols) return;
    float* g = gate + (u64)blockIdx.y * gate_stride + i;
    *g = activation(*g, act) * up[(u64)blockIdx.y * up_stride + i];
}

// out[r] = x[rows[r]] (r where there are no rows), or with `add` out[r] += x[...]. The grid: (cols / 256, rows), 256 threads.
extern "C" __global__ void __launch_bounds__(256) gather(
    const float* x, u32 x_stride, const u32* rows, u32 cols, float* out, u32 out_stride, u32 add) {
    in_turn();
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
    in_turn();
    const u32 i = blockIdx.x * 256 + threadIdx.x, r = blockIdx.y;
    if (i >= cols) return;
    float y = shared ? shared[(u64)r * cols + i] : 0.0f;
    for (u32 k = 0; k < used; k++) y = y + weights[r * used + k] * experts[((u64)r * used + k) * cols + i];
    float* o = out + (u64)r * out_stride + i;
    *o = add ? *o + y : y;
}

// A logit's rank: NaN above all, so that whoever takes the best sees it; -0 equal to +0.
__device__ __forceinline__ u32 rank(float x) {
    const u32 b = __float_as_uint(x + 0.0f);
    return x != x ? ALL : b & 0x80000000 ? ~b : b | 0x80000000;
}

// The better of two: of higher rank, of equals the lower place; place ALL is none.
__device__ __forceinline__ void take(u32& best, u32& place, u32 r, u32 p) {
    if (p != ALL && (place == ALL || r > best || (r == best && p < place))) best = r, place = p;
}

// The k best of elements blockIdx.x * per .. + per of x[r], best first, ties to the lower: values and ids [rows][gridDim.x][k]. `from`, where
// given, holds the elements' ids, as x is laid out: so that a second call (one block a row) merges the parts of a first. Where fewer are
// there, the rest get -inf and the id 2^32 - 1. Every thread keeps the best of its own; whose was taken looks for its next. The grid:
// (n / per, rows), 256 threads.
extern "C" __global__ void __launch_bounds__(256) top_k(
    const float* x, u32 x_stride, const u32* from, u32 n, u32 per, u32 k, float* values, u32* ids) {
    __shared__ u32 ranks[2][8], places[2][8];
    in_turn();
    const u32 t = threadIdx.x, first = blockIdx.x * per, end = n - first < per ? n : first + per;
    x += (u64)blockIdx.y * x_stride;
    if (from) from += (u64)blockIdx.y * x_stride;
    values += ((u64)blockIdx.y * gridDim.x + blockIdx.x) * k;
    ids += ((u64)blockIdx.y * gridDim.x + blockIdx.x) * k;
    // This thread's best that was not taken, and the one that was before.
    u32 mine = 0, where = ALL, last = ALL, at = ALL;
    bool look = true;
    for (u32 j = 0; j < k; j++) {
        if (look) {
            mine = 0, where = ALL;
#pragma unroll 4
            for (u32 i = first + t; i < end; i += 256) {
                const u32 r = rank(x[i]);
                if ((at == ALL || r < last || (r == last && i > at)) && !(from && from[i] == ALL)) take(mine, where, r, i);
            }
        }
        u32 best = mine, place = where;
#pragma unroll
        for (int half = 16; half > 0; half /= 2) {
            const u32 r = __shfl_xor_sync(ALL, best, half), p = __shfl_xor_sync(ALL, place, half);
            take(best, place, r, p);
        }
        // In turns, so that nobody waits for those who still read the last.
        if (t % WARP == 0) ranks[j % 2][t / WARP] = best, places[j % 2][t / WARP] = place;
        __syncthreads();
        best = 0, place = ALL;
#pragma unroll
        for (int w = 0; w < 8; w++) take(best, place, ranks[j % 2][w], places[j % 2][w]);
        look = place != ALL && place == where;
        if (look) last = best, at = place;
        if (t == 0) {
            values[j] = place == ALL ? __int_as_float(0xff800000) : x[place];
            ids[j] = place == ALL ? ALL : from ? from[place] : place;
        }
    }
}
