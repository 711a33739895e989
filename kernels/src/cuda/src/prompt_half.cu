// Attention of a prompt's rows with grouped heads over f16 caches on tensor cores. From sm_80 on.
//
// A block takes up to 128 lanes, a lane being one query head of one row, all of which share keys, and walks the slots that any of its rows
// sees, 32 at a time, at multiples of 32 (the plan: kernels/src/cuda/plan.rs). A warp has 16 lanes: queries, scores, weights and sums stay
// in its registers. Keys and values come by copies that run on their own, STAGES - 1 blocks of slots ahead.
//
// Queries and weights go in two f16 parts (half.cuh), so a product costs two instructions. Chains of instructions are short, since tensor
// cores cut what they add: two steps of 16 dimensions for scores, 32 entries for sums; what they give is added in f32. Softmax in powers
// of two whose maximum is an integer, as everywhere. What a lane gets depends on its own entries and their slots modulo 32 alone.
#include "cached.cuh"
#include "half.cuh"
#include "softmax.cuh"

#define THREADS 256
#define LANES 128
#define BLOCK 32 // slots
#define STAGES 3
#define WEIGHT 16384.0f // weights, at most 2, are multiplied by this: their low parts are no subnormals where they count

// Rows of KEYS dimensions and VALUES columns at most; bytes that rows of a stage are apart: eight rows lie in different banks.
template <int KEYS, int VALUES>
struct Shape {
    static const int K_ROW = 2 * KEYS + 16, V_ROW = 2 * VALUES + 16, STAGE = BLOCK * (K_ROW + V_ROW);
};

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

template <int KEYS, int VALUES>
__device__ __forceinline__ void attend_tile(
    const float* q, const float* q_sink, u32 q_stride, const u8* k, u64 k_row, const u8* v, u64 v_row, u32 head, u32 heads, u32 key_dim,
    u32 value_dim, float scale, const Tile* tiles, const Segment* segments, const uint2* ranges, float* out, u32 out_stride) {
    typedef Shape<KEYS, VALUES> S;
    const int STEPS = KEYS / 16, PIECES = KEYS / 8, V_PIECES = VALUES / 8;
    extern __shared__ __align__(128) u8 memory[];
    const u32 t = threadIdx.x, lane = t % WARP, pair = 2 * (lane % 4);
    // Later tiles see more: the longest first.
    const Tile tile = tiles[gridDim.x - 1 - blockIdx.x];
    segments += tile.first;
    // Of fragments a thread has two lanes.
    const u32 first_of = t / WARP * 16 + lane / 4;
    auto row = [&](int i) { return (first_of + 8 * i) / heads; };
    auto live = [&](int i) { return first_of + 8 * i < tile.rows * heads; };
    auto its_head = [&](int i) { return head + (first_of + 8 * i) % heads; };

    Walk ahead = {segments, 0, tile.count, 0};
    ahead.begin();
    u32 to = shared_address(memory);
    const u32 start = to;
    auto copy = [&]() {
        if (ahead.there()) {
            const u32 first = segments[ahead.g].start, end = segments[ahead.g].end;
            auto rows = [&](u32 at, u32 apart, u32 pieces, u32 width, const u8* from, u64 from_row) {
#pragma unroll 1
                for (u32 i = t; i < BLOCK * pieces; i += THREADS) {
                    const u32 r = i / pieces, c = i % pieces, slot = ahead.from + r;
                    copy_or_zero<16, true>(at + r * apart + 16 * c, from + from_row * slot + 16 * c, slot >= first && slot < end && 8 * c < width);
                }
            };
            rows(to, S::K_ROW, PIECES, key_dim, k, k_row);
            rows(to + BLOCK * S::K_ROW, S::V_ROW, V_PIECES, value_dim, v, v_row);
            ahead.next();
        }
        stage_begun();
        to = to == start + (STAGES - 1) * S::STAGE ? start : to + S::STAGE;
    };
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) copy();

    u32 hi[STEPS][4], lo[STEPS][4];
    float max[2] = {-CUT, -CUT}, sum[2] = {0.0f, 0.0f}, undo[2], acc[V_PIECES][4] = {};
    u32 kind = 2; // of the queries in registers: 1 those for sinks
    u32 here = start;
    Walk walk = {segments, 0, tile.count, 0};
    for (walk.begin(); walk.there(); walk.next()) {
        stages_done<STAGES - 2>();
        __syncthreads();
        copy();
        const Segment segment = segments[walk.g];
        uint2 mine[2];
        bool some = false;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            mine[i] = live(i) ? ranges[tile.ranges + (u64)walk.g * tile.rows + row(i)] : make_uint2(0, 0);
            some |= mine[i].x < walk.from + BLOCK && mine[i].y > walk.from;
        }
        const u32 keys = here, values = here + BLOCK * S::K_ROW;
        here = here == start + (STAGES - 1) * S::STAGE ? start : here + S::STAGE;
        if (!__any_sync(ALL, some)) continue;

        const u32 wanted = q_sink && segment.sink ? 1 : 0;
        if (kind != wanted) {
            kind = wanted;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float* from = (wanted ? q_sink : q) + (u64)(tile.row + row(i)) * q_stride + its_head(i) * key_dim;
                auto at = [&](u32 d) { return live(i) && d < key_dim ? from[d] * scale : 0.0f; };
                float most = 0.0f;
#pragma unroll 4
                for (int d = 0; d < KEYS; d += 4) most = fmaxf(most, fabsf(at(d + lane % 4)));
                most = fmaxf(most, __shfl_xor_sync(ALL, most, 1));
                most = fmaxf(most, __shfl_xor_sync(ALL, most, 2));
                const float by = scale_for(most);
                undo[i] = 1.0f / by;
#pragma unroll
                for (int s = 0; s < STEPS; s++)
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        const u32 d = 16 * s + 8 * h + pair;
                        split(at(d) * by, at(d + 1) * by, hi[s][2 * h + i], lo[s][2 * h + i]);
                    }
            }
        }

        // Scores: tile n has entries 8 n .. 8 n + 8.
        float w[4][4];
