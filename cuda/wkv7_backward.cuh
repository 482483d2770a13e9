// WKV-7 on a GPU in tiles: the gradients.
#pragma once

#include "wkv7_tiles.cuh"

namespace {

// With D the gradient of the state, d its share of s (D_16 e^(c_15 - ref)), and the products of steps masked as before:
//
//     dsa = B d^T + rb^T dY            dz = inverse(1 - ab)^T dsa        dV = K d^T + rk^T dY + ak^T dz
//     drk = dY V^T    drb = dY sa^T    dak = dz V^T    dab = dz sa^T     D_0 = (d + dY^T R + dz^T A) e^ref
//     dR = dY s + drk K + drb B        dK = V d + drk^T R + dak^T A
//     dA = dz s + dak K + dab B        dB = sa d + drb^T R + dab^T A
//
// and dr, da, dk, db by the factors of R, A, K, B. The log decay's gradient is a sum over all that crosses step t: of
// earlier k, b, and the state, into later r, a, and the state. Per key, with [x] the sum over the values:
//
//     dg_t = [d s] + sum_all (K (V d) + B (sa d)) + sum_{u >= t} (R dR - K dK - B dB + A dA)_u - (A dA)_t
//
// What crosses no step cancels in it, exactly but for fp32 sums, as each product takes the same rounded operands on
// both sides; so dg keeps its relative precision where the decay is strong.
//
// Chunks are taken in reverse. In each, a warp per 16 values goes back over the tiles with D. The helpers meanwhile
// find the states at the start of the tiles, then follow one tile behind with the gradients with respect to keys, 16
// keys each.
template <bool HIGH, int VALUES>
struct Backward {
    static constexpr int TILES = CHUNK / TILE;
    typedef Operands<HIGH, TILES, VALUES> Of;
    static constexpr int BYTES = Of::BYTES + 2 * Matrix<HIGH, CHUNK, VALUES>::BYTES +
                                 (TILES + 1) * Matrix<HIGH, VALUES, SIZE>::BYTES +
                                 Matrix<HIGH, VALUES, 2 * TILE>::BYTES + Matrix<HIGH, 4 * TILE, TILE>::BYTES;
    enum Kind { DRK, DRB, DAK, DAB };
    char* at;  // the free memory, while the others take theirs
    Of on;
    Matrix<HIGH, CHUNK, VALUES> dy;
    Matrix<HIGH, VALUES, CHUNK> sa;             // values as rows
    Matrix<HIGH, TILES * VALUES, SIZE> states;  // s of each tile
    Matrix<HIGH, VALUES, SIZE> d;
    Matrix<HIGH, VALUES, 2 * TILE> dz;      // values as rows; of even tiles and of odd ones
    Matrix<HIGH, 4 * TILE, TILE> dsteps;  // by kind

    __device__ __forceinline__ Backward(char* memory, int lane)
        : at(memory + Of::BYTES),
          on(memory, lane),
          dy(at, lane),
          sa(at, lane),
          states(at, lane),
          d(at, lane),
          dz(at, lane),
          dsteps(at, lane) {}

    __device__ __forceinline__ Block<HIGH> dz_rows(int tile, int value) const {  // steps as rows
        return dz.transposed(value, tile % 2 * TILE);
    }

    // One of the four gradients of products of steps.
    __device__ __forceinline__ void differentiate_steps(int tile, int kind) const {
        Sums c = {};
#pragma unroll
        for (int value = 0; value < VALUES; value += TILE) {
            const Block<HIGH> x = kind < DAK ? dy.block(tile * TILE, value) : dz_rows(tile, value);
            const Block<HIGH> y = kind % 2 == 0 ? on.v.block(tile * TILE, value) : sa.transposed(value, tile * TILE);
            multiply(c, x, y);
        }
        keep_lower(c, kind < DAK);
        dsteps.put(kind * TILE, 0, rounded<HIGH>(c));
    }

