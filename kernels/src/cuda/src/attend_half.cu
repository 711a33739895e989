// Attention of single queries (decoding) with grouped heads over f16, q8_0 and q4_0 caches on tensor cores (lanes.cuh): parts of rows as
// attention.cu's `attend` makes them, for the same `merge`. From sm_80 on.
//
// A warp has the heads that share keys, eight in two f16 parts or 16 in one, and takes its own piece of a part of the row's list through
// them, 16 entries at a time. Copies that run on their own are two tiles ahead. A warp's shared memory is its own: none waits for another
// before the end, where their sums are added in order.
#include "lanes.cuh"
#include "lists.cuh"
#include "overlap.cuh"

#define TILE 16 // entries
#define STAGES 3

// A place in a list: `base` entries lie before span s.
struct Cursor {
    const Span* s;
    u32 base;
    __device__ __forceinline__ void seek(u32 at) {
        while (at - base >= s->len) base += (s++)->len;
    }
};

template <int DIMS>
struct Block {
    static const int WARPS = DIMS > 128 ? 2 : 4, THREADS = WARPS * WARP;
};

// The heads first .. first + count, whose queries begin at q (and q_sink, or null), in PARTS; entries from .. to of the list. Of each head
// its part is the softmax's maximum, its sum, and weighted sums.
template <int DIMS, int PARTS, bool PACKED>
__device__ __forceinline__ void attend_part(
    const float* q, const float* q_sink, const Columns& k, const Columns& v, u32 first, u32 count, float scale, const Span* spans, u32 from,
    u32 to, float* parts) {
    const int WARPS = Block<DIMS>::WARPS, HEADS = 16 / PARTS, ROW = Row<DIMS>::BYTES, WIDTH = DIMS + 8, UNROLL = DIMS > 128 ? 1 : 4;
    extern __shared__ __align__(128) u8 memory[];
    const u32 t = threadIdx.x, warp = t / WARP, lane = t % WARP;
    const u32 piece = ((to - from + WARPS - 1) / WARPS + TILE - 1) / TILE * TILE;
    u32 next = min(from + warp * piece, to);
    const u32 end = min(next + piece, to);
    const Mover<DIMS, PACKED> mover(k, v);
    const u32 pitch = mover.pitch, of = lane / 8; // of a thread's rows of a tile the first, then every fourth
    const u32 start = shared_address(memory) + warp * TILE * (STAGES * pitch + (PACKED ? ROW : 0)), unpacked = start + STAGES * TILE * pitch;
    Cursor cursor = {spans, 0};
    // The next tile, entries of one kind: their number, and the highest bit for sinks.
    auto fetch = [&](u32 to) {
        u32 len = 0, sink = 0;
        if (next < end) {
            cursor.seek(next);
            const Span* s = cursor.s;
            u32 stop = cursor.base + s->len;
            sink = q_sink && s->sink;
            while (stop < end && stop - next < TILE && (u32)(q_sink && s[1].sink) == sink) stop += (++s)->len;
            len = min(min(stop, end) - next, TILE);
            // Beyond its end entries are not seen: the last takes their place.
            Cursor own = cursor;
            const u32 entry = next + min(lane, len - 1);
            own.seek(entry);
            const u32 slot = own.s->start + (entry - own.base);
#pragma unroll UNROLL
            for (int r = 0; r < TILE; r += 4) mover.copy(__shfl_sync(ALL, slot, r + of), to + (r + of) * pitch);
            next += len;
        }
        stage_begun();
        return len | sink << 31;
    };

    Lanes<DIMS, PARTS> lanes;
    lanes.begin();
    u32 kind = 2, here = start, one = fetch(start), two = fetch(start + TILE * pitch); // what the next tiles are
    while (one) {
        stages_done<STAGES - 2>();
        __syncwarp();
        const u32 len = one & 0x7fffffff, wanted = one >> 31;
        one = two;
        two = fetch(here == start ? start + (STAGES - 1) * TILE * pitch : here - TILE * pitch);
        if (kind != wanted) {
            kind = wanted;
            lanes.ask(k.dim, [&](int i, float& by) {
                const u32 head = lane / 4 + 8 * i;
                by = head < count ? scale : 0.0f;
                return (wanted ? q_sink : q) + (head < count ? head * k.dim : 0);
            });
        }
        u32 rows = here;
        if (PACKED) {
            rows = unpacked;
            mover.template unpack<TILE / 4, UNROLL>(here + of * pitch, rows + of * ROW, 4);
            __syncwarp();
        }
        lanes.template step<TILE>(rows, len == TILE, [&](int, u32 entry) { return entry < len; });
        here = here == start + (STAGES - 1) * TILE * pitch ? start : here + TILE * pitch;
    }

    // The warps' sums together: maxima are whole numbers, so that only the additions round.
    float* const sums = (float*)memory;      // [WARPS][HEADS][WIDTH]
    float* const states = sums + WARPS * HEADS * WIDTH; // [WARPS][HEADS][2]: maximum, sum
    stages_done<0>();
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2 / PARTS; i++) {
        const u32 head = warp * HEADS + lane / 4 + 8 * i;
        const float sum = lanes.sum(i);
        if (lane % 4 == 0) *(float2*)(states + 2 * head) = make_float2(lanes.max[i], sum);
#pragma unroll
        for (int n = 0; n < DIMS / 8; n++)
            *(float2*)(sums + head * WIDTH + 8 * n + 2 * (lane % 4)) = make_float2(lanes.weighed(i, n, 0), lanes.weighed(i, n, 1));
    }
    __syncthreads();
    const u32 per = Block<DIMS>::THREADS / HEADS, head = t / per, column = t % per;
    if (head >= count) return;
    float max = states[2 * head], by[WARPS], sum = 0.0f;
