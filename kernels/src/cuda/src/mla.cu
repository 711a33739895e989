// Absorbed MLA over f16 caches on tensor cores (sm_80 and later): one entry of 576 values is the key of all heads and, but for its rotated
// part, their value. Parts as attention.cu's `attend_mla` makes them, for the same `merge`.
//
// A block of eight warps takes 16, 32 or 64 heads of one row and one part of the row's list, tile by tile. Tiles come by copies that run
// on their own, several stages of them. Queries stay in registers: a warp multiplies nine of the 36 steps of 16 columns for 16 or 32 heads,
// and what four warps found is added up as the softmax reads it. Then a warp adds 64 columns of the values for all heads. The softmax of
// one tile and the weighted sums of the one before share a stretch between two barriers: half of the warps begin with either.
//
// Up to 16 heads, bound by memory, go in two f16 parts (half.cuh), queries and weights, so that a product costs two instructions. An
// instruction's rounding is kept small by chains of nine (scores; the low parts in a chain of their own) and of two (weighted sums of 16
// entries); the rest is added as floats. More heads are bound by tensor cores: theirs go in one part, rounded as cached values are, and
// weighted sums stay where they are, divided by the sum of the rounded weights. Blocks of 16, 32 and 64 heads give the same bits.
#include "cached.cuh"
#include "half.cuh"
#include "softmax.cuh"

#define THREADS 256
#define SLICES 4    // warps that share a row of scores
#define STEPS 9     // steps of 16 columns of each
#define LATENT 512  // columns of a tile: latents, then the rotated part, zeros where there is less
#define WIDTH 576
#define ROTATED ((WIDTH - LATENT) / 16) // steps of rotated columns, the last warp's last
#define PITCH (2 * WIDTH + 16) // bytes of an entry in a stage: the same 16 bytes of eight lie in different banks
#define WEIGHT_BITS 14 // weights are multiplied by 2^14, so that what f16 keeps of them (of their low parts) is no subnormal
#define WEIGHT (float)(1 << WEIGHT_BITS)
#define AHEAD 128 // slots that are looked up at a time; twice as many are kept

// What reads and writes of N neighbours are done by.
template <class T, int N>
struct __align__(sizeof(T) * N) Some {
    T x[N];
};

// Place in a list of spans: `base` entries lie before span i.
struct Cursor {
    u32 i, base;
};

// The queries of a block's heads, of which the last block may have fewer.
struct Queries {
    const float* latent; // [heads][latent]
    const float* pe;     // [heads], `pe_head` apart
    const float* sink;   // the same for sinks, should there be any
    bool sinks;
    u32 pe_head, count; // heads there are
};

// WEIGHT 2^x for x < 2, WEIGHT 2^-126 below that.
__device__ __forceinline__ float weight(float x) {
    const float magic = 12582912.0f + WEIGHT_BITS, y = fmaxf(x, -126.0f), n = y + magic;
    return __int_as_float(__float_as_int(exp2_near(y - (n - magic))) + (__float_as_int(n) << 23));
}

// 2^x for whole x <= 0; 0 below 2^-126.
__device__ __forceinline__ float power(float x) { return __int_as_float(__float_as_int(fmaxf(x, -127.0f) + (12582912.0f + 127.0f)) << 23); }

