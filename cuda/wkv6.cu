// WKV-6 on a GPU. Per sequence and head, with a state S of N keys by N values and the decay w = exp(-exp(raw w)):
//
//     y_t = r_t^T (S_{t-1} + diag(u) k_t v_t^T)        S_t = diag(w_t) S_{t-1} + k_t v_t^T
//
// Two ways. The fast one walks in tiles of 16 steps whose work is products of 16 x 16 blocks on tensor cores; a block
// of threads (CTA) takes one head of one sequence, or some of its value columns ("split"). The plain one, for other
// head sizes and older GPUs, walks step by step.
//
// In a tile let c_t be the sum of log decays of steps 0..t, and m = c_7 the sum to its middle. Step t reads what step
// s < t wrote through the decay exp(c_{t-1} - c_s), which has to be a product of a factor of t and a factor of s:
//
//     r_mid_t = r_t exp(c_{t-1} - m)      k_mid_s = k_s exp(m - c_s)       between steps of the tile
//     r_in_t = r_t exp(c_{t-1})           k_out_s = k_s exp(c_15 - c_s)    from the state before, into the one after
//
// The first pair may grow, by at most 8 steps' decay; a log decay is taken as at least -10 (the decay is then off by
// 5e-5 at most), so by exp(80) at most, which fp32 and bf16 hold: with decays that strong, for |r|, |k| to 6000. The
// products with s > t may overflow and are replaced, not multiplied, by zero.
//
// Inputs in bf16 stay bf16, sums are fp32. Inputs in fp32 become pairs of bf16, high and low part, and three products.
//
// Layout: r, k, v, w, y (rows, H, N) with the sequences one after another in the rows; u (H, N); states (S, H, N, N).
#include <type_traits>

#include "gpu.cuh"

namespace {

using gpu::bf16;
using gpu::Pack;

constexpr int TILE = 16;
constexpr int CHUNK = 64;  // steps between the states that the forward pass keeps for the backward pass
constexpr int TILES = CHUNK / TILE;
constexpr float LEAST_LOG_DECAY = -10.0f;

// The rows of a sequence. Offsets are the caller's word: wrong ones must not lead out of the rows.
struct Span {
    int64_t begin, end, first_slot;
};

__device__ Span span(const gpu::Sequences& seqs, int64_t s) {
    if (!seqs.offsets) return {seqs.begin(s), seqs.end(s), seqs.first_slot(s, CHUNK)};
    const auto within = [](int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; };
    const int64_t begin = within(seqs.begin(s), 0, seqs.length);
    return {begin, within(seqs.end(s), begin, seqs.length), begin / CHUNK + s};
}

__device__ int minimum(int a, int b) { return a < b ? a : b; }

// 16 x 16 blocks ------------------------------------------------------------------------------------------------------

// A block of fp32 sums, spread over a warp: thread (g, q) = (lane / 4, lane % 4) holds at[n][e] of row g + 8 (e / 2),
// column 8 n + 2 q + e % 2. What is computed element by element is spread the same way.
struct Sum {
    float at[2][4];
};

__device__ __forceinline__ int lane() { return threadIdx.x % gpu::WARP; }
__device__ __forceinline__ int row_of(int e) { return lane() / 4 + 8 * (e / 2); }
__device__ __forceinline__ int column_of(int n, int e) { return 8 * n + 2 * (lane() % 4) + e % 2; }

// A block as the tensor cores read it; registers 0..3 hold pairs of columns of the quadrants (0, 0), (8, 0), (0, 8),
// (8, 8). Of fp32 values two parts, high and low.
template <typename T>
struct Block {
    static constexpr int PARTS = sizeof(T) == 4 ? 2 : 1;
    unsigned part[PARTS][4];

    __device__ __forceinline__ void set(int quadrant, float x0, float x1) {
        part[0][quadrant] = gpu::pack(x0, x1);
        if constexpr (PARTS == 2) {
            const float high0 = gpu::to_float(gpu::from_float<bf16>(x0)),
                        high1 = gpu::to_float(gpu::from_float<bf16>(x1));
            part[1][quadrant] = gpu::pack(x0 - high0, x1 - high1);
        }
    }
};

// A sum is in its place already.
template <typename T>
__device__ __forceinline__ Block<T> operand(const Sum& sum) {
    Block<T> block;
#pragma unroll
    for (int i = 0; i < 4; i++) block.set(i, sum.at[i / 2][2 * (i % 2)], sum.at[i / 2][2 * (i % 2) + 1]);
    return block;
}

// A block from shared memory, as it lies there or transposed.
template <bool TRANSPOSED>
__device__ __forceinline__ Block<bf16> read(const bf16* from, int stride) {
    Block<bf16> block;
    const int i = lane(), row = TRANSPOSED ? i % 8 + i / 16 * 8 : i % 16,
              column = TRANSPOSED ? i / 8 % 2 * 8 : i / 16 * 8;
    gpu::load_matrices<TRANSPOSED>(block.part[0], from + row * stride + column);
    return block;
}

template <bool TRANSPOSED>
__device__ __forceinline__ Block<float> read(const float* from, int stride) {
    Block<float> block;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int row = lane() / 4 + 8 * (i % 2), column = 2 * (lane() % 4) + 8 * (i / 2);
        if (TRANSPOSED) {
            block.set(i, from[column * stride + row], from[(column + 1) * stride + row]);
        } else {
            block.set(i, from[row * stride + column], from[row * stride + column + 1]);
        }
    }
    return block;
}

// x as the two parts of a block of fp32 values hold it; as it is where put() rounds it to bf16 anyway.
template <typename T>
__device__ __forceinline__ float rounded(float x) {
    if (Block<T>::PARTS == 1) return x;
    const float high = gpu::to_float(gpu::from_float<bf16>(x));
    return high + gpu::to_float(gpu::from_float<bf16>(x - high));
}

// sum += a b^T; WHOLE: with the product of the low parts, which else is left out.
template <bool WHOLE = false, typename T>
__device__ __forceinline__ void multiply(Sum& sum, const Block<T>& a, const Block<T>& b) {
#pragma unroll
    for (int n = 0; n < 2; n++) {
        const unsigned high[2] = {b.part[0][n], b.part[0][n + 2]};
        gpu::mma(sum.at[n], a.part[0], high);
        if constexpr (Block<T>::PARTS == 2) {
            const unsigned low[2] = {b.part[1][n], b.part[1][n + 2]};
            gpu::mma(sum.at[n], a.part[0], low);
            gpu::mma(sum.at[n], a.part[1], high);
            if (WHOLE) gpu::mma(sum.at[n], a.part[1], low);
        }
    }
}

// Store the first `rows` rows of a block. Neighbouring threads first exchange pairs, so that each stores four values.
template <typename T>
__device__ __forceinline__ void store(T* to, int64_t stride, int rows, const Sum& sum) {
    typedef std::conditional_t<sizeof(T) == 2, unsigned, unsigned long long> Pair;
    const bool odd = lane() % 2;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        Pair pair[2], out[2];
        for (int n = 0; n < 2; n++) {
            const T values[2] = {gpu::from_float<T>(sum.at[n][2 * half]), gpu::from_float<T>(sum.at[n][2 * half + 1])};
            memcpy(&pair[n], values, sizeof(Pair));
        }
        const Pair other = __shfl_xor_sync(gpu::ALL_LANES, odd ? pair[0] : pair[1], 1);
        out[0] = odd ? other : pair[0];
        out[1] = odd ? pair[1] : other;
        const int row = row_of(2 * half), column = lane() % 4 / 2 * 4 + (odd ? 8 : 0);
        Pack<T, 4> values;
        memcpy(&values, out, sizeof(values));
        if (row < rows) gpu::store(reinterpret_cast<Pack<T, 4>*>(to + row * stride + column), values);
    }
}

