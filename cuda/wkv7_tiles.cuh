// WKV-7 on a GPU in tiles of 16 steps, as products on tensor cores.
//
// In a tile of 16 steps let c_t be the log decay since its start, step t included, ref = c_7, and
//
//     R = r e^(c - ref)    A = a e^(c - g - ref)    K = k e^(ref - c)    B = b e^(ref - c)    s = S_0 diag(e^ref)
//
// with the steps as rows, so that a product of two rows holds the decay between their steps. With ab, ak the strictly
// lower part of A B^T, A K^T, and rb, rk the lower part, diagonal included, of R B^T, R K^T:
//
//     z = A s^T + ak V   sa = inverse(1 - ab) z   Y = R s^T + rb sa + rk V   S_16 = (s + sa^T B + V^T K) e^(c_15 - ref)
//
// Counting from the middle and letting no step decay by more than e^LEAST keeps every factor below e^72; what is masked
// may overflow, and is replaced. A decay that is smaller in truth is wrong by 1.3e-4 of the state at most; where all are
// that small, products of inputs may be as large as 1e7.
#pragma once

#include "wkv7_blocks.cuh"
#include "wkv7_inputs.cuh"

namespace {

constexpr int SIZE = 64;        // of a head
constexpr int HELPERS = 4;      // warps that prepare tiles, or take gradients with respect to keys
constexpr float LEAST = -9.0f;  // log decay of a step

// What the products of some tiles read: all that depends on no state.
template <bool HIGH, int TILES, int VALUES>
struct Operands {
    enum Kind { INVERSE, AK, RK, RB };  // of the products of steps
    static constexpr int BYTES = 4 * Matrix<HIGH, TILES * TILE, SIZE>::BYTES +
                                 Matrix<HIGH, TILES * TILE, VALUES>::BYTES +
                                 Matrix<HIGH, TILES * 4 * TILE, TILE>::BYTES + 2 * TILES * SIZE * sizeof(float);
    Matrix<HIGH, TILES * TILE, SIZE> r, k, a, b;
    Matrix<HIGH, TILES * TILE, VALUES> v;
    Matrix<HIGH, TILES * 4 * TILE, TILE> steps;  // block 4 tile + kind
    float *enter, *leave;                        // (TILES, SIZE): e^ref, e^(c_15 - ref)

    __device__ __forceinline__ Operands(char* at, int lane)
        : r(at, lane), k(at, lane), a(at, lane), b(at, lane), v(at, lane), steps(at, lane) {
        enter = reinterpret_cast<float*>(at);
        leave = enter + TILES * SIZE;
    }
    __device__ __forceinline__ Block<HIGH> of_steps(int tile, Kind kind) const {
        return steps.block((tile * 4 + kind) * TILE, 0);
    }
    __device__ __forceinline__ Block<HIGH> of_steps_transposed(int tile, Kind kind) const {
        return steps.transposed((tile * 4 + kind) * TILE, 0);
    }
};

// Where a sequence's head lies.
struct Rows {
    int64_t first;
    int stride, length;

    __device__ __forceinline__ int64_t at(int t) const { return first + static_cast<int64_t>(t) * stride; }
};

// COUNT values as whole registers, so that two bf16 wait in one.
template <typename T, int COUNT>
struct Words {
    Pack<unsigned, COUNT * sizeof(T) / 4> bits;

    __device__ __forceinline__ float at(int i) const {
        if constexpr (sizeof(T) == 4) return from_bits(bits.at[i]);
        return from_bits(i % 2 ? bits.at[i / 2] & 0xffff0000u : bits.at[i / 2] << 16);
    }
};

template <typename T, int COUNT>
__device__ __forceinline__ Words<T, COUNT> load_or_zeros(const T* from, int64_t at, bool real) {
    Words<T, COUNT> to = {};
    if (real) to.bits = gpu::load(reinterpret_cast<const decltype(to.bits)*>(from + at));
    return to;
}

// A warp's share of a tile: 16 channels. A thread has four steps, those of lane / 8, of two channels.
template <typename T>
struct Raw {
    Words<T, 2> r[4], w[4], k[4], a[4], b[4];

    __device__ __forceinline__ void load(const Inputs<T>& in, const Rows& rows, int t0, int channels) {
        const int lane = new_lane();
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int t = t0 + lane / 8 * 4 + i;
            const int64_t at = rows.at(t) + channels + lane % 8 * 2;
            const bool real = t < rows.length;
            r[i] = load_or_zeros<T, 2>(in.r, at, real);
            w[i] = load_or_zeros<T, 2>(in.w, at, real);
            k[i] = load_or_zeros<T, 2>(in.k, at, real);
            a[i] = load_or_zeros<T, 2>(in.a, at, real);
            b[i] = load_or_zeros<T, 2>(in.b, at, real);
        }
    }

