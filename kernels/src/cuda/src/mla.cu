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
#define PITCH (2 * WIDTH)
#define WEIGHT 16384.0f // weights are multiplied by this, so that what f16 keeps of them (of their low parts) is no subnormal

// What reads and writes of N neighbours are done by.
template <class T, int N>
struct __align__(sizeof(T) * N) Some {
    T x[N];
};

// Place in a list of spans: `base` entries lie before span s.
struct Cursor {
    const Span* s;
    u32 base;
    __device__ __forceinline__ void seek(u32 at) {
        while (at - base >= s->len) base += (s++)->len;
    }
};

// The queries of a block's heads, of which the last block may have fewer.
struct Queries {
    const float* latent; // [heads][latent]
    const float* pe;     // [heads], `pe_head` apart
    const float* sink;   // the same for sinks, or null
    u32 pe_head, count;  // heads there are
};

// WEIGHT e^x for x <= 1, 0 below 2^-40: as an f16 keeps it.
__device__ __forceinline__ float weight(float x) {
    float n;
    const float p = exp2_parts(fmaxf(x * 1.44269504f, -40.0f), n);
    return __int_as_float(__float_as_int(p) + (__float_as_int(n + (12582912.0f + 14.0f)) << 23));
}

// MT groups of 16 heads, their queries and weights in PARTS, TILE entries at a time.
template <int PARTS, int MT, int TILE, int STAGES>
__device__ __forceinline__ void attend_part(
    const Queries& q, const u8* latents, u64 latent_row, const u8* k_pe, u64 k_pe_row, u32 latent, u32 rope, float scale,
    const Span* spans, u32 from, u32 to, float* parts, u32 heads) {
    const int HEADS = 16 * MT, EDGE = TILE + 8; // rows of scores and weights are padded: no two of eight in the same banks
    const int GROUPS = MT == 4 ? 2 : 1;         // groups of heads that a warp scores
    const int ENTRIES = MT == 1 ? TILE / 2 : TILE, NT = ENTRIES < 16 ? 1 : 2; // entries that it scores, tiles of 8 at a time
    const int COPIERS = THREADS / TILE;
    // What softens a head: LANES threads, each QUADS runs of four entries.
    const int QUADS = TILE * HEADS <= 4 * THREADS ? 1 : TILE * HEADS / (4 * THREADS), LANES = TILE / 4 / QUADS, PER = 4 * QUADS;
    extern __shared__ __align__(128) u8 stages[];
    float* const scores = (float*)(stages + STAGES * TILE * PITCH);  // [SLICES][HEADS][EDGE]
    u16* const weights = (u16*)(scores + SLICES * HEADS * EDGE);     // [tile % 2][part][HEADS][EDGE]
    float* const shrinks = (float*)(weights + 2 * PARTS * HEADS * EDGE); // [tile % 2][HEADS]
    float* const powers = shrinks + 2 * HEADS;                       // [HEADS]
    float* const factors = powers + HEADS;                           // [HEADS], for scores
    float2* const states = (float2*)(factors + HEADS);               // [tile % 2][HEADS]: maximum, sum
    u32* const lens = (u32*)(states + 2 * HEADS);                    // [STAGES], the highest bit set for sinks
    const u32 t = threadIdx.x, warp = t / WARP, slice = warp % SLICES, half = warp / SLICES;
    const u32 row = t % WARP / 4, pair = t % 4 * 2;   // of a fragment of 16 x 8 floats: rows row, row + 8, columns pair, pair + 1
    const u32 matrix = t % WARP / 8, line = t % 8;    // the row of a matrix that this lane names
    const u32 group = MT == 1 ? 0 : 16 * GROUPS * half, first = MT == 1 ? half * ENTRIES : 0; // heads and entries that a warp scores
    const u32 tiles = shared_address(stages);

    // The next tile into a stage: entries of one kind, sinks or others.
    u32 next = from;
    Cursor head = {spans, 0};
    const u32 copied = t / COPIERS, chunk = t % COPIERS;
    const auto fetch = [&](u32 stage) {
        u32 len = 0, sink = 0;
        if (next < to) {
            head.seek(next);
            const Span* s = head.s;
            u32 end = head.base + s->len;
            sink = q.sink && s->sink;
            while (end < to && end - next < TILE && (u32)(q.sink && s[1].sink) == sink) end += (++s)->len;
            len = end < to ? end - next : to - next;
            len = len < TILE ? len : TILE;
            const bool live = copied < len;
            u64 slot = 0;
            if (live) {
                Cursor own = head;
                own.seek(next + copied);
                slot = own.s->start + (next + copied - own.base);
            }
            const u8* const one = latents + slot * latent_row;
            const u8* const two = k_pe + slot * k_pe_row;
            const u32 at = tiles + (stage * TILE + copied) * PITCH + 16 * (chunk ^ copied % 8);
#pragma unroll
            for (int j = 0; j < WIDTH / 8; j += COPIERS) {
                const bool rotated = j >= LATENT / 8;
                const u32 col = 8 * (j + chunk) - (rotated ? LATENT : 0);
                const bool here = live && col < (rotated ? rope : latent);
                if (j + COPIERS <= WIDTH / 8 || chunk < 8)
                    copy_or_zero<16, true>(at + 16 * j, (rotated ? two : one) + (here ? 2 * col : 0), here);
            }
        }
        if (t == 0) lens[stage] = len | sink << 31;
        next += len;
        stage_begun();
    };
    for (u32 i = 0; i < STAGES - 2; i++) fetch(i);

    // Columns 16 step + pair + 8 side (+ 1) of the head of row `row` + 8 r of group g, the rotated ones of `pe`. Where there is nothing
    // something else is loaded, so that no load waits at a branch.
    const auto query = [&](int g, u32 step, int r, int side, const float* pe) {
        const u32 head = group + 16 * g + row + 8 * r;
        const bool rotated = 16 * step >= LATENT;
        const u32 col = 16 * step + 8 * side - (rotated ? LATENT : 0);
        const bool here = head < q.count && col < (rotated ? rope : latent);
        const u64 at = (u64)head * (rotated ? q.pe_head : latent) + col + pair;
        const float* const from = here ? (rotated ? pe : q.latent) + at : q.latent;
        const float x = __ldg(from), y = __ldg(from + 1);
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
            for (int j = 0; j < 4 * GROUPS; j++) x[j / 4][i][j % 4] = query(j / 4, STEPS * slice + i, j % 2, j % 4 / 2, q.pe);
        const auto larger = [](float most, float2 x) { return fmaxf(most, fmaxf(fabsf(x.x), fabsf(x.y))); };
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
            float most[2] = {0.0f, 0.0f};
#pragma unroll
            for (int i = 0; i < STEPS; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) most[j % 2] = larger(most[j % 2], x[g][i][j]);
            if (q.sink && slice == SLICES - 1)
#pragma unroll
                for (int step = LATENT / 16; step < WIDTH / 16; step++)
#pragma unroll
                    for (int j = 0; j < 4; j++) most[j % 2] = larger(most[j % 2], query(g, step, j % 2, j / 2, q.sink));
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
            factors[t] = scale / powers[t];
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
            const u32 at = tiles + (stage * TILE + e + line + (NT > 1 ? matrix / 2 * 8 : 0)) * PITCH;
#pragma unroll
            for (int i = 0; i < STEPS; i++) {
                u32 k[4];
                // With one tile of entries the later two matrices are the former two.
                load_matrices(k, at + 16 * ((2 * (STEPS * slice + i) + matrix % 2) ^ line));
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

    const auto soften = [&](u32 len, u32 buffer) {
        if (mine >= HEADS) return;
        typedef Some<float, 4> Floats;
        typedef Some<u16, 4> Halves;
        const float factor = factors[mine], max = states[(buffer ^ 1) * HEADS + mine].x;
        float w[PER], top = -CUT, here = 0.0f;
#pragma unroll
        for (int j = 0; j < PER; j += 4) {
            const u32 e = begin + j * LANES;
            const float* const at = scores + mine * EDGE + e;
            Floats s[SLICES];
#pragma unroll
            for (int i = 0; i < SLICES; i++) s[i] = *(const Floats*)(at + i * HEADS * EDGE);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                // Infinite scores count as the largest there are, NaN as the lowest.
                const float x = ((s[0].x[i] + s[1].x[i]) + (s[2].x[i] + s[3].x[i])) * factor;
                w[j + i] = e + i < len ? fminf(CUT, fmaxf(-CUT, x)) : UNSEEN;
                top = fmaxf(top, w[j + i]);
            }
        }
#pragma unroll
        for (int other = LANES / 2; other > 0; other /= 2) top = fmaxf(top, __shfl_xor_sync(ALL, top, other));
        // Sums that stay where they are are not made smaller for a maximum that hardly grows.
        const float above = top > max + (PARTS == 2 ? 0.0f : 1.0f) ? top : max, less = above == max ? 1.0f : exp_exact(max - above);
#pragma unroll
        for (int j = 0; j < PER; j += 4) {
            const u32 e = begin + j * LANES;
            float v[4];
            Halves one, two;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float y = e >= len ? 0.0f : PARTS == 2 ? exp_exact(w[j + i] - above) * WEIGHT : weight(w[j + i] - above);
                one.x[i] = to_f16(y);
                v[i] = PARTS == 2 ? y : f16(one.x[i]);
                // Of weights below 2^-13 of the largest eleven bits do: 2^-25 of it is left out.
                if (PARTS == 2) two.x[i] = y < 2.0f ? 0 : to_f16(y - f16(one.x[i]));
            }
            here += (v[0] + v[1]) + (v[2] + v[3]);
            u16* const put = weights + (PARTS * buffer * HEADS + mine) * EDGE + e;
            *(Halves*)put = one;
            if (PARTS == 2) *(Halves*)(put + HEADS * EDGE) = two;
        }
        here = sum_lanes<LANES>(here);
        if (begin == 0) {
            shrinks[buffer * HEADS + mine] = less;
            states[buffer * HEADS + mine] = make_float2(above, fmaf(states[(buffer ^ 1) * HEADS + mine].y, less, here));
        }
    };

    // A tile's weighted sums, this warp's columns.
    const auto add = [&](u32 stage, u32 buffer) {
        float shrink[MT][2];
        const float* const less = shrinks + buffer * HEADS + row;
        if (PARTS == 2) {
#pragma unroll
            for (int i = 0; i < 2 * MT; i++) shrink[i / 2][i % 2] = less[8 * i];
        } else {
            bool some = false;
#pragma unroll
            for (int i = 0; i < 2 * MT; i++) some |= less[8 * i] != 1.0f;
            if (__any_sync(ALL, some)) {
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
                load_turned(v, tiles + (stage * TILE + k + line + matrix % 2 * 8) * PITCH + 16 * ((8 * warp + n + matrix / 2) ^ line));
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

    u32 kind = 0, last = 0;
    for (u32 i = 0;; i++) {
        // Tile i is there, and nothing reads tile i - 2 any more.
        stages_done<STAGES - 3>();
        __syncthreads();
        fetch((i + STAGES - 2) % STAGES);
        const u32 len = lens[i % STAGES];
        if (!len) break;
        if (len >> 31 != kind) {
            // Sinks are scored with the second rotation.
            kind = len >> 31;
            if (slice == SLICES - 1) {
#pragma unroll
                for (int step = LATENT / 16; step < WIDTH / 16; step++)
#pragma unroll
                    for (int g = 0; g < GROUPS; g++) {
#pragma unroll
                        for (int j = 0; j < 4; j++)
                            take(g, step - STEPS * (SLICES - 1), j, query(g, step, j % 2, j / 2, kind ? q.sink : q.pe));
                        __syncwarp(); // else all are loaded at once, and registers do not do
                    }
            }
        }
        score(i % STAGES);
        __syncthreads();
        const u32 here = len & 0x7fffffff;
        if (warp < SLICES) soften(here, i % 2);
        if (i) add((i - 1) % STAGES, (i - 1) % 2);
        if (warp >= SLICES) soften(here, i % 2);
        last = i;
    }
    add(last % STAGES, last % 2);

    // [rows][heads][splits][latent + 2].
    const u64 size = latent + 2, part_head = gridDim.y * size;
    float* const part = parts + ((u64)blockIdx.z * heads + blockIdx.x * HEADS) * part_head + blockIdx.y * size;
    if (t < q.count) {
        const float2 state = states[last % 2 * HEADS + t];
        *(float2*)(part + t * part_head) = make_float2(state.x, state.y / WEIGHT);
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
        u32 list;                                                                                                                  \
        const u32 n = seen(spans, ends, row, list), each = part_len(n, split, most), from = blockIdx.y * each;                     \
        if (from >= n) return;                                                                                                     \
        const u32 to = n - from < each ? n : from + each, count = heads - head < HEADS ? heads - head : HEADS;                     \
        const u64 at = (u64)row * q_stride + head * (nope + rope) + nope;                                                          \
        const Queries queries = {                                                                                                  \
            q_latent + ((u64)row * heads + head) * latent, q + at, q_sink ? q_sink + at : 0, nope + rope, count};                  \
        attend_part<PARTS, HEADS / 16, TILE, STAGES>(                                                                              \
            queries, latents, latent_row, k_pe, k_pe_row, latent, rope, scale, spans + list, from, to,                             \
            parts, heads);                                                                                                         \
    }
#ifdef SMALL
// For GPUs that give a block 99 KiB of shared memory.
ATTEND(mla_split, 16, 2, 16, 4)
ATTEND(mla_16, 16, 1, 16, 3)
ATTEND(mla_32, 32, 1, 16, 3)
ATTEND(mla_64, 64, 1, 16, 3)
#else
ATTEND(mla_split, 16, 2, 32, 4)
ATTEND(mla_16, 16, 1, 32, 3)
ATTEND(mla_32, 32, 1, 32, 3)
ATTEND(mla_64, 64, 1, 32, 3)
#endif
