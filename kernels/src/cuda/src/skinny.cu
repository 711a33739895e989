// Quantised weights times a few rounded activation rows, 2 to 32, where weights are the load; one format a compilation (FORMAT), one text a
// target (mma.cuh).
//
// A block makes 16 MI output features of 8 J columns. Warp b multiplies sub-block b of every group of 256 weights, so that each of the eight
// running sums of docs/numerics.md lives in one warp, in registers, and meets its sub-blocks in order: bits are those of matvec.cu and of the
// CPU, whatever columns are beside it.
//
// Two groups of each row are a stage. Stages go to a ring in shared memory as they lie in device memory (cp.async), so that no registers are
// taken by what is under way; a stage of a row is laid out as a row of so few blocks, and formats.cuh reads it as one. Fragments are taken
// from it with an operation or two a word: integers stay where they are in their bytes, and the exponent of the number that makes floats of
// sums undoes that. A warp unpacks its scales once, a row and group in each lane, and hands them round in shared memory.
#include "block.cuh"
#include "overlap.cuh"
#include "product.cuh"
#include "products.cuh"

#define THREADS 256
#define GROUPS 2
#define NOTHING 0x80000000u

// Keeps a value as it is: computed anew in every stage it would cost more than the registers that it takes.
__device__ __forceinline__ void pin(u32& v) { asm volatile("" : "+r"(v)); }
__device__ __forceinline__ void pin(const u8*& v) { asm volatile("" : "+l"(v)); }

template <class F, int J, int MI>
struct Ring : Parts<F> {
    static const u32 ROWS = 16 * MI, BLOCKS = GROUPS * 256 / F::BLOCK; // of a row in a stage
    // What planes take of a row: units of 16 bytes, words where they are not a number of these, bytes.
    static __device__ constexpr u32 units(u32 bytes) {
        u32 n = 0;
        for (u32 f = 0; f < F::COUNT; f++) {
            const u32 here = BLOCKS * F::bytes(f);
            if (bytes == 1) n += plane(BLOCKS, F::bytes(f));
            else if ((bytes == 16) == (here % 16 == 0)) n += here / bytes;
        }
        return n;
    }
    // Bytes of a row: an odd multiple of 16, so that the same 16 bytes of eight rows lie in different banks.
    static const u32 ROW = units(1) | 16;
    // Bytes of a column's group: integers, at most 24 scales as they follow each other in a `Block`, of MIN16 scale and half; likewise odd.
    static const u32 COLUMN = 256 + 96 + 16, UNITS = 16 + 2 + 2 * Parts<F>::MINS; // of 16 bytes
    static const u32 COLUMNS = ROWS * ROW, SIZE = COLUMNS + GROUPS * 8 * J * COLUMN;
    // `skinny_shared` of launch.rs knows these sizes too.
#if __CUDA_ARCH__ >= 800
    static const u32 STAGES = SIZE <= 22 << 10 ? 4 : 3, END = STAGES * SIZE;
#else
    static const u32 STAGES = 2, END = STAGES * SIZE;
#endif
    // What threads copy: 16 bytes of weights, then of activations; words of weights.
    static const u32 WHOLE = units(16), WORDS = units(4), WEIGHTS = ROWS * WHOLE, COPIES = WEIGHTS + GROUPS * 8 * J * UNITS;
    static const u32 WIDE = (COPIES + THREADS - 1) / THREADS, SLOTS = WIDE + (WORDS > 0);
    // Bytes of the scales of two rows; blocks that a multiprocessor of sm_90 has room for.
    static const u32 HANDED = 8 * (1 + Parts<F>::PAIRS + Parts<F>::MINS), FIT = (227 << 10) / (END + 8 * ROWS * HANDED);
};