    // R, K, A, B and the scales of the state.
    template <bool HIGH, int TILES, int VALUES>
    __device__ __forceinline__ void prepare(const Operands<HIGH, TILES, VALUES>& to, const Rows& rows, int t0, int tile,
                                            int channels) const {
        const int lane = new_lane(), column = channels + lane % 8 * 2;
        float c[4][2], before[2], ref[2], enter[2], leave[2];
#pragma unroll
        for (int e = 0; e < 2; e++) {
            float sum = 0;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float g = -__expf(w[i].at(e));
                if (t0 + lane / 8 * 4 + i < rows.length) sum += g < LEAST ? LEAST : g;
                c[i][e] = sum;
            }
            float whole = sum;
#pragma unroll
            for (int delta = 8; delta < WARP; delta *= 2) {
                const float other = __shfl_up_sync(gpu::ALL_LANES, whole, delta);
                if (lane >= delta) whole += other;
            }
            const float previous = __shfl_up_sync(gpu::ALL_LANES, whole, 8);
            ref[e] = __shfl_sync(gpu::ALL_LANES, whole, 8 + lane % 8);
            enter[e] = __expf(ref[e]);
            leave[e] = __expf(__shfl_sync(gpu::ALL_LANES, whole, 24 + lane % 8) - ref[e]);
            before[e] = (lane >= 8 ? previous : 0.0f) - ref[e];
        }
        float earlier[2] = {__expf(before[0]), __expf(before[1])};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = tile * TILE + lane / 8 * 4 + i;
            const float decay[2] = {__expf(before[0] + c[i][0]), __expf(before[1] + c[i][1])};
            const float growth[2] = {__fdividef(1.0f, decay[0]), __fdividef(1.0f, decay[1])};
            const auto put = [&](const auto& matrix, const Words<T, 2>& x, const float(&factor)[2]) {
                matrix.put(row, column, Pair<HIGH>(x.at(0) * factor[0], x.at(1) * factor[1]));
            };
            put(to.r, r[i], decay);
            put(to.k, k[i], growth);
            put(to.a, a[i], earlier);
            put(to.b, b[i], growth);
            earlier[0] = decay[0];
            earlier[1] = decay[1];
        }
        if (lane < 8) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                to.enter[tile * SIZE + column + e] = enter[e];
                to.leave[tile * SIZE + column + e] = leave[e];
            }
        }
    }
};

// Rows of values, read by some threads, four values at a time.
template <typename T, int ROWS, int VALUES, int THREADS>
struct RawValues {
    static constexpr int PIECES = ROWS * VALUES / 4, EACH = (PIECES + THREADS - 1) / THREADS;
    Words<T, 4> x[EACH];

    __device__ __forceinline__ void load(const T* from, const Rows& rows, int t0, int values, int thread) {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int piece = thread + i * THREADS, column = piece % (VALUES / 4) * 4;
            const int t = t0 + piece / (VALUES / 4);
            x[i] = load_or_zeros<T, 4>(from, rows.at(t) + values + column,
                                       t < rows.length && piece < PIECES);
        }
    }
    template <bool HIGH>
    __device__ __forceinline__ void put(const Matrix<HIGH, ROWS, VALUES>& to, int thread) const {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int piece = thread + i * THREADS, row = piece / (VALUES / 4), column = piece % (VALUES / 4) * 4;
            if (piece >= PIECES) break;
#pragma unroll
            for (int e = 0; e < 4; e += 2) {
                to.put(row, column + e, Pair<HIGH>(x[i].at(e), x[i].at(e + 1)));
            }
        }
    }
};

// Sums of products of steps where the column's step comes before the row's, `diagonal`: or is the same; elsewhere 0.
__device__ __forceinline__ void keep_lower(Sums& c, bool diagonal) {
    const int lane = new_lane();
#pragma unroll
    for (int h = 0; h < 2; h++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int row = lane / 4 + e / 2 * 8, column = h * 8 + lane % 4 * 2 + e % 2;
            if (column >= row + diagonal) c.at[h][e] = 0.0f;
        }
    }
}

template <bool HIGH, int TILES, int VALUES>
__device__ __forceinline__ Sums products(const Matrix<HIGH, TILES, VALUES>& x, const Matrix<HIGH, TILES, VALUES>& y,
                                         int tile, bool diagonal) {
    Sums c = {};
#pragma unroll 2
    for (int i = 0; i < SIZE; i += TILE) multiply(c, x.block(tile * TILE, i), y.block(tile * TILE, i));
    keep_lower(c, diagonal);
    return c;
}

