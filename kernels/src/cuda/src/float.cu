// Float weights times a few activation rows in f32, and rows of an embedding table; one type a compilation (FORMAT).
//
// A warp makes one output feature; lane l sums elements l, l + 32, ... by fused multiply-adds, then the tree of docs/numerics.md:
// the CPU's bits. Consecutive lanes load consecutive elements, so that loads are whole sectors at any alignment of a row.
#include "floats.cuh"

#define ROWS 4 // output features (warps) of a block

template <class F, int C>
__device__ __forceinline__ void matvec(
    const u8* bytes, u64 row_bytes, u64 matrix_bytes, u32 rows, u32 len, const float* x, u32 x_stride, u32 n, const u32* ids,
    u32 share, const float* bias, float* out, u32 out_stride, u32 add) {
    const u32 lane = threadIdx.x % WARP, row = blockIdx.x * ROWS + threadIdx.x / WARP, job = blockIdx.y;
    if (row >= rows) return;
    if (ids) bytes += matrix_bytes * ids[job];
    const typename F::T* w = (const typename F::T*)(bytes + row_bytes * row);
    x += (u64)(job / share) * x_stride;
    out += (u64)job * out_stride;
    float acc[C];
#pragma unroll
    for (int c = 0; c < C; c++) acc[c] = 0.0f;
#pragma unroll 4
    for (u32 i = lane; i < len; i += WARP) {
        float v = F::get(__ldg(w + i));
#pragma unroll
        for (int c = 0; c < C; c++) acc[c] = fmaf(v, x[(u64)(c < n ? c : n - 1) * x_stride + i], acc[c]);
    }
#pragma unroll
    for (int c = 0; c < C; c++) {
        float y = sum_lanes<32>(acc[c]);
        if (lane == 0 && c < n) {
            float* o = out + (u64)c * out_stride + row;
            if (bias) y += bias[row];
            *o = add ? *o + y : y;
        }
    }
}

// As in matvec.cu, with x in f32.
#define MATVEC(C)                                                                                                                \
    extern "C" __global__ void __launch_bounds__(ROWS* WARP) matvec_##C(                                                         \
        const u8* w, u64 row_bytes, u64 matrix_bytes, u32 rows, u32 len, const float* x, u32 x_stride, u32 n, const u32* ids,     \
        u32 share, const float* bias, float* out, u32 out_stride, u32 add) {                                                     \
        matvec<FORMAT, C>(w, row_bytes, matrix_bytes, rows, len, x, x_stride, n, ids, share, bias, out, out_stride, add);         \
    }
MATVEC(1)
MATVEC(2)
MATVEC(4)
MATVEC(8)

// out[j] = scale * row ids[j] of the table: a grid of (len / 256, jobs), 256 threads.
extern "C" __global__ void __launch_bounds__(256) embed(
    const u8* w, u64 row_bytes, u32 len, const u32* ids, float scale, float* out, u32 out_stride) {
    const u32 i = blockIdx.x * 256 + threadIdx.x, job = blockIdx.y;
    if (i >= len) return;
    float y = FORMAT::get(__ldg((const FORMAT::T*)(w + row_bytes * ids[job]) + i));
    out[(u64)job * out_stride + i] = scale == 1.0f ? y : y * scale;
}

// As in matvec.cu; the grid: (len / 128, heads, rows).
extern "C" __global__ void __launch_bounds__(128) transposed(
    const u8* w, u64 row_bytes, u32 len, u32 head_rows, u32 n, const float* q, u32 q_stride, u32 q_head, float* out) {
    const u32 c = blockIdx.x * 128 + threadIdx.x, h = blockIdx.y;
    if (c >= len) return;
    q += (u64)blockIdx.z * q_stride + h * q_head;
    w += (u64)h * head_rows * row_bytes;
    float acc = 0.0f;
    for (u32 i = 0; i < n; i++) acc = fmaf(q[i], FORMAT::get(__ldg((const FORMAT::T*)(w + row_bytes * i) + c)), acc);
    out[((u64)blockIdx.z * gridDim.y + h) * len + c] = acc;
}