template <class F, int J, int MI>
__device__ __forceinline__ void skinny(
    Product p, const Product& second, const Product& third, const u8* up, u32 act, u32 row_bytes, u32 blocks, const Block* x, u32 x_stride,
    u32 n) {
    let_next_begin();
    typedef Ring<F, J, MI> R;
    extern __shared__ __align__(128) u8 memory[];
    const u32 t = threadIdx.x, lane = t % WARP, groups = F::BLOCK == 256 ? blocks : (blocks + 7) / 8, stages = (groups + GROUPS - 1) / GROUPS;
    u32 b = t / WARP;
    // With `up`, the lower half of the rows are gate's.
    const u32 made = up ? R::ROWS / 2 : R::ROWS, first = (up ? blockIdx.y : pick(p, second, third, R::ROWS, blockIdx.y)) * made, column = blockIdx.x * 8 * J;

    // The beginnings of rows are asked for while others still write activations: 32 KB of a block.
    {
        const u32 lines = THREADS / R::ROWS, local = t / lines, at = 128 * (t % lines), feature = first + (local & (made - 1));
        if (feature < p.rows && at < row_bytes) prefetch((local < made ? p.w : up) + (u64)feature * row_bytes + at);
    }

    // What a thread copies of each stage, `to` where in it. Bit s of `ended`: there is no slot s in the last.
    const u8* from[R::SLOTS];
    u32 to[R::SLOTS], step[R::SLOTS], ended = 0;
    auto weights = [&](u32 s, u32 local, u32 unit, u32 bytes) {
        u32 source = 0, target = local * R::ROW, feature = first + (local & (made - 1));
        // Rows past the end repeat the last.
        if (feature >= p.rows) feature = p.rows - 1;
        from[s] = (local < made ? p.w : up) + (u64)feature * row_bytes;
#pragma unroll
        for (u32 f = 0; f < F::COUNT; f++) {
            const u32 each = R::BLOCKS * F::bytes(f), units = (each % 16 == 0) == (bytes == 16) ? each / bytes : 0;
            const u32 length = plane(blocks, F::bytes(f));
            if (unit < units) {
                from[s] += source + bytes * unit, to[s] = target + bytes * unit, step[s] = each;
                if ((stages - 1) * each + bytes * unit >= length) ended |= 1 << s;
            }
            // Found, it is far beyond the end of every other.
            unit -= unit < units ? 1 << 16 : units;
            source += length, target += plane(R::BLOCKS, F::bytes(f));
        }
    };
    auto activations = [&](u32 s, u32 pair, u32 unit) {
        const u32 g = pair / (8 * J), c = pair % (8 * J);
        // Columns past the end repeat the last.
        const Block* const block = x + (column + c < n ? column + c : n - 1) * x_stride + g;
        from[s] = (const u8*)block + 16 * unit + (F::KIND == MIN16 && unit >= 18 ? 32 : 0);
        to[s] = R::COLUMNS + pair * R::COLUMN + 16 * unit, step[s] = GROUPS * sizeof(Block);
        if (GROUPS * (stages - 1) + g >= groups) ended |= 1 << s;
    };
#pragma unroll
    for (u32 s = 0; s < R::SLOTS; s++) {
        const u32 u = t + THREADS * s;
        from[s] = p.w, to[s] = NOTHING, step[s] = 0;
        if (s == R::WIDE) {
            const u32 each = R::WORDS ? R::WORDS : 1;
            if (t < R::ROWS * each) weights(s, t / each, t % each, 4);
        } else if (u < R::WEIGHTS) {
            weights(s, u / R::WHOLE, u % R::WHOLE, 16);
        } else if (u < R::COPIES) {
            activations(s, (u - R::WEIGHTS) / R::UNITS, (u - R::WEIGHTS) % R::UNITS);
        }
        pin(from[s]), pin(to[s]);
    }
    pin(ended), pin(b);
    auto copy = [&](bool last, u32 at) {
#pragma unroll
        for (u32 s = 0; s < R::SLOTS; s++) {
            const bool live = !last || !(ended >> s & 1), full = s < R::WIDE ? THREADS * (s + 1) <= R::COPIES : R::ROWS * R::WORDS == THREADS;
            if (full || to[s] < NOTHING) {
                if (s == R::WIDE) copy_or_zero<4, true>(at + to[s], from[s], live);
                else if (THREADS * (s + 1) <= R::WEIGHTS) copy_or_zero<16, true>(at + to[s], from[s], live);
                else copy_or_zero<16, false>(at + to[s], from[s], live);
            }
            from[s] += step[s];
        }
    };

    earlier_done();
    const u32 ring = shared_address(memory);
    u32 into = 0, out_of = 0;
    auto next = [&](u32 at) { return at + R::SIZE == R::END ? 0 : at + R::SIZE; };
    auto begin = [&](u32 stage) {
        if (stage + 1 < stages) copy(false, ring + into);
        else if (stage + 1 == stages) copy(true, ring + into);
        into = next(into);
        stage_begun();
    };
#pragma unroll 1
    for (u32 s = 0; s < R::STAGES - 1; s++) begin(s);

    float acc[MI][J][4];
#pragma unroll
    for (int mi = 0; mi < MI; mi++)
#pragma unroll
        for (int j = 0; j < J; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) acc[mi][j][e] = 0.0f;
    // Lane 4r + c of a fragment: rows r and r + 8, columns 2c and 2c + 1. It unpacks the scales of row lane % 16 of group lane / 16; they are
    // handed round behind the ring, of each group rows r and r + 8 beside each other.
    const u32 r = lane / 4, c = lane % 4, my_group = lane / 16 * (R::BLOCKS / GROUPS) + (F::BLOCK == 256 ? 0 : b);
    u32 mine = lane % 16 * R::ROW, fragment = ring + mine + lane / 16 * 16, rows = r * R::ROW;
    u32 integers = ring + R::COLUMNS + (lane / 16 * 8 * J + lane % 8) * R::COLUMN + 32 * b + 16 * (lane / 8 % 2);
    u32 scales = R::COLUMNS + 2 * c * R::COLUMN + 256, hand = R::END + 16 * b * R::HANDED;
    u32 write = hand + (lane / 16 * 8 + lane % 8) * R::HANDED + lane / 8 % 2 * 4, read = hand + r * R::HANDED;
    pin(mine), pin(fragment), pin(rows), pin(integers), pin(scales), pin(write), pin(read);
    u32 magic = magic_of(F::up(b));
    pin(magic);
#pragma unroll 1
    for (u32 stage = 0; stage < stages; stage++) {
        stages_done<R::STAGES - 2>();
        __syncthreads();
        begin(stage + R::STAGES - 1);
        const u8* const here = memory + out_of;
        u32 fb[J][4];
#pragma unroll
        for (int j = 0; j < J; j++) load_matrices(fb[j], out_of + integers + 8 * j * R::COLUMN);
#pragma unroll
        for (int mi = 0; mi < MI; mi++) {
            Scales own;
            F::scales(own, Staged{here + mine + 16 * mi * R::ROW}, R::BLOCKS, my_group, b);
            float* const to = (float*)(memory + write + mi * (8 * 16 * R::HANDED));
            to[0] = own.d;
            if (R::PAIRS) to[2] = __uint_as_float(both(own.sc));
#pragma unroll
            for (int m = 0; m < R::MINS; m++) to[2 * (1 + R::PAIRS + m)] = own.m[m];
        }
        __syncwarp();
#pragma unroll
        for (u32 g = 0; g < GROUPS; g++) {
            if (g && GROUPS * stage + g >= groups) break;
            const u32 at = F::BLOCK == 256 ? g : 8 * g + b;
#pragma unroll
            for (int mi = 0; mi < MI; mi++) {
                const u32 skip = 16 * mi * R::ROW;
                u32 fa[4];
                F::quants(fa, Fragment{out_of + fragment + skip, here + rows + skip, here + rows + skip + 8 * R::ROW}, R::BLOCKS, at, b, F::up(b));
                if (F::ZERO) {
#pragma unroll
                    for (int e = 0; e < 4; e++) fa[e] ^= 0x80808080;
                }
                const float2* const v = (const float2*)(memory + read + mi * (8 * 16 * R::HANDED) + 8 * g * R::HANDED);
                RowScales s;
                s.d = v[0];
                if (R::PAIRS) s.sc = make_uint2(__float_as_uint(v[1].x), __float_as_uint(v[1].y));
#pragma unroll
                for (int m = 0; m < R::MINS; m++) s.m[m] = v[1 + R::PAIRS + m];
#pragma unroll
                for (int j = 0; j < J; j++) {
                    const u8* const x0 = here + scales + 8 * (J * g + j) * R::COLUMN;
                    add_products<F, (R::MINS > 0)>(
                        acc[mi][j], fa, fb[j][2 * g], fb[j][2 * g + 1], s, (const float*)x0, (const float*)(x0 + R::COLUMN), b, magic);
                }
            }
        }
        out_of = next(out_of);
    }

    // The eight sums meet: [sum][column][row], 4 floats more a column so that banks differ.
    __syncthreads();
    float* const image = (float*)memory;
    const u32 stride = R::ROWS + 4, sum = 8 * J * stride;
#pragma unroll
    for (int mi = 0; mi < MI; mi++)
#pragma unroll
        for (int j = 0; j < J; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) image[b * sum + (8 * j + 2 * c + e % 2) * stride + 16 * mi + r + 8 * (e / 2)] = acc[mi][j][e];
    __syncthreads();
    const u32 row = first + lane;
    if (lane >= made || row >= p.rows) return;
    for (u32 c = b; c < 8 * J && column + c < n; c += 8) {
        const float* const v = image + c * stride + lane;
        float y = sum_eight(v, sum);
        if (up) y = activation(y, act) * sum_eight(v + made, sum);
        if (p.bias) y += p.bias[row];
        float* const to = p.out + (u64)(column + c) * p.out_stride + row;
        *to = p.add ? *to + y : y;
    }
}

