// Matrices of bf16 for tensor cores: blocks of 16 x 16 across a warp, and larger ones in shared memory. With HIGH each
// value is a sum of two bf16, so that fp32 inputs lose little of themselves.
#pragma once

#include "gpu.cuh"

namespace {

using gpu::bf16;
using gpu::WARP;

constexpr int TILE = 16;  // steps, keys or values of a block

__device__ __forceinline__ float from_bits(unsigned bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

// The thread's place in its warp, as a number that the compiler takes for a new one each time: else it would keep all
// addresses that follow from it in registers, over whole loops, and spill others.
__device__ __forceinline__ int new_lane() {
    int lane = threadIdx.x % WARP;
#ifndef CUDA_EMULATED
    asm volatile("" : "+r"(lane));
#endif
    return lane;
}

// Two neighbouring values as bf16, with HIGH also what the rounding lost.
template <bool HIGH>
struct Pair {
    unsigned part[HIGH ? 2 : 1];

    Pair() = default;
    __device__ __forceinline__ Pair(float x, float y) {
        part[0] = gpu::pack(x, y);
        if constexpr (HIGH) part[1] = gpu::pack(x - from_bits(part[0] << 16), y - from_bits(part[0] & 0xffff0000u));
    }
    __device__ __forceinline__ float first() const {
        const float x = from_bits(part[0] << 16);
        if constexpr (HIGH) return x + from_bits(part[1] << 16);
        return x;
    }
    __device__ __forceinline__ float second() const {
        const float x = from_bits(part[0] & 0xffff0000u);
        if constexpr (HIGH) return x + from_bits(part[1] & 0xffff0000u);
        return x;
    }
};

// 16 x 16 values across a warp, as tensor cores take them on the left; on the right they mean the transpose.
template <bool HIGH>
struct Block {
    unsigned part[HIGH ? 2 : 1][4];
};

// 16 x 16 sums across a warp: with lane = 4 g + q, at[h][e] is row g + 8 (e / 2), column 8 h + 2 q + e % 2.
struct Sums {
    float at[2][4];
};

// c += x y^T; with HIGH all but the product of two rounding errors, which only EXACT takes along.
template <bool EXACT = false, bool HIGH>
__device__ __forceinline__ void multiply(Sums& c, const Block<HIGH>& x, const Block<HIGH>& y) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const unsigned right[2] = {y.part[0][h], y.part[0][h + 2]};
        if constexpr (HIGH) {
            const unsigned lost[2] = {y.part[1][h], y.part[1][h + 2]};
            if constexpr (EXACT) gpu::mma(c.at[h], x.part[1], lost);
            gpu::mma(c.at[h], x.part[1], right);
            gpu::mma(c.at[h], x.part[0], lost);
        }
        gpu::mma(c.at[h], x.part[0], right);
    }
}

template <bool HIGH>
__device__ __forceinline__ Block<HIGH> rounded(const Sums& c) {
    Block<HIGH> to;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const Pair<HIGH> pair(c.at[i / 2][i % 2 * 2], c.at[i / 2][i % 2 * 2 + 1]);
#pragma unroll
        for (int p = 0; p <= HIGH; p++) to.part[p][i] = pair.part[p];
    }
    return to;
}

// A matrix of pairs in shared memory. The 16-byte pieces of a row are exchanged, so that what a warp reads at once lies
// in different banks.
template <bool HIGH, int ROWS, int WIDTH>
struct Matrix {
    static constexpr int COUNT = ROWS * WIDTH, BYTES = COUNT * 2 * (HIGH ? 2 : 1);
    bf16* data;
    int lane;

    __device__ __forceinline__ Matrix(char*& free, int lane) : data(reinterpret_cast<bf16*>(free)), lane(lane) {
        free += BYTES;
    }
    static __device__ __forceinline__ int place(int row, int column) {
        return row * WIDTH + (column ^ row / (64 / WIDTH) % (WIDTH / 8) * 8);
    }
    __device__ __forceinline__ Pair<HIGH> get(int row, int column) const {
        Pair<HIGH> pair;
#pragma unroll
        for (int p = 0; p <= HIGH; p++) memcpy(&pair.part[p], data + p * COUNT + place(row, column), 4);
        return pair;
    }
    __device__ __forceinline__ void put(int row, int column, const Pair<HIGH>& pair) const {
#pragma unroll
        for (int p = 0; p <= HIGH; p++) memcpy(data + p * COUNT + place(row, column), &pair.part[p], 4);
    }
    // The block at (row, column), or its transpose.
    template <bool TRANSPOSED = false>
    __device__ __forceinline__ Block<HIGH> block(int row, int column) const {
        const int low = lane / 8 % 2 * 8, high = lane / 16 * 8;
        const int at = place(row + lane % 8 + (TRANSPOSED ? high : low), column + (TRANSPOSED ? low : high));
        Block<HIGH> to;
#pragma unroll
        for (int p = 0; p <= HIGH; p++) gpu::load_matrices<TRANSPOSED>(to.part[p], data + p * COUNT + at);
        return to;
    }
    __device__ __forceinline__ Block<HIGH> transposed(int row, int column) const { return block<true>(row, column); }
    __device__ __forceinline__ void put(int row, int column, const Block<HIGH>& from) const {
        const int g = lane / 4, q = lane % 4;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            Pair<HIGH> pair;
#pragma unroll
            for (int p = 0; p <= HIGH; p++) pair.part[p] = from.part[p][i];
            put(row + g + i % 2 * 8, column + q * 2 + i / 2 * 8, pair);
        }
    }
};

}  // namespace