    // The gradients of r, w, k, a, b of a tile whose first step is t0, for the keys from `key` on.
    template <typename T>
    __device__ __forceinline__ void keys(const T* raw_w, const Gradients& grad, int64_t part, const Rows& rows, int t0,
                                         int tile, int key) const {
        const int lane = new_lane(), g = lane / 4, q = lane % 4, row = tile * TILE;
        Sums dr = {}, da = {}, dk = {}, db = {};
        float inner[2] = {0.0f, 0.0f};  // [d s] of key + g, and 8 later
#pragma unroll 1
        for (int value = 0; value < VALUES; value += TILE) {
            const Block<HIGH> s = states.transposed(tile * VALUES + value, key), d_keys = d.transposed(value, key);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                Pair<HIGH> x, y;
#pragma unroll
                for (int p = 0; p <= HIGH; p++) {
                    x.part[p] = s.part[p][i];
                    y.part[p] = d_keys.part[p][i];
                }
                inner[i % 2] += x.first() * y.first() + x.second() * y.second();
            }
            multiply(dr, dy.block(row, value), s);
            multiply(da, dz_rows(tile, value), s);
            multiply(dk, on.v.block(row, value), d_keys);
            multiply(db, sa.transposed(value, row), d_keys);
        }
        float total[2][2];  // of columns 8 h + 2 q + e
#pragma unroll
        for (int h = 0; h < 2; h++) {
            inner[h] += __shfl_xor_sync(gpu::ALL_LANES, inner[h], 1);
            inner[h] += __shfl_xor_sync(gpu::ALL_LANES, inner[h], 2);
            const int column = key + h * 8 + q * 2;
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float sum = 0;
#pragma unroll
                for (int low = 0; low < 2; low++) {
                    const Pair<HIGH> k = on.k.get(row + g + low * 8, column), b = on.b.get(row + g + low * 8, column);
                    sum += (e ? k.second() : k.first()) * dk.at[h][low * 2 + e];
                    sum += (e ? b.second() : b.first()) * db.at[h][low * 2 + e];
                }
#pragma unroll
                for (int mask = 4; mask < WARP; mask *= 2) sum += __shfl_xor_sync(gpu::ALL_LANES, sum, mask);
                total[h][e] = sum + __shfl_sync(gpu::ALL_LANES, inner[h], (q * 2 + e) * 4);
            }
        }
        const auto take = [&](Sums& x, Sums& y, Kind of_x, Kind of_y, const auto& from, bool back) {
            const Block<HIGH> keys = from.transposed(row, key);
            multiply<true>(x, back ? dsteps.transposed(of_x * TILE, 0) : dsteps.block(of_x * TILE, 0), keys);
            multiply<true>(y, back ? dsteps.transposed(of_y * TILE, 0) : dsteps.block(of_y * TILE, 0), keys);
        };
        take(dr, da, DRK, DAK, on.k, false);
        take(dr, da, DRB, DAB, on.b, false);
        take(dk, db, DRK, DRB, on.r, true);
        take(dk, db, DAK, DAB, on.a, true);

#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int column = key + h * 8 + q * 2;
            Words<T, 2> w[2];
            Pair<HIGH> r[2], k[2], a[2], b[2];
            float dw[2][2];
#pragma unroll
            for (int low = 0; low < 2; low++) {
                const int t = t0 + g + low * 8;
                w[low] = load_or_zeros<T, 2>(raw_w, rows.at(t) + column, t < rows.length);
                r[low] = on.r.get(row + g + low * 8, column);
                k[low] = on.k.get(row + g + low * 8, column);
                a[low] = on.a.get(row + g + low * 8, column);
                b[low] = on.b.get(row + g + low * 8, column);
            }
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float log_decay[2], c[2], crossing[2], own[2];
#pragma unroll
                for (int low = 0; low < 2; low++) {
                    const int i = low * 2 + e;
                    const auto of = [&](const Pair<HIGH>& x) { return e ? x.second() : x.first(); };
                    log_decay[low] = -__expf(w[low].at(e));
                    if (t0 + g + low * 8 >= rows.length) log_decay[low] = 0.0f;
                    c[low] = log_decay[low] < LEAST ? LEAST : log_decay[low];
                    own[low] = of(a[low]) * da.at[h][i];
                    crossing[low] = of(r[low]) * dr.at[h][i] - of(k[low]) * dk.at[h][i];
                    crossing[low] += own[low] - of(b[low]) * db.at[h][i];
                }
                const float clamped[2] = {c[0], c[1]};
#pragma unroll
                for (int delta = 4; delta < WARP; delta *= 2) {
#pragma unroll
                    for (int low = 0; low < 2; low++) {
                        const float earlier = __shfl_up_sync(gpu::ALL_LANES, c[low], delta);
                        const float later = __shfl_down_sync(gpu::ALL_LANES, crossing[low], delta);
                        if (lane >= delta) c[low] += earlier;
                        if (lane + delta < WARP) crossing[low] += later;
                    }
                }
                const float ref = __shfl_sync(gpu::ALL_LANES, c[0], 28 + q);
                crossing[0] += __shfl_sync(gpu::ALL_LANES, crossing[1], q);
                c[0] -= ref;
#pragma unroll
                for (int low = 0; low < 2; low++) {
                    const int i = low * 2 + e;
                    const float decay = __expf(c[low]), growth = __fdividef(1.0f, decay);
                    const float dg = total[h][e] + crossing[low] - own[low], x = log_decay[low];
                    dw[low][e] = x < DEAD ? 0.0f : dg * x * (x < LEAST ? __expf(x - LEAST) : 1.0f);
                    dr.at[h][i] *= decay;
                    da.at[h][i] *= __expf(c[low] - clamped[low]);
                    dk.at[h][i] *= growth;
                    db.at[h][i] *= growth;
                }
            }
