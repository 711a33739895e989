// Attention of a prompt's rows over a cache: grouped heads, and MLA in its absorbed form; one type of each cache a compilation (FORMAT, SECOND).
//
// A block takes up to 64 lanes, a lane being one query head of one row, all of which share keys, and walks the slots that any of its rows
// sees, 64 at a time (the plan: kernels/src/cpu/attention/rows.rs). The arithmetic is that of the CPU's tiles (cpu/attention/tile.rs), to the
// bit: scores and weighted sums by fused multiply-adds in ascending order, a softmax in powers of two whose maximum is an integer. What a
// lane gets depends on what its row sees alone. Tensor cores would take queries and weights as f16, a hundred times the bar's error.
//
// A thread makes 4 x 4 scores, then 4 lanes x 4 columns of sums for every 64 columns of the values: two loads of four floats from shared
// memory for 16 multiply-adds in both.
#include "cached.cuh"
#include "softmax.cuh"

#define THREADS 256
#define LANES 64
#define BLOCK 64  // entries
#define CHUNK 32  // dimensions of queries and keys at a time
#define COLS 64   // columns of values at a time
#define STRIDE 68 // of rows of 64 floats: eight dimensions of four lanes lie in different banks
#define LAZY 32.0f

// Queries in two parts, as keys are: dimension i of lane's head is a[i], past `a_len` b[i - a_len], the last part another for sinks.
struct Queries {
    const float* a;
    u64 a_row;
    u32 a_head;
    const float* b;
    const float* sink;
    u64 b_row;
    u32 b_head;
};

