// Activations rounded to int8, as `round` makes them and every quantised product reads them.
#pragma once
#include "common.cuh"

// 256 activations rounded to int8 per 32: kernels/src/cpu/quantized.rs, with the integer sums of each run of 16.
struct Block {
    i8 q[256];
    float scale[8], sum[8], half[16];
    int isum[16];
};