#pragma unroll
            for (int low = 0; low < 2; low++) {
                const int t = t0 + g + low * 8;
                const int64_t at = rows.at(t) + column;
                if (t >= rows.length) continue;
                const auto put = [&](void* to, float x, float y) {
                    if (grad.splits > 1) {
                        gpu::store(reinterpret_cast<Pack<float, 2>*>(static_cast<float*>(to) + part + at),
                                   Pack<float, 2>{x, y});
                    } else {
                        gpu::store(reinterpret_cast<Pack<T, 2>*>(static_cast<T*>(to) + at),
                                   Pack<T, 2>{gpu::from_float<T>(x), gpu::from_float<T>(y)});
                    }
                };
                put(grad.r, dr.at[h][low * 2], dr.at[h][low * 2 + 1]);
                put(grad.w, dw[low][0], dw[low][1]);
                put(grad.k, dk.at[h][low * 2], dk.at[h][low * 2 + 1]);
                put(grad.a, da.at[h][low * 2], da.at[h][low * 2 + 1]);
                put(grad.b, db.at[h][low * 2], db.at[h][low * 2 + 1]);
            }
        }
    }
};

// On a multiprocessor: as many as its shared memory takes, 228 KiB or less than 2 x 112.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200
constexpr int BACKWARD_BLOCKS = 2;
#else
constexpr int BACKWARD_BLOCKS = 1;
#endif

static_assert(Backward<false, SIZE>::BYTES == 112 * 1024 && Backward<true, SIZE>::BYTES == 222 * 1024,
              "visualrwkv/ops/wkv7.py knows them");

