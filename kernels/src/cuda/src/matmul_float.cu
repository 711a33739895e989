// Float weights times many activation rows in f32; one type a compilation (FORMAT).
//
// Every element is one fused multiply-add in f32, in the order of docs/numerics.md: the bits of float.cu and of the CPU. Tensor cores
// would have to split f32 activations into three f16 parts and still round sums their own way, which keeps neither the bits nor, for long
// rows, the 1e-6.
//
// A block makes 32 output features of 32 columns, a warp 16 of 8: lane l sums elements l, l + 32, ... of all 128 results in registers, so
// that 24 loads from shared memory serve 128 multiply-adds. Rows are staged 64 elements at a time, one stage ahead.
#include "floats.cuh"
#include "many.cuh"

#define THREADS 256
#define COLS 32  // columns of a block
#define R 16     // features of a warp
#define C 8      // columns of a warp
#define STAGE 64 // elements

// Sums over lanes l and l + 16, then l + 8, ...; each time a lane keeps one half of its results. At the end lane l has 4l .. 4l + 4.
template <int bit>
__device__ __forceinline__ void halve(float (&v)[C * R]) {
    const int half = C * R / 64 * bit * 2;
    const bool upper = threadIdx.x & bit;
#pragma unroll
    for (int i = 0; i < half; i++) {
        const float give = upper ? v[i] : v[i + half], keep = upper ? v[i + half] : v[i];
        v[i] = keep + __shfl_xor_sync(ALL, give, bit);
    }
    if constexpr (bit > 1) halve<bit / 2>(v);
}

template <class F>
__device__ __forceinline__ void matmul(
    const u8* w, u64 row_bytes, u64 matrix_bytes, u32 rows, u32 len, const float* x, u32 x_stride, u32 n, const u32* order,
    const Tile* tiles, u32 share, const u8* up, u32 act, const float* bias, float* out, u32 out_stride, u32 add) {
    __shared__ float sw[2][2 * R][STAGE], sx[2][COLS][STAGE];
    __shared__ u64 at[COLS];
    const Tile tile = tile_of<COLS>(tiles, n);
    if (tile.first >= tile.end) return;
    const u32 t = threadIdx.x, lane = t % WARP, warp = t / WARP, r0 = warp % 2 * R, c0 = warp / 2 * C;
    if (t < COLS) {
        const u32 p = tile.first + t;
        at[t] = (u64)(job_at(order, p < tile.end ? p : tile.end - 1) / share) * x_stride;
    }
    // Features of a block. With `up`, of each warp's 16 rows the first 8 are gate's, the others the same of up's.
    const u32 made = up ? R : 2 * R;
    float nw[8], nx[8];
    auto load = [&](u32 k) {
        k += t % STAGE;
#pragma unroll
        for (int l = 0; l < 8; l++) {
            const u32 local = t / STAGE + 4 * l, row = blockIdx.y * made + (up ? local / R * (R / 2) + local % (R / 2) : local);
            const u8* m = (up && local % R >= R / 2 ? up : w) + matrix_bytes * tile.matrix + row_bytes * row;
            const bool there = k < len;
            nw[l] = there && row < rows ? F::get(__ldg((const typename F::T*)m + k)) : 0.0f;
            nx[l] = there ? x[at[local] + k] : 0.0f;
        }
    };
    float acc[C * R];
#pragma unroll
    for (int i = 0; i < C * R; i++) acc[i] = 0.0f;
    __syncthreads();
    load(0);
    for (u32 k = 0, to = 0; k < len; k += STAGE, to ^= 1) {
#pragma unroll
        for (int l = 0; l < 8; l++) {
            sw[to][t / STAGE + 4 * l][t % STAGE] = nw[l];
            sx[to][t / STAGE + 4 * l][t % STAGE] = nx[l];
        }
        __syncthreads();
        if (k + STAGE < len) load(k + STAGE);
#pragma unroll
        for (int step = 0; step < STAGE; step += WARP) {
            float a[R];
#pragma unroll
            for (int r = 0; r < R; r++) a[r] = sw[to][r0 + r][step + lane];
#pragma unroll
            for (int c = 0; c < C; c++) {
                const float b = sx[to][c0 + c][step + lane];
#pragma unroll
                for (int r = 0; r < R; r++) acc[c * R + r] = fmaf(a[r], b, acc[c * R + r]);
            }
        }
    }
    halve<16>(acc);
    const u32 c = 4 * lane / R, r = 4 * lane % R, p = tile.first + c0 + c;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float y = acc[i];
        u32 row = blockIdx.y * made + r0 + r + i;
        if (up) {
            const float other = __shfl_xor_sync(ALL, y, 2);
            y = activation(y, act) * other;
            row = blockIdx.y * made + r0 / 2 + r + i;
        }
        if (p >= tile.end || row >= rows || (up && r >= R / 2)) continue;
        if (bias) y += bias[row];
        float* o = out + (u64)job_at(order, p) * out_stride + row;
        *o = add ? *o + y : y;
    }
}

// As in matmul.cu, with x in f32 and len its length. The grid: (tiles, rows / 32; with `up` rows / 16), 256 threads.
extern "C" __global__ void __launch_bounds__(THREADS, 1) matmul(
    const u8* w, u64 row_bytes, u64 matrix_bytes, u32 rows, u32 len, const float* x, u32 x_stride, u32 n, const u32* order,
    const Tile* tiles, u32 share, const u8* up, u32 act, const float* bias, float* out, u32 out_stride, u32 add) {
    matmul<FORMAT>(w, row_bytes, matrix_bytes, rows, len, x, x_stride, n, order, tiles, share, up, act, bias, out, out_stride, add);
}
