// What products with many columns share, whatever the weights: which columns a block takes and where they go.
#pragma once
#include "common.cuh"

// Columns first .. end of a list of jobs, all for one matrix of the stack.
struct Tile {
    u32 matrix, first, end;
};

// This block's columns, `cols` at most: of the tiles of 32 that `sort_experts` lists (blocks of more take none), or where there is no list
// of n for the only matrix.
template <u32 cols>
__device__ __forceinline__ Tile tile_of(const Tile* tiles, u32 n) {
    Tile t = {0, 0, n};
    u32 at = blockIdx.x;
    if constexpr (cols <= 32) {
        if (tiles) t = tiles[at / (32 / cols)], at %= 32 / cols;
    }
    t.first += at * cols;
    t.end = t.end < t.first + cols ? t.end : t.first + cols;
    return t;
}

// The job at place p.
__device__ __forceinline__ u32 job_at(const u32* order, u32 p) { return order ? order[p] : p; }
