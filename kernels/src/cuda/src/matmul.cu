// Quantised weights times many rounded activation rows on tensor cores; one format a compilation (FORMAT), one text a target (mma.cuh).
//
// A block makes 16 MI output features of 16 HALVES columns. Warp b (of each half) multiplies sub-block b of every group of 256: so that each
// of the eight running sums of docs/numerics.md lives in one warp, in registers, and meets its sub-blocks in order. Dots are exact integers,
// scales are applied to each as in matvec.cu, and the eight meet at the end in the same tree: a column's bits are those of matvec.cu and of
// the CPU, whatever columns are beside it.
//
// In stages of G groups, weights are loaded one ahead into registers and unpacked to bytes in shared memory; activations are copied there one
// ahead (cp.async). With MI 4, for 8 products of 16 x 8 x 32 a warp takes 5 ldmatrix, 8 (kind PLAIN) to 28 (MIN16) loads of scales, and for each of 4 results
// a lane and product 3 (PLAIN), 4 (MIN), 6 (SCALE16) or 8 (MIN16) instructions of the f32 pipes: these, not the tensor cores, are the limit.
#include "block.cuh"
#include "formats.cuh"
#include "many.cuh"
#include "mma.cuh"

#define PARTS 2 // fragments of 8 columns of a warp

// G groups of a tile of weights unpacked to signed bytes, and of activations, twice.
template <class F, int MI, int HALVES, int G>
struct Stage {
    static const int ROWS = 16 * MI, COLS = 16 * HALVES;
    static const bool PAIRS = F::KIND == SCALE16 || F::KIND == MIN16; // two dots a sub-block
    static const int MINS = F::KIND == MIN16 ? 2 : F::KIND == MIN ? 1 : 0;
    // Scales of a column as they follow each other in a `Block` (scale, sum), or scale and half; 4 more so that banks differ.
    static const int SCALES = 8 + 8 * MINS;
    // [sub-block][row][32], the two halves of every other four rows swapped: then eight rows of a half lie in different banks.
    u8 w[G][8][ROWS * 32 + 16];
    u8 x[2][G][8][COLS * 32 + 32];
    // Row r at (r % 8) * 2 MI + r / 8: what a lane needs lies together.
    __align__(16) float d[G][8][ROWS];
    __align__(16) u32 sc[PAIRS ? G : 1][8][PAIRS ? ROWS : 1]; // the upper halves of two floats, exact
    __align__(16) float m[MINS ? MINS : 1][MINS ? G : 1][8][MINS ? ROWS : 1];
    __align__(16) float scale[2][G][COLS][SCALES + 4];
    // When the sums meet: [sum][column][row], 16 columns at a time, 4 floats more a column so that banks differ.
    static const int STRIDE = ROWS + 4, SUM = 16 * STRIDE, IMAGE = 8 * SUM * 4;
};

__device__ __forceinline__ u32 unit(u32 row, u32 half) { return 32 * row + 16 * (half ^ (row >> 2 & 1)); }

