// Quantised weights times many rounded activation rows on tensor cores; one format a compilation (FORMAT), one text a target (mma.cuh).
//
// A block makes 16 MI output features of 16 HALVES columns. Warp b (of each half) multiplies sub-block b of every group of 256: so that each
// of the eight running sums of docs/numerics.md lives in one warp, in registers, and meets its sub-blocks in order. Dots are exact integers,
// scales are applied to each as in matvec.cu, and the eight meet at the end in the same tree: a column's bits are those of matvec.cu and of
// the CPU, whatever columns are beside it.
//
// Weights are loaded a group ahead into registers and unpacked to bytes in shared memory; activations are copied there a group ahead
// (cp.async). For 8 products of 16 x 8 x 32 a warp takes 5 ldmatrix, 8 (kind PLAIN) to 28 (MIN16) loads of scales, and for each of 4 results a
// lane and product 3 (PLAIN), 4 (MIN), 6 (SCALE16) or 8 (MIN16) instructions of the f32 pipes: these, not the tensor cores, are the limit.
#include "block.cuh"
#include "many.cuh"
#include "products.cuh"

#define PARTS 2 // fragments of 8 columns of a warp

// A group of a tile of weights unpacked to signed bytes, and of activations, twice.
template <class F, int MI, int HALVES>
struct Stage : Parts<F> {
    static const bool PAIRS = Parts<F>::PAIRS;
    static const int MINS = Parts<F>::MINS, ROWS = 16 * MI, COLS = 16 * HALVES;
    // Scales of a column as they follow each other in a `Block` (scale, sum), or scale and half; 4 more so that banks differ.
    static const int SCALES = 8 + 8 * MINS;
    // [sub-block][row][32], the two halves of every other four rows swapped: then eight rows of a half lie in different banks.
    u8 w[8][ROWS * 32 + 16];
    u8 x[2][8][COLS * 32 + 32];
    // Row r at (r % 8) * 2 MI + r / 8: what a lane needs lies together.
    __align__(16) float d[8][ROWS];
    __align__(16) u32 sc[8][PAIRS ? ROWS : 1];
    __align__(16) float m[MINS ? MINS : 1][8][MINS ? ROWS : 1];
    __align__(16) float scale[2][COLS][SCALES + 4];
    // When the sums meet: [sum][column][row], 16 columns at a time, 4 floats more a column so that banks differ.
    static const int STRIDE = ROWS + 4, SUM = 16 * STRIDE, IMAGE = 8 * SUM * 4;
};

__device__ __forceinline__ u32 unit(u32 row, u32 half) { return 32 * row + 16 * (half ^ (row >> 2 & 1)); }

