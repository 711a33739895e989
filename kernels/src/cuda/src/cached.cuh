// Cache rows as kernels read them, by type, and the lists of what a query sees. A layer's second cache (values, MLA's rotary keys) may be
// of a type of its own (SECOND). Rows lie in device memory as weight rows do: planes of a
// row's fields (kernels/src/cuda/layout.rs).
#pragma once
#include "overlap.cuh"
#ifndef SECOND
#define SECOND FORMAT
#endif

struct F32 {
    static __device__ __forceinline__ float get(const u8* row, u32, u32 i) { return fetch((const float*)row + i); }
};
struct F16 {
    static __device__ __forceinline__ float get(const u8* row, u32, u32 i) { return f16(fetch((const u16*)row + i)); }
};
struct BF16 {
    static __device__ __forceinline__ float get(const u8* row, u32, u32 i) { return bf16(fetch((const u16*)row + i)); }
};
// `width` is that of the row: the plane of scales follows that of the integers.
struct Q8_0 {
    static __device__ __forceinline__ float get(const u8* row, u32 width, u32 i) {
        return (float)(i8)fetch(row + i) * f16(fetch((const u16*)(row + width) + i / 32));
    }
};
struct Q4_0 {
    static __device__ __forceinline__ float get(const u8* row, u32 width, u32 i) {
        const u32 q = (fetch(row + 16 * (i / 32) + i % 16) >> (4 * (i % 32 / 16))) & 15;
        return ((float)q - 8.0f) * f16(fetch((const u16*)(row + width / 2) + i / 32));
    }
};

// Slots start .. start + len; sinks are scored with the query's second rotation.
struct Span {
    u32 start, len, sink;
};

// A cache [slots, width].
template <class F>
struct CacheOf {
    const u8* data;
    u64 row_bytes;
    u32 width;
    __device__ __forceinline__ float at(u32 slot, u32 i) const { return F::get(data + row_bytes * slot, width, i); }
};
typedef CacheOf<FORMAT> Cache;
typedef CacheOf<SECOND> Other;

// Slot and kind of the entry at place `at` of a row's list.
__device__ __forceinline__ void find(const Span* s, u32 at, u32& slot, u32& sink) {
    while (at >= s->len) at -= (s++)->len;
    slot = s->start + at;
    sink = s->sink;
}

__device__ __forceinline__ u32 seen(const Span* spans, const u32* ends, u32 row, u32& first) {
    first = row ? ends[row - 1] : 0;
    u32 n = 0;
    for (u32 i = first; i < ends[row]; i++) n += spans[i].len;
    return n;
}

// Entries of a part of a list of n > 0: `split`; or, where a number of parts is the most there may be, an eighth of the list, but of at least
// `split` and at most four times that, and more where else there would be too many parts.
__device__ __forceinline__ u32 part_len(u32 n, u32 split, u32 most) {
    if (!most) return split;
    const u32 eighth = ((n - 1) / 8 + 32) / 32 * 32, each = ((n - 1) / most + 32) / 32 * 32;
    return max(each, max(split, min(eighth, 4 * split)));
}

__device__ __forceinline__ u32 part_count(u32 n, u32 split, u32 most) {
    const u32 each = part_len(n, split, most);
    return (n + each - 1) / each;
}
