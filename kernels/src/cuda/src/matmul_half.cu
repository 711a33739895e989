// Weights times the rows of prompts on f16 tensor cores; one format a compilation (FORMAT). From sm_80 on.
//
// A weight goes to f16 in one rounding under its row's power of two (`powers`; d q, d q + m in f32), one of F16 as it is; an activation under
// its own (`half_rows` of round.cu). A sum is taken in place, 16 products at a time in order, whatever block makes it: a column's bits depend on
// its row of x alone. Tensor cores cut each step to the 24 bits of the largest: far below what f16 rounds (docs/numerics.md).
//
// While warps multiply a stage of K elements (16 MI features by 16 NP columns each), later ones are copied (cp.async): activations, and weights
// of F16. Other weights of the next stage are loaded to registers and unpacked into the other half of shared memory, a sub-block of 32 (some
// 150 instructions) or eight values of BF16 at a time: once for all of a block's columns. One barrier a stage.
#include "formats.cuh"
#include "half.cuh"
#include "many.cuh"

struct F16 {
    static const int BLOCK = 1;
};
struct BF16 {
    static const int BLOCK = 1;
};

// Elements of a stage, and bytes of f16 that a thread makes of a row's weights.
template <class F>
struct Stage {
    static const int K = 64, BYTES = 64;
};
template <>
struct Stage<BF16> {
    static const int K = 64, BYTES = 16;
};
// All of it copied: half as long, so that three of four may be on their way.
template <>
struct Stage<F16> {
    static const int K = 32, BYTES = 16;
};

// Where 16 bytes of a row of K elements lie: eight rows' bytes of one place lie in different banks.
template <int K>
__device__ __forceinline__ u32 unit(u32 row, u32 at) {
    return 2 * K * row + 16 * (at ^ (K == 64 ? row & 7 : row >> 1 & 3));
}

// Of a power of two between 2^-126 and 2^126.
__device__ __forceinline__ float inverse(float power) { return __int_as_float(0x7f000000 - __float_as_int(power)); }

// Sub-block `at` of a row of `blocks` blocks (of the last for what lies beyond) as f16, times `power`, to one half of row `row` of a tile.
template <class F>
__device__ __forceinline__ void unpack(F, u8* tile, u32 row, u32 half, const u8* from, u32 blocks, u32 at, float power) {
    Sub s;
    const u32 block = F::BLOCK == 256 ? at / 8 : at;
    load_sub<F>(s, from, blocks, min(block, blocks - 1), F::BLOCK == 256 ? at % 8 : 0);
    float d[2], m[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        d[h] = s.d * power;
        if (F::KIND == SCALE16 || F::KIND == MIN16) d[h] *= (float)s.sc[h];
        if (F::KIND == MIN || F::KIND == MIN16) m[h] = s.m[F::KIND == MIN16 ? h : 0] * power;
    }
    // Bytes behind the bits of 2^23 are floats; signed ones are made unsigned first.
    const float zero = 8388608.0f + (F::ZERO ? F::ZERO : 128);
    u32 out[16];
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const u32 q = F::ZERO ? s.q[j] : s.q[j] ^ 0x80808080u;
        float w[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            w[k] = __uint_as_float(__byte_perm(q, 0x4b000000, 0x7440 + k)) - zero;
            w[k] = F::KIND == MIN || F::KIND == MIN16 ? fmaf(w[k], d[j / 4], m[j / 4]) : w[k] * d[j / 4];
        }
        out[2 * j] = halves(w[0], w[1]), out[2 * j + 1] = halves(w[2], w[3]);
    }
#pragma unroll
    for (int j = 0; j < 4; j++)
        *(uint4*)(tile + unit<64>(row, 4 * half + j)) = make_uint4(out[4 * j], out[4 * j + 1], out[4 * j + 2], out[4 * j + 3]);
}

// The same of eight values of BF16, to place `to` of the row.
__device__ __forceinline__ void unpack(BF16, u8* tile, u32 row, u32 to, const u8* from, u32 len, u32 at, float power) {
    u32 q[4];
    words(q, load16(from + 16 * (u64)min(at, (len - 1) / 8)));
#pragma unroll
    for (int j = 0; j < 4; j++) q[j] = halves(__uint_as_float(q[j] << 16) * power, __uint_as_float(q[j] & 0xffff0000) * power);
    *(uint4*)(tile + unit<64>(row, to)) = make_uint4(q[0], q[1], q[2], q[3]);
}
__device__ __forceinline__ void unpack(F16, u8*, u32, u32, const u8*, u32, u32, float) {}

