// The products of matmul.cu in blocks of 64 features and 64 columns (48 or 32 where a sub-block has two scales), for many columns of one
// matrix; from sm_80 on. Bits are the same.
//
// A warp takes all of them for one of the eight sums: what a warp needs of the weights stays in registers while columns pass by. A group's
// weights are unpacked into one half of shared memory while the other half is multiplied, so that one barrier a group is enough. An
// instruction on f32 pipes for each multiply-add's share of scales remains the limit: some 18.5 a product of 16 x 8 x 32 (kind MIN), and
// 100 a group for the unpacking.
#pragma once

#define WIDE_THREADS 256

// A group of a tile, as in `Stage`; there are two.
template <class F>
struct __align__(16) Wide {
    typedef Stage<F, 4, 4> S;
    static const int COLS = F::KIND == MIN16 ? 32 : S::PAIRS ? 48 : 64; // as registers allow
    u8 w[8][64 * 32 + 16];
    u8 x[8][COLS * 32 + 32];
    __align__(16) float d[8][64];
    __align__(16) u32 sc[8][S::PAIRS ? 64 : 1];
    __align__(16) float m[S::MINS ? S::MINS : 1][8][S::MINS ? 64 : 1];
    __align__(16) float scale[COLS][S::SCALES + 4];
};

