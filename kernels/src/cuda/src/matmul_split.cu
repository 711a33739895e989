// F16 and BF16 weights times the rows of prompts on f16 or bf16 tensor cores; one type a compilation (FORMAT). From sm_80 on.
//
// Weights enter as they are, an activation as the sum of two f16 parts or three bf16 ones (`split_rows`), so that every product
// is exact to 2^-23 of the activation. Tensor cores cut what they add to the exponent of the largest: so each sum of 16 products and parts,
// the smallest part first, starts at zero and is added to the result in f32. A column's bits depend on its row of x alone.
//
// A block of 8 (or 4) warps copies stages of 32 elements into shared memory, STAGES - 1 ahead of the one it multiplies (cp.async); a warp
// multiplies 16 MI features by 16 NP columns.
#include "half.cuh"
#include "many.cuh"
#define INFINITY __int_as_float(0x7f800000)

struct F16 {
    static const int PARTS = 2;
    static __device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { mma_f16(c, a, b0, b1); }
    static __device__ __forceinline__ void split(float x, u16 (&parts)[PARTS]) {
        parts[0] = to_f16(x);
        parts[1] = fabsf(x) < INFINITY ? to_f16(x - f16(parts[0])) : 0;
    }
};
// One part, for weights that are rounded to f16 themselves (matmul_half.cu).
struct HALF {
    static const int PARTS = 1;
    static __device__ __forceinline__ void split(float x, u16 (&parts)[PARTS]) { parts[0] = to_f16(x); }
};
// Three parts of eight bits are all of an f32: no scale is needed.
struct BF16 {
    static const int PARTS = 3;
    static __device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { mma_bf16(c, a, b0, b1); }
    static __device__ __forceinline__ void split(float x, u16 (&parts)[PARTS]) {
        const bool finite = fabsf(x) < INFINITY;
        parts[0] = finite ? __float_as_uint(x) >> 16 : to_bf16(x);
        const float rest = finite ? x - bf16(parts[0]) : 0.0f;
        parts[1] = __float_as_uint(rest) >> 16;
        parts[2] = __float_as_uint(rest - bf16(parts[1])) >> 16;
    }
};

// Where 16 bytes of a row of 64 lie: eight rows' bytes of one place lie in different banks.
__device__ __forceinline__ u32 unit(u32 row, u32 at) { return 64 * row + 16 * (at ^ (row >> 1 & 3)); }

