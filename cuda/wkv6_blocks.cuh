// WKV-6 on a GPU: 16 x 16 blocks spread over a warp, as tensor cores read and write them.
#pragma once

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

template <typename T>
struct Inputs {
    const T *r, *k, *v, *w;
    const float* u;
};

}  // namespace
