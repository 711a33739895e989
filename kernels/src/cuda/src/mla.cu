// Absorbed MLA over f16 caches on tensor cores (sm_80 and later): one entry of 576 values is the key of all heads and, but for its rotated
// part, their value. Parts as attention.cu's `attend_mla` makes them, for the same `merge`.
//
// A block of eight warps takes 16 or 32 heads of one row and one part of the row's list, tile by tile. Tiles come by copies that run on
// their own, several stages of them. Queries stay in registers: a warp multiplies nine of the 36 steps of 16 columns for 16 heads, and
// what four warps found is added up as the softmax reads it. Then a warp adds 64 columns of the values for all heads. The softmax of one
// tile and the weighted sums of the one before share a stretch between two barriers: half of the warps begin with either.
//
// Queries and weights go in two f16 parts (half.cuh), so a product costs two instructions. An instruction's rounding is kept small by
// chains of nine (scores; the low parts in a chain of their own) and of two (weighted sums of 16 entries); the rest is added as floats.
#include "cached.cuh"
#include "half.cuh"

#define THREADS 256
#define SLICES 4    // warps that share a row of scores
#define STEPS 9     // steps of 16 columns of each
#define LATENT 512  // columns of a tile: latents, then the rotated part, zeros where there is less
#define WIDTH 576
#define PITCH (2 * WIDTH)
#define CUT 4194304.0f
#define WEIGHT 16384.0f // weights are multiplied by this, so that their low parts are no subnormals

