// Block formats as the device holds them, and a sub-block of 32 weights unpacked to integers and scales.
//
// A row on the device is a few planes, one after another, each the same field of all blocks of the row, padded to 16 bytes:
// so that every field can be read by aligned 16-byte (or at least whole-word) loads. `kernels/src/cuda/layout.rs` makes the planes;
// Fields here and its table must agree. Bit layouts: quant/src/formats. Arithmetic: kernels/src/cpu/scalar/formats.rs.
#pragma once
#include "mma.cuh"

// How a sub-block's dot product is scaled: docs/numerics.md.
enum Kind { PLAIN, MIN, SCALE16, MIN16 };

// A sub-block's value = d (sc) (q - ZERO) + m.
struct Scales {
    float d;
    int sc[2];
    float m[2];
};

// 32 weights: word j of q holds values 4j..4j+4 as bytes.
struct Sub : Scales {
    u32 q[8];
};

// Where a row lies: in device memory, or some of its groups in shared memory (Staged).
struct Staged {
    const u8* at;
    __device__ __forceinline__ Staged operator+(u32 n) const { return {at + n}; }
    __device__ __forceinline__ void operator+=(u32 n) { at += n; }
};
#define LOAD(NAME, T)                                                                                                              \
    __device__ __forceinline__ T NAME(const u8* p) { return __ldg((const T*)p); }                                                  \
    __device__ __forceinline__ T NAME(Staged p) { return *(const T*)p.at; }
LOAD(load16, uint4)
LOAD(load4, u32)
LOAD(load2, u16)
LOAD(load1, u8)
#undef LOAD

// Or 16 such rows, of whose sub-blocks a warp takes a fragment for tensor cores: of lane 4r + c words c and c + 4 of rows r and r + 8, in the
// order (row r, row r + 8) of the earlier words, then of the later.
struct Fragment {
    u32 at;             // what ldmatrix takes of this lane: row lane % 16, 16 bytes further on in the upper lanes
    const u8 *low, *high; // rows r and r + 8
    __device__ __forceinline__ Fragment operator+(u32 n) const { return {at + n, low + n, high + n}; }
    __device__ __forceinline__ void operator+=(u32 n) { *this = *this + n; }
};

// Bytes of a plane of `n` fields of `bytes` each.
__device__ __forceinline__ constexpr u32 plane(u32 n, u32 bytes) { return (n * bytes + 15) & ~15u; }

__device__ __forceinline__ void words(u32 q[4], uint4 v) { q[0] = v.x; q[1] = v.y; q[2] = v.z; q[3] = v.w; }

// The words of 16 and of 32 bytes.
__device__ __forceinline__ void load_words(u32 (&v)[4], const u8* p) { words(v, load16(p)); }
__device__ __forceinline__ void load_words(u32 (&v)[2], Fragment p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(v[0]), "=r"(v[1]) : "r"(p.at));
}
__device__ __forceinline__ void load_words(u32 (&q)[8], const u8* p) {
    words(q, load16(p));
    words(q + 4, load16(p + 16));
}
__device__ __forceinline__ void load_words(u32 (&q)[4], Fragment p) { load_matrices(q, p.at); }

// Of each byte the bits that `mask` has moved to bit `from`, moved to bit `to`.
__device__ __forceinline__ u32 move(u32 v, u32 from, u32 to, u32 mask) {
    return (to == from ? v : to == 0 ? v >> from : __funnelshift_l(v, v, to - from)) & mask << to;
}

// 16 bytes: low nibbles are values 0..16, high nibbles 16..32. As everywhere below, values go `up` bits up in their bytes.
template <int W, class P>
__device__ __forceinline__ void nibbles(u32 (&q)[W], P p, u32 up) {
    u32 v[W / 2];
    load_words(v, p);
#pragma unroll
    for (int j = 0; j < W / 2; j++) {
        q[j] = move(v[j], 0, up, 0x0f0f0f0f);
        q[j + W / 2] = move(v[j], 4, up, 0x0f0f0f0f);
    }
}

// Four of a sub-block's 32 bits at p: those of its word j.
__device__ __forceinline__ u32 bits(const u8* p, int j) { return (load4(p) >> (4 * j)) & 15; }
__device__ __forceinline__ u32 bits(Fragment p, int j) {
    return (*(const u32*)(j % 2 ? p.high : p.low) >> (threadIdx.x % 4 * 4 + 16 * (j / 2))) & 15;
}