// Blocks of a multiprocessor that registers are kept short for.
template <u32 COLUMNS, u32 FEATURES>
constexpr int BLOCKS = COLUMNS > 8 || FORMAT::KIND == SCALE16 || Ring<FORMAT, 1, FEATURES / 16>::FIT < 3 ? 2 : 3;

// out[c] (=|+=) W x[c] (+ bias), c < n, for up to three W of one format and length that share x; with `up` act(W x) * (up x) for the only W: 0
// SiLU, 1 GELU. The grid: (n / columns, the sum of rows / features; with `up` twice as many), 256 threads. The small ones where there would
// be few blocks otherwise.
#define ENTRY(FEATURES, COLUMNS)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS, (BLOCKS<COLUMNS, FEATURES>)) skinny_##FEATURES##x##COLUMNS(                                        \
        PRODUCT(0), PRODUCT(1), PRODUCT(2), const u8* up, u32 act, u32 row_bytes, u32 blocks, const Block* x, u32 x_stride, u32 n) { \
        skinny<FORMAT, COLUMNS / 8, FEATURES / 16>(OF(0), OF(1), OF(2), up, act, row_bytes, blocks, x, x_stride, n);               \
    }
ENTRY(16, 8)
ENTRY(32, 8)
ENTRY(32, 16)