// What reads and writes of PER neighbours are done by.
template <class T, int PER>
struct __align__(sizeof(T) * PER) Some {
    T x[PER];
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

// MT groups of 16 heads, TILE entries at a time.
template <int MT, int TILE, int STAGES>
__device__ __forceinline__ void attend_part(
    const Queries& q, const u8* latents, u64 latent_row, const u8* k_pe, u64 k_pe_row, u32 latent, u32 rope, float scale,
    const Span* spans, u32 from, u32 to, float* parts, u32 heads) {
    const int HEADS = 16 * MT, EDGE = TILE + 8; // rows of scores and weights are padded: no two of eight in the same banks
    const int NT = TILE * MT / 16;              // tiles of 8 entries that a warp scores
    const int LANES = THREADS / HEADS, PER = TILE / LANES, COPIERS = THREADS / TILE;
    extern __shared__ __align__(128) u8 stages[];
    float* const scores = (float*)(stages + STAGES * TILE * PITCH);  // [SLICES][HEADS][EDGE]
    u16* const weights = (u16*)(scores + SLICES * HEADS * EDGE);     // [tile % 2][high, low][HEADS][EDGE]
    float* const shrinks = (float*)(weights + 4 * HEADS * EDGE);     // [tile % 2][HEADS]
    float* const powers = shrinks + 2 * HEADS;                       // [HEADS]
    u32* const lens = (u32*)(powers + HEADS);                        // [STAGES], the highest bit set for sinks
    const u32 t = threadIdx.x, warp = t / WARP, slice = warp % SLICES, half = warp / SLICES;
    const u32 row = t % WARP / 4, pair = t % 4 * 2;   // of a fragment of 16 x 8 floats: rows row, row + 8, columns pair, pair + 1
    const u32 matrix = t % WARP / 8, line = t % 8;    // the row of a matrix that this lane names
    const u32 group = MT == 2 ? 16 * half : 0, first = MT == 2 ? 0 : half * (TILE / 2); // heads and entries that a warp scores
    const u32 tiles = shared_address(stages);

    // Columns 16 step + pair + 8 side (+ 1) of the head of row `row` + 8 r, the rotated ones of `pe`.
    const auto query = [&](u32 step, int r, int side, const float* pe) {
        const u32 head = group + row + 8 * r;
        const bool rotated = 16 * step >= LATENT;
        const u32 col = 16 * step + 8 * side - (rotated ? LATENT : 0);
        const float* const from = (rotated ? pe + (u64)head * q.pe_head : q.latent + (u64)head * latent) + col + pair;
        return head < q.count && col < (rotated ? rope : latent) ? make_float2(__ldg(from), __ldg(from + 1)) : make_float2(0.0f, 0.0f);
    };
    // Queries in f16, each head's scaled by the power of two that suits it.
    u32 high[STEPS][4], low[STEPS][4];
    float most[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < STEPS; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const u32 step = STEPS * slice + i;
            const float2 x = query(step, j % 2, j / 2, q.pe);
            most[j % 2] = fmaxf(most[j % 2], fmaxf(fabsf(x.x), fabsf(x.y)));
            if (q.sink && 16 * step >= LATENT) {
                const float2 y = query(step, j % 2, j / 2, q.sink);
                most[j % 2] = fmaxf(most[j % 2], fmaxf(fabsf(y.x), fabsf(y.y)));
            }
        }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        most[r] = fmaxf(most[r], __shfl_xor_sync(ALL, most[r], 1));
        most[r] = fmaxf(most[r], __shfl_xor_sync(ALL, most[r], 2));
        if (pair == 0 && (MT == 2 || half == 0)) scores[slice * HEADS + group + row + 8 * r] = most[r];
    }
    __syncthreads();
    if (t < HEADS) {
        const float* const m = scores + t;
        powers[t] = scale_for(fmaxf(fmaxf(m[0], m[HEADS]), fmaxf(m[2 * HEADS], m[3 * HEADS])));
    }
    __syncthreads();
    const auto take = [&](u32 least, const float* pe) {
#pragma unroll
        for (int i = 0; i < STEPS; i++)
            if (STEPS * slice + i >= least) {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const float2 x = query(STEPS * slice + i, j % 2, j / 2, pe);
                    const float power = powers[group + row + j % 2 * 8];
                    split(x.x * power, x.y * power, high[i][j], low[i][j]);
                }
                __syncwarp(); // else all are loaded at once, and registers do not do
            }
    };
    take(0, q.pe);
    // What this thread softens: PER entries of a head.
    const u32 mine = t / LANES, begin = t % LANES * PER;
    const float factor = scale / powers[mine];
    float max = -CUT, sum = 0.0f, acc[MT][8][4];
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) acc[i][n][j] = 0.0f;

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
                if (j + COPIERS <= WIDTH / 8 || chunk < 8) copy_or_zero<16, true>(at + 16 * j, (rotated ? two : one) + (here ? 2 * col : 0), here);
            }
        }
        if (t == 0) lens[stage] = len | sink << 31;
        next += len;
        stage_begun();
    };

    // A tile's scores, this warp's share of the columns.
    const auto score = [&](u32 stage) {
#pragma unroll 1
        for (int e = first; e < first + 8 * NT; e += 16) {
            float c[2][4], d[2][4];
#pragma unroll
            for (int j = 0; j < 8; j++) c[j / 4][j % 4] = d[j / 4][j % 4] = 0.0f;
            const u32 at = tiles + (stage * TILE + e + line + (NT > 1 ? matrix / 2 * 8 : 0)) * PITCH;
#pragma unroll
            for (int i = 0; i < STEPS; i++) {
                u32 k[4];
                // With one tile of entries the later two matrices are the former two.
                load_matrices(k, at + 16 * ((2 * (STEPS * slice + i) + matrix % 2) ^ line));
                mma_f16(c[0], high[i], k[0], k[1]);
                mma_f16(d[0], low[i], k[0], k[1]);
                if (NT > 1) {
                    mma_f16(c[1], high[i], k[2], k[3]);
                    mma_f16(d[1], low[i], k[2], k[3]);
                }
            }
            float* const to = scores + (slice * HEADS + group + row) * EDGE + e + pair;
#pragma unroll
            for (int n = 0; n < 2 && n < NT; n++)
#pragma unroll
                for (int r = 0; r < 2; r++)
                    *(float2*)(to + 8 * r * EDGE + 8 * n) = make_float2(c[n][2 * r] + d[n][2 * r], c[n][2 * r + 1] + d[n][2 * r + 1]);
        }
    };

    const auto soften = [&](u32 len, u32 buffer) {
        typedef Some<float, PER> Floats;
        typedef Some<u16, PER> Halves;
        const float* const at = scores + mine * EDGE + begin;
        Floats s[SLICES];
#pragma unroll
        for (int i = 0; i < SLICES; i++) s[i] = *(const Floats*)(at + i * HEADS * EDGE);
        float w[PER], top = -CUT, here = 0.0f;
#pragma unroll
        for (int j = 0; j < PER; j++) {
            // Infinite scores count as the largest there are, NaN as the lowest.
            w[j] = ((s[0].x[j] + s[1].x[j]) + (s[2].x[j] + s[3].x[j])) * factor;
            w[j] = fminf(CUT, fmaxf(-CUT, w[j]));
            if (begin + j < len) top = fmaxf(top, w[j]);
        }
#pragma unroll
        for (int other = LANES / 2; other > 0; other /= 2) top = fmaxf(top, __shfl_xor_sync(ALL, top, other));
        const float above = fmaxf(max, top), less = exp_exact(max - above);
        max = above;
        Halves one, two;
#pragma unroll
        for (int j = 0; j < PER; j++) {
            w[j] = begin + j < len ? exp_exact(w[j] - max) : 0.0f;
            here += w[j];
            const float y = w[j] * WEIGHT;
            one.x[j] = to_f16(y);
            // Of weights below 2^-13 of the largest eleven bits do: 2^-25 of it is left out.
            two.x[j] = y < 2.0f ? 0 : to_f16(y - f16(one.x[j]));
        }
        sum = fmaf(sum, less, sum_lanes<LANES>(here));
        u16* const put = weights + (2 * buffer * HEADS + mine) * EDGE + begin;
        *(Halves*)put = one;
        *(Halves*)(put + HEADS * EDGE) = two;
        if (begin == 0) shrinks[buffer * HEADS + mine] = less;
    };

    // A tile's weighted sums, this warp's columns.
    const auto add = [&](u32 stage, u32 buffer) {
        float shrink[MT][2];
#pragma unroll
        for (int i = 0; i < 2 * MT; i++) shrink[i / 2][i % 2] = shrinks[buffer * HEADS + row + 8 * i];
#pragma unroll 1
        for (int k = 0; k < TILE; k += 16) {
            u32 one[MT][4], two[MT][4];
            bool both[MT];
#pragma unroll
            for (int i = 0; i < MT; i++) {
                const u32 at = shared_address(weights + (2 * buffer * HEADS + 16 * i + line + matrix % 2 * 8) * EDGE + k + matrix / 2 * 8);
                load_matrices(one[i], at);
                load_matrices(two[i], at + 2 * HEADS * EDGE);
                // Products with zeros change nothing.
                both[i] = __any_sync(ALL, (two[i][0] | two[i][1] | two[i][2] | two[i][3]) != 0);
            }
#pragma unroll
            for (int n = 0; n < 8; n += 2) {
                u32 v[4];
                load_turned(v, tiles + (stage * TILE + k + line + matrix % 2 * 8) * PITCH + 16 * ((8 * warp + n + matrix / 2) ^ line));
#pragma unroll
                for (int i = 0; i < MT; i++) {
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
#pragma unroll
            for (int i = 0; i < 2 * MT; i++) shrink[i / 2][i % 2] = 1.0f;
        }
    };

    for (u32 i = 0; i < STAGES - 2; i++) fetch(i);
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
            take(LATENT / 16, kind ? q.sink : q.pe);
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
    if (begin == 0 && mine < q.count) *(float2*)(part + mine * part_head) = make_float2(max, sum);
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
#define ATTEND(NAME, MT, TILE, STAGES)                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(                                                                 \
        const float* q_latent, const float* q, const float* q_sink, u32 q_stride, const u8* latents, u64 latent_row, const u8* k_pe,\
        u64 k_pe_row, u32 heads, u32 latent, u32 nope, u32 rope, float scale, const Span* spans, const u32* ends, u32 split, u32 most,\
        float* parts) {                                                                                                            \
        const u32 head = blockIdx.x * 16 * MT, row = blockIdx.z;                                                                   \
        u32 list;                                                                                                                  \
        const u32 n = seen(spans, ends, row, list), each = part_len(n, split, most), from = blockIdx.y * each;                     \
        if (from >= n) return;                                                                                                     \
        const u32 to = n - from < each ? n : from + each, count = heads - head < 16 * MT ? heads - head : 16 * MT;                 \
        const u64 at = (u64)row * q_stride + head * (nope + rope) + nope;                                                          \
        const Queries queries = {                                                                                                  \
            q_latent + ((u64)row * heads + head) * latent, q + at, q_sink ? q_sink + at : 0, nope + rope, count};                  \
        attend_part<MT, TILE, STAGES>(                                                                                             \
            queries, latents, latent_row, k_pe, k_pe_row, latent, rope, scale, spans + list, from, to,                             \
            parts, heads);                                                                                                         \
    }
#ifdef SMALL
// For GPUs that give a block 99 KiB of shared memory.
ATTEND(mla_16, 1, 16, 4)
ATTEND(mla_32, 2, 16, 4)
#else
ATTEND(mla_16, 1, 32, 4)
ATTEND(mla_32, 2, 32, 3)
#endif
