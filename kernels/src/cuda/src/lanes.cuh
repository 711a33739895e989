// Attention by warps on f16 tensor cores: rows of keys and values come to shared memory as f16, whatever the caches hold, and a warp takes
// the queries of 16 lanes through them, a lane being one head of one row. From sm_80 on.
//
// Queries go in f16 under a power of two for each lane, weights under one for all, and weighted sums are divided by the sum of the
// rounded weights, which come as one more column of the values: all ones. Of eight lanes (PARTS 2) both go in two f16 parts, the low ones
// where the other eight lanes would be. What that costs: docs/cuda.md. The softmax is in powers of two, its maximum an integer, as
// everywhere.
#pragma once
#include "half.cuh"
#include "softmax.cuh"

// Of caches.
enum Type { IS_F16, IS_Q8_0, IS_Q4_0 };

// Columns col .. col + dim of the rows of a cache; `width` is that of all heads.
struct Columns {
    const u8* data;
    u32 row_bytes, type, width, col, dim;
    // Bytes of so many values, without scales.
    __device__ __forceinline__ u32 bytes(u32 values) const { return 2 * values >> type; }
    // Where this head's scales begin in a row; aligned to two bytes.
    __device__ __forceinline__ u32 scales() const { return bytes(width) + col / 16; }
};

// Rows in shared memory: DIMS values of a key, as many of a value, and 16 bytes, so that eight rows lie in different banks. PACKED ones,
// which are yet to be unpacked: both as they lie in the cache, then 16 bytes of scales of each.
template <int DIMS>
struct Row {
    static const u32 VALUE = 2 * DIMS, BYTES = 4 * DIMS + 16;
};
template <int DIMS>
__device__ __forceinline__ u32 packed_bytes(const Columns& k, const Columns& v) {
    return k.bytes(DIMS) + v.bytes(DIMS) + 32;
}

__device__ __forceinline__ u32 sub_halves(u32 a, u32 b) {
    u32 c;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}
__device__ __forceinline__ u32 mul_halves(u32 a, u32 b) {
    u32 c;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}
__device__ __forceinline__ u32 load_shared_half(u32 at) {
    u16 x;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(at) : "memory");
    return x;
}
__device__ __forceinline__ uint4 load_shared(u32 at) {
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(at) : "memory");
    return x;
}
__device__ __forceinline__ void store_shared(u32 at, uint4 x) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" : : "r"(at), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}

template <int ROWS, int UNROLL, class One>
__device__ __forceinline__ void each_row(u32 from, u32 scales, u32 to, u32 from_step, u32 to_step, One one) {
#pragma unroll UNROLL
    for (u32 r = 0; r < ROWS; r++) one(from + r * from_step, scales + r * from_step, to + r * to_step);
}

// Thread `share` of eight unpacks its share of the keys or values of ROWS rows: d q, rounded to f16. Rows are `from_step` and `to_step` apart.
template <int DIMS, int ROWS, int UNROLL>
__device__ __forceinline__ void unpack_rows(const Columns& of, u32 share, u32 from, u32 scales, u32 to, u32 from_step, u32 to_step) {
    scales += of.scales() % 4;
    // An f16 of 0x6400 + b is 1024 + b.
    const auto put = [&](u32 at, u32 q, u32 p, u32 zero, u32 d) {
        const auto two = [&](u32 q, u32 which) { return mul_halves(sub_halves(__byte_perm(q, 0x64646464, which), zero), d); };
        store_shared(at, make_uint4(two(q, 0x4140), two(q, 0x4342), two(p, 0x4140), two(p, 0x4342)));
    };
    // 16 bytes: 8 values of f16, 16 of q8_0, a block of 32 of q4_0.
    if (of.type == IS_F16) {
        each_row<ROWS, UNROLL>(from, scales, to, from_step, to_step, [&](u32 from, u32, u32 to) {
#pragma unroll
            for (u32 i = 0; i < DIMS / 8; i += 8)
                if (DIMS % 64 == 0 || i + share < DIMS / 8) store_shared(to + 16 * (i + share), load_shared(from + 16 * (i + share)));
        });
    } else if (of.type == IS_Q8_0) {
        each_row<ROWS, UNROLL>(from, scales, to, from_step, to_step, [&](u32 from, u32 scales, u32 to) {
#pragma unroll
            for (u32 i = 0; i < DIMS / 16; i += 8) {
                const u32 c = i + share, sign = 0x80808080, zero = 0x64806480;
                if (DIMS % 128 && c >= DIMS / 16) break;
                const uint4 q = load_shared(from + 16 * c);
                const u32 d = 16 * c < of.dim ? load_shared_half(scales + c / 2 * 2) * 0x10001 : 0;
                put(to + 32 * c, q.x ^ sign, q.y ^ sign, zero, d);
                put(to + 32 * c + 16, q.z ^ sign, q.w ^ sign, zero, d);
            }
        });
    } else {
        each_row<ROWS, UNROLL>(from, scales, to, from_step, to_step, [&](u32 from, u32 scales, u32 to) {
            const u32 low = 0x0f0f0f0f, zero = 0x64086408;
            if (DIMS % 256 && share >= DIMS / 32) return;
            const uint4 q = load_shared(from + 16 * share);
            const u32 d = 32 * share < of.dim ? load_shared_half(scales + 2 * share) * 0x10001 : 0;
            put(to + 64 * share, q.x & low, q.y & low, zero, d);
            put(to + 64 * share + 16, q.z & low, q.w & low, zero, d);
            put(to + 64 * share + 32, q.x >> 4 & low, q.y >> 4 & low, zero, d);
            put(to + 64 * share + 48, q.z >> 4 & low, q.w >> 4 & low, zero, d);
        });
    }
}

