// Attention mass: the probabilities that one row's queries give to the entries it sees, added up by key head and slot (docs/kv-policies.md);
// one type of each cache a compilation (FORMAT, SECOND). It follows the parts of attention.cu, which know each head's largest score and its sum.
#include "cached.cuh"

#define WARPS 4 // entries of a block at a time

// mass[g][slot] += the sum over the heads of group g, in order, of their probabilities for the entry in `slot`. Keys, queries and sinks
// as in `attend`; with a second part of keys (b.width > 0) as in `attend_mla`, where g is 0. parts: the row's, [heads][splits][part].
__device__ __forceinline__ void add_mass(
    const Cache& a, u32 a_col, u32 a_len, const Other& b, const float* q_a, u32 q_a_head, const float* q_b, u32 q_b_head,
    const float* q_sink, u32 heads, float scale, const Span* spans, u32 n, u32 used, const float* parts, u32 splits, u64 part,
    float* mass) {
    extern __shared__ float head[];  // [heads]: largest score, then sum
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    for (u32 h = threadIdx.x; h < heads; h += WARPS * WARP) {
        const float* p = parts + (u64)h * splits * part;
        float max = p[0], sum = 0.0f;
        for (u32 s = 1; s < used; s++) max = fmaxf(max, p[s * part]);
        for (u32 s = 0; s < used; s++) sum = fmaf(p[s * part + 1], exp_exact(p[s * part] - max), sum);
        head[h] = max;
        head[heads + h] = sum;
    }
    __syncthreads();
    for (u32 e = blockIdx.x * WARPS + warp; e < n; e += gridDim.x * WARPS) {
        u32 slot, kind;
        find(spans, e, slot, kind);
        float total = 0.0f;
        for (u32 h = 0; h < heads; h++) {
            const float* one = q_a + h * q_a_head;
            const float* two = q_b + h * q_b_head;
            const float* sink = q_sink && kind ? q_sink + h * (b.width ? q_b_head : q_a_head) : 0;
            const float* first = sink && !b.width ? sink : one;
            const float* second = sink ? sink : two;
            float s = 0.0f;
            for (u32 i = lane; i < a_len; i += WARP) s = fmaf(a.at(slot, a_col + i), first[i], s);
            for (u32 i = lane; i < b.width; i += WARP) s = fmaf(b.at(slot, i), second[i], s);
            s = fminf(4194304.0f, fmaxf(-4194304.0f, sum_lanes<32>(s) * scale));
            total += exp_exact(s - head[h]) / head[heads + h];
        }
        if (lane == 0) mass[slot] += total;
    }
}

// Of row `row` of grouped-query attention. The grid: (any number, kv_heads), 128 threads, shared memory for 2 * group floats.
extern "C" __global__ void __launch_bounds__(WARPS * WARP, 8) mass(
    const float* q, const float* q_sink, u32 q_stride, const u8* k, u64 k_row, u32 kv_heads, u32 group, u32 key_dim, u32 value_dim,
    float scale, const Span* spans, const u32* ends, u32 row, u32 split, u32 most, const float* parts, u32 splits, float* mass,
    u32 mass_stride) {
    u32 list;
    const u32 n = seen(spans, ends, row, list), g = blockIdx.y;
    const Cache keys = {k, k_row, kv_heads * key_dim};
    const Other none = {0, 0, 0};
    const u64 part = value_dim + 2, at = (u64)row * q_stride + g * group * key_dim;
    add_mass(
        keys, g * key_dim, key_dim, none, q + at, key_dim, 0, 0, q_sink ? q_sink + at : 0, group, scale, spans + list, n,
        part_count(n, split, most), parts + ((u64)row * kv_heads + g) * group * splits * part, splits, part, mass + (u64)g * mass_stride);
}

// Of row `row` of absorbed MLA. The grid: (any number), 128 threads, shared memory for 2 * heads floats.
extern "C" __global__ void __launch_bounds__(WARPS * WARP, 8) mass_mla(
    const float* q_latent, const float* q, const float* q_sink, u32 q_stride, const u8* latents, u64 latent_row, const u8* k_pe,
    u64 k_pe_row, u32 heads, u32 latent, u32 nope, u32 rope, float scale, const Span* spans, const u32* ends, u32 row, u32 split,
    u32 most, const float* parts, u32 splits, float* mass) {
    u32 list;
    const u32 n = seen(spans, ends, row, list);
    const Cache c = {latents, latent_row, latent};
    const Other pe = {k_pe, k_pe_row, rope};
    const u64 part = latent + 2, at = (u64)row * q_stride + nope;
    add_mass(
        c, 0, latent, pe, q_latent + (u64)row * heads * latent, latent, q + at, nope + rope, q_sink ? q_sink + at : 0, heads, scale,
        spans + list, n, part_count(n, split, most), parts + (u64)row * heads * splits * part, splits, part, mass);
}
