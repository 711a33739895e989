// Rows of a cache moved from slot to slot, whatever their type: runs of two bytes.
#include "common.cuh"

// Copies from slot moves[2i] to slot moves[2i + 1], i = 0 .. n, in this order, the bytes [first, first + bytes) of a row and, where
// bytes_b is not 0, [first_b, first_b + bytes_b) of its second plane; all of them even. A thread takes two bytes of a row through all
// moves, so that a later move sees what an earlier one wrote. The grid: ((bytes + bytes_b) / 256), 128 threads.
extern "C" __global__ void __launch_bounds__(128) kv_move(
    u8* data, u64 row_bytes, const u32* moves, u32 n, u32 first, u32 bytes, u32 first_b, u32 bytes_b) {
    const u32 i = 2 * (blockIdx.x * 128 + threadIdx.x);
    if (i >= bytes + bytes_b) return;
    data += i < bytes ? first + i : first_b + (i - bytes);
    for (u32 k = 0; k < n; k++) *(u16*)(data + row_bytes * moves[2 * k + 1]) = *(const u16*)(data + row_bytes * moves[2 * k]);
}

// ids[i] = i % n: which head's matrix a row of heads multiplies. The grid: (count / 128), 128 threads.
extern "C" __global__ void __launch_bounds__(128) cycle(u32* ids, u32 count, u32 n) {
    const u32 i = blockIdx.x * 128 + threadIdx.x;
    if (i < count) ids[i] = i % n;
}
