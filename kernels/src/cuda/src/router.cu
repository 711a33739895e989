// The router of a mixture of experts: kernels/src/cpu/router.rs, to the bit.
#include "overlap.cuh"

// logits[row][expert] in 64 running sums and the CPU's order. The grid: (experts, rows), 64 threads.
extern "C" __global__ void __launch_bounds__(64) router_logits(const float* w, const float* x, u32 x_stride, u32 d, float* logits) {
    __shared__ float lanes[64];
    const u32 t = threadIdx.x, whole = d / 16 * 16;
    w += (u64)blockIdx.x * d;
    let_next_begin();
    if (OVERLAPS)
        for (u32 i = 32 * t; i < d; i += 32 * 64) prefetch(w + i);
    earlier_done();
    x += (u64)blockIdx.y * x_stride;
    float acc = 0.0f;
#pragma unroll 8
    for (u32 i = t; i < whole; i += 64) acc = fmaf(w[i], x[i], acc);
    lanes[t] = acc;
    __syncthreads();
    if (t >= WARP) return;
    const u32 l = t % 16;
    float sum = sum_lanes<16>((lanes[l] + lanes[16 + l]) + (lanes[32 + l] + lanes[48 + l]));
    if (t == 0) {
        for (u32 i = whole; i < d; i++) sum += w[i] * x[i];
        logits[(u64)blockIdx.y * gridDim.x + blockIdx.x] = sum;
    }
}

// A float's place among all floats: NaN above infinity, -0 below +0.
__device__ __forceinline__ int place(float x) {
    const int b = __float_as_int(x);
    return b ^ (int)((u32)(b >> 31) >> 1);
}

// Index of the largest of v[0..n] below `last` in (value, then lower index first) order; a warp asks for one after another.
struct Best {
    int value;
    u32 index;
};

__device__ __forceinline__ bool before(Best a, Best b) { return a.value > b.value || (a.value == b.value && a.index < b.index); }

__device__ __forceinline__ Best next_best(const float* v, u32 n, bool any, Best last) {
    Best best = {(int)0x80000000, ALL};
    for (u32 i = threadIdx.x % WARP; i < n; i += WARP) {
        const Best here = {place(v[i]), i};
        if ((!any || before(last, here)) && (best.index == ALL || before(here, best))) best = here;
    }
#pragma unroll
    for (int half = 16; half > 0; half /= 2) {
        const Best other = {__shfl_xor_sync(ALL, best.value, half), __shfl_xor_sync(ALL, best.index, half)};
        if (other.index != ALL && (best.index == ALL || before(other, best))) best = other;
    }
    return best;
}