template <class F, int MI, int NP, int WR, int WC, int STAGES>
__device__ __forceinline__ void matmul(
    u8* memory, const u8* w, u64 row_bytes, u64 matrix_bytes, u32 rows, u32 len, const u8* x, u32 x_stride, const float* scales, u32 n,
    const u32* order, const Tile* tiles, u32 share, const u8* up, u32 act, const float* bias, float* out, u32 out_stride, u32 add) {
    const int P = F::PARTS, STRIP = 16 * MI, ROWS = STRIP * WR, COLS = 16 * NP * WC, THREADS = WARP * WR * WC;
    const int STAGE = 64 * (ROWS + P * COLS);
    // 16-byte pieces that follow each other of a column, and how often they go into its parts.
    const int RUN = P == 2 ? 8 : 4, TURNS = 4 * P / RUN;
    const int W_COPIES = 4 * ROWS / THREADS, X_COPIES = RUN * COLS / THREADS;
    const Tile tile = tile_of<COLS>(tiles, n);
    if (tile.first >= tile.end) return;
    const u32 t = threadIdx.x, lane = t % WARP, wr = t / WARP % WR, wc = t / WARP / WR;

    // With `up`, of each strip the first half is gate's. Features and columns past the end repeat the last.
    const u32 strip = up ? STRIP / 2 : STRIP, first = blockIdx.y * strip * WR;
    const u8* from = (up && t / 4 % STRIP >= strip ? up : w) + matrix_bytes * tile.matrix + row_bytes * first + 16 * (t % 4);
    static_assert(THREADS / 4 % STRIP == 0, "a thread loads the same row of strips");
    const u32 last = rows - 1 - first, row = t / 4 / STRIP * strip + t / 4 % strip;
    // In shared memory, since registers are short.
    __shared__ u32 x_at[COLS];
    if (t < COLS) {
        const u32 p = tile.first + t;
        x_at[t] = job_at(order, p < tile.end ? p : tile.end - 1) / share * x_stride;
    }
    __syncthreads();
    u32 k = 0; // of the next stage to copy
    auto copy = [&](u32 to) {
        if (k < len) {
#pragma unroll
            for (int l = 0; l < W_COPIES; l++) {
                const u32 r = row + THREADS / 4 / STRIP * strip * l;
                copy_or_zero<16, true>(to + unit(t / 4 + THREADS / 4 * l, t % 4), from + row_bytes * (r < last ? r : last), k + 8 * (t % 4) < len);
            }
            to += 64 * ROWS;
#pragma unroll
            for (int l = 0; l < X_COPIES; l++)
#pragma unroll
                for (int turn = 0; turn < TURNS; turn++) {
                    const u32 col = t / RUN + THREADS / RUN * l, piece = t % RUN + RUN * turn;
                    copy_or_zero<16, true>(to + 64 * COLS * (piece / 4) + unit(col, piece % 4), x + x_at[col] + 16 * piece, true);
                }
        }
        stage_begun();
        k += 32, from += 64, x += 64 * P;
    };

    float acc[MI][NP][2][4];
#pragma unroll
    for (int mi = 0; mi < MI; mi++)
#pragma unroll
        for (int j = 0; j < NP; j++)
#pragma unroll
            for (int e = 0; e < 8; e++) acc[mi][j][e / 4][e % 4] = 0.0f;
    const u32 start = shared_address(memory);
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) copy(start + STAGE * s);
    // What a lane loads of fragments; the second half of a stage's elements lies 32 bytes away.
    const u32 a_at = unit(STRIP * wr + lane % 16, lane / 16);
    const u32 b_at = 64 * ROWS + unit(16 * NP * wc + lane / 16 * 8 + lane % 8, lane / 8 & 1);
    u32 here = start, ahead = start + STAGE * (STAGES - 1);
    while (k < len + 32 * (STAGES - 1)) {
        stages_done<STAGES - 2>();
        __syncthreads();
        copy(ahead);
        ahead = ahead == start + STAGE * (STAGES - 1) ? start : ahead + STAGE;
        // Not unrolled: registers are short.
#pragma unroll 1
        for (int half = 0; half < 2; half++) {
            u32 fa[MI][4];
#pragma unroll
            for (int mi = 0; mi < MI; mi++) load_matrices(fa[mi], here + 1024 * mi + (a_at ^ 32 * half));
#pragma unroll
            for (int j = 0; j < NP; j++) {
                float sum[MI][2][4] = {};
#pragma unroll
                for (int p = P - 1; p >= 0; p--) {
                    u32 fb[4];
                    load_matrices(fb, here + 64 * COLS * p + 1024 * j + (b_at ^ 32 * half));
#pragma unroll
                    for (int mi = 0; mi < MI; mi++)
#pragma unroll
                        for (int h = 0; h < 2; h++) F::mma(sum[mi][h], fa[mi], fb[2 * h], fb[2 * h + 1]);
                }
#pragma unroll
                for (int mi = 0; mi < MI; mi++)
#pragma unroll
                    for (int e = 0; e < 8; e++) acc[mi][j][e / 4][e % 4] += sum[mi][e / 4][e % 4];
            }
        }
        here = here == start + STAGE * (STAGES - 1) ? start : here + STAGE;
    }

    // Results go through shared memory, 16 columns of each warp at a time.
    float* const image = (float*)memory;
#pragma unroll
    for (int j = 0; j < NP; j++) {
        __syncthreads();
        to_image(image, ROWS + 4, 16 * wc, STRIP * wr, lane, acc, j);
        __syncthreads();
#pragma unroll 1
        for (u32 o = t; o < 16 * WC * strip * WR; o += THREADS) {
            const u32 c = o / (strip * WR), r = o % (strip * WR), feature = first + r;
            const u32 p = tile.first + 16 * (NP * (c / 16) + j) + c % 16;
            if (p >= tile.end || feature >= rows) continue;
            const u32 job = job_at(order, p);
            const float scale = scales ? scales[job / share] : 1.0f;
            const float* from = image + c * (ROWS + 4) + r / strip * STRIP + r % strip;
            float y = *from * scale;
            if (up) y = activation(y, act) * (from[strip] * scale);
            if (bias) y += bias[feature];
            float* to = out + (u64)job * out_stride + feature;
            *to = add ? *to + y : y;
        }
    }
}