// Start copying `rows` rows of COLUMNS values to shared memory; the rest of the tile becomes zero.
template <int COLUMNS, int THREADS, typename T>
__device__ __forceinline__ void copy_tile(T* to, int to_stride, const T* from, int64_t from_stride, int rows) {
    constexpr int VALUES = 16 / sizeof(T), PIECES = COLUMNS / VALUES;
    for (int piece = threadIdx.x; piece < TILE * PIECES; piece += THREADS) {
        const int row = piece / PIECES, column = piece % PIECES * VALUES;
        const bool real = row < rows;
        gpu::copy_async<16>(to + row * to_stride + column, real ? from + row * from_stride + column : from, real);
    }
}

// Decays --------------------------------------------------------------------------------------------------------------

// The decays of a tile's 16 steps for 16 keys, of which each thread holds those of its elements.
struct Decays {
    Sum log;
    Sum r_mid, k_mid;      // the factors that make r_mid and k_mid of r and k
    float to_mid[2][2];    // exp(m) of the thread's keys: from the tile's start to its middle
    float from_mid[2][2];  // exp(c_15 - m)
};

template <typename T>
__device__ __forceinline__ Decays decays(const T* w, int stride, int rows) {
    Decays d;
    const int g = lane() / 4, q = lane() % 4;
#pragma unroll
    for (int n = 0; n < 2; n++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const float log = -__expf(gpu::to_float(w[row_of(e) * stride + column_of(n, e)]));
            d.log.at[n][e] = row_of(e) < rows ? (log < LEAST_LOG_DECAY ? LEAST_LOG_DECAY : log) : 0.0f;
        }
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const float early = d.log.at[n][c], late = d.log.at[n][c + 2];
            float to_mid = early, from_mid = late;  // from this step to the middle; from the middle to this step
#pragma unroll
            for (int step = 1; step < 8; step *= 2) {
                const float next = __shfl_down_sync(gpu::ALL_LANES, to_mid, 4 * step);
                const float previous = __shfl_up_sync(gpu::ALL_LANES, from_mid, 4 * step);
                to_mid += g + step < 8 ? next : 0.0f;
                from_mid += g >= step ? previous : 0.0f;
            }
            d.to_mid[n][c] = __expf(__shfl_sync(gpu::ALL_LANES, to_mid, q));
            d.from_mid[n][c] = __expf(__shfl_sync(gpu::ALL_LANES, from_mid, 28 + q));
            d.r_mid.at[n][c] = __expf(-to_mid);
            d.k_mid.at[n][c] = __expf(to_mid - early);
            d.r_mid.at[n][c + 2] = __expf(from_mid - late);
            d.k_mid.at[n][c + 2] = __expf(-from_mid);
        }
    }
    return d;
}

template <typename T>
__device__ __forceinline__ void put(T* tile, int stride, int n, int e, float x0, float x1) {
    *reinterpret_cast<Pack<T, 2>*>(tile + row_of(e) * stride + column_of(n, e)) = {gpu::from_float<T>(x0),
                                                                                   gpu::from_float<T>(x1)};
}

template <typename T>
__device__ __forceinline__ Sum elements(const T* tile, int stride) {
    Sum x;
#pragma unroll
    for (int n = 0; n < 2; n++) {
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
            const Pack<T, 2> pair = *reinterpret_cast<const Pack<T, 2>*>(tile + row_of(e) * stride + column_of(n, e));
            x.at[n][e] = gpu::to_float(pair.at[0]);
            x.at[n][e + 1] = gpu::to_float(pair.at[1]);
        }
    }
    return x;
}

// A tile of N or VALUES columns in shared memory; 16 bytes more a row keep rows of a block in different banks.
template <typename T, int COLUMNS>
struct alignas(16) Tile {
    static constexpr int STRIDE = COLUMNS + 16 / sizeof(T);
    T at[TILE * STRIDE];
};

template <typename T>
struct Inputs {
    const T *r, *k, *v, *w;
    const float* u;
};

// r and k times their decays, and what else of a tile all warps need.
template <typename T, int N>
struct Operands {
    Tile<T, N> r_mid, k_mid, r_in, k_out;
    float decay[N];               // of the whole tile
    float current[N / 16][TILE];  // r_t diag(u) k_t over 16 keys each: how a step reads itself
};

// Fill in the 16 keys of this warp.
template <typename T, int N>
__device__ __forceinline__ Decays prepare(Operands<T, N>& to, int warp, const Tile<T, N>& r_tile,
                                          const Tile<T, N>& k_tile, const Tile<T, N>& w_tile, const float* u,
                                          int rows) {
    constexpr int STRIDE = Tile<T, N>::STRIDE;
    const int first = 16 * warp;
    const Decays d = decays(w_tile.at + first, STRIDE, rows);
    const Sum r = elements(r_tile.at + first, STRIDE), k = elements(k_tile.at + first, STRIDE);
    float current[2] = {0.0f, 0.0f};
#pragma unroll
    for (int n = 0; n < 2; n++) {
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
            const float r0 = r.at[n][e] * d.r_mid.at[n][e], r1 = r.at[n][e + 1] * d.r_mid.at[n][e + 1];
            const float k0 = k.at[n][e] * d.k_mid.at[n][e], k1 = k.at[n][e + 1] * d.k_mid.at[n][e + 1];
            put(to.r_mid.at + first, STRIDE, n, e, rounded<T>(r0), rounded<T>(r1));
            put(to.k_mid.at + first, STRIDE, n, e, rounded<T>(k0), rounded<T>(k1));
            put(to.r_in.at + first, STRIDE, n, e, r0 * d.to_mid[n][0], r1 * d.to_mid[n][1]);
            put(to.k_out.at + first, STRIDE, n, e, k0 * d.from_mid[n][0], k1 * d.from_mid[n][1]);
            const int i = first + column_of(n, e);
            current[e / 2] += r.at[n][e] * u[i] * k.at[n][e] + r.at[n][e + 1] * u[i + 1] * k.at[n][e + 1];
        }
        if (lane() < 4) {
            to.decay[first + column_of(n, 0)] = d.to_mid[n][0] * d.from_mid[n][0];
            to.decay[first + column_of(n, 1)] = d.to_mid[n][1] * d.from_mid[n][1];
        }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        current[half] += __shfl_xor_sync(gpu::ALL_LANES, current[half], 1);
        current[half] += __shfl_xor_sync(gpu::ALL_LANES, current[half], 2);
        if (lane() % 4 == 0) to.current[warp][row_of(2 * half)] = current[half];
    }
    return d;
}

// Forward -------------------------------------------------------------------------------------------------------------

// Warps prepare 16 keys each. For the products a warp takes 16 value columns; where there are fewer such groups than
// warps, several warps share a group, each with a part of the keys, and their outputs are added up.
template <typename T, int N, int VALUES>
struct Forward {
    static constexpr int WARPS = N / 16, THREADS = gpu::WARP * WARPS, SPLITS = N / VALUES;
    static constexpr int GROUPS = VALUES / 16, SHARERS = WARPS / GROUPS, BLOCKS = N / 16 / SHARERS;
    static constexpr int SLOTS = sizeof(T) == 4 ? 3 : 4;