// What one of the eight threads that copy or unpack a row does: it is number `share` of them.
template <int DIMS, bool PACKED>
struct Mover {
    // Its pieces of 16 bytes, every eighth: its first of row 0, bytes that rows are apart, how many it writes and has bytes for.
    struct Pieces {
        const u8* first;
        u32 row_bytes, all, here;
        __device__ __forceinline__ void copy(u32 slot, u32 to) const {
            const u8* const from = first + (u64)row_bytes * slot;
#pragma unroll
            for (u32 i = 0; i < DIMS / 64 + (DIMS % 64 != 0); i++)
                if ((!PACKED && DIMS % 64 == 0) || i < all) copy_or_zero<16, true>(to + 128 * i, from + 128 * i, i < here);
        }
    };
    // Its word of scales likewise.
    struct Word {
        const u8* first;
        u32 row_bytes, here;
        __device__ __forceinline__ void copy(u32 slot, u32 to) const { copy_or_zero<4, false>(to, first + (u64)row_bytes * slot, here); }
    };
    static const bool LEAN = PACKED && DIMS > 128; // keeps nothing that can be found again: registers do not do
    Columns k, v;
    u32 share, pitch, value; // bytes that rows are apart, and that a row's value begins at
    Pieces keys, values;
    Word scales;

    __device__ __forceinline__ Pieces pieces(const Columns& of) const {
        const auto mine = [&](u32 values) { return (of.bytes(values) / 16 + 7 - share) / 8; };
        return {of.data + of.bytes(of.col) + 16 * share, of.row_bytes, mine(DIMS), mine(of.dim)};
    }
    __device__ __forceinline__ Mover(const Columns& k, const Columns& v) : k(k), v(v), share(threadIdx.x % 8) {
        pitch = PACKED ? packed_bytes<DIMS>(k, v) : Row<DIMS>::BYTES, value = PACKED ? k.bytes(DIMS) : Row<DIMS>::VALUE;
        if (!LEAN) keys = pieces(k), values = pieces(v);
        if (PACKED && !LEAN) scales = word();
    }
    // Four threads have a word of the keys' scales, four of the values'. The first word may begin with another head's.
    __device__ __forceinline__ Word word() const {
        const bool key = share < 4;
        const u32 first = key ? k.scales() : v.scales(), word = (first & ~3u) + 4 * (share % 4);
        const bool here = (key ? k.type : v.type) != IS_F16 && word < first + (key ? k.dim : v.dim) / 16;
        return {(key ? k.data : v.data) + word, key ? k.row_bytes : v.row_bytes, here};
    }
    // A slot's row to `to`.
    __device__ __forceinline__ void copy(u32 slot, u32 to) const {
        (LEAN ? pieces(k) : keys).copy(slot, to + 16 * share);
        (LEAN ? pieces(v) : values).copy(slot, to + value + 16 * share);
        if (PACKED) (LEAN ? word() : scales).copy(slot, to + pitch - 32 + 4 * share);
    }
    // Rows that `copy` brought, `step` rows apart.
    template <int ROWS, int UNROLL>
    __device__ __forceinline__ void unpack(u32 from, u32 to, u32 step) const {
        const u32 from_step = step * pitch, to_step = step * Row<DIMS>::BYTES;
        unpack_rows<DIMS, ROWS, UNROLL>(k, share, from, from + pitch - 32, to, from_step, to_step);
        unpack_rows<DIMS, ROWS, UNROLL>(v, share, from + value, from + pitch - 16, to + Row<DIMS>::VALUE, from_step, to_step);
    }
};