#pragma unroll
    for (int w = 1; w < WARPS; w++) max = fmaxf(max, states[2 * (w * HEADS + head)]);
    // From powers of two to those of e: nat is max ln 2, rounded.
    const float nat = max * 0.6931472f, rest = fmaf(max, 0.6931472f, -nat) - max * 1.9046543e-9f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        const float* const state = states + 2 * (w * HEADS + head);
        by[w] = scale2((1.0f + rest) * (1.0f / 16384.0f), state[0] - max);
        sum = fmaf(state[1], by[w], sum);
    }
    // [rows][heads][splits][value_dim + 2].
    float* const part = parts + ((u64)(first + head) * gridDim.x + blockIdx.x) * (v.dim + 2);
    if (column == 0) *(float2*)part = make_float2(nat, sum);
    for (u32 c = column; c < v.dim; c += per) {
        float y = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) y = fmaf(sums[(w * HEADS + head) * WIDTH + c], by[w], y);
        part[2 + c] = y;
    }
}

// As `attend`, with the types of both caches (0: f16, 1: q8_0, 2: q4_0), which are f16 but for PACKED; key_dim and value_dim at most DIMS,
// multiples of 8, of 32 for others than f16. The grid: (parts of the longest list, kv_heads * ceil(group / HEADS), rows); 128 threads, 64
// where DIMS is 256; shared memory: launch/attention.rs.
#define ATTEND(NAME, DIMS, HEADS, PACKED)                                                                                          \
    extern "C" __global__ void __launch_bounds__(Block<DIMS>::THREADS, 2) NAME(                                                    \
        const float* q, const float* q_sink, u32 q_stride, const u8* k, u64 k_row, const u8* v, u64 v_row, u32 kv_heads, u32 group, \
        u32 key_dim, u32 value_dim, float scale, const Span* spans, const u32* ends, u32 split, u32 most, float* parts, u32 k_type,  \
        u32 v_type) {                                                                                                              \
        let_next_begin();                                                                                                          \
        const u32 blocks = (group + HEADS - 1) / HEADS, g = blockIdx.y / blocks, first = blockIdx.y % blocks * HEADS;              \
        const u32 row = blockIdx.z, head = g * group + first;                                                                      \
        u32 list;                                                                                                                  \
        const u32 n = seen(spans, ends, row, list), each = part_len(n, split, most), from = blockIdx.x * each;                     \
        earlier_done();                                                                                                            \
        if (from >= n) return;                                                                                                     \
        const Columns keys = {k, (u32)k_row, PACKED ? k_type : IS_F16, kv_heads * key_dim, g * key_dim, key_dim};                  \
        const Columns values = {v, (u32)v_row, PACKED ? v_type : IS_F16, kv_heads * value_dim, g * value_dim, value_dim};          \
        const u64 at = (u64)row * q_stride + head * key_dim;                                                                                                                        \
        attend_part<DIMS, 16 / HEADS, PACKED>(                                                                                     \
            q + at, q_sink ? q_sink + at : 0, keys, values, row * kv_heads * group + head, group - first < HEADS ? group - first : HEADS,     \
            scale * 1.44269504f, spans + list, from, n - from < each ? n : from + each, parts);                                    \
    }
ATTEND(attend_64, 64, 8, false)
ATTEND(attend_many_64, 64, 16, false)
ATTEND(attend_128, 128, 8, false)
ATTEND(attend_many_128, 128, 16, false)
ATTEND(attend_256, 256, 8, false)
ATTEND(packed_64, 64, 8, true)
ATTEND(packed_many_64, 64, 16, true)
ATTEND(packed_128, 128, 8, true)
ATTEND(packed_many_128, 128, 16, true)
ATTEND(packed_256, 256, 8, true)