    struct Slot {
        Tile<T, N> r, k, w;
        Tile<T, VALUES> v;
    };
    struct Shared {
        Slot slots[SLOTS];
        Operands<T, N> operands[2];
        float u[N];
        float shares[SHARERS > 1 ? 2 : 1][SHARERS > 1 ? SHARERS * TILE : 1][VALUES + 8];  // of y
    };
};

template <typename T, int N, int VALUES>
__global__ void __launch_bounds__(2 * N, 1024 / sizeof(T) / (2 * N))
    forward_tiles(gpu::Sequences seqs, int64_t heads, Inputs<T> in, const float* initial, T* y, float* final_state,
                  float* states) {
    typedef Forward<T, N, VALUES> F;
    typename F::Shared& shared = *reinterpret_cast<typename F::Shared*>(gpu::shared_memory());
    const int warp = threadIdx.x / gpu::WARP, group = warp % F::GROUPS, sharer = warp / F::GROUPS;
    const int64_t item = blockIdx.x / F::SPLITS, head = item % heads, stride = heads * N;
    const int value = blockIdx.x % F::SPLITS * VALUES;  // the first of this CTA
    const Span rows = span(seqs, item / heads);
    const int length = static_cast<int>(rows.end - rows.begin), tiles = (length + TILE - 1) / TILE;
    const auto row_at = [&](int tile) { return (rows.begin + tile * TILE) * stride + head * N; };
    const auto rows_in = [&](int tile) { return minimum(length - tile * TILE, TILE); };

    const auto copy = [&](int tile) {
        if (tile < tiles) {
            typename F::Slot& slot = shared.slots[tile % F::SLOTS];
            const int64_t at = row_at(tile);
            const int count = rows_in(tile);
            copy_tile<N, F::THREADS>(slot.r.at, slot.r.STRIDE, in.r + at, stride, count);
            copy_tile<N, F::THREADS>(slot.k.at, slot.k.STRIDE, in.k + at, stride, count);
            copy_tile<N, F::THREADS>(slot.w.at, slot.w.STRIDE, in.w + at, stride, count);
            copy_tile<VALUES, F::THREADS>(slot.v.at, slot.v.STRIDE, in.v + at + value, stride, count);
        }
        gpu::copy_commit();
    };
    const auto prepare_tile = [&](int tile) {
        const typename F::Slot& slot = shared.slots[tile % F::SLOTS];
        prepare(shared.operands[tile % 2], warp, slot.r, slot.k, slot.w, shared.u, rows_in(tile));
    };
    const auto add_shares = [&](int tile) {
        for (int i = threadIdx.x; i < TILE * VALUES / 4; i += F::THREADS) {
            const int t = i / (VALUES / 4), j = i % (VALUES / 4) * 4;
            Pack<T, 4> sum;
            for (int c = 0; c < 4; c++) {
                float x = 0.0f;
                for (int s = 0; s < F::SHARERS; s++) x += shared.shares[tile % 2][s * TILE + t][j + c];
                sum.at[c] = gpu::from_float<T>(x);
            }
            T* to = y + row_at(tile) + t * stride + value + j;
            if (t < rows_in(tile)) gpu::store(reinterpret_cast<Pack<T, 4>*>(to), sum);
        }
    };

    // S^T: values in the rows, keys in the columns, and so on in the states (key, value) in global memory
    Sum state[F::BLOCKS];
    const int first_block = sharer * F::BLOCKS;
    const auto element = [&](int b, int n, int e) {
        return (16 * (first_block + b) + column_of(n, e)) * N + value + 16 * group + row_of(e);
    };
    const auto store_state = [&](float* to) {
#pragma unroll
        for (int b = 0; b < F::BLOCKS; b++)
#pragma unroll
            for (int i = 0; i < 8; i++) gpu::store(to + element(b, i / 4, i % 4), state[b].at[i / 4][i % 4]);
    };
#pragma unroll
    for (int b = 0; b < F::BLOCKS; b++)
#pragma unroll
        for (int i = 0; i < 8; i++)
            state[b].at[i / 4][i % 4] = initial ? gpu::load(initial + item * N * N + element(b, i / 4, i % 4)) : 0.0f;

    // One barrier a tile: between two of them warps multiply one tile and prepare the next.
    for (int tile = 0; tile < F::SLOTS - 1; tile++) copy(tile);
    for (int i = threadIdx.x; i < N; i += F::THREADS) shared.u[i] = gpu::load(in.u + head * N + i);
    gpu::copy_wait<F::SLOTS - 2>();
    __syncthreads();
    if (tiles > 0) prepare_tile(0);
    for (int tile = 0; tile < tiles; tile++) {
        gpu::copy_wait<F::SLOTS - 3>();
        __syncthreads();
        copy(tile + F::SLOTS - 1);
        if (F::SHARERS > 1 && tile > 0) add_shares(tile - 1);
        if (states && tile % TILES == 0)
            store_state(states + ((rows.first_slot + tile / TILES) * heads + head) * N * N);

        const Operands<T, N>& of = shared.operands[tile % 2];
        constexpr int STRIDE = Tile<T, N>::STRIDE;
        Sum reads = {};  // what step t (row) reads of step s (column)
#pragma unroll
        for (int b = 0; b < F::BLOCKS; b++) {
            const int key = 16 * (first_block + b);
            multiply(reads, read<false>(of.r_mid.at + key, STRIDE), read<false>(of.k_mid.at + key, STRIDE));
        }
#pragma unroll
        for (int e = 0; e < 4; e++) {
            float current = 0.0f;
            for (int b = 0; b < F::BLOCKS; b++) current += of.current[first_block + b][row_of(e)];
            for (int n = 0; n < 2; n++) {
                const int t = row_of(e), s = column_of(n, e);
                reads.at[n][e] = s < t ? reads.at[n][e] : s == t ? current : 0.0f;
            }
        }
        const auto& values = shared.slots[tile % F::SLOTS].v;
        const Block<T> v = read<true>(values.at + 16 * group, values.STRIDE);
        Sum out = {};
        multiply(out, operand<T>(reads), v);
#pragma unroll
        for (int b = 0; b < F::BLOCKS; b++) {
            const int key = 16 * (first_block + b);
            multiply(out, read<false>(of.r_in.at + key, STRIDE), operand<T>(state[b]));
#pragma unroll
            for (int i = 0; i < 8; i++) state[b].at[i / 4][i % 4] *= of.decay[key + column_of(i / 4, i % 4)];
            multiply(state[b], v, read<true>(of.k_out.at + key, STRIDE));
        }
        if constexpr (F::SHARERS > 1) {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const int n = i / 4, e = i % 4;
                shared.shares[tile % 2][sharer * TILE + row_of(e)][16 * group + column_of(n, e)] = out.at[n][e];
            }
        } else {
            store(y + row_at(tile) + value + 16 * group, stride, rows_in(tile), out);
        }
        if (tile + 1 < tiles) prepare_tile(tile + 1);
    }
    if (F::SHARERS > 1 && tiles > 0) {
        __syncthreads();
        add_shares(tiles - 1);
    }
    store_state(final_state + item * N * N);
}

// Backward ------------------------------------------------------------------------------------------------------------