// 2^f for |f| <= 1/2: to f32's precision, or to 3e-6, a fiftieth of what f16 rounds.
template <bool EXACT>
__device__ __forceinline__ float exp2_part(float f) {
    float p = EXACT ? 0.00015353359f : 0.009582853f;
    if (EXACT) p = fmaf(fmaf(p, f, 0.0013398875f), f, 0.009618437f);
    p = fmaf(p, f, EXACT ? 0.055503324f : 0.055906426f);
    p = fmaf(p, f, EXACT ? 0.24022648f : 0.24024099f);
    p = fmaf(p, f, EXACT ? 0.6931472f : 0.6931242f);
    return fmaf(p, f, 1.0f);
}

// Of a power of two.
__device__ __forceinline__ float inverse(float x) { return __int_as_float(0x7f000000 - __float_as_int(x)); }

// 16 lanes of a warp, or 8 in two parts. A thread has lane `threadIdx.x % 32 / 4`, and with 16 the one eight further.
template <int DIMS, int PARTS>
struct Lanes {
    static const int MINE = 2 / PARTS, STEPS = DIMS / 16, TILES = DIMS / 8, ROW = Row<DIMS>::BYTES, SUMS = PARTS == 2 ? 1 : 4;
    u32 q[STEPS][4];
    float acc[TILES][4], ones[SUMS]; // of values, and of ones (in two parts a thread's own): 2^14 times what they are
    float max[MINE], undo[MINE]; // the largest score, about; what undoes a query's power of two

    __device__ __forceinline__ void begin() {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            ones[e % SUMS] = 0.0f;
#pragma unroll
            for (int n = 0; n < TILES; n++) acc[n][e] = 0.0f;
        }
#pragma unroll
        for (int i = 0; i < MINE; i++) max[i] = -CUT;
    }

    // The query of this thread's lane i is scale times from(i, scale), `dim` values.
    template <class From>
    __device__ __forceinline__ void ask(u32 dim, From from) {
        const u32 own = threadIdx.x % 4;
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            float scale, most = 0.0f;
            const float* const x = from(i, scale);
#pragma unroll 4
            for (u32 d = own; d < dim; d += 4) most = fmaxf(most, fabsf(x[d]));
            most = fmaxf(most, __shfl_xor_sync(ALL, most, 1));
            most = fmaxf(most, __shfl_xor_sync(ALL, most, 2));
            // The least queries make the same of all keys.
            const float by = fminf(scale_for(most * scale), 1152921504606846976.0f);
            undo[i] = inverse(by);
#pragma unroll
            for (int s = 0; s < STEPS; s++) {
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const u32 d = 16 * s + 8 * h;
                    float2 y = make_float2(0.0f, 0.0f);
                    if (d < dim) y = make_float2(x[d + 2 * own] * scale * by, x[d + 2 * own + 1] * scale * by);
                    if (PARTS == 2) split(y.x, y.y, q[s][2 * h], q[s][2 * h + 1]);
                    else q[s][2 * h + i] = halves(y.x, y.y);
                }
                if (DIMS > 128) __syncwarp(); // else all are loaded at once, and registers do not do
            }
        }
    }

    // N rows at `rows`. Where `all` does not hold, only those for which seen(i, row) does.
    template <int N, class Seen>
    __device__ __forceinline__ void step(u32 rows, bool all, Seen seen) {
        const u32 lane = threadIdx.x % WARP, pair = 2 * (lane % 4);
        // Scores: tile n has rows 8 n .. 8 n + 8.
        float w[N / 8][4];
        const u32 keys = rows + (lane / 16 * 8 + lane % 8) * ROW + lane / 8 % 2 * 16;
#pragma unroll
        for (int n = 0; n < N / 8; n += 2) {
#pragma unroll
            for (int e = 0; e < 8; e++) w[n + e / 4][e % 4] = 0.0f;
#pragma unroll
            for (int s = 0; s < STEPS; s++) {
                u32 f[4];
                load_matrices(f, keys + 8 * n * ROW + 32 * s);
                mma_f16(w[n], q[s], f[0], f[1]);
                mma_f16(w[n + 1], q[s], f[2], f[3]);
            }
        }
        if (PARTS == 2)
#pragma unroll
            for (int n = 0; n < N / 8; n++) w[n][0] += w[n][2], w[n][1] += w[n][3];
        const auto is_seen = [&](int i, int n, int e) { return seen(i, 8 * n + pair + e); };
        if (!all)
#pragma unroll
            for (int i = 0; i < MINE; i++)
#pragma unroll
                for (int n = 0; n < N / 8; n++)
#pragma unroll
                    for (int e = 0; e < 2; e++)
                        if (!is_seen(i, n, e)) w[n][2 * i + e] = __int_as_float(0xff800000);

        // Weights, of which 2^-40 and less are 0. Infinite scores count as the largest there are, NaN as the lowest.
        float shift[MINE];
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            float top = __int_as_float(0xff800000);
#pragma unroll
            for (int n = 0; n < N / 8; n++) top = fmaxf(fmaxf(top, w[n][2 * i]), w[n][2 * i + 1]);
            top = fmaxf(top, __shfl_xor_sync(ALL, top, 1));
            top = fmaxf(top, __shfl_xor_sync(ALL, top, 2));
            top = fminf(top * undo[i], CUT);
            const float next = top > max[i] + 1.0f ? nearest(top) : max[i];
            shift[i] = max[i] - next;
            max[i] = next;
            const float by = inverse(undo[i]), lowest = fmaxf(-CUT, next - 40.0f) * by, highest = CUT * by, less = 14.0f - next;
#pragma unroll
            for (int n = 0; n < N / 8; n++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const float x = fmaf(fminf(fmaxf(w[n][2 * i + e], lowest), highest), undo[i], less), whole = x + 12582912.0f;
                    const float p = exp2_part<PARTS == 2>(x - (whole - 12582912.0f));
                    w[n][2 * i + e] = __int_as_float(__float_as_int(p) + (__float_as_int(whole) << 23));
                }
        }
        if (!all)
