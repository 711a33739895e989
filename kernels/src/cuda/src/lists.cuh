// What a query sees: its list of slots, and the parts that decoding cuts it in.
#pragma once
#include "common.cuh"

// Slots start .. start + len; sinks are scored with the query's second rotation.
struct Span {
    u32 start, len, sink;
};

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