// With G_t = dL/dS_t, primes marking the parts without u, and products of two vectors taken per element:
//
//     dr'_t = S_{t-1} dy_t       dk'_t = G_t v_t       dv'_t = G_t^T k_t       G_{t-1} = diag(w_t) G_t + r_t dy_t^T
//
// Warps take 16 keys each, of S and of G; a tile's start S comes from the chunk's start by a pass forwards. G lies in
// shared memory too, for dv, which sums over keys.
//
// dg_t, the gradient of the log decay, collects what passes through step t: from steps before it or from the tile's
// start to steps after it or to the tile's end. What steps s read of each other enters it twice, as r dr' where it ends
// and as k dk' where it began, and cancels where both are on one side of t; with the rounded r_mid and k_mid that went
// into dr' and dk' the two are the same but for fp32's rounding, however strong the decay.
template <typename T, int N, int VALUES>
struct Backward {
    static constexpr int WARPS = N / 16, THREADS = gpu::WARP * WARPS, SPLITS = N / VALUES, BLOCKS = VALUES / 16;
    typedef std::conditional_t<SPLITS == 1, T, float> Out;  // parts of a sum are fp32

    struct Slot {
        Tile<T, N> r, k, w;
        Tile<T, VALUES> v, dy;
    };
    struct Shared {
        Slot slots[TILES];
        Operands<T, N> operands;
        alignas(16) T dstate[N * Tile<T, VALUES>::STRIDE];
        Pack<float, 4> kept[TILES][BLOCKS * Block<T>::PARTS][THREADS];  // S at each tile's start, thread by thread
        float u[N];
    };
};

// What a thread keeps of a block of S: rounded for the tensor cores, or fp32.
template <typename T, int THREADS>
__device__ __forceinline__ void keep(Pack<float, 4> (*to)[THREADS], const Sum& sum) {
    if constexpr (Block<T>::PARTS == 1) {
        memcpy(&to[0][threadIdx.x], operand<T>(sum).part[0], 16);
    } else {
        for (int n = 0; n < 2; n++) memcpy(&to[n][threadIdx.x], sum.at[n], 16);
    }
}

template <typename T, int THREADS>
__device__ __forceinline__ Sum kept(const Pack<float, 4> (*from)[THREADS]) {
    Sum sum;
    if constexpr (Block<T>::PARTS == 1) {
        T pairs[4][2];
        memcpy(pairs, &from[0][threadIdx.x], 16);
        for (int i = 0; i < 8; i++) sum.at[i / 4][i % 4] = gpu::to_float(pairs[i / 4 * 2 + i % 4 / 2][i % 2]);
    } else {
        for (int n = 0; n < 2; n++) memcpy(sum.at[n], &from[n][threadIdx.x], 16);
    }
    return sum;
}

// The largest one up to x; 1 where x is close to an end of fp32's range.
__device__ __forceinline__ float power_of_two(float x) {
    unsigned bits;
    memcpy(&bits, &x, 4);
    bits &= 0x7f800000;
    float power;
    memcpy(&power, &bits, 4);
    return power > 1e-30f && power < 1e30f ? power : 1.0f;
}

template <typename T, typename Out>
struct Gradients {
    const T* dy;
    const float* dfinal;
    Out *dr, *dk;
    T* dv;
    Out* dw;
    float *du, *dstate;
};

