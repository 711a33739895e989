// Products with a few columns, whatever the weights: which row a warp makes, of which matrix, and what becomes of its sums. Included behind
// X, what x is made of, EARLY and dot_rows.
//
// Weights are asked for before `earlier_done`, into the second-level cache. Registers would be nearer, but x comes no sooner than from there.
// Only where a router says which matrix it is must that be waited for.
#pragma once
#include "overlap.cuh"
#include "product.cuh"

#define ROWS 4 // output features (warps) of a block

// The beginnings of a warp's R rows of weights, EARLY bytes in all, to the second-level cache.
template <int R>
__device__ __forceinline__ void prefetch_rows(const u8* const (&w)[R], u64 row_bytes) {
    const u32 at = 128 * (threadIdx.x % WARP);
#pragma unroll
    for (int r = 0; r < R; r++)
        if (at < row_bytes && at < EARLY / R) prefetch(w[r] + at);
}

// out[c] (=|+=) W x[c] (+ bias), c < n, for up to three W of one format and length that share x; `len`: elements or blocks of a row. A warp
// makes R rows. The grid: (the sum of rows / 4 R, jobs), 128 threads. For mixtures of experts, job j multiplies matrix ids[j] (0 where there
// are no ids) of the first with row j / share of x, into row j of out; n is 1 then.
template <class F, int C, int R>
__device__ __forceinline__ void matvec(
    Product p, const Product& second, const Product& third, u64 row_bytes, u64 matrix_bytes, u32 len, const X* x, u32 x_stride, u32 n,
    const u32* ids, u32 share) {
    let_next_begin();
    const u32 row = (pick(p, second, third, ROWS * R, blockIdx.x) * ROWS + threadIdx.x / WARP) * R, job = blockIdx.y;
    if (ids || row >= p.rows) earlier_done();
    if (row >= p.rows) return;
    const u8* of[R];
#pragma unroll
    for (int r = 0; r < R; r++) of[r] = p.w + row_bytes * (row + r < p.rows ? row + r : row) + (ids ? matrix_bytes * ids[job] : 0);
    prefetch_rows(of, row_bytes);
    earlier_done();
    float sums[R][C];
    dot_rows<F, C, R>(of, len, x + (u64)(job / share) * x_stride, x_stride, n, sums);
#pragma unroll
    for (int r = 0; r < R; r++) {
        float* const out = p.out + (u64)job * p.out_stride + row + r;
#pragma unroll
        for (int c = 0; c < C; c++) {
            if (threadIdx.x % WARP == 0 && c < n && row + r < p.rows) {
                float y = sums[r][c], *o = out + (u64)c * p.out_stride;
                if (p.bias) y += p.bias[row + r];
                *o = p.add ? *o + y : y;
            }
        }
    }
}

// out[c] = act(W x[c]) * (up x[c]), up being of the shape and format of W; otherwise as above.
template <class F, int C, int R>
__device__ __forceinline__ void gate(
    const u8* w, const u8* up, u32 rows, u32 act, float* out, u32 out_stride, u64 row_bytes, u64 matrix_bytes, u32 len, const X* x,
    u32 x_stride, u32 n, const u32* ids, u32 share) {
    let_next_begin();
    const u32 row = (blockIdx.x * ROWS + threadIdx.x / WARP) * R, job = blockIdx.y;
    if (ids || row >= rows) earlier_done();
    if (row >= rows) return;
    const u8* of[2 * R];
#pragma unroll
    for (int r = 0; r < R; r++) {
        const u64 skip = row_bytes * (row + r < rows ? row + r : row) + (ids ? matrix_bytes * ids[job] : 0);
        of[r] = w + skip, of[R + r] = up + skip;
    }
    prefetch_rows(of, row_bytes);
    earlier_done();
    float sums[2 * R][C];
    dot_rows<F, C, 2 * R>(of, len, x + (u64)(job / share) * x_stride, x_stride, n, sums);
    out += (u64)job * out_stride + row;
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int c = 0; c < C; c++)
            if (threadIdx.x % WARP == 0 && c < n && row + r < rows)
                out[(u64)c * out_stride + r] = activation(sums[r][c], act) * sums[R + r][c];
}

// C columns at most; R rows of each warp, of gate and up half as many.
#define FEW(C, R)                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(ROWS* WARP, C < 8 ? 8 : 4) matvec_##C(                                            \
        PRODUCT(0), PRODUCT(1), PRODUCT(2), u64 row_bytes, u64 matrix_bytes, u32 len, const X* x, u32 x_stride, u32 n,             \
        const u32* ids, u32 share) {                                                                                               \
        matvec<FORMAT, C, R>(OF(0), OF(1), OF(2), row_bytes, matrix_bytes, len, x, x_stride, n, ids, share);                       \
    }                                                                                                                              \
    extern "C" __global__ void __launch_bounds__(ROWS* WARP, C < 4 ? 6 : 4) gate_##C(                                              \
        const u8* w, const u8* up, u32 rows, u32 act, float* out, u32 out_stride, u64 row_bytes, u64 matrix_bytes, u32 len,        \
        const X* x, u32 x_stride, u32 n, const u32* ids, u32 share) {                                                              \
        gate<FORMAT, C, (R + 1) / 2>(w, up, rows, act, out, out_stride, row_bytes, matrix_bytes, len, x, x_stride, n, ids, share); \
    }
FEW(1, 1)
