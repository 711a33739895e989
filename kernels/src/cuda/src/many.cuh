// What products with many columns share, whatever the weights: which columns a block takes and where they go.
#pragma once
#include "common.cuh"

// Columns first .. end of a list of jobs, all for one matrix of the stack.
struct Tile {
    u32 matrix, first, end;
};

// This block's columns, `cols` at most: of the tiles that `sort_experts` lists (blocks of less than 32 share one of 32, others take one that is
// no larger than they are), or where there is no list of n for the only matrix.
template <u32 cols>
__device__ __forceinline__ Tile tile_of(const Tile* tiles, u32 n) {
    Tile t = {0, 0, n};
    u32 at = blockIdx.x;
    const u32 parts = cols < 32 ? 32 / cols : 1;
    if (tiles) t = tiles[at / parts], at %= parts;
    t.first += at * cols;
    t.end = t.end < t.first + cols ? t.end : t.first + cols;
    return t;
}

// The job at place p.
__device__ __forceinline__ u32 job_at(const u32* order, u32 p) { return order ? order[p] : p; }

// Sums of 16 MI features, from `feature` on, by 16 columns, from `column` on, to shared memory, columns `stride` floats apart (4 more than
// features, so that banks differ): stores of them are then whole rows of features. Lane 4r + c of a fragment has rows r and r + 8, columns
// 2c and 2c + 1.
template <int MI, int NP>
__device__ __forceinline__ void to_image(
    float* image, u32 stride, u32 column, u32 feature, u32 lane, const float (&acc)[MI][NP][2][4], int j) {
#pragma unroll
    for (int mi = 0; mi < MI; mi++)
#pragma unroll
        for (int e = 0; e < 8; e++)
            image[(column + 8 * (e / 4) + 2 * (lane % 4) + e % 2) * stride + feature + 16 * mi + 8 * (e / 2 % 2) + lane / 4] =
                acc[mi][j][e / 4][e % 4];
}