#pragma unroll
        for (int n = 0; n < 4; n += 2) {
            const u32 at = keys + (8 * n + lane / 16 * 8 + lane % 8) * S::K_ROW + lane / 8 % 2 * 16;
            float total[2][4] = {};
#pragma unroll
            for (int s = 0; s < STEPS; s += 2) {
                float some[2][4] = {};
                u32 f[2][4];
#pragma unroll
                for (int i = 0; i < 2 && s + i < STEPS; i++) load_matrices(f[i], at + 32 * (s + i));
#pragma unroll
                for (int high = 0; high < 2; high++)
#pragma unroll
                    for (int i = 0; i < 2 && s + i < STEPS; i++)
#pragma unroll
                        for (int h = 0; h < 2; h++)
                            mma_f16(some[h], high ? hi[s + i] : lo[s + i], f[i][2 * h], f[i][2 * h + 1]);
#pragma unroll
                for (int e = 0; e < 8; e++) total[e / 4][e % 4] += some[e / 4][e % 4];
            }
#pragma unroll
            for (int e = 0; e < 8; e++) w[n + e / 4][e % 4] = total[e / 4][e % 4] * undo[e % 4 / 2];
        }

        // Weights.
        float shift[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float top = UNSEEN;
#pragma unroll
            for (int n = 0; n < 4; n++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const u32 slot = walk.from + 8 * n + pair + e;
                    float& x = w[n][2 * i + e];
                    x = slot >= mine[i].x && slot < mine[i].y ? fminf(fmaxf(x, -CUT), CUT) : UNSEEN;
                    top = fmaxf(top, x);
                }
            top = fmaxf(top, __shfl_xor_sync(ALL, top, 1));
            top = fmaxf(top, __shfl_xor_sync(ALL, top, 2));
            const float next = top > max[i] + 1.0f ? nearest(top) : max[i];
            shift[i] = max[i] - next;
            max[i] = next;
            float more[4];
#pragma unroll
            for (int n = 0; n < 4; n++) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float whole;
                    const float p = exp2_parts(w[n][2 * i + e], whole);
                    w[n][2 * i + e] = scale2(p, whole - next);
                }
                more[n] = w[n][2 * i] + w[n][2 * i + 1];
            }
            sum[i] = scale2(sum[i], shift[i]) + ((more[0] + more[1]) + (more[2] + more[3]));
        }
        if (__any_sync(ALL, shift[0] != 0.0f || shift[1] != 0.0f)) {
#pragma unroll
            for (int n = 0; n < V_PIECES; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) acc[n][e] = scale2(acc[n][e], shift[e / 2]);
        }
        u32 high[2][4], low[2][4];
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
            for (int i = 0; i < 2; i++)
                split(w[n][2 * i] * WEIGHT, w[n][2 * i + 1] * WEIGHT, high[n / 2][n % 2 * 2 + i], low[n / 2][n % 2 * 2 + i]);

        // Their sums: tile n has columns 8 n .. 8 n + 8.
        const u32 at = values + lane % 16 * S::V_ROW + lane / 16 * 16;
