// WKV-6 on a GPU, forward, on tensor cores.
#pragma once

#include "wkv6_tiles.cuh"

namespace {

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

}  // namespace