// Adds bit i of 32 to value i as its fifth bit.
template <int W, class P>
__device__ __forceinline__ void fifth(u32 (&q)[W], P p, u32 up) {
    // Bits 0..4 to bits 4, 12, 20, 28: the product has no carries, its wanted bits lie apart.
#pragma unroll
    for (int j = 0; j < W; j++) q[j] |= (bits(p, j) * (0x02040810u << up)) & 0x10101010u << up;
}

// 32 bytes, of which each value has `mask` at bit `shift`.
template <int W, class P>
__device__ __forceinline__ void fields(u32 (&q)[W], P p, u32 shift, u32 up, u32 mask) {
    load_words(q, p);
#pragma unroll
    for (int j = 0; j < W; j++) q[j] = move(q[j], shift, up, mask);
}

// Values of a 16-entry table, for the 8 nibbles of `q`: low nibbles to `lo`, high nibbles to `hi`.
__device__ __forceinline__ void look_up(const u32 t[4], u32 q, u32& lo, u32& hi) {
    u32 r[2];
#pragma unroll
    for (int h = 0; h < 2; h++, q >>= 16) {
        u32 below = __byte_perm(t[0], t[1], q & 0x7777), above = __byte_perm(t[2], t[3], q & 0x7777);
        r[h] = __byte_perm(below, above, 0x3210 + ((q & 0x8888) >> 1));
    }
    lo = __byte_perm(r[0], r[1], 0x6420);
    hi = __byte_perm(r[0], r[1], 0x7531);
}

template <int W, class P>
__device__ __forceinline__ void table_nibbles(u32 (&q)[W], P p, const u32 t[4]) {
    u32 v[W / 2];
    load_words(v, p);
#pragma unroll
    for (int j = 0; j < W / 2; j++) look_up(t, v[j], q[j], q[j + W / 2]);
}

// The 6-bit scale and minimum b of a Q4_K or Q5_K block, from its 16 bytes of header.
template <class P>
__device__ __forceinline__ void header_k4(Scales& s, P p, int b) {
    // The lower four bits of the last four, and the upper two of all, lie elsewhere than the first four's.
    const uint4 h = load16(p);
    const u32 at = 8 * (b & 3), low = b < 4 ? 63 : 15, high = b < 4 ? 0 : 48;
    const u32 sc = (b < 4 ? h.y : h.w) >> at & low | h.y >> (at + 2) & high;
    const u32 m = (b < 4 ? h.z : h.w) >> (b < 4 ? at : at + 4) & low | h.z >> (at + 2) & high;
    s.d = f16((u16)h.x) * (float)sc;
    s.m[0] = -f16((u16)(h.x >> 16)) * (float)m;
}

// Twice the E2M1 values' power of two: 2^(e - 128).
__device__ __forceinline__ float e8m0_half(u32 e) { return __uint_as_float(e < 2 ? 0x00200000u << e : (e - 1) << 23); }

// The fields of a block, in bytes, in the order of their planes.
template <u32... BYTES>
struct Fields {
    static const u32 COUNT = sizeof...(BYTES);
    static __device__ constexpr u32 bytes(u32 f) {
        const u32 all[] = {BYTES...};
        return all[f];
    }
};

// Each format: KIND, BLOCK (values of a block), ZERO (what unsigned values have too much of), its fields, and of sub-block b of block i
// (BLOCK 256), or of block i (BLOCK 32), of a row of n blocks
// quants(q, row, n, i, b, up): words of integers (see load_words), `up` bits up in their bytes, and
// scales(s, row, n, i, b).
// up(b): where tensor cores take them at the least cost. Where there is a ZERO, at the upper end of the byte: inverting the uppermost bit is
// then the subtraction.
#define UP(N) static __device__ __forceinline__ u32 up(u32 b) { return N; }
#define QUANTS                                                                                                                     \
    template <int W, class P>                                                                                                      \
    static __device__ __forceinline__ void quants(u32 (&q)[W], P row, u32 n, u32 i, u32 b, u32 up)
#define SCALES                                                                                                                     \
    template <class P>                                                                                                             \
    static __device__ __forceinline__ void scales(Scales& s, P row, u32 n, u32 i, u32 b)

struct Q4_0 : Fields<16, 2> {
    static const Kind KIND = PLAIN;
    static const int BLOCK = 32, ZERO = 8;
    UP(4)
    QUANTS { nibbles(q, row + 16 * i, up); }
    SCALES { s.d = f16(load2(row + plane(n, 16) + 2 * i)); }
};

