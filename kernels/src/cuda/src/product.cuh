// Products that share an input and a launch: which one a block works for.
#pragma once
#include "common.cuh"

// out[c] (=|+=) W x[c] (+ bias).
struct Product {
    const u8* w;
    u32 rows;
    const float* bias;
    float* out;
    u32 out_stride, add;
};

#define PRODUCT(i) const u8 *w##i, u32 rows##i, const float *bias##i, float *out##i, u32 stride##i, u32 add##i
#define OF(i) Product{w##i, rows##i, bias##i, out##i, stride##i, add##i}

// Of up to three, in blocks of so many rows, p becomes the one that block `at` works for; returns the block's place in it.
__device__ __forceinline__ u32 pick(Product& p, const Product& second, const Product& third, u32 each, u32 at) {
    const u32 blocks = (p.rows + each - 1) / each, more = (second.rows + each - 1) / each;
    if (at < blocks) return at;
    at -= blocks;
    p = at < more ? second : third;
    return at < more ? at : at - more;
}
