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