template <class F, int MI, int HALVES>
__device__ __forceinline__ void matmul(
    u8* memory, const u8* w, u64 row_bytes, u64 matrix_bytes, u32 rows, u32 blocks, const Block* x, u32 x_stride, u32 n,
    const u32* order, const Tile* tiles, u32 share, const u8* up, u32 act, const float* bias, float* out, u32 out_stride, u32 add) {
    typedef Stage<F, MI, HALVES> S;
    const int ROWS = S::ROWS, THREADS = 256 * HALVES;
    S& s = *(S*)memory;
    Tile tile = tile_of<S::COLS>(tiles, n);
    if (tile.first >= tile.end) return;
    const u32 t = threadIdx.x, lane = t % WARP, b = t / WARP % 8, half = t / WARP / 8, groups = F::BLOCK == 256 ? blocks : (blocks + 7) / 8;

    // This thread loads sub-block t % 8 of a row. With `up`, the lower half of the rows are gate's.
    const u32 made = up ? ROWS / 2 : ROWS, local = t / 8, feature = blockIdx.y * made + local % made;
    const u8* from = (local < made ? w : up) + matrix_bytes * tile.matrix + row_bytes * (feature < rows ? feature : 0);
    // And activations: 16 bytes t % 16 of column t / 16; columns past the end repeat the last.
    const u32 place = tile.first + t / 16;
    x += (u64)(job_at(order, place < tile.end ? place : tile.end - 1) / share) * x_stride;
    auto copy_columns = [&](u32 i) {
        const u32 u = t % 16, col = t / 16, to = i & 1;
        copy16(s.x[to][u / 2] + unit(col, u & 1), x->q + 16 * u);
        // MIN16 takes the sums of runs, which follow those of sub-blocks.
        const u32 skip = F::KIND == MIN16 && u >= 2 ? 8 : 0;
        if (u < S::SCALES / 4) copy16(s.scale[to][col] + 4 * u, x->scale + 4 * u + skip);
        x++;
    };
    Sub sub;
    auto load_weights = [&](u32 i) { load_part<F>(sub, from, blocks, i, t % 8); };

    float acc[MI][PARTS][4];
#pragma unroll
    for (int mi = 0; mi < MI; mi++)
#pragma unroll
        for (int j = 0; j < PARTS; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) acc[mi][j][e] = 0.0f;

    copy_columns(0);
    load_weights(0);
    for (u32 i = 0; i < groups; i++) {
        __syncthreads();
        const u32 k = t % 8, at = local % 8 * (2 * MI) + local / 8;
        u32 q[8];
#pragma unroll
        for (int j = 0; j < 8; j++) q[j] = F::ZERO ? (sub.q[j] + 0x01010101u * (128 - F::ZERO)) ^ 0x80808080u : sub.q[j];
        *(uint4*)(s.w[k] + unit(local, 0)) = make_uint4(q[0], q[1], q[2], q[3]);
        *(uint4*)(s.w[k] + unit(local, 1)) = make_uint4(q[4], q[5], q[6], q[7]);
        s.d[k][at] = sub.d;
        if (S::PAIRS) s.sc[k][at] = both(sub.sc);
#pragma unroll
        for (int e = 0; e < S::MINS; e++) s.m[e][k][at] = sub.m[e];
        copies_done();
        __syncthreads();
        if (i + 1 < groups) copy_columns(i + 1);
        // Lane 4r + c of a fragment: rows r and r + 8, columns 2c and 2c + 1.
        const u32 r = lane / 4, c = lane % 4;
        u32 fb[PARTS][2];
#pragma unroll
        for (int j = 0; j < PARTS; j += 2) {
            u32 f[4];
            load_matrices(f, shared_address(s.x[i & 1][b] + unit(16 * half + 8 * (j + lane / 16) + lane % 8, lane / 8 & 1)));
            fb[j][0] = f[0], fb[j][1] = f[1], fb[j + 1][0] = f[2], fb[j + 1][1] = f[3];
        }
#pragma unroll
        for (int mi = 0; mi < MI; mi++) {
            // As early as registers allow.
            if (mi == (S::PAIRS ? MI - 1 : MI / 2) && i + 1 < groups) load_weights(i + 1);
            u32 fa[4];
            load_matrices(fa, shared_address(s.w[b] + unit(16 * mi + lane % 16, lane / 16)));
            const u32 at = r * (2 * MI) + 2 * mi;
            RowScales scales;
            scales.d = *(const float2*)(s.d[b] + at);
            if (S::PAIRS) scales.sc = *(const uint2*)(s.sc[b] + at);
#pragma unroll
            for (int e = 0; e < S::MINS; e++) scales.m[e] = *(const float2*)(s.m[e][b] + at);
#pragma unroll
            for (int j = 0; j < PARTS; j++) {
                const auto& columns = s.scale[i & 1];
                const u32 col = 16 * half + 8 * j + 2 * c;
                add_products<F, false>(acc[mi][j], fa, fb[j][0], fb[j][1], scales, columns[col], columns[col + 1], b);
            }
        }
    }

    // The eight sums meet.
    const int STRIDE = S::STRIDE, SUM = S::SUM;
    // Read again: registers are short above.
    tile = tile_of<S::COLS>(tiles, n);
    float* image = (float*)memory;
    for (u32 h = 0; h < HALVES; h++) {
        __syncthreads();
        if (h == half) {
#pragma unroll
            for (int mi = 0; mi < MI; mi++)
#pragma unroll
                for (int j = 0; j < PARTS; j++)
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        image[b * SUM + (8 * j + 2 * (lane % 4) + e % 2) * STRIDE + 16 * mi + lane / 4 + 8 * (e / 2)] = acc[mi][j][e];
        }
        __syncthreads();
        auto sum = [&](u32 c, u32 r) { return sum_eight(image + c * STRIDE + r, SUM); };
        for (u32 o = t; o < 16 * made; o += THREADS) {
            const u32 c = o / made, r = o % made, p = tile.first + 16 * h + c, row = blockIdx.y * made + r;
            if (p >= tile.end || row >= rows) continue;
            float y = sum(c, r);
            if (up) y = activation(y, act) * sum(c, r + made);
            if (bias) y += bias[row];
            float* to = out + (u64)job_at(order, p) * out_stride + row;
            *to = add ? *to + y : y;
        }
    }
}

// out[job] (=|+=) W[matrix] x[job / share] (+ bias), or with `up` act(W[matrix] x) * (up[matrix] x): 0 SiLU, 1 GELU. The grid: (n / 32, rows / 64;
// with `up` twice as many), 512 threads. One matrix: no order, no list of tiles, share 1. Mixtures of experts: both from `sort_experts`, whose
// tiles have 32 columns; jobs of one token share its row of x.
extern "C" __global__ void __launch_bounds__(512, 1) matmul(
    const u8* w, u64 row_bytes, u64 matrix_bytes, u32 rows, u32 blocks, const Block* x, u32 x_stride, u32 n, const u32* order,
    const Tile* tiles, u32 share, const u8* up, u32 act, const float* bias, float* out, u32 out_stride, u32 add) {
    typedef Stage<FORMAT, 4, 2> S;
    __shared__ __align__(16) u8 memory[sizeof(S) > S::IMAGE ? sizeof(S) : S::IMAGE];
    matmul<FORMAT, 4, 2>(
        memory, w, row_bytes, matrix_bytes, rows, blocks, x, x_stride, n, order, tiles, share, up, act, bias, out, out_stride, add);
}
