// Cache rows as kernels read them, by type. A layer's second cache (values, MLA's rotary keys) may be
// of a type of its own (SECOND). Rows lie in device memory as weight rows do: planes of a
// row's fields (kernels/src/cuda/layout.rs).
#pragma once
#include "lists.cuh"
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