template <class F, int MI, int NP, int WR, int WC>
__device__ __forceinline__ void matmul(
    u8* memory, const u8* w, u64 row_bytes, u32 matrix_rows, u32 rows, u32 blocks, const float* powers, const float* up_powers,
    const u8* x, u32 x_stride, const float* scales, u32 n, const u32* order, const Tile* tiles, u32 share, const u8* up, u32 act,
    const float* bias, float* out, u32 out_stride, u32 add) {
    const int STRIP = 16 * MI, ROWS = STRIP * WR, COLS = 16 * NP * WC, THREADS = WARP * WR * WC;
    const int K = Stage<F>::K, STAGES = 128 / K, W_STAGE = 2 * K * ROWS, X_STAGE = 2 * K * COLS;
    const bool COPIED = K == 32;
    // Pieces of 16 bytes of a stage's row; shares that threads bring of a row's weights; of how many rows, and how far apart.
    const int PIECES = K / 8, X_COPIES = PIECES * COLS / THREADS;
    const int SHARES = 2 * K / Stage<F>::BYTES, APART = THREADS / SHARES, MINE = ROWS / APART;
    const Tile tile = tile_of<COLS>(tiles, n);
    if (tile.first >= tile.end) return;
    const u32 t = threadIdx.x, lane = t % WARP, wr = t / WARP % WR, wc = t / WARP / WR;

    // With `up`, of each strip the first half is gate's. Features and columns past the end repeat the last.
    const u32 strip = up ? STRIP / 2 : STRIP, first = blockIdx.y * strip * WR;
    auto is_up = [&](u32 local) { return local % STRIP >= strip; };
    auto row_of = [&](u32 local) {
        return (u64)matrix_rows * tile.matrix + min(first + local / STRIP * strip + local % strip, rows - 1);
    };
    auto power_of = [&](u32 local) { return COPIED ? 1.0f : (is_up(local) ? up_powers : powers)[row_of(local)]; };
    const u32 mine = t / SHARES, part = t % SHARES;
    const u8* from[MINE];
    float power[MINE];
#pragma unroll
    for (int l = 0; l < MINE; l++) {
        const u32 local = mine + APART * l;
        from[l] = (is_up(local) ? up : w) + row_bytes * row_of(local), power[l] = power_of(local);
    }
    __shared__ u32 x_at[COLS];
    __shared__ float x_scale[COLS];
    if (t < COLS) {
        const u32 p = tile.first + t, x_row = job_at(order, p < tile.end ? p : tile.end - 1) / share;
        x_at[t] = x_row * x_stride, x_scale[t] = scales[x_row];
    }
    __syncthreads();
    const u32 pieces = F::BLOCK == 1 ? (blocks + 31) / 32 * 4 : F::BLOCK / 8 * blocks, stages = (pieces + PIECES - 1) / PIECES;
    u8* const x_tiles = memory + STAGES * W_STAGE;
    const u32 x_start = shared_address(x_tiles), w_start = shared_address(memory);
    x += 16 * (t % PIECES);
    auto copy = [&](u32 s) {
        const u32 at = PIECES * s + t % PIECES;
#pragma unroll
        for (int l = 0; COPIED && l < MINE; l++)
            copy_or_zero<16, true>(
                w_start + W_STAGE * (s % STAGES) + unit<K>(mine + APART * l, part), from[l] + (u64)16 * at, 8 * at < blocks);
#pragma unroll
        for (int l = 0; l < X_COPIES; l++) {
            const u32 col = t / PIECES + THREADS / PIECES * l;
            copy_or_zero<16, true>(
                x_start + X_STAGE * (s % STAGES) + unit<K>(col, t % PIECES), x + x_at[col] + (u64)2 * K * s, at < pieces);
        }
        stage_begun();
    };
    auto load = [&](u32 s) {
#pragma unroll
        for (int l = 0; l < MINE; l++)
            unpack(F(), memory + W_STAGE * (s % STAGES), mine + APART * l, part, from[l], blocks, SHARES * s + part, power[l]);
    };

    float acc[MI][NP][2][4];
#pragma unroll
    for (int mi = 0; mi < MI; mi++)
#pragma unroll
        for (int j = 0; j < NP; j++)
#pragma unroll
            for (int e = 0; e < 8; e++) acc[mi][j][e / 4][e % 4] = 0.0f;
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) copy(s);
    load(0);
    const u32 a_at = unit<K>(STRIP * wr + lane % 16, lane / 16);
    const u32 b_at = unit<K>(16 * NP * wc + lane / 16 * 8 + lane % 8, lane / 8 & 1);
    for (u32 s = 0; s < stages; s++) {
        stages_done<STAGES - 2>();
        __syncthreads();
        // Past the end zeros are copied and any weights unpacked: without a branch ptxas loads early and unpacks between the products.
        copy(s + STAGES - 1);
        const u32 a = w_start + W_STAGE * (s % STAGES) + a_at, b = x_start + X_STAGE * (s % STAGES) + b_at;
#pragma unroll
        for (int k = 0; k < K / 16; k++) {
            u32 fa[MI][4];
#pragma unroll
            for (int mi = 0; mi < MI; mi++) load_matrices(fa[mi], (a ^ 32 * k) + 32 * K * mi);
#pragma unroll
            for (int j = 0; j < NP; j++) {
                u32 fb[4];
                load_matrices(fb, (b ^ 32 * k) + 32 * K * j);
#pragma unroll
                for (int mi = 0; mi < MI; mi++)
#pragma unroll
                    for (int h = 0; h < 2; h++) mma_f16(acc[mi][j][h], fa[mi], fb[2 * h], fb[2 * h + 1]);
            }
        }
        load(s + 1);
    }
    copies_done();

    // Results go through shared memory, 16 columns of each warp at a time; a thread then has one feature.
    float* const image = (float*)memory;
    const u32 made = up ? ROWS / 2 : ROWS, r = t % made, feature = first + r;
    const u32 local = up ? r / (STRIP / 2) * STRIP + r % (STRIP / 2) : r;
    const bool there = feature < rows;
    const float undo = inverse(power_of(local)), undo_up = up ? inverse(power_of(local + STRIP / 2)) : 0.0f;
    const float more = bias && there ? bias[feature] : 0.0f;