template <typename T, int N, int VALUES>
__global__ void __launch_bounds__(2 * N, 256 / (2 * N))
    backward_tiles(gpu::Sequences seqs, int64_t heads, Inputs<T> in, const float* states,
                   Gradients<T, typename Backward<T, N, VALUES>::Out> grad) {
    typedef Backward<T, N, VALUES> B;
    constexpr int STRIDE = Tile<T, N>::STRIDE, VALUE_STRIDE = Tile<T, VALUES>::STRIDE;
    typename B::Shared& shared = *reinterpret_cast<typename B::Shared*>(gpu::shared_memory());
    Operands<T, N>& of = shared.operands;
    const int warp = threadIdx.x / gpu::WARP, g = lane() / 4, q = lane() % 4, first = 16 * warp;
    const int64_t item = blockIdx.x / B::SPLITS, head = item % heads, stride = heads * N;
    const int split = blockIdx.x % B::SPLITS, value = split * VALUES;
    const int64_t part = split * (seqs.offsets ? 1 : seqs.count) * seqs.length * stride;  // where this split's lie
    const Span rows = span(seqs, item / heads);
    const int length = static_cast<int>(rows.end - rows.begin), tiles = (length + TILE - 1) / TILE;
    const int chunks = (tiles + TILES - 1) / TILES;
    const auto row_at = [&](int chunk, int tile) {
        return (rows.begin + chunk * CHUNK + tile * TILE) * stride + head * N;
    };
    const auto rows_in = [&](int chunk, int tile) { return minimum(length - chunk * CHUNK - tile * TILE, TILE); };

    // A chunk's tiles lie in the slots in turn forwards and backwards: while one chunk is walked from its last tile,
    // the next, an earlier one, moves in from its first, which is needed first.
    const auto slot_of = [&](int chunk, int tile) -> typename B::Slot& {
        return shared.slots[chunk % 2 ? TILES - 1 - tile : tile];
    };
    const auto copy = [&](int chunk, int tile) {
        const int64_t at = row_at(chunk, tile);
        const int count = rows_in(chunk, tile);
        if (chunk < 0 || count <= 0) return;
        typename B::Slot& slot = slot_of(chunk, tile);
        copy_tile<N, B::THREADS>(slot.r.at, STRIDE, in.r + at, stride, count);
        copy_tile<N, B::THREADS>(slot.k.at, STRIDE, in.k + at, stride, count);
        copy_tile<N, B::THREADS>(slot.w.at, STRIDE, in.w + at, stride, count);
        copy_tile<VALUES, B::THREADS>(slot.v.at, VALUE_STRIDE, in.v + at + value, stride, count);
        copy_tile<VALUES, B::THREADS>(slot.dy.at, VALUE_STRIDE, grad.dy + at + value, stride, count);
    };
    // Where a pair of elements of S or G lies in a state (key, value): rows are keys here.
    const auto element = [&](int b, int n, int e) {
        return (first + row_of(e)) * N + value + 16 * b + column_of(n, e);
    };
    // The chunk's state arrives in the place of the last two tiles' states, which are no longer needed by then.
    // Threads use the same 16 bytes there for both, so that none overwrites another's.
    const auto arrival = [&](int b, int pair) {
        return reinterpret_cast<Pack<float, 2>*>(&shared.kept[2][0][(2 * b + pair / 2) * B::THREADS + threadIdx.x]) +
               pair % 2;
    };
    const auto copy_state = [&](int chunk) {
        if (chunk < 0) return;
        const float* from = states + ((rows.first_slot + chunk) * heads + head) * N * N;
        for (int b = 0; b < B::BLOCKS; b++)
            for (int i = 0; i < 4; i++) gpu::copy_async<8>(arrival(b, i), from + element(b, i / 2, i % 2 * 2), true);
    };

    Sum G[B::BLOCKS];
#pragma unroll
    for (int b = 0; b < B::BLOCKS; b++) {
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
            Pack<float, 2> pair = {};
            if (grad.dfinal)
                pair = gpu::load(
                    reinterpret_cast<const Pack<float, 2>*>(grad.dfinal + item * N * N + element(b, i / 4, i % 4)));
            G[b].at[i / 4][i % 4] = pair.at[0];
            G[b].at[i / 4][i % 4 + 1] = pair.at[1];
        }
    }
    float du[2][2] = {};
    for (int i = threadIdx.x; i < N; i += B::THREADS) shared.u[i] = gpu::load(in.u + head * N + i);
    for (int tile = 0; tile < TILES - 1; tile++) copy(chunks - 1, tile);
    copy_state(chunks - 1);
    gpu::copy_commit();

    for (int chunk = chunks - 1; chunk >= 0; chunk--) {
        const int here = minimum(tiles - chunk * TILES, TILES);
        __syncthreads();
        copy(chunk, TILES - 1);
        gpu::copy_commit();
        gpu::copy_wait<1>();
        __syncthreads();

        Sum S[B::BLOCKS];
#pragma unroll
        for (int b = 0; b < B::BLOCKS; b++)
#pragma unroll
            for (int i = 0; i < 8; i++) S[b].at[i / 4][i % 4] = arrival(b, i / 2)->at[i % 2];
        for (int tile = 0;; tile++) {
#pragma unroll
            for (int b = 0; b < B::BLOCKS; b++) keep<T>(shared.kept[tile] + b * Block<T>::PARTS, S[b]);
            if (tile == here - 1) break;
            const typename B::Slot& slot = slot_of(chunk, tile);
            const Decays d = decays(slot.w.at + first, STRIDE, TILE);
            const Sum k = elements(slot.k.at + first, STRIDE);
            __syncwarp();
#pragma unroll
            for (int n = 0; n < 2; n++) {
#pragma unroll
                for (int e = 0; e < 4; e += 2)
                    put(of.k_out.at + first, STRIDE, n, e, k.at[n][e] * (d.k_mid.at[n][e] * d.from_mid[n][0]),
                        k.at[n][e + 1] * (d.k_mid.at[n][e + 1] * d.from_mid[n][1]));
                if (g == 0)
                    for (int c = 0; c < 2; c++) of.decay[first + column_of(n, c)] = d.to_mid[n][c] * d.from_mid[n][c];
            }
            __syncwarp();
            const Block<T> k_out = read<true>(of.k_out.at + first, STRIDE);
            const float decay[2] = {of.decay[first + g], of.decay[first + g + 8]};
#pragma unroll
            for (int b = 0; b < B::BLOCKS; b++) {
#pragma unroll
                for (int i = 0; i < 8; i++) S[b].at[i / 4][i % 4] *= decay[i % 4 / 2];
                multiply(S[b], k_out, read<true>(slot.v.at + 16 * b, VALUE_STRIDE));
            }
        }

        for (int tile = TILES - 1; tile >= 0; tile--) {
            if (tile == TILES - 1) gpu::copy_wait<0>();
            __syncthreads();
            if (tile < TILES - 1) copy(chunk - 1, TILES - 2 - tile);  // into the slot of the tile just done
            if (tile == 1) copy_state(chunk - 1);
            if (tile < here) {
                const typename B::Slot& slot = slot_of(chunk, tile);
                const int64_t at = row_at(chunk, tile);
                const int count = rows_in(chunk, tile);
                const Decays d = prepare(of, warp, slot.r, slot.k, slot.w, shared.u, count);
#pragma unroll
                for (int b = 0; b < B::BLOCKS; b++)
#pragma unroll
                    for (int n = 0; n < 2; n++)
#pragma unroll
                        for (int e = 0; e < 4; e += 2)
                            put(shared.dstate + first * VALUE_STRIDE + 16 * b, VALUE_STRIDE, n, e, G[b].at[n][e],
                                G[b].at[n][e + 1]);
                __syncthreads();

                Sum dreads = {}, dreads_turned = {}, dr_in = {}, dk_out = {}, dr_mid = {}, dk_mid = {};
                float through[2] = {0.0f, 0.0f};  // rowsum(G S) of keys g and g + 8
#pragma unroll
                for (int b = 0; b < B::BLOCKS; b++) {
                    const Block<T> v = read<false>(slot.v.at + 16 * b, VALUE_STRIDE);
                    const Block<T> dy = read<false>(slot.dy.at + 16 * b, VALUE_STRIDE);
                    const Sum start = kept<T>(shared.kept[tile] + b * Block<T>::PARTS);
                    multiply(dreads, dy, v);
                    multiply(dreads_turned, v, dy);
                    multiply(dr_in, dy, operand<T>(start));
                    multiply(dk_out, v, operand<T>(G[b]));
#pragma unroll
                    for (int i = 0; i < 8; i++) through[i % 4 / 2] += start.at[i / 4][i % 4] * G[b].at[i / 4][i % 4];
                }
                float v_dy[2];  // of steps g and g + 8, from the diagonal
                for (int half = 0; half < 2; half++) {
                    through[half] += __shfl_xor_sync(gpu::ALL_LANES, through[half], 1);
                    through[half] += __shfl_xor_sync(gpu::ALL_LANES, through[half], 2);
                    const float diagonal = g % 2 ? dreads.at[half][2 * half + 1] : dreads.at[half][2 * half];
                    v_dy[half] = __shfl_sync(gpu::ALL_LANES, diagonal, 4 * g + g / 2);
                }
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    const int n = i / 4, e = i % 4, row_here = row_of(e), column = column_of(n, e);
                    dreads.at[n][e] = column < row_here ? dreads.at[n][e] : 0.0f;
                    dreads_turned.at[n][e] = row_here < column ? dreads_turned.at[n][e] : 0.0f;
                }
                // Gradients can be of any size: brought to 1, they leave the exponents' range to the decays.
                float largest = 0.0f;
#pragma unroll
                for (int i = 0; i < 8; i++) largest = fmaxf(largest, fabsf(dreads.at[i / 4][i % 4]));
                for (int other = 1; other < gpu::WARP; other *= 2)
                    largest = fmaxf(largest, __shfl_xor_sync(gpu::ALL_LANES, largest, other));
                const float size = power_of_two(largest), scale = __fdividef(1.0f, size);
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    dreads.at[i / 4][i % 4] *= scale;
                    dreads_turned.at[i / 4][i % 4] *= scale;
                }
                multiply<true>(dr_mid, operand<T>(dreads), read<true>(of.k_mid.at + first, STRIDE));
                multiply<true>(dk_mid, operand<T>(dreads_turned), read<true>(of.r_mid.at + first, STRIDE));

                const Sum r = elements(slot.r.at + first, STRIDE), k = elements(slot.k.at + first, STRIDE);
                const Sum r_mid = elements(of.r_mid.at + first, STRIDE), k_mid = elements(of.k_mid.at + first, STRIDE);
                Sum dr, dk, dw;
#pragma unroll
                for (int n = 0; n < 2; n++) {
#pragma unroll
                    for (int c = 0; c < 2; c++) {
                        const float u = shared.u[first + column_of(n, c)];
                        float ends[2], after[2], out = 0.0f;
#pragma unroll
                        for (int half = 0; half < 2; half++) {
                            const int e = c + 2 * half;
                            const float dr_e = dr_in.at[n][e] * (d.r_mid.at[n][e] * d.to_mid[n][c]);
                            const float dk_e = dk_out.at[n][e] * (d.k_mid.at[n][e] * d.from_mid[n][c]);
                            const float r_e = r.at[n][e], k_e = k.at[n][e];
                            dr.at[n][e] = dr_mid.at[n][e] * d.r_mid.at[n][e] * size + dr_e + u * k_e * v_dy[half];
                            dk.at[n][e] = dk_mid.at[n][e] * d.k_mid.at[n][e] * size + dk_e + u * r_e * v_dy[half];
                            du[n][c] += r_e * k_e * v_dy[half];
                            // what ends at this step, and that less what begins at it
                            ends[half] = r_e * dr_e + r_mid.at[n][e] * dr_mid.at[n][e] * size;
                            after[half] = ends[half] - k_e * dk_e - k_mid.at[n][e] * dk_mid.at[n][e] * size;
                            out += k_e * dk_e;  // what reaches the tile's end from its steps
                        }
#pragma unroll
                        for (int step = 1; step < 8; step *= 2) {
                            const float next0 = __shfl_down_sync(gpu::ALL_LANES, after[0], 4 * step);
                            const float next1 = __shfl_down_sync(gpu::ALL_LANES, after[1], 4 * step);
                            after[0] += g + step < 8 ? next0 : 0.0f;
                            after[1] += g + step < 8 ? next1 : 0.0f;
                            out += __shfl_xor_sync(gpu::ALL_LANES, out, 4 * step);
                        }
                        after[0] += __shfl_sync(gpu::ALL_LANES, after[1], q);
                        out += __shfl_sync(gpu::ALL_LANES, through[n], 4 * (2 * q + c)) * d.to_mid[n][c] *
                               d.from_mid[n][c];
#pragma unroll
                        for (int half = 0; half < 2; half++) {
                            const int e = c + 2 * half;
                            const float log = d.log.at[n][e];
                            // where the log decay is cut off, nothing depends on it
                            dw.at[n][e] = log <= LEAST_LOG_DECAY ? 0.0f : log * (out + after[half] - ends[half]);
                        }
                    }
                }
                store(grad.dr + part + at + first, stride, count, dr);
                store(grad.dk + part + at + first, stride, count, dk);
                store(grad.dw + part + at + first, stride, count, dw);

                const Block<T> r_in = read<true>(of.r_in.at + first, STRIDE);
                const float decay[2] = {of.decay[first + g], of.decay[first + g + 8]};
#pragma unroll
                for (int b = 0; b < B::BLOCKS; b++) {
#pragma unroll
                    for (int i = 0; i < 8; i++) G[b].at[i / 4][i % 4] *= decay[i % 4 / 2];
                    multiply(G[b], r_in, read<true>(slot.dy.at + 16 * b, VALUE_STRIDE));
                }

                for (int group = warp; group < B::BLOCKS; group += B::WARPS) {  // 16 value columns of dv
                    Sum reads_turned = {}, dv = {};
#pragma unroll
                    for (int key = 0; key < N; key += 16) {
                        multiply(reads_turned, read<false>(of.k_mid.at + key, STRIDE),
                                 read<false>(of.r_mid.at + key, STRIDE));
                        multiply(dv, read<false>(of.k_out.at + key, STRIDE),
                                 read<true>(shared.dstate + key * VALUE_STRIDE + 16 * group, VALUE_STRIDE));
                    }
#pragma unroll
                    for (int i = 0; i < 8; i++) {
                        const int n = i / 4, e = i % 4, s = row_of(e), t = column_of(n, e);
                        float current = 0.0f;
                        for (int keys = 0; keys < N / 16; keys++) current += of.current[keys][s];
                        reads_turned.at[n][e] = s < t ? reads_turned.at[n][e] : s == t ? current : 0.0f;
                    }
                    multiply(dv, operand<T>(reads_turned), read<true>(slot.dy.at + 16 * group, VALUE_STRIDE));
                    store(grad.dv + at + value + 16 * group, stride, count, dv);
                }
            }
        }
        gpu::copy_commit();
    }

