// WKV-7 on a GPU in tiles: y and the states.
#pragma once

#include "wkv7_tiles.cuh"

namespace {

// A block per sequence, head and share of the values. A warp for each 16 values walks, two tiles at a time, while the
// helpers prepare the next two and read those after.
constexpr int GROUP = 2;

template <bool HIGH, int VALUES>
constexpr int FORWARD_BYTES = 2 * Operands<HIGH, GROUP, VALUES>::BYTES;

template <typename T, int VALUES>
__global__ void __launch_bounds__(HELPERS* WARP + VALUES * 2, sizeof(T) == 2 ? 2 : 1)
    tiled_forward(Sequences seqs, int64_t heads, Inputs<T> in, const float* state, T* y, float* final_state,
                  float* states) {
    constexpr bool HIGH = sizeof(T) == 4;
    constexpr int WALKERS = VALUES / TILE, STEPS = GROUP * TILE;
    typedef Operands<HIGH, GROUP, VALUES> Of;
    const int warp = threadIdx.x / WARP, helper = warp - WALKERS, values = blockIdx.y * VALUES;
    const int64_t item = blockIdx.x, sequence = item / heads, head = item % heads;
    const Rows rows{(seqs.begin(sequence) * heads + head) * SIZE, static_cast<int>(heads * SIZE),
                    static_cast<int>(seqs.end(sequence) - seqs.begin(sequence))};
    const auto operands = [&](int group) { return Of(gpu::shared_memory() + (group & 1) * Of::BYTES, new_lane()); };
    const int groups = (rows.length + STEPS - 1) / STEPS;
    // Two roles, so that neither holds the other's registers; both come to the same number of barriers.
    if (helper >= 0) {
        const int thread = threadIdx.x - WALKERS * WARP;
        Raw<T> raw[GROUP];
        RawValues<T, STEPS, VALUES, HELPERS * WARP> v;
        const auto read = [&](int group, int i) { raw[i].load(in, rows, (group * GROUP + i) * TILE, helper * TILE); };
        read(0, 0);
        read(0, 1);
        v.load(in.v, rows, 0, values, thread);
#pragma unroll 1
        for (int group = 0; group <= groups; group++) {  // one ahead of the others
            const Of on = operands(group);
            v.put(on.v, thread);
#pragma unroll
            for (int i = 0; i < GROUP; i++) {
                raw[i].prepare(on, rows, (group * GROUP + i) * TILE, i, helper * TILE);
                __syncwarp();  // one after the other, in fewer registers
            }
            __syncthreads();
            read(group + 1, 0);
            multiply_steps(on, helper / 2, helper % 2);
            __syncwarp();  // all of the reading before it would take more registers than there are
            read(group + 1, 1);
            v.load(in.v, rows, (group + 1) * STEPS, values, thread);
            __syncthreads();
        }
        return;
    }
    State S;
    const int row = values + warp * TILE;
    load_state(S, state ? state + item * SIZE * SIZE : nullptr, row);
    __syncthreads();
    __syncthreads();
    for (int group = 0; group < groups; group++) {
        const Of on = operands(group);
#pragma unroll 1
        for (int i = 0; i < GROUP; i++) {
            const int t0 = (group * GROUP + i) * TILE;
            if (t0 < rows.length) {
                if (states && t0 % CHUNK == 0) {
                    const int64_t slot = seqs.first_slot(sequence, CHUNK) + t0 / CHUNK;
                    store_state(S, states + (slot * heads + head) * SIZE * SIZE, row);
                }
                Sums out = {};
                const auto read_state = [&](int k, const auto& s) { multiply(out, on.r.block(i * TILE, k * TILE), s); };
                walk(S, on, i, warp * TILE, read_state, [&](const auto& v, const auto& sa) {
                    multiply(out, on.of_steps(i, Of::RK), v);
                    multiply(out, on.of_steps(i, Of::RB), sa);
                    store_rows(y, rows, t0, row, out);
                });
            }
            __syncthreads();
        }
    }
    store_state(S, final_state + item * SIZE * SIZE, row);
}

}  // namespace