#pragma unroll
    for (int j = 0; j < NP; j++) {
        __syncthreads();
        to_image(image, ROWS + 4, 16 * wc, STRIP * wr, lane, acc, j);
        __syncthreads();
#pragma unroll 1
        for (u32 c = up ? t / (ROWS / 2) : t / ROWS; c < 16 * WC; c += up ? 2 * THREADS / ROWS : THREADS / ROWS) {
            const u32 column = 16 * (NP * (c / 16) + j) + c % 16, p = tile.first + column;
            if (p >= tile.end || !there) continue;
            const float* y_at = image + c * (ROWS + 4) + local;
            float y = *y_at * (x_scale[column] * undo);
            if (up) y = activation(y, act) * (y_at[STRIP / 2] * (x_scale[column] * undo_up));
            if (bias) y += more;
            float* to = out + (u64)job_at(order, p) * out_stride + feature;
            *to = add ? *to + y : y;
        }
    }
}

// As in matmul.cu: rows of x as `half_rows` leaves them, x_stride bytes apart, `scales` that of each; `powers` those of the rows of w and of
// `up`, matrices matrix_rows rows apart. The grid: (n / columns, rows / features; with `up` twice as many); shared memory: 256 bytes for each
// feature and column. By expert: tiles of at most so many columns. `matmul_256`: 128 features, 256 columns, 256 threads, one matrix; `matmul_128`:
// 128, 128, 256; `matmul_32`: 64, 32, 128.
#define ENTRY(NAME, MI, NP, WR, WC, BLOCKS)                                                                                         \
    extern "C" __global__ void __launch_bounds__(WARP* WR* WC, BLOCKS) NAME(                                                        \
        const u8* w, u64 row_bytes, u32 matrix_rows, u32 rows, u32 blocks, const float* powers, const float* up_powers, const u8* x, \
        u32 x_stride, const float* scales, u32 n, const u32* order, const Tile* tiles, u32 share, const u8* up, u32 act,            \
        const float* bias, float* out, u32 out_stride, u32 add) {                                                                   \
        extern __shared__ __align__(128) u8 memory[];                                                                               \
        matmul<FORMAT, MI, NP, WR, WC>(                                                                                             \
            memory, w, row_bytes, matrix_rows, rows, blocks, powers, up_powers, x, x_stride, scales, n, order, tiles, share, up,    \
            act, bias, out, out_stride, add);                                                                                       \
    }
ENTRY(matmul_256, 4, 4, 2, 4, 1)
ENTRY(matmul_128, 2, 4, 4, 2, 1)
ENTRY(matmul_32, 2, 1, 2, 2, 4)