#pragma unroll
        for (int n = 0; n < V_PIECES; n += 2) {
            u32 f[2][4];
            float some[2][4] = {};
#pragma unroll
            for (int s = 0; s < 2; s++) load_turned(f[s], at + 16 * s * S::V_ROW + 16 * n);
#pragma unroll
            for (int part = 0; part < 2; part++)
#pragma unroll
                for (int s = 0; s < 2; s++)
#pragma unroll
                    for (int h = 0; h < 2; h++) mma_f16(some[h], part ? high[s] : low[s], f[s][2 * h], f[s][2 * h + 1]);
#pragma unroll
            for (int e = 0; e < 8; e++) acc[n + e / 4][e % 4] += some[e / 4][e % 4];
        }
    }

#pragma unroll
    for (int i = 0; i < 2; i++) {
        sum[i] += __shfl_xor_sync(ALL, sum[i], 1);
        sum[i] += __shfl_xor_sync(ALL, sum[i], 2);
        if (!live(i)) continue;
        const float inv = 1.0f / sum[i] * (1.0f / WEIGHT);
        float* o = out + (u64)(tile.row + row(i)) * out_stride + its_head(i) * value_dim;
#pragma unroll
        for (int n = 0; n < V_PIECES; n++)
#pragma unroll
            for (int e = 0; e < 2; e++)
                if (8 * n + pair + e < value_dim) o[8 * n + pair + e] = acc[n][2 * i + e] * inv;
    }
}

// As in prompt.cu, with at most 128 lanes a tile; key_dim and value_dim multiples of 8, at most KEYS and VALUES. The grid: (tiles,
// kv_heads * ceil(group / per)), 256 threads; shared memory: three stages of 32 rows of 2 KEYS + 16 and 2 VALUES + 16 bytes.
#define PROMPT(KEYS, VALUES)                                                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) prompt_##KEYS(                                                        \
        const float* q, const float* q_sink, u32 q_stride, const u8* k, u64 k_row, const u8* v, u64 v_row, u32 kv_heads, u32 group, \
        u32 per, u32 key_dim, u32 value_dim, float scale, const Tile* tiles, const Segment* segments, const uint2* ranges, float* out, \
        u32 out_stride) {                                                                                                         \
        const u32 pieces = (group + per - 1) / per, g = blockIdx.y / pieces, h = blockIdx.y % pieces * per;                        \
        attend_tile<KEYS, VALUES>(                                                                                                \
            q, q_sink, q_stride, k + 2 * g * key_dim, k_row, v + 2 * g * value_dim, v_row, g * group + h,                          \
            group - h < per ? group - h : per, key_dim, value_dim, scale * 1.44269504f, tiles, segments, ranges, out, out_stride);  \
    }
PROMPT(64, 64)
PROMPT(96, 96)
PROMPT(128, 128)
