// Block formats as the device holds them, and a sub-block of 32 weights unpacked to integers and scales.
//
// A row on the device is a few planes, one after another, each the same field of all blocks of the row, padded to 16 bytes:
// so that every field can be read by aligned 16-byte (or at least whole-word) loads. `kernels/src/cuda/layout.rs` makes the planes;
// FIELDS here and its table must agree. Bit layouts: quant/src/formats. Arithmetic: kernels/src/cpu/scalar/formats.rs.
#pragma once
#include "common.cuh"

// How a sub-block's dot product is scaled: docs/numerics.md.
enum Kind { PLAIN, MIN, SCALE16, MIN16 };

// 32 weights: word j of q holds values 4j..4j+4 as bytes, value = d (sc) (q - ZERO) + m.
struct Sub {
    u32 q[8];
    float d;
    int sc[2];
    float m[2];
};

__device__ __forceinline__ uint4 load16(const u8* p) { return __ldg((const uint4*)p); }
__device__ __forceinline__ u32 load4(const u8* p) { return __ldg((const u32*)p); }
__device__ __forceinline__ u32 load2(const u8* p) { return __ldg((const u16*)p); }
__device__ __forceinline__ u32 load1(const u8* p) { return __ldg(p); }

// Bytes of a plane of `n` fields of `bytes` each.
__device__ __forceinline__ u32 plane(u32 n, u32 bytes) { return (n * bytes + 15) & ~15u; }

__device__ __forceinline__ void words(u32 q[4], uint4 v) { q[0] = v.x; q[1] = v.y; q[2] = v.z; q[3] = v.w; }

// 16 bytes: low nibbles are values 0..16, high nibbles 16..32.
__device__ __forceinline__ void nibbles(Sub& s, const u8* p) {
    u32 v[4];
    words(v, load16(p));
#pragma unroll
    for (int j = 0; j < 4; j++) {
        s.q[j] = v[j] & 0x0f0f0f0f;
        s.q[j + 4] = (v[j] >> 4) & 0x0f0f0f0f;
    }
}

// Adds bit i of `high` to value i as its fifth bit.
__device__ __forceinline__ void fifth(Sub& s, u32 high) {
#pragma unroll
    for (int j = 0; j < 8; j++) {
        // Bits 0..4 to bits 4, 12, 20, 28: the product has no carries, its wanted bits lie apart.
        u32 b = (high >> (4 * j)) & 15;
        s.q[j] |= (b * 0x02040810u) & 0x10101010u;
    }
}