template <class F, int MI, int HALVES, int G>
__device__ __forceinline__ void matmul(
    u8* memory, const u8* w, u64 row_bytes, u64 matrix_bytes, u32 rows, u32 blocks, const Block* x, u32 x_stride, u32 n,
    const u32* order, const Tile* tiles, u32 share, const u8* up, u32 act, const float* bias, float* out, u32 out_stride, u32 add) {
    typedef Stage<F, MI, HALVES, G> S;
    const int ROWS = S::ROWS, THREADS = 256 * HALVES;
    S& s = *(S*)memory;
    Tile tile = tile_of<S::COLS>(tiles, n);
    if (tile.first >= tile.end) return;
    const u32 t = threadIdx.x, lane = t % WARP, b = t / WARP % 8, half = t / WARP / 8, groups = F::BLOCK == 256 ? blocks : (blocks + 7) / 8;

    // This thread loads sub-block t % 8 of a row, of one group of a stage. With `up`, the lower half of the rows are gate's.
    const u32 made = up ? ROWS / 2 : ROWS, local = G == 1 ? t / 8 : t / 8 % ROWS, mine = G == 1 ? 0 : t / 8 / ROWS;
    const u32 feature = blockIdx.y * made + local % made;
    const bool there = feature < rows;
    const u8* from = (local < made ? w : up) + matrix_bytes * tile.matrix + row_bytes * (there ? feature : 0);
    // And activations: 16 bytes t % 16 of column t / 16; columns past the end repeat the last.
    const u32 place = tile.first + t / 16;
    x += (u64)(job_at(order, place < tile.end ? place : tile.end - 1) / share) * x_stride;
    auto copy_columns = [&](u32 i) {
        const u32 u = t % 16, col = t / 16, to = i / G & 1;
#pragma unroll
        for (int g = 0; g < G; g++) {
            if (G > 1 && i + g >= groups) break;
            copy16(s.x[to][g][u / 2] + unit(col, u & 1), x->q + 16 * u);
            // MIN16 takes the sums of runs, which follow those of sub-blocks.
            const u32 skip = F::KIND == MIN16 && u >= 2 ? 8 : 0;
            if (u < S::SCALES / 4) copy16(s.scale[to][g][col] + 4 * u, x->scale + 4 * u + skip);
            x++;
        }
    };
    Sub sub;
    auto load_weights = [&](u32 i) { load_part<F>(sub, there && (G == 1 || i + mine < groups), from, blocks, i + mine, t % 8); };

    float acc[MI][PARTS][4];
#pragma unroll
    for (int mi = 0; mi < MI; mi++)
#pragma unroll
        for (int j = 0; j < PARTS; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) acc[mi][j][e] = 0.0f;

    copy_columns(0);
    load_weights(0);
    for (u32 i = 0; i < groups; i += G) {
        __syncthreads();
        const u32 k = t % 8, at = local % 8 * (2 * MI) + local / 8;
        u32 q[8];
#pragma unroll
        for (int j = 0; j < 8; j++) q[j] = F::ZERO ? (sub.q[j] + 0x01010101u * (128 - F::ZERO)) ^ 0x80808080u : sub.q[j];
        *(uint4*)(s.w[mine][k] + unit(local, 0)) = make_uint4(q[0], q[1], q[2], q[3]);
        *(uint4*)(s.w[mine][k] + unit(local, 1)) = make_uint4(q[4], q[5], q[6], q[7]);
        s.d[mine][k][at] = sub.d;
        if (S::PAIRS) s.sc[mine][k][at] = __float_as_uint((float)sub.sc[0]) >> 16 | __float_as_uint((float)sub.sc[1]) & 0xffff0000;
#pragma unroll
        for (int e = 0; e < S::MINS; e++) s.m[e][mine][k][at] = sub.m[e];
        copies_done();
        __syncthreads();
        if (i + G < groups) copy_columns(i + G);
        // Lane 4r + c of a fragment: rows r and r + 8, columns 2c and 2c + 1.
        const u32 r = lane / 4, c = lane % 4;
#pragma unroll
        for (int g = 0; g < G; g++) {
            if (G > 1 && i + g >= groups) break;
            u32 fb[PARTS][2];
#pragma unroll
            for (int j = 0; j < PARTS; j += 2) {
                u32 f[4];
                load_matrices(f, shared_address(s.x[i / G & 1][g][b] + unit(16 * half + 8 * (j + lane / 16) + lane % 8, lane / 8 & 1)));
                fb[j][0] = f[0], fb[j][1] = f[1], fb[j + 1][0] = f[2], fb[j + 1][1] = f[3];
            }
#pragma unroll
            for (int mi = 0; mi < MI; mi++) {
                // As early as registers allow.
                if (g == 0 && mi == (S::PAIRS ? MI - 1 : MI / 2) && i + G < groups) load_weights(i + G);
                u32 fa[4];
                load_matrices(fa, shared_address(s.w[g][b] + unit(16 * mi + lane % 16, lane / 16)));
                const u32 at = r * (2 * MI) + 2 * mi;
                const float2 d = *(const float2*)(s.d[g][b] + at);
                float2 m0, m1;
                float2 lo, hi;
                if (S::MINS) m0 = *(const float2*)(s.m[0][g][b] + at);
                if (S::MINS > 1) m1 = *(const float2*)(s.m[S::MINS - 1][g][b] + at);
                if (S::PAIRS) {
                    const uint2 sc = *(const uint2*)(s.sc[g][b] + at);
                    lo = make_float2(__int_as_float(sc.x << 16), __int_as_float(sc.y << 16));
                    hi = make_float2(__int_as_float(sc.x & 0xffff0000), __int_as_float(sc.y & 0xffff0000));
                }
#pragma unroll
                for (int j = 0; j < PARTS; j++) {
                    int one[4], two[4];
                    if (S::PAIRS) {
                        dot16(one, fa[0], fa[1], fb[j][0]);
                        dot16(two, fa[2], fa[3], fb[j][1]);
                    } else {
                        dot32(one, fa, fb[j][0], fb[j][1]);
                    }
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const float* a = s.scale[i / G & 1][g][16 * half + 8 * j + 2 * c + e % 2];
                        float dot = float_of(one[e]);
                        // Below 2^24, hence exact; the zero keeps signs of zeros as integers have them.
                        if (S::PAIRS) dot = fmaf(e < 2 ? hi.x : hi.y, float_of(two[e]), fmaf(e < 2 ? lo.x : lo.y, dot, 0.0f));
                        float y = fmaf(dot, (e < 2 ? d.x : d.y) * a[b], acc[mi][j][e]);
                        if (S::MINS == 1) y = fmaf(e < 2 ? m0.x : m0.y, a[8 + b], y);
                        if (S::MINS == 2) {
                            y = fmaf(e < 2 ? m0.x : m0.y, a[8 + 2 * b], y);
                            y = fmaf(e < 2 ? m1.x : m1.y, a[9 + 2 * b], y);
                        }
                        acc[mi][j][e] = y;
                    }
                }
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
        auto sum = [&](u32 c, u32 r) {
            const float* v = image + c * STRIDE + r;
            return ((v[0] + v[4 * SUM]) + (v[2 * SUM] + v[6 * SUM])) + ((v[SUM] + v[5 * SUM]) + (v[3 * SUM] + v[7 * SUM]));
        };
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

#if __CUDA_ARCH__ >= 800
#include "matmul_wide.cuh"
// As below, for one matrix: no order, no tiles. 256 threads, sizeof(Wide) bytes of dynamic shared memory.
extern "C" __global__ void __launch_bounds__(WIDE_THREADS, 1) matmul_64(
    const u8* w, u64 row_bytes, u64 matrix_bytes, u32 rows, u32 blocks, const Block* x, u32 x_stride, u32 n, const u32* order,
    const Tile* tiles, u32 share, const u8* up, u32 act, const float* bias, float* out, u32 out_stride, u32 add) {
    extern __shared__ __align__(128) u8 memory[];
    matmul_wide<FORMAT>(memory, w, row_bytes, rows, blocks, x, x_stride, n, up, act, bias, out, out_stride, add);
}
#endif

// out[job] (=|+=) W[matrix] x[job / share] (+ bias), or with `up` act(W[matrix] x) * (up[matrix] x): 0 SiLU, 1 GELU. The grid: (n / columns, rows /
// features; with `up` twice as many). One matrix: no order, no list of tiles, share 1. Mixtures of experts: both from `sort_experts`, whose
// tiles have 32 columns; jobs of one token share its row of x. `matmul`: 64 features, 32 columns, 512 threads. `matmul_16`: 16, 16, 256, for few
// columns: four times the blocks, with two groups of every row under way.
#define ENTRY(NAME, MI, HALVES, G, BLOCKS)                                                                                         \
    extern "C" __global__ void __launch_bounds__(256 * HALVES, BLOCKS) NAME(                                                       \
        const u8* w, u64 row_bytes, u64 matrix_bytes, u32 rows, u32 blocks, const Block* x, u32 x_stride, u32 n, const u32* order, \
        const Tile* tiles, u32 share, const u8* up, u32 act, const float* bias, float* out, u32 out_stride, u32 add) {             \
        typedef Stage<FORMAT, MI, HALVES, G> S;                                                                                   \
        __shared__ __align__(16) u8 memory[sizeof(S) > S::IMAGE ? sizeof(S) : S::IMAGE];                                           \
        matmul<FORMAT, MI, HALVES, G>(                                                                                            \
            memory, w, row_bytes, matrix_bytes, rows, blocks, x, x_stride, n, order, tiles, share, up, act, bias, out, out_stride, add); \
    }
ENTRY(matmul, 4, 2, 1, 1)
ENTRY(matmul_16, 1, 1, 2, 3)
