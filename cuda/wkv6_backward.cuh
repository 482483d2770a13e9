// WKV-6 on a GPU, backward, on tensor cores.
#pragma once

#include "wkv6_tiles.cuh"

namespace {

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

}  // namespace