// MT groups of 16 heads, their queries and weights in PARTS, TILE entries at a time.
template <int PARTS, int MT, int TILE, int STAGES>
__device__ __forceinline__ void attend_part(
    const Queries& q, const u8* latents, u64 latent_row, const u8* k_pe, u64 k_pe_row, u32 latent, u32 rope, float scale,
    const Span* spans, u32 from, u32 to, float* parts, u32 heads) {
    const int HEADS = 16 * MT, EDGE = TILE + 8; // rows of scores and weights are padded: no two of eight in the same banks
    const int GROUPS = MT == 4 ? 2 : 1;         // groups of heads that a warp scores
    const int ENTRIES = MT == 1 ? TILE / 2 : TILE, NT = ENTRIES < 16 ? 1 : 2; // entries that it scores, tiles of 8 at a time
    const int COPIERS = THREADS / TILE, COPIES = (WIDTH / 8 + COPIERS - 1) / COPIERS; // of 16 bytes of an entry
    const u32 SINK = 1u << 31;
    // What softens a head: LANES threads, each QUADS runs of four entries.
    const int QUADS = TILE * HEADS <= 4 * THREADS ? 1 : TILE * HEADS / (4 * THREADS), LANES = TILE / 4 / QUADS, PER = 4 * QUADS;
    extern __shared__ __align__(128) u8 stages[];
    float* const scores = (float*)(stages + STAGES * TILE * PITCH);  // [SLICES][HEADS][EDGE]
    u16* const weights = (u16*)(scores + SLICES * HEADS * EDGE);     // [tile % 2][part][HEADS][EDGE]
    float2* const states = (float2*)(weights + 2 * PARTS * HEADS * EDGE); // [tile % 2][HEADS]: what weights are relative to, their sum
    float2* const bounds = states + 2 * HEADS;                       // [HEADS]: what makes scores of sums, the largest sum that counts
    float* const shrinks = (float*)(bounds + HEADS);                 // [tile % 2][HEADS]
    float* const powers = shrinks + 2 * HEADS;                       // [HEADS]
    u8* const grew = (u8*)(powers + HEADS);                          // [tile % 2][warps]: whether some head's sums shrink
    const float** const rotated = (const float**)(grew + 16);        // queries for others, and for sinks
    Cursor* const cursors = (Cursor*)(rotated + 2);                  // [2], in turn
    u32* const slots = (u32*)(cursors + 2);                          // [2 * AHEAD], the highest bit set for sinks
    u32* const lens = slots + 2 * AHEAD;                             // [STAGES], likewise
    const u32 t = threadIdx.x, warp = t / WARP, slice = warp % SLICES, half = warp / SLICES;
    const u32 row = t % WARP / 4, pair = t % 4 * 2;   // of a fragment of 16 x 8 floats: rows row, row + 8, columns pair, pair + 1
    const u32 matrix = t % WARP / 8, line = t % 8;    // the row of a matrix that this lane names
    const u32 group = MT == 1 ? 0 : 16 * GROUPS * half, first = MT == 1 ? half * ENTRIES : 0; // heads and entries that a warp scores
    const u32 tiles = shared_address(stages);

    // A thread looks up one of the next slots.
    u32 known = from;
    const auto look_up = [&] {
        const u32 at = known + t, turn = known / AHEAD % 2;
        u32 slot = 0;
        if (t < AHEAD && at < to) {
            Cursor c = cursors[turn];
            while (at - c.base >= spans[c.i].len) c.base += spans[c.i++].len;
            slot = spans[c.i].start + (at - c.base) | (q.sinks && spans[c.i].sink ? SINK : 0);
            if (t == AHEAD - 1) cursors[turn ^ 1] = c;
        }
        if (t < AHEAD) slots[at % (2 * AHEAD)] = slot;
        known += AHEAD;
        return slot & ~SINK;
    };
    // The next tile into a stage: entries of one kind, sinks or others.
    u32 next = from;
    const u32 copied = t / COPIERS, chunk = t % COPIERS;
    const auto copy_tile = [&](u32 stage) {
        u32 len = 0, sink = 0;
        if (next < to) {
            len = min(to - next, (u32)TILE);
            if (q.sinks) {
                sink = slots[next % (2 * AHEAD)] & SINK;
                // As far as the first of another kind.
                const u32 others = __ballot_sync(ALL, (slots[(next + t % TILE) % (2 * AHEAD)] & SINK) != sink);
                len = min((u32)__popc(~others & (others - 1)), len);
            }
            const u64 slot = slots[(next + copied) % (2 * AHEAD)] & ~SINK;
            const u8* const one = latents + slot * latent_row + 16 * chunk;
            const u8* const two = k_pe + slot * k_pe_row + 16 * chunk;
            const u32 at = tiles + (stage * TILE + copied) * PITCH + 16 * chunk;
            const auto copy = [&](int j, u32 latent, u32 rope) {
                const int col = 8 * j * COPIERS;
                const bool live = copied < len && (col < LATENT ? col + 8 * chunk < latent : col + 8 * chunk < LATENT + rope);
                const u8* const from = col < LATENT ? one + 2 * col : two + 2 * (col - LATENT);
                if (col + 8 * COPIERS <= WIDTH || chunk < (WIDTH - col) / 8) copy_or_zero<16, true>(at + 2 * col, from, live);
            };
            if (latent == LATENT && rope == WIDTH - LATENT) {
#pragma unroll
                for (int j = 0; j < COPIES; j++) copy(j, LATENT, WIDTH - LATENT);
            } else {
#pragma unroll
                for (int j = 0; j < COPIES; j++) copy(j, latent, rope);
            }
            if (known - next < 3 * TILE) look_up();
        }
        if (t == 0) lens[stage] = len | sink;
        next += len;
        stage_begun();
    };

    if (t == 0) cursors[from / AHEAD % 2] = {0, 0}, rotated[0] = q.pe, rotated[1] = q.sink;
    if (t < 16) grew[t] = 0;
    __syncthreads();
    {
        // The first entries are asked for while those are made that others still write: a cache's lines are whole in the second level.
        const u64 slot = look_up();
        if (t < AHEAD && from + t < to) {
            for (u32 i = 0; i < 2 * latent; i += 128) prefetch(latents + slot * latent_row + i);
            prefetch(k_pe + slot * k_pe_row);
        }
    }
    earlier_done();
    __syncthreads();
    for (u32 i = 0; i < STAGES - 2; i++) copy_tile(i);

    // Columns col + pair (+ 1) of latents of the head of row `row` + 8 r of group g, and rotated ones of `pe`. Where there are none something
    // else is loaded, so that no load waits at a branch.
    const auto query = [&](int g, u32 col, int r) {
        const u32 head = group + 16 * g + row + 8 * r;
        const bool here = head < q.count && col < latent;
        const float2 x = fetch((const float2*)(q.latent + (here ? (u64)head * latent + col + pair : 0)));
        return here ? x : make_float2(0.0f, 0.0f);
    };
    const auto rotated_query = [&](int g, u32 col, int r, const float* pe) {
        const u32 head = group + 16 * g + row + 8 * r;
        const bool here = head < q.count && col < rope;
        const float* const from = here ? pe + (u64)head * q.pe_head + col + pair : q.latent;
        const float x = fetch(from), y = fetch(from + 1);
        return here ? make_float2(x, y) : make_float2(0.0f, 0.0f);
    };
    // Queries in f16, each head's scaled by the power of two that suits it.
    u32 high[GROUPS][STEPS][4], low[GROUPS][PARTS == 2 ? STEPS : 1][4];
    const auto take = [&](int g, int i, int j, float2 x) {
        const float power = powers[group + 16 * g + row + j % 2 * 8];
        if (PARTS == 2) split(x.x * power, x.y * power, high[g][i][j], low[g][i % (PARTS == 2 ? STEPS : 1)][j]);
        else high[g][i][j] = to_f16(x.x * power) | (u32)to_f16(x.y * power) << 16;
    };
    {
        float2 x[GROUPS][STEPS][4];
#pragma unroll
        for (int i = 0; i < STEPS; i++)
#pragma unroll
            for (int j = 0; j < 4 * GROUPS; j++) x[j / 4][i][j % 4] = query(j / 4, 16 * (STEPS * slice + i) + j % 4 / 2 * 8, j % 2);
        if (slice == SLICES - 1)
#pragma unroll
            for (int i = 0; i < ROTATED; i++)
#pragma unroll
                for (int j = 0; j < 4 * GROUPS; j++)
                    x[j / 4][STEPS - ROTATED + i][j % 4] = rotated_query(j / 4, 16 * i + j % 4 / 2 * 8, j % 2, q.pe);
        const auto larger = [](float most, float2 x) { return fmaxf(most, fmaxf(fabsf(x.x), fabsf(x.y))); };
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
            float most[2] = {0.0f, 0.0f};
#pragma unroll
            for (int i = 0; i < STEPS; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) most[j % 2] = larger(most[j % 2], x[g][i][j]);
            if (q.sinks && slice == SLICES - 1)
#pragma unroll
                for (int i = 0; i < ROTATED; i++)
#pragma unroll
                    for (int j = 0; j < 4; j++) most[j % 2] = larger(most[j % 2], rotated_query(g, 16 * i + j / 2 * 8, j % 2, q.sink));
#pragma unroll
            for (int r = 0; r < 2; r++) {
                most[r] = fmaxf(most[r], __shfl_xor_sync(ALL, most[r], 1));
                most[r] = fmaxf(most[r], __shfl_xor_sync(ALL, most[r], 2));
                if (pair == 0 && (MT > 1 || half == 0)) scores[slice * HEADS + group + 16 * g + row + 8 * r] = most[r];
            }
        }
        __syncthreads();
        if (t < HEADS) {
            const float* const m = scores + t;
            powers[t] = scale_for(fmaxf(fmaxf(m[0], m[HEADS]), fmaxf(m[2 * HEADS], m[3 * HEADS])));
            const float factor = scale * 1.44269504f / powers[t];
            bounds[t] = make_float2(factor, fminf(CUT / factor, 3.0e38f));
            states[HEADS + t] = make_float2(-CUT, 0.0f);
        }
        __syncthreads();
#pragma unroll
        for (int g = 0; g < GROUPS; g++)
#pragma unroll
            for (int i = 0; i < STEPS; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) take(g, i, j, x[g][i][j]);
    }
    // What this thread softens: a head's entries 4 (lane + LANES i) and three more. Of four heads the middle two change places, so that
    // reads of eight threads lie in different banks.
    const u32 place = t / LANES, mine = LANES == 4 ? place & ~3u | (place & 1) << 1 | place >> 1 & 1 : place, begin = 4 * (t % LANES);
    float acc[MT][8][4];
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) acc[i][n][j] = 0.0f;

    // A tile's scores, this warp's share of the columns.
    const auto score = [&](u32 stage) {
#pragma unroll 1
        for (int e = first; e < first + ENTRIES; e += 16) {
            float c[GROUPS][2][4], d[2][4];
#pragma unroll
            for (int j = 0; j < 8 * GROUPS; j++) c[j / 8][j / 4 % 2][j % 4] = 0.0f;
#pragma unroll
            for (int j = 0; j < 8; j++) d[j / 4][j % 4] = 0.0f;
            const u32 at = tiles + (stage * TILE + e + line + (NT > 1 ? matrix / 2 * 8 : 0)) * PITCH + 32 * STEPS * slice + 16 * (matrix % 2);
#pragma unroll
            for (int i = 0; i < STEPS; i++) {
                u32 k[4];
                // With one tile of entries the later two matrices are the former two.
                load_matrices(k, at + 32 * i);
#pragma unroll
                for (int n = 0; n < NT; n++) {
#pragma unroll
                    for (int g = 0; g < GROUPS; g++) mma_f16(c[g][n], high[g][i], k[2 * n], k[2 * n + 1]);
                    if (PARTS == 2) mma_f16(d[n], low[0][i % (PARTS == 2 ? STEPS : 1)], k[2 * n], k[2 * n + 1]);
                }
            }
#pragma unroll
            for (int g = 0; g < GROUPS; g++)
#pragma unroll
                for (int n = 0; n < NT; n++)
#pragma unroll
                    for (int r = 0; r < 2; r++) {
                        float2 x = make_float2(c[g][n][2 * r], c[g][n][2 * r + 1]);
                        if (PARTS == 2) x = make_float2(x.x + d[n][2 * r], x.y + d[n][2 * r + 1]);
                        *(float2*)(scores + (slice * HEADS + group + 16 * g + row + 8 * r) * EDGE + e + 8 * n + pair) = x;
                    }
        }
    };

    // A tile's weights, relative to a power of two that follows the largest: what is smaller by one is smaller exactly.
    const auto soften = [&](u32 len, u32 buffer) {
        if (mine >= HEADS) return;
        typedef Some<float, 4> Floats;
        typedef Some<u32, 2> Halves;
        const float2 bound = bounds[mine], state = states[(buffer ^ 1) * HEADS + mine];
        float w[PER], top = -bound.y, sum = 0.0f;
#pragma unroll
        for (int j = 0; j < PER; j += 4) {
            const float* const at = scores + mine * EDGE + begin + j * LANES;
            Floats s[SLICES];
#pragma unroll
            for (int i = 0; i < SLICES; i++) s[i] = *(const Floats*)(at + i * HEADS * EDGE);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                // Infinite scores count as the largest there are, NaN as the lowest.
                w[j + i] = fminf(bound.y, fmaxf(-bound.y, (s[0].x[i] + s[1].x[i]) + (s[2].x[i] + s[3].x[i])));
            }
        }
        if (len < TILE) {
#pragma unroll
            for (int i = 0; i < PER; i++)
                if (begin + i / 4 * 4 * LANES + i % 4 >= len) w[i] = __int_as_float(0xff800000);
        }
