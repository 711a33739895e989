// Products with a few columns, whatever the weights: which row a warp makes, of which matrix, and what becomes of its sums. Included behind
// X, what x is made of, and dot_rows.

#define ROWS 4 // output features (warps) of a block

struct Product {
    const u8* w;
    u32 rows;
    const float* bias;
    float* out;
    u32 out_stride, add;
};

// out[c] (=|+=) W x[c] (+ bias), c < n, for up to three W of one format and length that share x; `len`: elements or blocks of a row. The
// grid: (the sum of rows / 4, jobs), 128 threads. For mixtures of experts, job j multiplies matrix ids[j] (0 where there are no ids) of the
// first with row j / share of x, into row j of out; n is 1 then.
template <class F, int C>
__device__ __forceinline__ void matvec(
    Product p, const Product& second, const Product& third, u64 row_bytes, u64 matrix_bytes, u32 len, const X* x, u32 x_stride, u32 n,
    const u32* ids, u32 share) {
    const u32 blocks = (p.rows + ROWS - 1) / ROWS, more = (second.rows + ROWS - 1) / ROWS, job = blockIdx.y;
    u32 block = blockIdx.x;
    if (block >= blocks) {
        block -= blocks;
        p = block < more ? second : third;
        if (block >= more) block -= more;
    }
    const u32 row = block * ROWS + threadIdx.x / WARP;
    if (row >= p.rows) return;
    const u8* const of[1] = {p.w + row_bytes * row + (ids ? matrix_bytes * ids[job] : 0)};
    float sums[1][C];
    dot_rows<F, C, 1>(of, len, x + (u64)(job / share) * x_stride, x_stride, n, sums);
    float* const out = p.out + (u64)job * p.out_stride + row;
#pragma unroll
    for (int c = 0; c < C; c++) {
        if (threadIdx.x % WARP == 0 && c < n) {
            float y = sums[0][c], *o = out + (u64)c * p.out_stride;
            if (p.bias) y += p.bias[row];
            *o = p.add ? *o + y : y;
        }
    }
}

// out[c] = act(W x[c]) * (up x[c]), up being of the shape and format of W; otherwise as above.
template <class F, int C>
__device__ __forceinline__ void gate(
    const u8* w, const u8* up, u32 rows, u32 act, float* out, u32 out_stride, u64 row_bytes, u64 matrix_bytes, u32 len, const X* x,
    u32 x_stride, u32 n, const u32* ids, u32 share) {
    const u32 row = blockIdx.x * ROWS + threadIdx.x / WARP, job = blockIdx.y;
    if (row >= rows) return;
    const u64 skip = row_bytes * row + (ids ? matrix_bytes * ids[job] : 0);
    const u8* const of[2] = {w + skip, up + skip};
    float sums[2][C];
    dot_rows<F, C, 2>(of, len, x + (u64)(job / share) * x_stride, x_stride, n, sums);
    out += (u64)job * out_stride + row;
#pragma unroll
    for (int c = 0; c < C; c++)
        if (threadIdx.x % WARP == 0 && c < n) out[(u64)c * out_stride] = activation(sums[0][c], act) * sums[1][c];
}

#define PRODUCT(i) const u8 *w##i, u32 rows##i, const float *bias##i, float *out##i, u32 stride##i, u32 add##i
#define OF(i) Product{w##i, rows##i, bias##i, out##i, stride##i, add##i}
#define FEW(C)                                                                                                                     \
    extern "C" __global__ void __launch_bounds__(ROWS* WARP, C < 8 ? 8 : 6) matvec_##C(                                            \
        PRODUCT(0), PRODUCT(1), PRODUCT(2), u64 row_bytes, u64 matrix_bytes, u32 len, const X* x, u32 x_stride, u32 n,             \
        const u32* ids, u32 share) {                                                                                               \
        matvec<FORMAT, C>(OF(0), OF(1), OF(2), row_bytes, matrix_bytes, len, x, x_stride, n, ids, share);                          \
    }                                                                                                                              \
    extern "C" __global__ void __launch_bounds__(ROWS* WARP, C < 8 ? 6 : 4) gate_##C(                                              \
        const u8* w, const u8* up, u32 rows, u32 act, float* out, u32 out_stride, u64 row_bytes, u64 matrix_bytes, u32 len,        \
        const X* x, u32 x_stride, u32 n, const u32* ids, u32 share) {                                                              \
        gate<FORMAT, C>(w, up, rows, act, out, out_stride, row_bytes, matrix_bytes, len, x, x_stride, n, ids, share);              \
    }
FEW(1)
FEW(2)
FEW(4)
FEW(8)
