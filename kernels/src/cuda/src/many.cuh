// What products with many columns share, whatever the weights: which columns a block takes and where they go.
#pragma once
#include "common.cuh"

#define COLS 32 // columns of a block

// Columns first .. end of a list of jobs, all for one matrix of the stack.
struct Tile {
    u32 matrix, first, end;
};

// This block's columns: tile blockIdx.x of the list that `sort_experts` makes, or where there is none 32 of n for the only matrix.
__device__ __forceinline__ Tile tile_of(const Tile* tiles, u32 n) {
    if (tiles) return tiles[blockIdx.x];
    const u32 first = blockIdx.x * COLS;
    const Tile t = {0, first, n < first + COLS ? n : first + COLS};
    return t;
}

// The job at place p.
__device__ __forceinline__ u32 job_at(const u32* order, u32 p) { return order ? order[p] : p; }