#pragma unroll
        for (int i = 0; i < PER; i++) top = fmaxf(top, w[i]);
#pragma unroll
        for (int other = LANES / 2; other > 0; other /= 2) top = fmaxf(top, __shfl_xor_sync(ALL, top, other));
        const float peak = top * bound.x, above = peak > state.x + 1.0f ? nearest(peak) : state.x, less = power(state.x - above);
#pragma unroll
        for (int j = 0; j < PER; j += 4) {
            float v[4], summed[4];
#pragma unroll
            for (int i = 0; i < 4; i++) v[i] = weight(fmaf(w[j + i], bound.x, -above));
            const Halves one = {halves(v[0], v[1]), halves(v[2], v[3])};
            u16* const put = weights + (PARTS * buffer * HEADS + mine) * EDGE + begin + j * LANES;
            *(Halves*)put = one;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float kept = f16((u16)(one.x[i / 2] >> 16 * (i % 2)));
                summed[i] = PARTS == 2 ? v[i] : kept;
                // Of weights below 2^-13 of the largest eleven bits do: 2^-25 of it is left out.
                v[i] = v[i] < 2.0f ? 0.0f : v[i] - kept;
            }
            sum += (summed[0] + summed[1]) + (summed[2] + summed[3]);
            if (PARTS == 2) *(Halves*)(put + HEADS * EDGE) = {halves(v[0], v[1]), halves(v[2], v[3])};
        }
        sum = sum_lanes<LANES>(sum);
        if (begin == 0) {
            shrinks[buffer * HEADS + mine] = less;
            states[buffer * HEADS + mine] = make_float2(above, fmaf(state.y, less, sum));
        }
        const bool some = __any_sync(ALL, above != state.x);
        if (t % WARP == 0) grew[8 * buffer + warp] = some;
    };

    // A tile's weighted sums, this warp's columns.
    const auto add = [&](u32 stage, u32 buffer) {
        float shrink[MT][2];
        const float* const less = shrinks + buffer * HEADS + row;
        if (PARTS == 2) {
#pragma unroll
            for (int i = 0; i < 2 * MT; i++) shrink[i / 2][i % 2] = less[8 * i];
        } else {
            const uint2 some = *(const uint2*)(grew + 8 * buffer);
            if (some.x | some.y) {
#pragma unroll
                for (int i = 0; i < MT; i++)
#pragma unroll
                    for (int n = 0; n < 8; n++)
#pragma unroll
                        for (int j = 0; j < 4; j++) acc[i][n][j] *= less[16 * i + j / 2 * 8];
            }
        }
#pragma unroll 1
        for (int k = 0; k < TILE; k += 16) {
            u32 one[MT][4], two[MT][4];
            bool both[MT];
#pragma unroll
            for (int i = 0; i < MT; i++) {
                const u32 of = PARTS * buffer * HEADS + 16 * i + line + matrix % 2 * 8;
                const u32 at = shared_address(weights + of * EDGE + k + matrix / 2 * 8);
                load_matrices(one[i], at);
                if (PARTS == 2) {
                    load_matrices(two[i], at + 2 * HEADS * EDGE);
                    // Products with zeros change nothing.
                    both[i] = __any_sync(ALL, (two[i][0] | two[i][1] | two[i][2] | two[i][3]) != 0);
                }
            }
#pragma unroll
            for (int n = 0; n < 8; n += 2) {
                u32 v[4];
                load_turned(v, tiles + (stage * TILE + k + line + matrix % 2 * 8) * PITCH + 16 * (8 * warp + n + matrix / 2));
#pragma unroll
                for (int i = 0; i < MT; i++) {
                    if (PARTS == 1) {
                        mma_f16(acc[i][n], one[i], v[0], v[1]);
                        mma_f16(acc[i][n + 1], one[i], v[2], v[3]);
                        continue;
                    }
                    float c[2][4] = {{0.0f, 0.0f, 0.0f, 0.0f}, {0.0f, 0.0f, 0.0f, 0.0f}};
                    if (both[i]) {
                        mma_f16(c[0], two[i], v[0], v[1]);
                        mma_f16(c[1], two[i], v[2], v[3]);
                    }
                    mma_f16(c[0], one[i], v[0], v[1]);
                    mma_f16(c[1], one[i], v[2], v[3]);
#pragma unroll
                    for (int j = 0; j < 8; j++) {
                        float& a = acc[i][n + j / 4][j % 4];
                        a = fmaf(a, shrink[i][j % 4 / 2], c[j / 4][j % 4]);
                    }
                }
            }
            if (PARTS == 2) {
#pragma unroll
                for (int i = 0; i < 2 * MT; i++) shrink[i / 2][i % 2] = 1.0f;
            }
        }
    };

    u32 kind = 0, i = 0;
    for (;; i++) {
        // Tile i is there, and nothing reads tile i - 2 any more.
        stages_done<STAGES - 3>();
        __syncthreads();
        copy_tile((i + STAGES - 2) % STAGES);
        const u32 len = lens[i % STAGES];
        if (!len) break;
        if (len >> 31 != kind) {
            // Sinks are scored with the second rotation.
            kind = len >> 31;
            if (slice == SLICES - 1) {
#pragma unroll
                for (int i = 0; i < ROTATED; i++)
#pragma unroll
                    for (int g = 0; g < GROUPS; g++) {
#pragma unroll
                        for (int j = 0; j < 4; j++)
                            take(g, STEPS - ROTATED + i, j, rotated_query(g, 16 * i + j / 2 * 8, j % 2, rotated[kind]));
                        __syncwarp(); // else all are loaded at once, and registers do not do
                    }
            }
        }
        score(i % STAGES);
        __syncthreads();
        const u32 seen = len & ~SINK;
#pragma unroll 1
        for (u32 turn = 0; turn < 2; turn++) {
            if (turn == half) soften(seen, i % 2);
            else if (i) add((i - 1) % STAGES, (i - 1) % 2);
        }
    }
    const u32 last = i - 1;
    add(last % STAGES, last % 2);

    // [rows][heads][splits][latent + 2].
    const u64 size = latent + 2, part_head = gridDim.y * size;
    float* const part = parts + ((u64)blockIdx.z * heads + blockIdx.x * HEADS) * part_head + blockIdx.y * size;
    if (t < q.count) {
        const float2 state = states[last % 2 * HEADS + t];
        // The bounds of scores stay what they are.
        const float top = fabsf(state.x) < CUT - 4.0f ? state.x * 0.693147181f : copysignf(CUT, state.x);
        *(float2*)(part + t * part_head) = make_float2(top, state.y / WEIGHT);
    }
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const u32 to = 16 * i + row + 8 * r, col = 64 * warp + 8 * n + pair;
                if (to < q.count && col < latent)
                    *(float2*)(part + to * part_head + 2 + col) = make_float2(acc[i][n][2 * r] / WEIGHT, acc[i][n][2 * r + 1] / WEIGHT);
            }
}

