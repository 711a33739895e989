// Attention of a prompt's rows with grouped heads over f16, q8_0 and q4_0 caches on tensor cores (lanes.cuh). From sm_80 on.
//
// A block takes up to 128 lanes, all of which share keys, and walks the slots that any of its rows sees, 32 at a time, at multiples of 32
// (the plan: kernels/src/cuda/plan.rs). A warp has 16 lanes: queries, scores, weights and sums stay in its registers. Keys and values
// come by copies that run on their own: f16 two blocks of slots ahead; others one more, since they are unpacked beside the multiplication
// of the block before. What a lane gets depends on its own entries and their slots modulo 32 alone.
#include "lanes.cuh"

#define THREADS 256
#define LANES 128
#define BLOCK 32 // slots

// Where a block's walk stands: segment g, its slots from `from` on.
struct Walk {
    const Segment* segments;
    u32 g, count, from;
    __device__ __forceinline__ bool there() const { return g < count; }
    __device__ __forceinline__ void begin() {
        if (there()) from = segments[g].start / BLOCK * BLOCK;
    }
    __device__ __forceinline__ void next() {
        from += BLOCK;
        if (from >= segments[g].end) g++, begin();
    }
};

template <int DIMS, bool PACKED>
__device__ __forceinline__ void attend_tile(
    const float* q, const float* q_sink, u32 q_stride, const Columns& k, const Columns& v, u32 head, u32 heads, float scale,
    const Tile* tiles, const Segment* segments, const uint2* ranges, float* out, u32 out_stride) {
    typedef Row<DIMS> R;
    const u32 STAGE = BLOCK * R::BYTES, STAGES = PACKED ? 2 : 3; // of rows in f16; packed ones have two more
    extern __shared__ __align__(128) u8 memory[];
    const u32 t = threadIdx.x, pair = 2 * (t % 4);
    // Later tiles see more: the longest first.
    const Tile& tile = tiles[gridDim.x - 1 - blockIdx.x];
    segments += tile.first;
    // A thread's lanes, and where what they see of the first segment stands. Lanes that are not there see all, which is least work.
    const auto lane = [&](int i) { return t / WARP * 16 + t % WARP / 4 + 8 * i; };
    const auto live = [&](int i) { return lane(i) < tile.rows * heads; };
    u32 ranges_at[2];
#pragma unroll
    for (int i = 0; i < 2; i++) ranges_at[i] = live(i) ? tile.ranges + lane(i) / heads : 0xffffffff;

    const Mover<DIMS, PACKED> mover(k, v);
    const u32 start = shared_address(memory), of = t / 8; // a thread's row of a block of slots
    const u32 packed = start + STAGES * STAGE, raw = BLOCK * mover.pitch; // where packed stages begin, and their bytes
    Walk ahead = {segments, 0, tile.count};
    ahead.begin();
    // Copies the next block of slots, if there is one. Slots outside of its segment are never seen: others take their place.
    auto copy = [&](u32 to) {
        const bool there = ahead.there();
        if (there) {
            const Segment& here = segments[ahead.g];
            mover.copy(min(max(ahead.from + of, here.start), here.end - 1), to + of * mover.pitch);
            ahead.next();
        }
        stage_begun();
        return there;
    };
    auto unpack = [&](u32 from, u32 to) { mover.template unpack<1, 1>(from + of * mover.pitch, to + of * R::BYTES, 0); };
    copy(PACKED ? packed : start);
    if (PACKED) {
        stages_done<0>();
        __syncthreads();
    }
    bool more = copy(PACKED ? packed + raw : start + STAGE);
    if (PACKED) unpack(packed, start);

    Lanes<DIMS, 1> lanes;
    lanes.begin();
    u32 kind = 2; // of the queries in registers: 1 those for sinks
    u32 here = start;
    Walk walk = {segments, 0, tile.count};
    for (walk.begin(); walk.there(); walk.next()) {
        stages_done<PACKED ? 0 : 1>();
        __syncthreads();
        // Block i lies here; i + 2 comes to where i - 1 was, or, packed, to where i was unpacked from, as i + 1 now is.
        const bool next = more, odd = here != start;
        more = copy(PACKED ? packed + (odd ? raw : 0) : odd ? here - STAGE : start + 2 * STAGE);
        if (PACKED && next) unpack(packed + (odd ? 0 : raw), odd ? start : start + STAGE);
        uint2 mine[2];
        bool some = false, all = true;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            mine[i] = ranges_at[i] + 1 ? ranges[ranges_at[i] + walk.g * tile.rows] : make_uint2(0, 0xffffffff);
            some |= ranges_at[i] + 1 && mine[i].x < walk.from + BLOCK && mine[i].y > walk.from;
            all &= mine[i].x <= walk.from && mine[i].y >= walk.from + BLOCK;
        }
        const u32 block = here;
        here = here == start + (STAGES - 1) * STAGE ? start : here + STAGE;
        if (!__any_sync(ALL, some)) continue;

        const u32 wanted = q_sink && segments[walk.g].sink ? 1 : 0;
        if (kind != wanted) {
            kind = wanted;
            lanes.ask(k.dim, [&](int i, float& by) {
                const u32 its = live(i) ? lane(i) : 0;
                by = live(i) ? scale : 0.0f;
                return (wanted ? q_sink : q) + (u64)(tile.row + its / heads) * q_stride + (head + its % heads) * k.dim;
            });
        }
        // Scores of 32 slots beside 256 columns would be more than there are registers.
        const int N = DIMS > 128 ? BLOCK / 2 : BLOCK;
        all = __all_sync(ALL, all);
#pragma unroll 1
        for (u32 at = 0; at < BLOCK; at += N)
            lanes.template step<N>(block + at * R::BYTES, all, [&](int i, u32 entry) {
                const u32 slot = walk.from + at + entry;
                return slot >= mine[i].x && slot < mine[i].y;
            });
    }