struct Q4_1 : Fields<16, 4> {
    static const Kind KIND = MIN;
    static const int BLOCK = 32, ZERO = 0;
    UP(0)
    QUANTS { nibbles(q, row + 16 * i, up); }
    SCALES {
        u32 dm = load4(row + plane(n, 16) + 4 * i);
        s.d = f16((u16)dm);
        s.m[0] = f16((u16)(dm >> 16));
    }
};

struct Q5_0 : Fields<16, 4, 2> {
    static const Kind KIND = PLAIN;
    static const int BLOCK = 32, ZERO = 16;
    UP(3)
    QUANTS {
        nibbles(q, row + 16 * i, up);
        fifth(q, row + plane(n, 16) + 4 * i, up);
    }
    SCALES { s.d = f16(load2(row + plane(n, 16) + plane(n, 4) + 2 * i)); }
};

struct Q5_1 : Fields<16, 4, 4> {
    static const Kind KIND = MIN;
    static const int BLOCK = 32, ZERO = 0;
    UP(0)
    QUANTS {
        nibbles(q, row + 16 * i, up);
        fifth(q, row + plane(n, 16) + 4 * i, up);
    }
    SCALES {
        u32 dm = load4(row + plane(n, 16) + plane(n, 4) + 4 * i);
        s.d = f16((u16)dm);
        s.m[0] = f16((u16)(dm >> 16));
    }
};

struct Q8_0 : Fields<32, 2> {
    static const Kind KIND = PLAIN;
    static const int BLOCK = 32, ZERO = 0;
    UP(0)
    QUANTS { fields(q, row + 32 * i, 0, 0, 0xffffffff); }
    SCALES { s.d = f16(load2(row + plane(n, 32) + 2 * i)); }
};

struct IQ4_NL : Fields<16, 2> {
    static const Kind KIND = PLAIN;
    static const int BLOCK = 32, ZERO = 0;
    UP(0)
    QUANTS {
        const u32 t[4] = {0xbfad9881, 0xf6eaddcf, 0x26190d01, 0x71594535};
        table_nibbles(q, row + 16 * i, t);
    }
    SCALES { s.d = f16(load2(row + plane(n, 16) + 2 * i)); }
};

struct MXFP4 : Fields<16, 1> {
    static const Kind KIND = PLAIN;
    static const int BLOCK = 32, ZERO = 0;
    UP(0)
    QUANTS {
        const u32 t[4] = {0x03020100, 0x0c080604, 0xfdfeff00, 0xf4f8fafc};
        table_nibbles(q, row + 16 * i, t);
    }
    SCALES { s.d = e8m0_half(load1(row + plane(n, 16) + i)); }
};

struct Q2_K : Fields<16, 64, 4> {
    static const Kind KIND = MIN16;
    static const int BLOCK = 256, ZERO = 0;
    UP(2 * (b & 3))
    QUANTS { fields(q, row + plane(n, 16) + 64 * i + 32 * (b / 4), 2 * (b & 3), up, 0x03030303); }
    SCALES {
        u32 sc = load2(row + 16 * i + 2 * b), dm = load4(row + plane(n, 16) + plane(n, 64) + 4 * i);
        float min = f16((u16)(dm >> 16));
        s.d = f16((u16)dm);
        s.sc[0] = sc & 15;
        s.sc[1] = (sc >> 8) & 15;
        s.m[0] = -min * (float)((sc >> 4) & 15);
        s.m[1] = -min * (float)(sc >> 12);
    }
};

struct Q3_K : Fields<32, 64, 12, 2> {
    static const Kind KIND = SCALE16;
    static const int BLOCK = 256, ZERO = 4;
    UP(5)
    QUANTS {
        u32 high[W];
        load_words(high, row + 32 * i);
        fields(q, row + plane(n, 32) + 64 * i + 32 * (b / 4), 2 * (b & 3), up, 0x03030303);
#pragma unroll
        for (int j = 0; j < W; j++) q[j] |= move(high[j], b, up + 2, 0x01010101);
    }
    SCALES {
        row += plane(n, 32) + plane(n, 64);
        // Scales 2b and 2b + 1: low four bits of two neighbouring bytes of the first eight, high two bits of two of the last four.
        const P p = row + 12 * i;
        u32 low = load2(p + 2 * (b & 3)) >> (4 * (b / 4)), two = load2(p + 8 + 2 * (b & 1)) >> (2 * (b / 2));
        s.sc[0] = (int)((low & 15) | (two & 3) << 4) - 32;
        s.sc[1] = (int)(((low >> 8) & 15) | ((two >> 8) & 3) << 4) - 32;
        s.d = f16(load2(row + plane(n, 12) + 2 * i));
    }
};

