// Quantised weights times a rounded activation row, and rows of an embedding table; one format a compilation (FORMAT).
//
// A warp makes one output feature. Lane 8g + b takes sub-block b of groups g, g + 4, ...; the eight running sums of
// docs/numerics.md travel from the lanes of one group to those of the next, so that they meet the groups in order: the bits are
// those of the CPU's scalar kernel, while 32 lanes load.
#include "block.cuh"
#include "formats.cuh"

typedef Block X;
#define EARLY 4096 // an H200 has room for 36 such warps on each of 132 SMs: 19 MB of its cache's 50

// Adds sub-block b of four groups, one of them in this lane (or none), to the running sums, group by group.
template <class F, int C, int R>
__device__ __forceinline__ void add_groups(
    const Sub (&s)[R], bool here, const X* x, u32 b, u32 x_stride, u32 n, float (&sums)[R][C]) {
    const u32 lane = threadIdx.x % WARP;
#pragma unroll
    for (int c = 0; c < C; c++) {
        const Block& a = x[(u64)(c < n ? c : n - 1) * x_stride];
        u32 v[8];
        words(v, *(const uint4*)(a.q + 32 * b));
        words(v + 4, *(const uint4*)(a.q + 32 * b + 16));
#pragma unroll
        for (int r = 0; r < R; r++) {
            int lo = 0, hi = 0;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                lo = dot4(s[r].q[j], v[j], lo);
                hi = dot4(s[r].q[j + 4], v[j + 4], hi);
            }
            if (F::ZERO) {
                lo -= F::ZERO * a.isum[2 * b];
                hi -= F::ZERO * a.isum[2 * b + 1];
            }
            const float dot = F::KIND == PLAIN || F::KIND == MIN ? (float)(lo + hi) : (float)(s[r].sc[0] * lo + s[r].sc[1] * hi);
            const float d = s[r].d * a.scale[b];
            float sum[2];
            if (F::KIND == MIN) sum[0] = a.sum[b];
            if (F::KIND == MIN16) sum[0] = a.half[2 * b], sum[1] = a.half[2 * b + 1];
#pragma unroll
            for (int step = 0; step < 4; step++) {
                float t = fmaf(dot, d, sums[r][c]);
                if (F::KIND == MIN || F::KIND == MIN16) t = fmaf(s[r].m[0], sum[0], t);
                if (F::KIND == MIN16) t = fmaf(s[r].m[1], sum[1], t);
                sums[r][c] = __shfl_sync(ALL, here ? t : sums[r][c], lane - 8);
            }
        }
    }
}

// Rows of R matrices of one shape (gate and up), which share x: sums[r][c] in lane 0.
template <class F, int C, int R>
__device__ __forceinline__ void dot_rows(const u8* (&w)[R], u32 blocks, const X* x, u32 x_stride, u32 n, float (&sums)[R][C]) {
    const u32 g = threadIdx.x % WARP / 8, b = threadIdx.x % 8, groups = F::BLOCK == 256 ? blocks : (blocks + 7) / 8;
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int c = 0; c < C; c++) sums[r][c] = 0.0f;
    // Two loads under way for each lane: a row of its two matrices, or its next group.
    const int AHEAD = R == 1 ? 2 : 1;
    for (u32 at = 0; at < groups; at += 4 * AHEAD) {
        Sub s[AHEAD][R];
#pragma unroll
        for (int k = 0; k < AHEAD; k++)
#pragma unroll
            for (int r = 0; r < R; r++) load_part<F>(s[k][r], w[r], blocks, at + 4 * k + g, b);
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            const u32 i = at + 4 * k + g;
            // The same for all lanes.
            if (at + 4 * k < groups) add_groups<F, C, R>(s[k], i < groups, x + min(i, groups - 1), b, x_stride, n, sums);
        }
    }
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int c = 0; c < C; c++) sums[r][c] = sum_lanes<8>(sums[r][c]);
}

#include "few.cuh"

// Weight `lane` of a sub-block.
template <class F>
__device__ __forceinline__ float weight(const Sub& s, u32 lane) {
    // A tree of selects: an array indexed by the lane would lie in memory.
    const u32 a = lane & 4 ? s.q[1] : s.q[0], c = lane & 4 ? s.q[3] : s.q[2];
    const u32 e = lane & 4 ? s.q[5] : s.q[4], g = lane & 4 ? s.q[7] : s.q[6];
    const u32 word = lane & 16 ? (lane & 8 ? g : e) : (lane & 8 ? c : a);
    const float q = (float)((int)(i8)(word >> (8 * (lane % 4))) - F::ZERO);
    float y = s.d * q;
    if (F::KIND == SCALE16 || F::KIND == MIN16) y = (s.d * (float)(lane & 16 ? s.sc[1] : s.sc[0])) * q;
    if (F::KIND == MIN) y = y + s.m[0];
    if (F::KIND == MIN16) y = y + (lane & 16 ? s.m[1] : s.m[0]);
    return y;
}

// out[j] = scale * row ids[j] of the table: a grid of (sub-blocks / 8, jobs), 256 threads; a warp writes a sub-block of 32.
extern "C" __global__ void __launch_bounds__(256) embed(
    const u8* w, u64 row_bytes, u32 blocks, const u32* ids, float scale, float* out, u32 out_stride) {
    typedef FORMAT F;
    in_turn();
    const u32 lane = threadIdx.x % WARP, at = blockIdx.x * 8 + threadIdx.x / WARP, job = blockIdx.y;
    if (at >= blocks * (F::BLOCK / 32)) return;
    Sub s;
    load_sub<F>(s, w + row_bytes * ids[job], blocks, F::BLOCK == 256 ? at / 8 : at, at % 8);
    const float y = weight<F>(s, lane);
    out[(u64)job * out_stride + 32 * at + lane] = scale == 1.0f ? y : y * scale;
}

// Sums of rows, for weights stored the other way round (MLA's keys in attn_kv_b): out[r][h] = sum over i < n of q[r][h * q_head + i]
// times row h * head_rows + i, i ascending, fused. The grid: (sub-blocks / 4, heads, rows), 128 threads.
extern "C" __global__ void __launch_bounds__(128) transposed(
    const u8* w, u64 row_bytes, u32 blocks, u32 head_rows, u32 n, const float* q, u32 q_stride, u32 q_head, float* out) {
    typedef FORMAT F;
    in_turn();
    const u32 lane = threadIdx.x % WARP, at = blockIdx.x * 4 + threadIdx.x / WARP, h = blockIdx.y, subs = blocks * (F::BLOCK / 32);
    if (at >= subs) return;
    q += (u64)blockIdx.z * q_stride + h * q_head;
    w += (u64)h * head_rows * row_bytes;
    float acc = 0.0f;
    for (u32 i = 0; i < n; i++) {
        Sub s;
        load_sub<F>(s, w + row_bytes * i, blocks, F::BLOCK == 256 ? at / 8 : at, at % 8);
        acc = fmaf(q[i], weight<F>(s, lane), acc);
    }
    out[((u64)blockIdx.z * gridDim.y + h) * 32 * subs + 32 * at + lane] = acc;
}