#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (!live(i)) continue;
        const float inv = 1.0f / lanes.sum(i);
        float* o = out + (u64)(tile.row + lane(i) / heads) * out_stride + (head + lane(i) % heads) * v.dim;
#pragma unroll
        for (int n = 0; n < DIMS / 8; n++)
#pragma unroll
            for (int e = 0; e < 2; e++)
                if (8 * n + pair + e < v.dim) o[8 * n + pair + e] = lanes.weighed(i, n, e) * inv;
    }
}

// As in prompt.cu, with at most 128 lanes a tile; the types of both caches (0: f16, 1: q8_0, 2: q4_0), which are f16 but for PACKED; key_dim
// and value_dim at most DIMS and multiples of 8, of 32 for others than f16. The grid: (tiles, kv_heads * ceil(group / per)), 256 threads;
// shared memory: launch/attention.rs.
#define PROMPT(NAME, DIMS, PACKED)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(                                                                 \
        const float* q, const float* q_sink, u32 q_stride, const u8* k, u64 k_row, const u8* v, u64 v_row, u32 kv_heads, u32 group, \
        u32 per, u32 key_dim, u32 value_dim, float scale, const Tile* tiles, const Segment* segments, const uint2* ranges, float* out, \
        u32 out_stride, u32 k_type, u32 v_type) {                                                                                  \
        const u32 pieces = (group + per - 1) / per, g = blockIdx.y / pieces, h = blockIdx.y % pieces * per;                        \
        const Columns keys = {k, (u32)k_row, PACKED ? k_type : IS_F16, kv_heads * key_dim, g * key_dim, key_dim};                  \
        const Columns values = {v, (u32)v_row, PACKED ? v_type : IS_F16, kv_heads * value_dim, g * value_dim, value_dim};          \
        attend_tile<DIMS, PACKED>(                                                                                                 \
            q, q_sink, q_stride, keys, values, g * group + h, group - h < per ? group - h : per, scale * 1.44269504f, tiles,       \
            segments, ranges, out, out_stride);                                                                                    \
    }
PROMPT(prompt_64, 64, false)
PROMPT(prompt_96, 96, false)
PROMPT(prompt_128, 128, false)
PROMPT(prompt_256, 256, false)
PROMPT(packed_64, 64, true)
PROMPT(packed_96, 96, true)
PROMPT(packed_128, 128, true)
PROMPT(packed_256, 256, true)