#pragma unroll
    for (int b = 0; b < B::BLOCKS; b++)
#pragma unroll
        for (int i = 0; i < 8; i += 2)
            gpu::store(reinterpret_cast<Pack<float, 2>*>(grad.dstate + item * N * N + element(b, i / 4, i % 4)),
                       Pack<float, 2>{G[b].at[i / 4][i % 4], G[b].at[i / 4][i % 4 + 1]});
    for (int n = 0; n < 2; n++) {
        for (int c = 0; c < 2; c++) {
            for (int step = 4; step < gpu::WARP; step *= 2) du[n][c] += __shfl_xor_sync(gpu::ALL_LANES, du[n][c], step);
            if (g == 0) {
                const int64_t heads_before = split * seqs.count * heads + item;
                gpu::store(grad.du + heads_before * N + first + column_of(n, c), du[n][c]);
            }
        }
    }
}

// Step by step --------------------------------------------------------------------------------------------------------

// 128 threads share 16 rows or columns of a state, eight threads each. Any head size that is a multiple of 16.
constexpr int LINES = 16, PARTNERS = 8, PLAIN_THREADS = LINES * PARTNERS;
constexpr int STEPS = 8;  // loaded together

struct PlainShape {
    int n, stride;  // of a line of a state, with a gap so that lines lie in different banks
    __device__ __host__ explicit PlainShape(int64_t head_size) : n(static_cast<int>(head_size)), stride(n + PARTNERS) {}
};

__device__ __forceinline__ float sum_of_partners(float x) {
    for (int other = 1; other < PARTNERS; other *= 2) x += __shfl_xor_sync(gpu::ALL_LANES, x, other);
    return x;
}

// The decay, and in *log the log decay, of a raw w.
__device__ __forceinline__ float decay_of(float w, float* log = nullptr) {
    const float g = -expf(w);
    if (log) *log = g;
    return expf(g);
}

template <typename T>
__device__ __forceinline__ float load_float(const T* p) {
    return gpu::to_float(gpu::load(p));
}

// Of 16 value columns: out_t = sum_i x_t[i] (A[i] + u[i] p_t[i] q_t) and A[i] <- w_t[i] A[i] + p_t[i] q_t. Forwards
// that is y (x = r, p = k, q = v) with A = S, backwards dv (x = k, p = r, q = dy) with A = dL/dS.
template <typename T>
struct Scan {
    const T *x, *p, *q, *w;
    const float *u, *initial;
    T* out;
    float *final_state, *states;
};

inline size_t scan_bytes(int64_t n) {
    return sizeof(float) * (LINES * (n + PARTNERS) + 3 * STEPS * n + n + STEPS * LINES);
}

template <typename T, bool BACKWARDS>
__global__ void scan_steps(gpu::Sequences seqs, int64_t heads, int64_t head_size, Scan<T> in) {
    const PlainShape shape(head_size);
    const int n = shape.n, line = threadIdx.x / PARTNERS, partner = threadIdx.x % PARTNERS;
    float* x = reinterpret_cast<float*>(gpu::shared_memory());
    float *p = x + STEPS * n, *w = p + STEPS * n, *u = w + STEPS * n, *q = u + n, *A = q + STEPS * LINES;
    float* own = A + line * shape.stride;
    const int64_t groups = n / LINES, item = blockIdx.x / groups, head = item % heads, stride = heads * n;
    const int value = static_cast<int>(blockIdx.x % groups) * LINES;
    const Span rows = span(seqs, item / heads);
    for (int i = threadIdx.x; i < n; i += PLAIN_THREADS) u[i] = gpu::load(in.u + head * n + i);
    const auto element = [&](int i) { return static_cast<int64_t>(i) * n + value + line; };
    for (int i = partner; i < n; i += PARTNERS)
        own[i] = in.initial ? gpu::load(in.initial + item * n * n + element(i)) : 0.0f;
    const int length = static_cast<int>(rows.end - rows.begin), tiles = (length + STEPS - 1) / STEPS;
    for (int walked = 0; walked < tiles; walked++) {
        const int tile = BACKWARDS ? tiles - 1 - walked : walked;
        const int64_t at = (rows.begin + tile * STEPS) * stride + head * n;
        const int count = minimum(length - tile * STEPS, STEPS);
        __syncthreads();
        for (int i = threadIdx.x; i < count * n; i += PLAIN_THREADS) {
            const int64_t from = at + i / n * stride + i % n;
            x[i] = load_float(in.x + from);
            p[i] = load_float(in.p + from);
            w[i] = decay_of(load_float(in.w + from));
        }
        for (int i = threadIdx.x; i < count * LINES; i += PLAIN_THREADS)
            q[i] = load_float(in.q + at + i / LINES * stride + value + i % LINES);
        __syncthreads();
        if (in.states && tile * STEPS % CHUNK == 0) {
            float* to = in.states + ((rows.first_slot + tile * STEPS / CHUNK) * heads + head) * n * n;
            for (int i = partner; i < n; i += PARTNERS) gpu::store(to + element(i), own[i]);
        }
        for (int step = 0; step < count; step++) {
            const int t = BACKWARDS ? count - 1 - step : step;
            const float q_t = q[t * LINES + line];
            float out = 0.0f;
            for (int i = partner; i < n; i += PARTNERS) {
                const float new_value = p[t * n + i] * q_t;
                out += x[t * n + i] * (own[i] + u[i] * new_value);
                own[i] = w[t * n + i] * own[i] + new_value;
            }
            out = sum_of_partners(out);
            if (partner == 0) gpu::store(in.out + at + t * stride + value + line, gpu::from_float<T>(out));
        }
    }
    for (int i = partner; i < n; i += PARTNERS) gpu::store(in.final_state + item * n * n + element(i), own[i]);
}