// Keys are `a` at columns a_col .. a_col + a_len, then `b` whole; values `value` columns of v from v_col on. The heads are head .. head + heads.
template <int PARTS, class V>
__device__ __forceinline__ void attend_tile(
    const Cache& a, u32 a_col, u32 a_len, const Other& b, const V& v, u32 v_col, u32 value, const Queries& q, u32 head, u32 heads,
    float scale, const Tile* tiles, const Segment* segments, const uint2* ranges, float* out, u64 out_stride) {
    __shared__ __align__(16) float scores[BLOCK * STRIDE];
    __shared__ __align__(16) float stage[2 * CHUNK * STRIDE]; // queries and keys [dimension][lane or entry], then values [entry][column]
    __shared__ float tops[4][LANES], shifts[LANES], sums[LANES];
    __shared__ u32 moves[THREADS / WARP];
    float* const keys = stage + CHUNK * STRIDE;
    const u32 t = threadIdx.x, width = a_len + b.width;
    // What a thread makes: lanes 4x .. 4x + 4, entries or columns 4y .. 4y + 4.
    const u32 x = t % 16, y = t / 16;
    // What it softens: 16 entries of a lane; and, in the first two warps, the sum of a lane.
    const u32 lane = t % LANES, quarter = t / LANES;
    // Later tiles see more: the longest first.
    const Tile tile = tiles[gridDim.x - 1 - blockIdx.x];
    const u32 row = lane / heads;
    float max = -CUT, sum = 0.0f, acc[PARTS][4][4];
#pragma unroll
    for (int p = 0; p < PARTS; p++)
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) acc[p][i][j] = 0.0f;
    for (u32 g = 0; g < tile.count; g++) {
        const Segment segment = segments[tile.first + g];
        const uint2* seen = ranges + tile.ranges + (u64)g * tile.rows;
        const uint2 mine = row < tile.rows ? seen[row] : make_uint2(0, 0);
        for (u32 from = segment.start; from < segment.end; from += BLOCK) {
            const u32 len = segment.end - from < BLOCK ? segment.end - from : BLOCK;
            __syncthreads();
            float s[4][4];
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) s[i][j] = 0.0f;
            for (u32 d = 0; d < width; d += CHUNK) {
                // A warp loads eight dimensions of four rows.
#pragma unroll 2
                for (int l = 0; l < 8; l++) {
                    const u32 at = 8 * (l % 4) + t % 8, r = 4 * (t / WARP + 8 * (l / 4)) + t % WARP / 8, i = d + at, qr = r / heads;
                    float one = 0.0f, two = 0.0f;
                    if (i < width) {
                        if (qr < tile.rows) {
                            const u64 h = head + r % heads, rr = tile.row + qr;
                            const bool first = i < a_len;
                            const float* p = first ? q.a + rr * q.a_row + h * q.a_head : q.b + rr * q.b_row + h * q.b_head;
                            // The last part turns with positions.
                            if (q.sink && segment.sink && (!first || !b.width)) p = q.sink + (first ? rr * q.a_row + h * q.a_head : rr * q.b_row + h * q.b_head);
                            one = p[first ? i : i - a_len] * scale;
                        }
                        if (r < len) two = i < a_len ? a.at(from + r, a_col + i) : b.at(from + r, i - a_len);
                    }
                    stage[at * STRIDE + r] = one;
                    keys[at * STRIDE + r] = two;
                }
                __syncthreads();
#pragma unroll 4
                for (int k = 0; k < CHUNK; k++) {
                    const float4 one = *(const float4*)(stage + k * STRIDE + 4 * x), two = *(const float4*)(keys + k * STRIDE + 4 * y);
                    const float u[4] = {one.x, one.y, one.z, one.w}, w[4] = {two.x, two.y, two.z, two.w};
#pragma unroll
                    for (int i = 0; i < 4; i++)
#pragma unroll
                        for (int j = 0; j < 4; j++) s[i][j] = fmaf(u[i], w[j], s[i][j]);
                }
                __syncthreads();
            }
#pragma unroll
            for (int j = 0; j < 4; j++) *(float4*)(scores + (4 * y + j) * STRIDE + 4 * x) = make_float4(s[0][j], s[1][j], s[2][j], s[3][j]);
            __syncthreads();
            // Scores cut to their range, those not seen hidden.
            float w[16], top = UNSEEN;
#pragma unroll
            for (int j = 0; j < 16; j++) {
                const u32 e = 16 * quarter + j, slot = from + e;
                w[j] = fminf(fmaxf(scores[e * STRIDE + lane], -CUT), CUT);
                if (e >= len || slot < mine.x || slot >= mine.y) w[j] = UNSEEN;
                top = fmaxf(top, w[j]);
            }
            tops[quarter][lane] = top;
            __syncthreads();
            top = fmaxf(fmaxf(tops[0][lane], tops[1][lane]), fmaxf(tops[2][lane], tops[3][lane]));
            // The maximum follows only once scores pass it by 2^LAZY: rescaling is exact, so that waiting changes nothing.
            const float next = top > max + LAZY ? nearest(top) : max, shift = max - next;
            max = next;
            sum = scale2(sum, shift);
            if (quarter == 0) shifts[lane] = shift;
            const bool some = __any_sync(ALL, shift != 0.0f);
            if (t % WARP == 0) moves[t / WARP] = some;
#pragma unroll
            for (int j = 0; j < 16; j++) {
                float n;
                const float p = exp2_parts(w[j], n);
                scores[(16 * quarter + j) * STRIDE + lane] = scale2(p, n - max);
            }
            __syncthreads();
            if (t < LANES) {
                for (u32 e = 0; e < len; e++) sum += scores[e * STRIDE + lane];
            }
            // Warps 0 and 1 know all lanes.
            if (moves[0] | moves[1]) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float by = shifts[4 * x + i];
#pragma unroll
                    for (int p = 0; p < PARTS; p++)
#pragma unroll
                        for (int j = 0; j < 4; j++) acc[p][i][j] = scale2(acc[p][i][j], by);
                }
            }