// 32 bytes, of which each value has `mask` at bit `shift`.
__device__ __forceinline__ void fields(u32 q[8], const u8* p, int shift, u32 mask) {
    words(q, load16(p));
    words(q + 4, load16(p + 16));
#pragma unroll
    for (int j = 0; j < 8; j++) q[j] = (q[j] >> shift) & mask;
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

__device__ __forceinline__ void table_nibbles(Sub& s, const u8* p, const u32 t[4]) {
    u32 v[4];
    words(v, load16(p));
#pragma unroll
    for (int j = 0; j < 4; j++) look_up(t, v[j], s.q[j], s.q[j + 4]);
}

// The 6-bit scale and minimum b of a Q4_K or Q5_K block, from its 16 bytes of header.
__device__ __forceinline__ void header_k4(Sub& s, const u8* p, int b) {
    uint4 h = load16(p);
    int at = 8 * (b & 3);
    u32 sc, m;
    if (b < 4) {
        sc = (h.y >> at) & 63;
        m = (h.z >> at) & 63;
    } else {
        sc = ((h.w >> at) & 15) | ((h.y >> (at + 6)) & 3) << 4;
        m = ((h.w >> (at + 4)) & 15) | ((h.z >> (at + 6)) & 3) << 4;
    }
    s.d = f16((u16)h.x) * (float)sc;
    s.m[0] = -(f16((u16)(h.x >> 16)) * (float)m);
}

// Twice the E2M1 values' power of two: 2^(e - 128).
__device__ __forceinline__ float e8m0_half(u32 e) { return __uint_as_float(e < 2 ? 0x00200000u << e : (e - 1) << 23); }

// Each format: KIND, BLOCK (values of a block), ZERO (what unsigned values have too much of), and
// load(s, row, n, i, b): sub-block b of block i (BLOCK 256), or block i (BLOCK 32), of a row of n blocks.

struct Q4_0 {
    static const Kind KIND = PLAIN;
    static const int BLOCK = 32, ZERO = 8;
    static __device__ __forceinline__ void load(Sub& s, const u8* row, u32 n, u32 i, int) {
        nibbles(s, row + 16 * i);
        s.d = f16(load2(row + plane(n, 16) + 2 * i));
    }
};

struct Q4_1 {
    static const Kind KIND = MIN;
    static const int BLOCK = 32, ZERO = 0;
    static __device__ __forceinline__ void load(Sub& s, const u8* row, u32 n, u32 i, int) {
        nibbles(s, row + 16 * i);
        u32 dm = load4(row + plane(n, 16) + 4 * i);
        s.d = f16((u16)dm);
        s.m[0] = f16((u16)(dm >> 16));
    }
};

struct Q5_0 {
    static const Kind KIND = PLAIN;
    static const int BLOCK = 32, ZERO = 16;
    static __device__ __forceinline__ void load(Sub& s, const u8* row, u32 n, u32 i, int) {
        nibbles(s, row + 16 * i);
        row += plane(n, 16);
        fifth(s, load4(row + 4 * i));
        s.d = f16(load2(row + plane(n, 4) + 2 * i));
    }
};

struct Q5_1 {
    static const Kind KIND = MIN;
    static const int BLOCK = 32, ZERO = 0;
    static __device__ __forceinline__ void load(Sub& s, const u8* row, u32 n, u32 i, int) {
        nibbles(s, row + 16 * i);
        row += plane(n, 16);
        fifth(s, load4(row + 4 * i));
        u32 dm = load4(row + plane(n, 4) + 4 * i);
        s.d = f16((u16)dm);
        s.m[0] = f16((u16)(dm >> 16));
    }
};

struct Q8_0 {
    static const Kind KIND = PLAIN;
    static const int BLOCK = 32, ZERO = 0;
    static __device__ __forceinline__ void load(Sub& s, const u8* row, u32 n, u32 i, int) {
        words(s.q, load16(row + 32 * i));
        words(s.q + 4, load16(row + 32 * i + 16));
        s.d = f16(load2(row + plane(n, 32) + 2 * i));
    }
};

struct IQ4_NL {
    static const Kind KIND = PLAIN;
    static const int BLOCK = 32, ZERO = 0;
    static __device__ __forceinline__ void load(Sub& s, const u8* row, u32 n, u32 i, int) {
        const u32 t[4] = {0xbfad9881, 0xf6eaddcf, 0x26190d01, 0x71594535};
        table_nibbles(s, row + 16 * i, t);
        s.d = f16(load2(row + plane(n, 16) + 2 * i));
    }
};

struct MXFP4 {
    static const Kind KIND = PLAIN;
    static const int BLOCK = 32, ZERO = 0;
    static __device__ __forceinline__ void load(Sub& s, const u8* row, u32 n, u32 i, int) {
        const u32 t[4] = {0x03020100, 0x0c080604, 0xfdfeff00, 0xf4f8fafc};
        table_nibbles(s, row + 16 * i, t);
        s.d = e8m0_half(load1(row + plane(n, 16) + i));
    }
};

struct Q2_K {
    static const Kind KIND = MIN16;
    static const int BLOCK = 256, ZERO = 0;
    static __device__ __forceinline__ void load(Sub& s, const u8* row, u32 n, u32 i, int b) {
        u32 sc = load2(row + 16 * i + 2 * b);
        row += plane(n, 16);
        fields(s.q, row + 64 * i + 32 * (b / 4), 2 * (b & 3), 0x03030303);
        u32 dm = load4(row + plane(n, 64) + 4 * i);
        float min = f16((u16)(dm >> 16));
        s.d = f16((u16)dm);
        s.sc[0] = sc & 15;
        s.sc[1] = (sc >> 8) & 15;
        s.m[0] = -(min * (float)((sc >> 4) & 15));
        s.m[1] = -(min * (float)(sc >> 12));
    }
};

struct Q3_K {
    static const Kind KIND = SCALE16;
    static const int BLOCK = 256, ZERO = 4;
    static __device__ __forceinline__ void load(Sub& s, const u8* row, u32 n, u32 i, int b) {
        u32 high[8];
        fields(high, row + 32 * i, b, 0x01010101);
        row += plane(n, 32);
        fields(s.q, row + 64 * i + 32 * (b / 4), 2 * (b & 3), 0x03030303);
        row += plane(n, 64);
#pragma unroll
        for (int j = 0; j < 8; j++) s.q[j] |= high[j] << 2;
        // Scales 2b and 2b + 1: low four bits of two neighbouring bytes of the first eight, high two bits of two of the last four.
        const u8* p = row + 12 * i;
        u32 low = load2(p + 2 * (b & 3)) >> (4 * (b / 4)), two = load2(p + 8 + 2 * (b & 1)) >> (2 * (b / 2));
        s.sc[0] = (int)((low & 15) | (two & 3) << 4) - 32;
        s.sc[1] = (int)(((low >> 8) & 15) | ((two >> 8) & 3) << 4) - 32;
        s.d = f16(load2(row + plane(n, 12) + 2 * i));
    }
};

struct Q4_K {
    static const Kind KIND = MIN;
    static const int BLOCK = 256, ZERO = 0;
    static __device__ __forceinline__ void load(Sub& s, const u8* row, u32, u32 i, int b) {
        row += 144 * i;
        header_k4(s, row, b);
        fields(s.q, row + 16 + 32 * (b / 2), 4 * (b & 1), 0x0f0f0f0f);
    }
};

struct Q5_K {
    static const Kind KIND = MIN;
    static const int BLOCK = 256, ZERO = 0;
    static __device__ __forceinline__ void load(Sub& s, const u8* row, u32, u32 i, int b) {
        row += 176 * i;
        header_k4(s, row, b);
        u32 high[8];
        fields(high, row + 16, b, 0x01010101);
        fields(s.q, row + 48 + 32 * (b / 2), 4 * (b & 1), 0x0f0f0f0f);
#pragma unroll
        for (int j = 0; j < 8; j++) s.q[j] |= high[j] << 4;
    }
};

struct Q6_K {
    static const Kind KIND = SCALE16;
    static const int BLOCK = 256, ZERO = 32;
    static __device__ __forceinline__ void load(Sub& s, const u8* row, u32 n, u32 i, int b) {
        u32 high[8];
        fields(s.q, row + 128 * i + 64 * (b / 4) + 32 * (b & 1), 4 * ((b / 2) & 1), 0x0f0f0f0f);
        row += plane(n, 128);
        fields(high, row + 64 * i + 32 * (b / 4), 2 * (b & 3), 0x03030303);
        row += plane(n, 64);
#pragma unroll
        for (int j = 0; j < 8; j++) s.q[j] |= high[j] << 4;
        u32 sc = load2(row + 16 * i + 2 * b);
        s.sc[0] = (i8)sc;
        s.sc[1] = (i8)(sc >> 8);
        s.d = f16(load2(row + plane(n, 16) + 2 * i));
    }
};

struct Q8_K {
    static const Kind KIND = PLAIN;
    static const int BLOCK = 256, ZERO = 0;
    static __device__ __forceinline__ void load(Sub& s, const u8* row, u32 n, u32 i, int b) {
        words(s.q, load16(row + 256 * i + 32 * b));
        words(s.q + 4, load16(row + 256 * i + 32 * b + 16));
        s.d = __uint_as_float(load4(row + plane(n, 256) + 4 * i));
    }
};

struct IQ4_XS {
    static const Kind KIND = PLAIN;
    static const int BLOCK = 256, ZERO = 0;
    static __device__ __forceinline__ void load(Sub& s, const u8* row, u32 n, u32 i, int b) {
        const u32 t[4] = {0xbfad9881, 0xf6eaddcf, 0x26190d01, 0x71594535};
        table_nibbles(s, row + 128 * i + 16 * b, t);
        row += plane(n, 128) + 8 * i;
        u32 head = load4(row), low = load4(row + 4);
        u32 ls = ((low >> (4 * b)) & 15) | ((head >> (16 + 2 * b)) & 3) << 4;
        s.d = f16((u16)head) * ((float)ls - 32.0f);
    }
};

// Sub-block b of group i of a row of `blocks` blocks; zeros where the row has ended, or is not there at all.
template <class F>
__device__ __forceinline__ void load_part(Sub& s, bool there, const u8* row, u32 blocks, u32 i, u32 b) {
    s.d = s.m[0] = s.m[1] = 0.0f;
    s.sc[0] = s.sc[1] = 0;
#pragma unroll
    for (int j = 0; j < 8; j++) s.q[j] = F::ZERO * 0x01010101u;
    const u32 at = F::BLOCK == 256 ? i : 8 * i + b;
    if (there && at < blocks) F::load(s, row, blocks, at, b);
}