inline size_t keys_bytes(int64_t n) {
    return sizeof(float) * (2 * LINES * (n + PARTNERS) + 2 * STEPS * n + 4 * STEPS * LINES + CHUNK * LINES);
}

// dr, dk, dw, du of 16 keys, dg by the telescoped rule: with A_t = rowsum(G_t S_t), dg_t = A_t - k_t dk'_t and
// A_{t-1} = dg_t + r_t dr'_t, formed afresh at the end of every chunk. Of the parts of sums that the caller expects,
// the first is the sum and the others are zero.
template <typename T, typename Out>
__global__ void backward_keys(gpu::Sequences seqs, int64_t heads, int64_t head_size, int64_t parts, Inputs<T> in,
                              const float* states, Gradients<T, Out> grad) {
    constexpr float DEAD = -17.0f;  // log decay below which g e^g is under fp32's resolution, but not the error of dg
    const PlainShape shape(head_size);
    const int n = shape.n, line = threadIdx.x / PARTNERS, partner = threadIdx.x % PARTNERS;
    float* v = reinterpret_cast<float*>(gpu::shared_memory());
    float *dy = v + STEPS * n, *r = dy + STEPS * n, *k = r + STEPS * LINES, *w = k + STEPS * LINES;
    float *log = w + STEPS * LINES, *dr = log + STEPS * LINES, *S = dr + CHUNK * LINES + line * shape.stride;
    float* G = S + LINES * shape.stride;
    const int64_t groups = n / LINES, item = blockIdx.x / groups, head = item % heads, stride = heads * n;
    const int64_t all = (seqs.offsets ? 1 : seqs.count) * seqs.length * stride;
    const int key = static_cast<int>(blockIdx.x % groups) * LINES;
    const Span rows = span(seqs, item / heads);
    const float u = gpu::load(in.u + head * n + key + line);
    const int64_t own_line = static_cast<int64_t>(key + line) * n;
    for (int j = partner; j < n; j += PARTNERS)
        G[j] = grad.dfinal ? gpu::load(grad.dfinal + item * n * n + own_line + j) : 0.0f;
    float du = 0.0f;
    const int length = static_cast<int>(rows.end - rows.begin);

    int64_t at = 0;
    int count = 0;
    const auto load_tile = [&](int tile) {
        at = (rows.begin + tile * STEPS) * stride + head * n;
        count = minimum(length - tile * STEPS, STEPS);
        __syncthreads();
        for (int i = threadIdx.x; i < count * n; i += PLAIN_THREADS) {
            const int64_t from = at + i / n * stride + i % n;
            v[i] = load_float(in.v + from);
            dy[i] = load_float(grad.dy + from);
        }
        for (int i = threadIdx.x; i < count * LINES; i += PLAIN_THREADS) {
            const int64_t from = at + i / LINES * stride + key + i % LINES;
            r[i] = load_float(in.r + from);
            k[i] = load_float(in.k + from);
            w[i] = decay_of(load_float(in.w + from), log + i);
        }
        __syncthreads();
    };

    for (int chunk = (length + CHUNK - 1) / CHUNK - 1; chunk >= 0; chunk--) {
        const int first = chunk * (CHUNK / STEPS), tiles = (minimum(length - chunk * CHUNK, CHUNK) + STEPS - 1) / STEPS;
        const float* start = states + ((rows.first_slot + chunk) * heads + head) * n * n + own_line;
        for (int j = partner; j < n; j += PARTNERS) S[j] = gpu::load(start + j);
        for (int tile = first; tile < first + tiles; tile++) {
            load_tile(tile);
            for (int t = 0; t < count; t++) {
                const int i = t * LINES + line;
                float sum = 0.0f;
                for (int j = partner; j < n; j += PARTNERS) {
                    sum += S[j] * dy[t * n + j];
                    S[j] = w[i] * S[j] + k[i] * v[t * n + j];
                }
                sum = sum_of_partners(sum);
                if (partner == 0) dr[(tile - first) * STEPS * LINES + i] = sum;
            }
        }
        __syncwarp();
        float A = 0.0f;
        for (int j = partner; j < n; j += PARTNERS) A += G[j] * S[j];
        A = sum_of_partners(A);
        for (int tile = first + tiles - 1; tile >= first; tile--) {
            load_tile(tile);
            for (int t = count - 1; t >= 0; t--) {
                const int i = t * LINES + line;
                float dk = 0.0f, v_dy = 0.0f;
                for (int j = partner; j < n; j += PARTNERS) {
                    dk += G[j] * v[t * n + j];
                    v_dy += v[t * n + j] * dy[t * n + j];
                    G[j] = w[i] * G[j] + r[i] * dy[t * n + j];
                }
                dk = sum_of_partners(dk);
                v_dy = sum_of_partners(v_dy);
                const float dr_t = dr[(tile - first) * STEPS * LINES + i], dg = A - k[i] * dk;
                A = dg + r[i] * dr_t;
                du += r[i] * k[i] * v_dy;
                if (partner == 0) {
                    const int64_t to = at + t * stride + key + line;
                    gpu::store(grad.dr + to, gpu::from_float<Out>(dr_t + u * k[i] * v_dy));
                    gpu::store(grad.dk + to, gpu::from_float<Out>(dk + u * r[i] * v_dy));
                    gpu::store(grad.dw + to, gpu::from_float<Out>(log[i] < DEAD ? 0.0f : log[i] * dg));
                    for (int64_t part = 1; part < parts; part++)
                        for (Out* x : {grad.dr, grad.dk, grad.dw})
                            gpu::store(x + part * all + to, gpu::from_float<Out>(0.0f));
                }
            }
        }
    }
    if (partner == 0) {
        for (int64_t part = 0; part < parts; part++)
            gpu::store(grad.du + (part * seqs.count * heads + item) * n + key + line, part ? 0.0f : du);
    }
}

// Which way -----------------------------------------------------------------------------------------------------------

bool plain_only = false;

// Whether the GPU has tensor cores for bf16 and room for this much shared memory.
bool takes_tiles(size_t shared_bytes) {
#ifdef CUDA_EMULATED
    (void)shared_bytes;
    return !plain_only;
#else
    int device = 0, major = 0, room = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&room, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    return !plain_only && major >= 8 && shared_bytes <= static_cast<size_t>(room);
#endif
}

bool fits(int64_t splits, int64_t sequences, int64_t heads, int64_t head_size) {
    return splits >= 1 && sequences >= 1 && heads >= 1 && head_size >= 16 && head_size <= 256 && head_size % 16 == 0;
}