struct Q4_K : Fields<144> {
    static const Kind KIND = MIN;
    static const int BLOCK = 256, ZERO = 0;
    UP(4 * (b & 1))
    QUANTS { fields(q, row + 144 * i + 16 + 32 * (b / 2), 4 * (b & 1), up, 0x0f0f0f0f); }
    SCALES { header_k4(s, row + 144 * i, b); }
};

struct Q5_K : Fields<176> {
    static const Kind KIND = MIN;
    static const int BLOCK = 256, ZERO = 0;
    UP(3)
    QUANTS {
        row += 176 * i;
        u32 high[W];
        fields(high, row + 16, b, up + 4, 0x01010101);
        fields(q, row + 48 + 32 * (b / 2), 4 * (b & 1), up, 0x0f0f0f0f);
#pragma unroll
        for (int j = 0; j < W; j++) q[j] |= high[j];
    }
    SCALES { header_k4(s, row + 176 * i, b); }
};

struct Q6_K : Fields<128, 64, 16, 2> {
    static const Kind KIND = SCALE16;
    static const int BLOCK = 256, ZERO = 32;
    UP(2)
    QUANTS {
        u32 high[W];
        fields(q, row + 128 * i + 64 * (b / 4) + 32 * (b & 1), 4 * ((b / 2) & 1), up, 0x0f0f0f0f);
        fields(high, row + plane(n, 128) + 64 * i + 32 * (b / 4), 2 * (b & 3), up + 4, 0x03030303);
#pragma unroll
        for (int j = 0; j < W; j++) q[j] |= high[j];
    }
    SCALES {
        row += plane(n, 128) + plane(n, 64);
        u32 sc = load2(row + 16 * i + 2 * b);
        s.sc[0] = (i8)sc;
        s.sc[1] = (i8)(sc >> 8);
        s.d = f16(load2(row + plane(n, 16) + 2 * i));
    }
};

struct Q8_K : Fields<256, 4> {
    static const Kind KIND = PLAIN;
    static const int BLOCK = 256, ZERO = 0;
    UP(0)
    QUANTS { fields(q, row + 256 * i + 32 * b, 0, 0, 0xffffffff); }
    SCALES { s.d = __uint_as_float(load4(row + plane(n, 256) + 4 * i)); }
};

struct IQ4_XS : Fields<128, 8> {
    static const Kind KIND = PLAIN;
    static const int BLOCK = 256, ZERO = 0;
    UP(0)
    QUANTS {
        const u32 t[4] = {0xbfad9881, 0xf6eaddcf, 0x26190d01, 0x71594535};
        table_nibbles(q, row + 128 * i + 16 * b, t);
    }
    SCALES {
        row += plane(n, 128) + 8 * i;
        u32 head = load4(row), low = load4(row + 4);
        u32 ls = ((low >> (4 * b)) & 15) | ((head >> (16 + 2 * b)) & 3) << 4;
        s.d = f16((u16)head) * ((float)ls - 32.0f);
    }
};

#undef UP
#undef QUANTS
#undef SCALES

// Sub-block b of block i, or block i, of a row of n blocks.
template <class F>
__device__ __forceinline__ void load_sub(Sub& s, const u8* row, u32 n, u32 i, u32 b) {
    F::quants(s.q, row, n, i, b, 0);
    F::scales(s, row, n, i, b);
}

// Sub-block b of group i of a row of `blocks` blocks; where the row has ended in a group another, of scale 0, and behind the last group any:
// so that loads depend on nothing and go out together.
template <class F>
__device__ __forceinline__ void load_part(Sub& s, const u8* row, u32 blocks, u32 i, u32 b) {
    const u32 at = F::BLOCK == 256 ? i : 8 * i + b;
    s.m[0] = s.m[1] = 0.0f;
    s.sc[0] = s.sc[1] = 0;
    load_sub<F>(s, row, blocks, min(at, blocks - 1), F::BLOCK == 256 ? b : 0);
    if (F::BLOCK == 32 && at >= blocks) s.d = s.m[0] = 0.0f;
}