template <class F>
__device__ __forceinline__ void matmul_wide(
    u8* memory, const u8* w, u64 row_bytes, u32 rows, u32 blocks, const Block* x, u32 x_stride, u32 n, const u8* up, u32 act,
    const float* bias, float* out, u32 out_stride, u32 add) {
    typedef Stage<F, 4, 4> S;
    const int MI = 4, COLS = Wide<F>::COLS, J = COLS / 8;
    Wide<F>* const stages = (Wide<F>*)memory;
    __shared__ u32 at[COLS]; // columns' blocks
    const u32 first = blockIdx.x * COLS, t = threadIdx.x, lane = t % WARP, b = t / WARP;
    const u32 groups = F::BLOCK == 256 ? blocks : (blocks + 7) / 8;
    // This thread loads sub-block t % 8 of rows t / 8 and t / 8 + 32. With `up`, the lower half of the rows are gate's.
    const u32 made = up ? 32 : 64;
    auto load = [&](u32 i, Wide<F>& s, int half) {
        const u32 local = t / 8 + 32 * half, k = t % 8, place = local % 8 * (2 * MI) + local / 8;
        const u32 feature = blockIdx.y * made + local % made;
        const u8* from = (local < made ? w : up) + row_bytes * (feature < rows ? feature : 0);
        Sub sub;
        load_part<F>(sub, from, blocks, i, k);
        u32 q[8];
#pragma unroll
        for (int j = 0; j < 8; j++) q[j] = F::ZERO ? (sub.q[j] + 0x01010101u * (128 - F::ZERO)) ^ 0x80808080u : sub.q[j];
        *(uint4*)(s.w[k] + unit(local, 0)) = make_uint4(q[0], q[1], q[2], q[3]);
        *(uint4*)(s.w[k] + unit(local, 1)) = make_uint4(q[4], q[5], q[6], q[7]);
        s.d[k][place] = sub.d;
        if (S::PAIRS) s.sc[k][place] = both(sub.sc);
#pragma unroll
        for (int e = 0; e < S::MINS; e++) s.m[e][k][place] = sub.m[e];
    };
    // And activations: 16 bytes t % 16 of columns t / 16, t / 16 + 16, ...; columns past the end repeat the last.
    auto copy_columns = [&](u32 i, Wide<F>& s) {
        const u32 u = t % 16;
#pragma unroll
        for (int l = 0; l < COLS / 16; l++) {
            const u32 col = t / 16 + 16 * l;
            const Block* from = x + at[col] + i;
            copy16(s.x[u / 2] + unit(col, u & 1), from->q + 16 * u);
            const u32 skip = F::KIND == MIN16 && u >= 2 ? 8 : 0;
            if (u < S::SCALES / 4) copy16(s.scale[col] + 4 * u, from->scale + 4 * u + skip);
        }
    };

    float acc[MI][J][4];
#pragma unroll
    for (int mi = 0; mi < MI; mi++)
#pragma unroll
        for (int j = 0; j < J; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) acc[mi][j][e] = 0.0f;

    if (t < COLS) at[t] = (first + t < n ? first + t : n - 1) * x_stride;
    __syncthreads();
    copy_columns(0, stages[0]);
    load(0, stages[0], 0);
    load(0, stages[0], 1);
    for (u32 i = 0; i < groups; i++) {
        Wide<F>&s = stages[i & 1], &next = stages[~i & 1];
        copies_done();
        __syncthreads();
        if (i + 1 < groups) copy_columns(i + 1, next);
        // Lane 4r + c of a fragment: rows r and r + 8, columns 2c and 2c + 1.
        const u32 r = lane / 4, c = lane % 4;
        u32 fa[MI][4];
        RowScales scales[MI];
        u32 fb[4];
#pragma unroll
        for (int mi = 0; mi < MI; mi++) {
            const u32 place = r * (2 * MI) + 2 * mi;
            load_matrices(fa[mi], shared_address(s.w[b] + unit(16 * mi + lane % 16, lane / 16)));
            scales[mi].d = *(const float2*)(s.d[b] + place);
            if (S::PAIRS) scales[mi].sc = *(const uint2*)(s.sc[b] + place);
#pragma unroll
            for (int e = 0; e < S::MINS; e++) scales[mi].m[e] = *(const float2*)(s.m[e][b] + place);
        }
#pragma unroll
        for (int j = 0; j < J; j++) {
            // Halfway and at the end of the columns the next group's weights are there.
            if (j % (J / 2) == 0 && i + 1 < groups) load(i + 1, next, j / (J / 2));
            // Keeps ptxas from loading so far ahead that registers run out.
            if (S::PAIRS) __syncwarp();
            if (j % 2 == 0) load_matrices(fb, shared_address(s.x[b] + unit(8 * (j + lane / 16) + lane % 8, lane / 8 & 1)));
            const float* const x0 = s.scale[8 * j + 2 * c];
#pragma unroll
            for (int mi = 0; mi < MI; mi++)
                add_products<F, false>(acc[mi][j], fa[mi], fb[j % 2 * 2], fb[j % 2 * 2 + 1], scales[mi], x0, x0 + S::SCALES + 4, b);
        }
    }

    // The eight sums meet, 16 columns at a time.
    const int STRIDE = S::STRIDE, SUM = S::SUM;
    float* image = (float*)memory;
#pragma unroll
    for (int h = 0; h < J / 2; h++) {
        __syncthreads();
#pragma unroll
        for (int mi = 0; mi < MI; mi++)
#pragma unroll
            for (int e = 0; e < 8; e++)
                image[b * SUM + (8 * (e / 4) + 2 * (lane % 4) + e % 2) * STRIDE + 16 * mi + lane / 4 + 8 * (e / 2 % 2)] =
                    acc[mi][2 * h + e / 4][e % 4];
        __syncthreads();
        auto sum = [&](u32 c, u32 r) { return sum_eight(image + c * STRIDE + r, SUM); };
#pragma unroll 1
        for (u32 o = t; o < 16 * made; o += WIDE_THREADS) {
            const u32 c = o / made, r = o % made, p = first + 16 * h + c, row = blockIdx.y * made + r;
            if (p >= n || row >= rows) continue;
            float y = sum(c, r);
            if (up) y = activation(y, act) * sum(c, r + made);
            if (bias) y += bias[row];
            float* to = out + (u64)p * out_stride + row;
            *to = add ? *to + y : y;
        }
    }
}