template <int X>
using Int = std::integral_constant<int, X>;

// run(N, VALUES) with the head size and the value columns of a split as types; false where there are no such kernels.
template <typename Run>
bool with_tiles(int64_t head_size, int64_t splits, Run run) {
    if (head_size == 64 && splits == 1) return run(Int<64>(), Int<64>());
    if (head_size == 64 && splits == 2) return run(Int<64>(), Int<32>());
    if (head_size == 64 && splits == 4) return run(Int<64>(), Int<16>());
    if (head_size == 32 && splits == 1) return run(Int<32>(), Int<32>());
    if (head_size == 32 && splits == 2) return run(Int<32>(), Int<16>());
    return false;
}

template <typename T>
cudaError_t run_forward(const gpu::Sequences& seqs, int64_t splits, int64_t heads, int64_t head_size,
                        const Inputs<T>& in, const float* state, T* y, float* final_state, float* states,
                        cudaStream_t stream) {
    cudaError_t error = cudaSuccess;
    const unsigned items = static_cast<unsigned>(seqs.count * heads);
    const bool done = with_tiles(head_size, splits, [&](auto n, auto values) {
        typedef Forward<T, n, values> F;
        const size_t bytes = sizeof(typename F::Shared);
        if (!takes_tiles(bytes)) return false;
        error = gpu::launch(forward_tiles<T, n, values>, dim3(items * F::SPLITS), dim3(F::THREADS), bytes, stream, seqs,
                            heads, in, state, y, final_state, states);
        return true;
    });
    if (done) return error;
    const Scan<T> scan{in.r, in.k, in.v, in.w, in.u, state, y, final_state, states};
    return gpu::launch(scan_steps<T, false>, dim3(items * static_cast<unsigned>(head_size / LINES)),
                       dim3(PLAIN_THREADS), scan_bytes(head_size), stream, seqs, heads, head_size, scan);
}

template <typename T, typename Out>
cudaError_t run_backward(const gpu::Sequences& seqs, int64_t splits, int64_t heads, int64_t head_size,
                         const Inputs<T>& in, const float* states, const Gradients<T, Out>& grad, cudaStream_t stream) {
    cudaError_t error = cudaSuccess;
    const unsigned items = static_cast<unsigned>(seqs.count * heads);
    const bool done = with_tiles(head_size, splits, [&](auto n, auto values) {
        typedef Backward<T, n, values> B;
        if constexpr (!std::is_same_v<Out, typename B::Out>) {
            return false;
        } else {
            const size_t bytes = sizeof(typename B::Shared);
            if (!takes_tiles(bytes)) return false;
            error = gpu::launch(backward_tiles<T, n, values>, dim3(items * B::SPLITS), dim3(B::THREADS), bytes, stream,
                                seqs, heads, in, states, grad);
            return true;
        }
    });
    if (done) return error;
    const dim3 grid(items * static_cast<unsigned>(head_size / LINES));
    error = gpu::launch(backward_keys<T, Out>, grid, dim3(PLAIN_THREADS), keys_bytes(head_size), stream, seqs, heads,
                        head_size, splits, in, states, grad);
    if (error != cudaSuccess) return error;
    const Scan<T> scan{in.k, in.r, grad.dy, in.w, in.u, grad.dfinal, grad.dv, grad.dstate, nullptr};
    return gpu::launch(scan_steps<T, true>, grid, dim3(PLAIN_THREADS), scan_bytes(head_size), stream, seqs, heads,
                       head_size, scan);
}

template <typename T>
Inputs<T> inputs(const void* r, const void* k, const void* v, const void* w, const float* u) {
    return {static_cast<const T*>(r), static_cast<const T*>(k), static_cast<const T*>(v), static_cast<const T*>(w), u};
}

template <typename T, typename Out>
Gradients<T, Out> gradients(const void* dy, const float* dfinal, void* dr, void* dk, void* dv, void* dw, float* du,
                            float* dstate) {
    return {static_cast<const T*>(dy),
            dfinal,
            static_cast<Out*>(dr),
            static_cast<Out*>(dk),
            static_cast<T*>(dv),
            static_cast<Out*>(dw),
            du,
            dstate};
}

constexpr int INVALID_VALUE = 1;

}  // namespace

// The device walks step by step from now on, or not: for tests.
extern "C" int visualrwkv_cuda_wkv6_plain(int64_t on) {
    plain_only = on != 0;
    return 0;
}

// offsets: (sequences + 1) row numbers on the device, of which `length` are the rows of all, or null when every
// sequence has `length` rows; wrong ones are cut to the rows. dtype: of r, k, v, w, y, all aligned to 16 bytes.
// head_size: a multiple of 16 up to 256. splits: CTAs that share a head, 1, 2 or 4. state: null for zeros. states:
// null, or one state (heads, head_size, head_size) in each of rows / 64 + sequences slots, for the backward pass.
extern "C" int visualrwkv_cuda_wkv6_forward(int64_t dtype, int64_t splits, int64_t sequences, int64_t length,
                                            const int64_t* offsets, int64_t heads, int64_t head_size, const void* r,
                                            const void* k, const void* v, const void* w, const float* u,
                                            const float* state, void* y, float* final_state, float* states,
                                            cudaStream_t stream) {
    if (!fits(splits, sequences, heads, head_size)) return INVALID_VALUE;
    const gpu::Sequences seqs{sequences, length, offsets};
    if (dtype == gpu::BFLOAT16)
        return run_forward<bf16>(seqs, splits, heads, head_size, inputs<bf16>(r, k, v, w, u), state,
                                 static_cast<bf16*>(y), final_state, states, stream);
    if (dtype == gpu::FLOAT32)
        return run_forward<float>(seqs, splits, heads, head_size, inputs<float>(r, k, v, w, u), state,
                                  static_cast<float*>(y), final_state, states, stream);
    return INVALID_VALUE;
}

// dfinal: null for zeros. dr, dk, dw: with one split like r; with more (splits, rows, H, N) fp32, whose sum is the
// gradient. du: (splits, sequences, H, N) fp32, likewise.
extern "C" int visualrwkv_cuda_wkv6_backward(int64_t dtype, int64_t splits, int64_t sequences, int64_t length,
                                             const int64_t* offsets, int64_t heads, int64_t head_size, const void* r,
                                             const void* k, const void* v, const void* w, const float* u,
                                             const float* states, const void* dy, const float* dfinal, void* dr,
                                             void* dk, void* dv, void* dw, float* du, float* dstate,
                                             cudaStream_t stream) {
    if (!fits(splits, sequences, heads, head_size)) return INVALID_VALUE;
    const gpu::Sequences seqs{sequences, length, offsets};
    if (dtype == gpu::FLOAT32)
        return run_backward(seqs, splits, heads, head_size, inputs<float>(r, k, v, w, u), states,
                            gradients<float, float>(dy, dfinal, dr, dk, dv, dw, du, dstate), stream);
    if (dtype != gpu::BFLOAT16) return INVALID_VALUE;
    if (splits == 1)
        return run_backward(seqs, splits, heads, head_size, inputs<bf16>(r, k, v, w, u), states,
                            gradients<bf16, bf16>(dy, dfinal, dr, dk, dv, dw, du, dstate), stream);
    return run_backward(seqs, splits, heads, head_size, inputs<bf16>(r, k, v, w, u), states,
                        gradients<bf16, float>(dy, dfinal, dr, dk, dv, dw, du, dstate), stream);
}