// ids and weights [rows][used] from logits [rows][experts]. gating 0 softmax, 1 sigmoid; `correction` may be null; groups 0 for none, else
// experts of the `groups_used` best groups by their best expert (group_score 0) or the sum of the best two (1). The grid: (1, rows), a warp;
// shared memory for 2 * experts + groups floats.
extern "C" __global__ void __launch_bounds__(WARP) route(
    const float* logits, u32 experts, u32 gating, const float* correction, u32 groups, u32 groups_used, u32 group_score, u32 used,
    u32 normalize, float scale, u32* ids, float* weights) {
    in_turn();
    extern __shared__ float p[];
    float* choice = p + experts;
    float* scores = choice + experts;
    const u32 t = threadIdx.x;
    logits += (u64)blockIdx.y * experts;
    ids += (u64)blockIdx.y * used;
    weights += (u64)blockIdx.y * used;
    const float lowest = __int_as_float(0xff800000);
    float max = lowest;
    for (u32 i = t; i < experts; i += WARP) max = fmaxf(max, logits[i]);
#pragma unroll
    for (int half = 16; half > 0; half /= 2) max = fmaxf(max, __shfl_xor_sync(ALL, max, half));
    for (u32 i = t; i < experts; i += WARP) p[i] = gating ? sigmoid(logits[i]) : exp_exact(logits[i] - max);
    __syncwarp();
    if (!gating) {
        // In order, as on the CPU.
        float sum = 0.0f;
        for (u32 i = 0; i < experts; i++) sum += p[i];
        __syncwarp();
        for (u32 i = t; i < experts; i += WARP) p[i] = p[i] / sum;
        __syncwarp();
    }
    for (u32 i = t; i < experts; i += WARP) choice[i] = correction ? p[i] + correction[i] : p[i];
    __syncwarp();
    const Best none = {0, 0};
    if (groups) {
        const u32 size = experts / groups;
        for (u32 g = 0; g < groups; g++) {
            const float* c = choice + g * size;
            const Best one = next_best(c, size, false, none);
            float score = c[one.index];
            if (group_score && size > 1) score += c[next_best(c, size, true, one).index];
            if (t == 0) scores[g] = score;
        }
        __syncwarp();
        // What is before the last group kept stays.
        Best last = none;
        for (u32 k = 0; k < groups_used; k++) last = next_best(scores, groups, k > 0, last);
        for (u32 i = t; i < experts; i += WARP) {
            const Best mine = {place(scores[i / size]), i / size};
            if (before(last, mine)) choice[i] = lowest;
        }
        __syncwarp();
    }
    float sum = 0.0f;
    Best at = none;
    for (u32 k = 0; k < used; k++) {
        at = next_best(choice, experts, k > 0, at);
        sum += p[at.index];
        if (t == 0) ids[k] = at.index;
    }
    sum = normalize ? sum + 1e-20f : 1.0f;
    at = none;
    for (u32 k = 0; k < used; k++) {
        at = next_best(choice, experts, k > 0, at);
        if (t == 0) weights[k] = p[at.index] / sum * scale;
    }
}

// Jobs sorted by expert, those of one in order, and tiles of at most `columns` of them, as products take them: tile k is (expert, first place,
// end). There is room for jobs / columns + experts tiles; those not needed are left empty. The grid: experts, 256 threads, shared memory for `experts` words.
extern "C" __global__ void __launch_bounds__(256) sort_experts(const u32* ids, u32 jobs, u32 columns, u32* order, u32* tiles) {
    extern __shared__ u32 counts[];
    __shared__ u32 first, tile, ranks[8];
    in_turn();
    const u32 t = threadIdx.x, lane = t % WARP, e = blockIdx.x, experts = gridDim.x;
    for (u32 i = t; i < experts; i += 256) counts[i] = 0;
    if (t == 0) first = tile = 0;
    __syncthreads();
    for (u32 i = t; i < jobs; i += 256) atomicAdd(counts + ids[i], 1u);
    __syncthreads();
    // What lies before this expert's: integers, so that no order of adding matters.
    for (u32 i = t; i < e; i += 256) {
        atomicAdd(&first, counts[i]);
        atomicAdd(&tile, (counts[i] + columns - 1) / columns);
    }
    __syncthreads();
    const u32 begin = first, end = begin + counts[e], mine = (counts[e] + columns - 1) / columns;
    for (u32 i = t; i < mine; i += 256) {
        u32* to = tiles + 3 * (tile + i);
        to[0] = e;
        to[1] = begin + columns * i;
        to[2] = to[1] + columns < end ? to[1] + columns : end;
    }
    if (e == experts - 1) {
        for (u32 i = tile + mine + t; i < jobs / columns + experts; i += 256) tiles[3 * i] = tiles[3 * i + 1] = tiles[3 * i + 2] = 0;
    }
    u32 place = begin;
    for (u32 at = 0; at < jobs; at += 256) {
        const bool here = at + t < jobs && ids[at + t] == e;
        const u32 vote = __ballot_sync(ALL, here);
        if (lane == 0) ranks[t / WARP] = __popc(vote);
        __syncthreads();
        u32 rank = __popc(vote & ((1u << lane) - 1)), all = 0;
#pragma unroll
        for (int w = 0; w < 8; w++) {
            if (w < t / WARP) rank += ranks[w];
            all += ranks[w];
        }
        if (here) order[place + rank] = at + t;
        place += all;
        __syncthreads();
    }
}