#pragma unroll
            for (int p = 0; p < PARTS; p++) {
                if (p * COLS >= value) break;
                if (p) __syncthreads();
                const u32 c = p * COLS + t % COLS;
#pragma unroll 2
                for (u32 e = t / COLS; e < len; e += THREADS / COLS) stage[e * STRIDE + t % COLS] = c < value ? v.at(from + e, v_col + c) : 0.0f;
                __syncthreads();
#pragma unroll 2
                for (u32 e = 0; e < len; e++) {
                    const float4 one = *(const float4*)(scores + e * STRIDE + 4 * x), two = *(const float4*)(stage + e * STRIDE + 4 * y);
                    const float u[4] = {one.x, one.y, one.z, one.w}, w[4] = {two.x, two.y, two.z, two.w};
#pragma unroll
                    for (int i = 0; i < 4; i++)
#pragma unroll
                        for (int j = 0; j < 4; j++) acc[p][i][j] = fmaf(w[j], u[i], acc[p][i][j]);
                }
            }
        }
    }
    if (t < LANES) sums[lane] = 1.0f / sum;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const u32 r = (4 * x + i) / heads, h = head + (4 * x + i) % heads;
        if (r >= tile.rows) continue;
        const float inv = sums[4 * x + i];
        float* o = out + (tile.row + r) * out_stride + (u64)h * value;
#pragma unroll
        for (int p = 0; p < PARTS; p++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const u32 c = p * COLS + 4 * y + j;
                if (c < value) o[c] = acc[p][i][j] * inv;
            }
    }
}

// Grouped-query attention, out [rows][heads][value_dim], value_dim at most 64 PARTS. A tile's rows times `per` heads are at most 64 lanes;
// a group of more than `per` heads (at most 64) is cut in pieces. The grid: (tiles, kv_heads * ceil(group / per)), 256 threads.
#define PROMPT(PARTS, BLOCKS)                                                                                                      \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) prompt_##PARTS(                                                  \
        const float* q, const float* q_sink, u32 q_stride, const u8* k, u64 k_row, const u8* v, u64 v_row, u32 kv_heads, u32 group, \
        u32 per, u32 key_dim, u32 value_dim, float scale, const Tile* tiles, const Segment* segments, const uint2* ranges, float* out, \
        u32 out_stride) {                                                                                                         \
        const u32 pieces = (group + per - 1) / per, g = blockIdx.y / pieces, h = blockIdx.y % pieces * per;                        \
        const Cache keys = {k, k_row, kv_heads * key_dim};                                                                        \
        const Other none = {0, 0, 0}, values = {v, v_row, kv_heads * value_dim};                                                  \
        const Queries queries = {q, q_stride, key_dim, 0, q_sink, 0, 0};                                                          \
        attend_tile<PARTS>(                                                                                                       \
            keys, g * key_dim, key_dim, none, values, g * value_dim, value_dim, queries, g * group + h,                            \
            group - h < per ? group - h : per, scale * 1.44269504f, tiles, segments, ranges, out, out_stride);                     \
    }
PROMPT(2, 2)
PROMPT(4, 1)

// Absorbed MLA: keys are a latent (at most 512) and a rotated part that all heads share, values the latents. q_latent [rows][heads][latent]
// (the keys' up-projection applied), q [rows][heads][nope + rope]; out [rows][heads][latent]: the values' up-projection follows. The grid:
// (tiles, ceil(heads / per)), 256 threads.
extern "C" __global__ void __launch_bounds__(THREADS, 1) prompt_mla(
    const float* q_latent, const float* q, const float* q_sink, u32 q_stride, const u8* latents, u64 latent_row, const u8* k_pe,
    u64 k_pe_row, u32 heads, u32 per, u32 latent, u32 nope, u32 rope, float scale, const Tile* tiles, const Segment* segments,
    const uint2* ranges, float* out) {
    const u32 h = blockIdx.y * per;
    const Cache c = {latents, latent_row, latent};
    const Other pe = {k_pe, k_pe_row, rope};
    const Queries queries = {q_latent, (u64)heads * latent, latent, q + nope, q_sink ? q_sink + nope : 0, q_stride, nope + rope};
    attend_tile<8>(
        c, 0, latent, pe, c, 0, latent, queries, h, heads - h < per ? heads - h : per, scale * 1.44269504f, tiles, segments, ranges, out,
        (u64)heads * latent);
}