// As in matmul.cu, with rows of x as `split_rows` leaves them, x_stride bytes apart, `scales` that of each (BF16: none), and len elements
// a row (a multiple of 32 where more follow). The grid: (n / columns, rows / features; with `up` twice as many); shared memory: STAGES
// times 64 bytes for each feature and each part of each column. `matmul`: 256 features, 128 columns (BF16: 64), 256 threads, one matrix.
// `matmul_32`: 64, 32, 128; by expert too.
#define ENTRY(NAME, MI, NP, WR, WC, BYTES)                                                                                          \
    extern "C" __global__ void __launch_bounds__(WARP* WR* WC, 1) NAME(                                                             \
        const u8* w, u64 row_bytes, u64 matrix_bytes, u32 rows, u32 len, const u8* x, u32 x_stride, const float* scales, u32 n,     \
        const u32* order, const Tile* tiles, u32 share, const u8* up, u32 act, const float* bias, float* out, u32 out_stride, u32 add) { \
        extern __shared__ __align__(128) u8 memory[];                                                                              \
        matmul<FORMAT, MI, NP, WR, WC, BYTES / (64 * 16 * (MI * WR + FORMAT::PARTS * NP * WC))>(                                    \
            memory, w, row_bytes, matrix_bytes, rows, len, x, x_stride, scales, n, order, tiles, share, up, act, bias, out, out_stride, add); \
    }
ENTRY(matmul, 4, (FORMAT::PARTS == 2 ? 4 : 2), 4, 2, 98304)
ENTRY(matmul_32, 2, 1, 2, 2, 40960)

// Rows of x in parts: for every 32 values of a row of len (the last filled up with zeros) those of each part, 64 bytes, rows out_stride
// bytes apart; for F16 of x times a power of two that brings the row's largest finite value near 2^14, and what undoes it in `scales`
// (BF16: none). The grid: (rows), 256 threads.
template <class F>
__device__ __forceinline__ void split(const float* x, u32 x_stride, u32 len, u8* out, u32 out_stride, float* scales) {
    __shared__ float most[256 / WARP];
    const u32 t = threadIdx.x;
    x += (u64)blockIdx.x * x_stride;
    out += (u64)blockIdx.x * out_stride;
    float scale = 1.0f;
    if (scales) {
        float max = 0.0f;
        for (u32 i = t; i < len; i += 256)
            if (fabsf(x[i]) < INFINITY) max = fmaxf(max, fabsf(x[i]));
#pragma unroll
        for (int half = WARP / 2; half > 0; half /= 2) max = fmaxf(max, __shfl_xor_sync(ALL, max, half));
        if (t % WARP == 0) most[t / WARP] = max;
        __syncthreads();
#pragma unroll
        for (int w = 0; w < 256 / WARP; w++) max = fmaxf(max, most[w]);
        scale = scale_for(max);
        if (t == 0) scales[blockIdx.x] = 1.0f / scale;
    }
    for (u32 i = 2 * t; i < (len + 31) / 32 * 32; i += 512) {
        u16 one[F::PARTS], two[F::PARTS];
        F::split(i < len ? x[i] * scale : 0.0f, one);
        F::split(i + 1 < len ? x[i + 1] * scale : 0.0f, two);
#pragma unroll
        for (int p = 0; p < F::PARTS; p++)
            *(u32*)(out + 64 * (i / 32 * F::PARTS + p) + 2 * (i % 32)) = one[p] | (u32)two[p] << 16;
    }
}

#define ROWS(NAME, F)                                                                            \
    extern "C" __global__ void __launch_bounds__(256) NAME(                                      \
        const float* x, u32 x_stride, u32 len, u8* out, u32 out_stride, float* scales) {         \
        split<F>(x, x_stride, len, out, out_stride, scales);                                     \
    }
ROWS(split_rows, FORMAT)
#ifdef HALF_ROWS
// The same in one f16 part, for weights of block formats.
ROWS(half_rows, HALF)
#endif
