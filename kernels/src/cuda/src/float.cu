// Float weights times a few activation rows in f32, and rows of an embedding table; one type a compilation (FORMAT).
//
// A warp makes one output feature; lane l sums elements l, l + 32, ... by fused multiply-adds, then the tree of docs/numerics.md:
// the CPU's bits. Consecutive lanes load consecutive elements, so that loads are whole sectors at any alignment of a row.
#include "floats.cuh"

typedef float X;
#define EARLY 2048 // an H200 has room for 48 such warps on each of 132 SMs: 13 MB of its cache's 50

// Rows of R matrices of one shape (gate and up), which share x: sums[r][c] in every lane.
template <class F, int C, int R>
__device__ __forceinline__ void dot_rows(const u8* (&w)[R], u32 len, const X* x, u32 x_stride, u32 n, float (&sums)[R][C]) {
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int c = 0; c < C; c++) sums[r][c] = 0.0f;
    const X* from[C];
#pragma unroll
    for (int c = 0; c < C; c++) from[c] = x + (u64)(c < n ? c : n - 1) * x_stride;
    // Eight loads under way for each lane. 64 bits, so that they are a constant apart.
#pragma unroll 8
    for (u64 i = threadIdx.x % WARP; i < len; i += WARP) {
        float v[R];
#pragma unroll
        for (int r = 0; r < R; r++) v[r] = F::get(__ldg((const typename F::T*)w[r] + i));
#pragma unroll
        for (int c = 0; c < C; c++) {
            const float y = from[c][i];
#pragma unroll
            for (int r = 0; r < R; r++) sums[r][c] = fmaf(v[r], y, sums[r][c]);
        }
    }
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int c = 0; c < C; c++) sums[r][c] = sum_lanes<32>(sums[r][c]);
}

#include "few.cuh"
// Block formats go to tensor cores from two columns on. Here each weight meets four bytes of every column: rows share what is read of them.
FEW(2, 1)
FEW(4, 2)
FEW(8, 4)

// out[j] = scale * row ids[j] of the table: a grid of (len / 256, jobs), 256 threads.
extern "C" __global__ void __launch_bounds__(256) embed(
    const u8* w, u64 row_bytes, u32 len, const u32* ids, float scale, float* out, u32 out_stride) {
    in_turn();
    const u32 i = blockIdx.x * 256 + threadIdx.x, job = blockIdx.y;
    if (i >= len) return;
    float y = FORMAT::get(__ldg((const FORMAT::T*)(w + row_bytes * ids[job]) + i));
    out[(u64)job * out_stride + i] = scale == 1.0f ? y : y * scale;
}

// As in matvec.cu; the grid: (len / 128, heads, rows).
extern "C" __global__ void __launch_bounds__(128) transposed(
    const u8* w, u64 row_bytes, u32 len, u32 head_rows, u32 n, const float* q, u32 q_stride, u32 q_head, float* out) {
    in_turn();
    const u32 c = blockIdx.x * 128 + threadIdx.x, h = blockIdx.y;
    if (c >= len) return;
    q += (u64)blockIdx.z * q_stride + h * q_head;
    w += (u64)h * head_rows * row_bytes;
    float acc = 0.0f;
    for (u32 i = 0; i < n; i++) acc = fmaf(q[i], FORMAT::get(__ldg((const FORMAT::T*)(w + row_bytes * i) + c)), acc);
    out[((u64)blockIdx.z * gridDim.y + h) * len + c] = acc;
}