// What `attend_mla` of attention.cu is told; latent and rope are multiples of 8, at most 512 and 64. The grid: (ceil(heads / HEADS), parts
// of the row that has most, rows), 256 threads, shared memory: mla.rs.
#define ATTEND(NAME, HEADS, PARTS, TILE, STAGES)                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(                                                                 \
        const float* q_latent, const float* q, const float* q_sink, u32 q_stride, const u8* latents, u64 latent_row, const u8* k_pe,\
        u64 k_pe_row, u32 heads, u32 latent, u32 nope, u32 rope, float scale, const Span* spans, const u32* ends, u32 split, u32 most,\
        float* parts) {                                                                                                            \
        const u32 head = blockIdx.x * HEADS, row = blockIdx.z;                                                                     \
        let_next_begin();                                                                                                          \
        u32 list;                                                                                                                  \
        const u32 n = seen(spans, ends, row, list), each = part_len(n, split, most), from = blockIdx.y * each;                     \
        if (from >= n) return earlier_done();                                                                                      \
        const u32 to = n - from < each ? n : from + each, count = heads - head < HEADS ? heads - head : HEADS;                     \
        const u64 at = (u64)row * q_stride + head * (nope + rope) + nope;                                                          \
        const Queries queries = {                                                                                                  \
            q_latent + ((u64)row * heads + head) * latent, q + at, q_sink + at, q_sink != 0, nope + rope, count};                  \
        attend_part<PARTS, HEADS / 16, TILE, STAGES>(                                                                              \
            queries, latents, latent_row, k_pe, k_pe_row, latent, rope, scale, spans + list, from, to,                             \
            parts, heads);                                                                                                         \
    }
#ifdef SMALL
// For GPUs that give a block 99 KiB of shared memory. Their tensor cores bind blocks of 32 heads already.
ATTEND(mla_split, 16, 2, 16, 4)
ATTEND(mla_16, 16, 1, 16, 3)
ATTEND(mla_32, 32, 1, 16, 3)
#else
ATTEND(mla_split, 16, 2, 32, 4)
ATTEND(mla_16, 16, 1, 32, 3)
ATTEND(mla_32, 32, 1, 32, 3)
ATTEND(mla_64, 64, 1, 32, 3)
#endif
