// WKV-6 on a GPU: what a tile of 16 steps is prepared to, before its products. See wkv6.cu for the factors.
#pragma once

#include "wkv6_blocks.cuh"

namespace {

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

}  // namespace
