// Attention of single queries over a cache (decoding): grouped heads, and MLA in its absorbed form; one type of each cache a compilation (FORMAT, SECOND).
//
// A row's list of entries is cut into parts whose length the list's decides; a block takes one part for up to eight heads that share keys, tile by
// tile: keys to shared memory once for all heads, scores, a running softmax, values once for all heads. `merge` adds the parts in
// order. What a row gets depends on its own list alone: not on other rows, nor on the slots that its entries lie in.
#include "cached.cuh"

#define TILE 16    // entries
#define HEADS 8    // query heads of a block
#define THREADS 128 // TILE x HEADS
#define DIMS 4     // value dimensions of a thread: at most 512 in all

// The dot product of a tile's row with a query, in four running sums.
__device__ __forceinline__ float dot(const float* k, const float* q, u32 n) {
    float a[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    u32 i = 0;
    for (; i + 4 <= n; i += 4) {
#pragma unroll
        for (int j = 0; j < 4; j++) a[j] = fmaf(k[i + j], fetch(q + i + j), a[j]);
    }
    for (; i < n; i++) a[0] = fmaf(k[i], fetch(q + i), a[0]);
    return (a[0] + a[1]) + (a[2] + a[3]);
}

// One part of one row for the heads first .. first + count. Keys are `a` at columns a_col .. a_col + a_len, then (MLA) `b` whole; a
// head's query is q_a[head] and q_b[head], the latter (or the former, where there is no b) another for sinks. Values are columns of v, or
// with v.data null the first `value` columns of the tile.
// part[head]: the softmax's maximum, its sum, and `value` weighted sums.
__device__ __forceinline__ void attend_part(
    const Cache& a, u32 a_col, u32 a_len, const Other& b, const Other& v, u32 v_col, u32 value, const float* q_a, u32 q_a_head,
    const float* q_b, u32 q_b_head, const float* q_sink, u32 count, float scale, const Span* spans, u32 from, u32 to, float* part,
    u64 part_head) {
    extern __shared__ float tile[];
    __shared__ float weights[HEADS][TILE];
    __shared__ float shrink[HEADS];
    __shared__ u32 slots[TILE], sinks[TILE];
    const u32 t = threadIdx.x, e = t % TILE, h = t / TILE;
    const u32 width = a_len + b.width, stride = width + 1;
    float max = -4194304.0f, sum = 0.0f, acc[DIMS][HEADS];
#pragma unroll
    for (int d = 0; d < DIMS; d++)
#pragma unroll
        for (int j = 0; j < HEADS; j++) acc[d][j] = 0.0f;
    for (u32 at = from; at < to; at += TILE) {
        const u32 here = to - at < TILE ? to - at : TILE;
        if (t < here) find(spans, at + t, slots[t], sinks[t]);
        __syncthreads();
        for (u32 i = t; i < here * width; i += THREADS) {
            const u32 row = i / width, col = i % width, slot = slots[row];
            tile[row * stride + col] = col < a_len ? a.at(slot, a_col + col) : b.at(slot, col - a_len);
        }
        __syncthreads();
        // A score for each entry and head; infinite ones count as the largest there are, NaN as the lowest.
        float score = -4194304.0f;
        const bool live = e < here && h < count;
        if (live) {
            const float* k = tile + e * stride;
            const float* one = q_a + h * q_a_head;
            const float* two = q_b + h * q_b_head;
            const float* sink = q_sink && sinks[e] ? q_sink + h * (b.width ? q_b_head : q_a_head) : 0;
            float s = dot(k, sink && !b.width ? sink : one, a_len);
            if (b.width) s += dot(k + a_len, sink ? sink : two, b.width);
            score = fminf(4194304.0f, fmaxf(-4194304.0f, s * scale));
        }
        float top = score;
#pragma unroll
        for (int half = TILE / 2; half > 0; half /= 2) top = fmaxf(top, __shfl_xor_sync(ALL, top, half));
        const float next = fmaxf(max, top), less = exp_exact(max - next);
        const float weight = live ? exp_exact(score - next) : 0.0f;
        max = next;
        sum = fmaf(sum, less, sum_lanes<TILE>(weight));
        weights[h][e] = weight;
        if (e == 0) shrink[h] = less;
        __syncthreads();
#pragma unroll
        for (int d = 0; d < DIMS; d++) {
            const u32 col = t + d * THREADS;
            if (col < value) {
#pragma unroll
                for (int j = 0; j < HEADS; j++) acc[d][j] *= shrink[j];
                for (u32 i = 0; i < here; i++) {
                    const float x = v.data ? v.at(slots[i], v_col + col) : tile[i * stride + col];
#pragma unroll
                    for (int j = 0; j < HEADS; j++) acc[d][j] = fmaf(weights[j][i], x, acc[d][j]);
                }
            }
        }
        __syncthreads();
    }
    if (e == 0 && h < count) {
        part[h * part_head] = max;
        part[h * part_head + 1] = sum;
    }
#pragma unroll
    for (int d = 0; d < DIMS; d++) {
        const u32 col = t + d * THREADS;
#pragma unroll
        for (int j = 0; j < HEADS; j++)
            if (col < value && j < count) part[j * part_head + 2 + col] = acc[d][j];
    }
}

// Parts of grouped-query attention. The grid: (parts of the longest list, kv_heads * ceil(group / 8), rows), 128 threads, shared memory
// for 16 rows of key_dim + 1 floats. parts [rows][heads][splits][value_dim + 2], of which a row writes as many as its list has.
extern "C" __global__ void __launch_bounds__(THREADS, 4) attend(
    const float* q, const float* q_sink, u32 q_stride, const u8* k, u64 k_row, const u8* v, u64 v_row, u32 kv_heads, u32 group,
    u32 key_dim, u32 value_dim, float scale, const Span* spans, const u32* ends, u32 split, u32 most, float* parts) {
    let_next_begin();
    const u32 blocks = (group + HEADS - 1) / HEADS, g = blockIdx.y / blocks, first = blockIdx.y % blocks * HEADS;
    const u32 row = blockIdx.z, head = g * group + first;
    u32 list;
    const u32 n = seen(spans, ends, row, list), each = part_len(n, split, most), from = blockIdx.x * each;
    earlier_done();
    if (from >= n) return;
    const u32 to = n - from < each ? n : from + each, count = group - first < HEADS ? group - first : HEADS;
    const Cache keys = {k, k_row, kv_heads * key_dim};
    const Other none = {0, 0, 0}, values = {v, v_row, kv_heads * value_dim};
    const u64 part = value_dim + 2, at = (u64)row * q_stride + head * key_dim;
    attend_part(
        keys, g * key_dim, key_dim, none, values, g * value_dim, value_dim, q + at, key_dim, 0, 0, q_sink ? q_sink + at : 0, count,
        scale, spans + list, from, to, parts + (((u64)row * kv_heads * group + head) * gridDim.x + blockIdx.x) * part,
        gridDim.x * part);
}

// Parts of absorbed MLA: keys are a latent and a rotated part that all heads share, values are the latents. q_latent [rows][heads][latent]
// (the keys' up-projection applied), q [rows][heads][nope + rope]. The grid: (parts, ceil(heads / 8), rows), 128 threads, shared memory for 16
// rows of latent + rope + 1 floats. Its sums are over latents: the values' up-projection follows `merge`.
extern "C" __global__ void __launch_bounds__(THREADS, 4) attend_mla(
    const float* q_latent, const float* q, const float* q_sink, u32 q_stride, const u8* latents, u64 latent_row, const u8* k_pe,
    u64 k_pe_row, u32 heads, u32 latent, u32 nope, u32 rope, float scale, const Span* spans, const u32* ends, u32 split, u32 most,
    float* parts) {
    let_next_begin();
    const u32 head = blockIdx.y * HEADS, row = blockIdx.z;
    u32 list;
    const u32 n = seen(spans, ends, row, list), each = part_len(n, split, most), from = blockIdx.x * each;
    earlier_done();
    if (from >= n) return;
    const u32 to = n - from < each ? n : from + each, count = heads - head < HEADS ? heads - head : HEADS;
    const Cache c = {latents, latent_row, latent};
    const Other none = {0, 0, 0}, pe = {k_pe, k_pe_row, rope};
    const u64 part = latent + 2, at = (u64)row * q_stride + head * (nope + rope) + nope;
    attend_part(
        c, 0, latent, pe, none, 0, latent, q_latent + ((u64)row * heads + head) * latent, latent, q + at, nope + rope,
        q_sink ? q_sink + at : 0, count, scale, spans + list, from, to,
        parts + (((u64)row * heads + head) * gridDim.x + blockIdx.x) * part, gridDim.x * part);
}

// out[row][head] = the parts put together, in order: at most 128. The grid: (heads, rows), 128 threads.
extern "C" __global__ void __launch_bounds__(THREADS) merge(
    const float* parts, u32 splits, u32 value, const Span* spans, const u32* ends, u32 split, u32 most, float* out, u32 out_stride) {
    let_next_begin();
    __shared__ float maxima[THREADS], weights[THREADS], sums[THREADS];
    const u32 head = blockIdx.x, row = blockIdx.y, t = threadIdx.x;
    u32 list;
    const u32 n = part_count(seen(spans, ends, row, list), split, most);
    earlier_done();
    const u64 part = value + 2;
    parts += ((u64)row * gridDim.x + head) * splits * part;
    const float own = parts[(t < n ? t : 0) * part];
    maxima[t] = own;
    __syncthreads();
    float max = own, sum = 0.0f;
#pragma unroll 1
    for (u32 s = 0; s < n; s++) max = fmaxf(max, maxima[s]);
    weights[t] = exp_exact(own - max);
    sums[t] = t < n ? parts[t * part + 1] : 0.0f;
    __syncthreads();
#pragma unroll 1
    for (u32 s = 0; s < n; s++) sum = fmaf(sums[s], weights[s], sum);
#pragma unroll 1
    for (u32 i = t; i < value; i += THREADS) {
        float y = 0.0f;
#pragma unroll 8
        for (u32 s = 0; s < n; s++) y = fmaf(parts[s * part + 2 + i], weights[s], y);
        out[(u64)row * out_stride + head * value + i] = y / sum;
    }
}