template <typename T, int VALUES>
__global__ void __launch_bounds__(HELPERS* WARP + VALUES * 2, sizeof(T) == 2 ? BACKWARD_BLOCKS : 1)
    tiled_backward(Sequences seqs, int64_t heads, Inputs<T> in, const float* states, const T* dy, const float* dfinal,
                   Gradients grad) {
    constexpr bool HIGH = sizeof(T) == 4;
    constexpr int WALKERS = VALUES / TILE, WARPS = WALKERS + HELPERS, THREADS = WARPS * WARP;
    typedef Backward<HIGH, VALUES> Shared;
    typedef typename Shared::Of Of;
    const int warp = threadIdx.x / WARP, helper = warp - WALKERS, values = blockIdx.y * VALUES, value = warp * TILE;
    const int64_t item = blockIdx.x, sequence = item / heads, head = item % heads;
    const Rows rows{(seqs.begin(sequence) * heads + head) * SIZE, static_cast<int>(heads * SIZE),
                    static_cast<int>(seqs.end(sequence) - seqs.begin(sequence))};
    const int64_t part = blockIdx.y * seqs.end(seqs.count - 1) * rows.stride;

    const int chunks = (rows.length + CHUNK - 1) / CHUNK;
    const auto tiles_of = [&](int chunk) {
        const int steps = rows.length - chunk * CHUNK;
        return steps < CHUNK ? (steps + TILE - 1) / TILE : Shared::TILES;
    };
    const auto prepare = [&](int chunk) {
        const Shared shared(gpu::shared_memory(), new_lane());
        const Of& on = shared.on;
        const int t0 = chunk * CHUNK;
        const int tiles = tiles_of(chunk);
#pragma unroll 1
        for (int i = warp; i < tiles * 4; i += WARPS) {
            Raw<T> raw;
            raw.load(in, rows, t0 + i / 4 * TILE, i % 4 * TILE);
            raw.prepare(on, rows, t0 + i / 4 * TILE, i / 4, i % 4 * TILE);
        }
        RawValues<T, CHUNK, VALUES, THREADS> x;
        x.load(in.v, rows, t0, values, threadIdx.x);
        x.put(on.v, threadIdx.x);
        x.load(dy, rows, t0, values, threadIdx.x);
        x.put(shared.dy, threadIdx.x);
        __syncthreads();
#pragma unroll 1
        for (int i = warp; i < tiles * 2; i += WARPS) multiply_steps(on, i / 2, i % 2);
        __syncthreads();
    };
    // Two roles, so that neither holds the other's registers; both come to the same number of barriers.
    if (helper >= 0) {
        const int key = helper * TILE;  // the first of its 16 keys, and while it walks, of its values
#pragma unroll 1
        for (int chunk = chunks - 1; chunk >= 0; chunk--) {
            prepare(chunk);
            const int tiles = tiles_of(chunk);
            if (helper < WALKERS) {
                State S;
                const int64_t slot = seqs.first_slot(sequence, CHUNK) + chunk;
                load_state(S, states + (slot * heads + head) * SIZE * SIZE, values + key);
#pragma unroll 1
                for (int tile = 0; tile < tiles; tile++) {
                    const Shared shared(gpu::shared_memory(), new_lane());
                    const auto keep = [&](int i, const auto& s) {
                        shared.states.put(tile * VALUES + key, i * TILE, s);
                    };
                    walk(S, shared.on, tile, key, keep, [&](const auto&, const auto& sa) {
                        shared.sa.put(key, tile * TILE, sa);
                    });
                }
            }
#pragma unroll 1
            for (int tile = tiles - 1; tile >= -1; tile--) {
                const Shared shared(gpu::shared_memory(), new_lane());
                if (tile + 1 < tiles) {
                    shared.keys(in.w, grad, part, rows, chunk * CHUNK + (tile + 1) * TILE, tile + 1, key);
                }
                __syncthreads();
                if (tile < 0) break;
                shared.differentiate_steps(tile, helper);
                __syncthreads();
            }
        }
        return;
    }
    State D;
    load_state(D, dfinal ? dfinal + item * SIZE * SIZE : nullptr, values + value);
#pragma unroll 1
    for (int chunk = chunks - 1; chunk >= 0; chunk--) {
        prepare(chunk);
        const int tiles = tiles_of(chunk);
#pragma unroll 1
        for (int tile = tiles - 1; tile >= 0; tile--) {
            const Shared shared(gpu::shared_memory(), new_lane());
            const Of& on = shared.on;
            const int row = tile * TILE;
            scale(D, on.leave + tile * SIZE);
            const Block<HIGH> dout = shared.dy.transposed(row, value);
            Sums dsa = {}, sums = {}, dv = {};
            multiply(dsa, dout, on.of_steps_transposed(tile, Of::RB));
#pragma unroll
            for (int i = 0; i < SIZE / TILE; i++) multiply(dsa, rounded<HIGH>(D[i]), on.b.block(row, i * TILE));
            multiply(sums, rounded<HIGH>(dsa), on.of_steps_transposed(tile, Of::INVERSE));
            const Block<HIGH> dz = rounded<HIGH>(sums);
            shared.dz.put(value, tile % 2 * TILE, dz);
            __syncthreads();
            multiply(dv, on.of_steps_transposed(tile, Of::RK), dout);
            multiply(dv, on.of_steps_transposed(tile, Of::AK), dz);
#pragma unroll
            for (int i = 0; i < SIZE / TILE; i++) {
                const Block<HIGH> d = rounded<HIGH>(D[i]);
                shared.d.put(value, i * TILE, d);
                multiply(dv, on.k.block(row, i * TILE), d);
                multiply(D[i], dout, on.r.transposed(row, i * TILE));
                multiply(D[i], dz, on.a.transposed(row, i * TILE));
            }
            store_rows(static_cast<T*>(grad.v), rows, chunk * CHUNK + row, values + value, dv);
            scale(D, on.enter + tile * SIZE);
            __syncthreads();
        }
        __syncthreads();  // the helpers end one tile later
    }
    store_state(D, grad.state + item * SIZE * SIZE, values + value);
}

}  // namespace