// The products of a tile's steps, in two shares of about equal time: `share` 0 is the inverse.
template <bool HIGH, int TILES, int VALUES>
__device__ __forceinline__ void multiply_steps(const Operands<HIGH, TILES, VALUES>& on, int tile, int share) {
    typedef Operands<HIGH, TILES, VALUES> Of;
    const int first = tile * 4 * TILE;
    if (share == 0) {
        const Sums ab = products(on.a, on.b, tile, false);
        // Forward substitution; a lane has the column lane % 16 of the inverse.
        const int lane = new_lane(), column = lane % TILE;
        float inverse[TILE];
#pragma unroll
        for (int t = 0; t < TILE; t++) inverse[t] = t == column ? 1.0f : 0.0f;
#pragma unroll
        for (int s = 0; s < TILE - 1; s++) {
#pragma unroll
            for (int t = s + 1; t < TILE; t++) {
                const float x = ab.at[s / 8][t / 8 * 2 + s % 2];
                inverse[t] += __shfl_sync(gpu::ALL_LANES, x, t % 8 * 4 + s % 8 / 2) * inverse[s];
            }
        }
#pragma unroll
        for (int t = 0; t < TILE; t++) {  // even columns store, their neighbours' value with theirs
            const float next = __shfl_xor_sync(gpu::ALL_LANES, inverse[t], 1);
            if (lane < TILE && lane % 2 == 0) on.steps.put(first + t, column, Pair<HIGH>(inverse[t], next));
        }
    } else {
        on.steps.put(first + Of::AK * TILE, 0, rounded<HIGH>(products(on.a, on.k, tile, false)));
        on.steps.put(first + Of::RK * TILE, 0, rounded<HIGH>(products(on.r, on.k, tile, true)));
        on.steps.put(first + Of::RB * TILE, 0, rounded<HIGH>(products(on.r, on.b, tile, true)));
    }
}

// 16 rows of a state, as four blocks of keys in a warp.
typedef Sums State[SIZE / TILE];

__device__ __forceinline__ void scale(State& S, const float* factors) {
    const int q = new_lane() % 4;
#pragma unroll
    for (int i = 0; i < SIZE / TILE; i++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const float *f = factors + i * TILE + h * 8 + q * 2, x = f[0], y = f[1];
            S[i].at[h][0] *= x;
            S[i].at[h][1] *= y;
            S[i].at[h][2] *= x;
            S[i].at[h][3] *= y;
        }
    }
}

// Show `see` each pair of this lane's values, and its place in a (SIZE, SIZE) state whose rows from `row` on are these.
template <typename StateOf, typename See>
__device__ __forceinline__ void each_pair(StateOf& S, int row, See see) {
    const int lane = new_lane();
#pragma unroll
    for (int i = 0; i < SIZE / TILE; i++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
#pragma unroll
            for (int low = 0; low < 2; low++) {
                const int64_t place = (row + lane / 4 + low * 8) * SIZE + i * TILE + h * 8 + lane % 4 * 2;
                see(place, S[i].at[h][low * 2], S[i].at[h][low * 2 + 1]);
            }
        }
    }
}

__device__ __forceinline__ void load_state(State& S, const float* from, int row) {
    each_pair(S, row, [&](int64_t place, float& x, float& y) {
        const auto pair = load_or_zeros<float, 2>(from, place, from != nullptr);
        x = pair.at(0);
        y = pair.at(1);
    });
}

__device__ __forceinline__ void store_state(const State& S, float* to, int row) {
    each_pair(S, row, [&](int64_t place, float x, float y) {
        gpu::store(reinterpret_cast<Pack<float, 2>*>(to + place), Pack<float, 2>{x, y});
    });
}

// Carry S over a tile. On the way `see_state` is shown every block of s, `see` the values and sa, with values as rows.
template <bool HIGH, int TILES, int VALUES, typename SeeState, typename See>
__device__ __forceinline__ void walk(State& S, const Operands<HIGH, TILES, VALUES>& on, int tile, int value,
                                     SeeState see_state, See see) {
    typedef Operands<HIGH, TILES, VALUES> Of;
    scale(S, on.enter + tile * SIZE);
    const Block<HIGH> v = on.v.transposed(tile * TILE, value);
    Sums z = {}, sums = {};
    multiply(z, v, on.of_steps(tile, Of::AK));
#pragma unroll
    for (int i = 0; i < SIZE / TILE; i++) {
        const Block<HIGH> s = rounded<HIGH>(S[i]);
        multiply(z, s, on.a.block(tile * TILE, i * TILE));
        see_state(i, s);
    }
    multiply(sums, rounded<HIGH>(z), on.of_steps(tile, Of::INVERSE));
    const Block<HIGH> sa = rounded<HIGH>(sums);
    see(v, sa);
#pragma unroll
    for (int i = 0; i < SIZE / TILE; i++) {
        multiply(S[i], v, on.k.transposed(tile * TILE, i * TILE));
        multiply(S[i], sa, on.b.transposed(tile * TILE, i * TILE));
    }
    scale(S, on.leave + tile * SIZE);
}

template <typename T>
__device__ __forceinline__ void store_rows(T* to, const Rows& rows, int t0, int column, const Sums& x) {
    const int lane = new_lane();
#pragma unroll
    for (int low = 0; low < 2; low++) {
        const int t = t0 + lane / 4 + low * 8;
        if (t >= rows.length) continue;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            gpu::store(reinterpret_cast<Pack<T, 2>*>(to + rows.at(t) + column + h * 8 + lane % 4 * 2),
                       Pack<T, 2>{gpu::from_float<T>(x.at[h][low * 2]), gpu::from_float<T>(x.at[h][low * 2 + 1])});
        }
    }
}

}  // namespace