#pragma unroll
            for (int i = 0; i < MINE; i++)
#pragma unroll
                for (int n = 0; n < N / 8; n++)
#pragma unroll
                    for (int e = 0; e < 2; e++)
                        if (!is_seen(i, n, e)) w[n][2 * i + e] = 0.0f;
        bool moves = false;
#pragma unroll
        for (int i = 0; i < MINE; i++) moves |= shift[i] != 0.0f;
        if (__any_sync(ALL, moves)) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float less = scale2(1.0f, shift[e / 2 % MINE]);
                if (e < SUMS) ones[e % SUMS] *= less;
#pragma unroll
                for (int n = 0; n < TILES; n++) acc[n][e] *= less;
            }
        }
        u32 a[N / 16][4];
#pragma unroll
        for (int n = 0; n < N / 8; n++) {
            u32* const to = a[n / 2] + n % 2 * 2;
            if (PARTS == 2) split(w[n][0], w[n][1], to[0], to[1]), ones[0] += w[n][0] + w[n][1];
            else to[0] = halves(w[n][0], w[n][1]), to[1] = halves(w[n][2], w[n][3]);
        }

        // Their sums: tile n has columns 8 n .. 8 n + 8.
        const u32 values = rows + Row<DIMS>::VALUE + lane % 16 * ROW + lane / 16 * 16;
#pragma unroll
        for (int s = 0; s < N / 16; s++) {
            if constexpr (PARTS == 1) mma_f16(ones, a[s], 0x3c003c00, 0x3c003c00);
#pragma unroll
            for (int n = 0; n < TILES; n += 2) {
                u32 f[4];
                load_turned(f, values + 16 * s * ROW + 16 * n);
                mma_f16(acc[n], a[s], f[0], f[1]);
                mma_f16(acc[n + 1], a[s], f[2], f[3]);
            }
        }
    }

    // The sum of weights of lane i, for all threads of a warp, and element e of tile n of what they weigh.
    __device__ __forceinline__ float sum(int i) const { return PARTS == 2 ? sum_lanes<4>(ones[0]) : ones[2 * i % SUMS]; }
    __device__ __forceinline__ float weighed(int i, int n, int e) const {
        return PARTS == 2 ? acc[n][e] + acc[n][2 + e] : acc[n][2 * i + e];
    }
};
