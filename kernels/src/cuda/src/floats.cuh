// Float types as rows of weights and caches hold them.
#pragma once
#include "common.cuh"

struct F32 {
    typedef float T;
    static __device__ __forceinline__ float get(float x) { return x; }
    static __device__ __forceinline__ float put(float x) { return x; }
};
struct F16 {
    typedef u16 T;
    static __device__ __forceinline__ float get(u16 x) { return f16(x); }
    static __device__ __forceinline__ u16 put(float x) { return to_f16(x); }
};
struct BF16 {
    typedef u16 T;
    static __device__ __forceinline__ float get(u16 x) { return bf16(x); }
    static __device__ __forceinline__ u16 put(float x) { return to_bf16(x); }
};
