// WKV-7 on the CPU. Per sequence and head, with a state S of N values by N keys and the decay w = exp(-exp(raw w)):
//
//     sa_t = S_{t-1} a_t        S_t = S_{t-1} diag(w_t) + sa_t b_t^T + v_t k_t^T        y_t = S_t r_t
//
// Two kinds of loop do all of it. read_keys walks a matrix (keys, values in lanes) through time, forwards for y and sa,
// backwards for their gradients; what it reads at one step enters the next, so all of the matrix takes part in every
// step and is passed over once, in the nearest cache. read_values, for the other gradients, knows sa beforehand: a
// block of a matrix (values, keys in lanes) stays in registers while it walks through a tile of time.
//
// Layout: r, w, k, v, a, b, y (rows, H, N) with the sequences one after another in the rows; states (S, H, N, N).
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "simd.h"
#include "tiles.h"

namespace {

using simd::Scratch;
using simd::vecf;
using tiles::Direction;
using tiles::dot;
using tiles::LANES;
using tiles::pack;
using tiles::pack_decay;
using tiles::Sequences;
using tiles::sized;
using tiles::transpose;
using tiles::unpack;

constexpr int64_t TILE = 32;     // steps in a tile of the backward pass, whose every state is kept near
constexpr float DEAD = -104.0f;  // log decay below which the decay is 0 in fp32
constexpr int BLOCK = simd::REGISTERS / 2;  // vectors of a matrix that stay in registers; the rest are operands

inline int64_t step_at(int64_t step, int64_t steps, Direction direction) {
    return direction == Direction::forwards ? step : steps - 1 - step;
}

// At every step, with all operands rows of packed tiles:
//
//     A <- diag(w) A + p carried^T + q x^T        out = A^T m        carried = A^T c
//
// `carried` (n) is what the step before read. `kept` (may be null) receives each carried row as it is read. Without
// `out`, m is not read.
template <int COLS, bool OUT>
inline __attribute__((always_inline)) void read_keys_block(int n, int64_t steps, Direction direction, const float* w,
                                                           const float* p, const float* q, const float* x,
                                                           const float* m, const float* c, float* out, float* carried,
                                                           float* kept, float* matrix) {
    vecf before[COLS];
    for (int i = 0; i < COLS; i++) before[i] = simd::load(carried + i * LANES);
    for (int64_t step = 0; step < steps; step++) {
        const int64_t t = step_at(step, steps, direction) * n;
        vecf x_t[COLS], read[COLS], next[COLS];
        for (int i = 0; i < COLS; i++) {
            x_t[i] = simd::load(x + t + i * LANES);
            read[i] = next[i] = vecf{};
        }
        for (int key = 0; key < n; key++) {
            const float w_t = w[t + key], p_t = p[t + key], q_t = q[t + key], c_t = c[t + key];
            const float m_t = OUT ? m[t + key] : 0;
            float* row = matrix + key * n;
            for (int i = 0; i < COLS; i++) {
                const vecf a = w_t * simd::load(row + i * LANES) + (p_t * before[i] + q_t * x_t[i]);
                simd::store(row + i * LANES, a);
                if (OUT) read[i] += m_t * a;
                next[i] += c_t * a;
            }
        }
        for (int i = 0; i < COLS; i++) {
            if (OUT) simd::store(out + t + i * LANES, read[i]);
            if (kept) simd::store(kept + t + i * LANES, next[i]);
            before[i] = next[i];
        }
    }
    for (int i = 0; i < COLS; i++) simd::store(carried + i * LANES, before[i]);
}

// N fixed at compile time for the usual head sizes; N = 0 takes any multiple of 16 at run time.
template <int N, bool OUT>
void read_keys(int n_runtime, int64_t steps, Direction direction, const float* w, const float* p, const float* q,
               const float* x, const float* m, const float* c, float* out, float* carried, float* kept,
               float* matrix) {
    const int n = N ? N : n_runtime;
    constexpr int COLS = tiles::columns(N, simd::REGISTERS / 8);
    for (int i = 0; i < n; i += COLS * LANES)
        read_keys_block<COLS, OUT>(n, steps, direction, w, p, q, x + i, m, c, OUT ? out + i : nullptr, carried + i,
                                   kept ? kept + i : nullptr, matrix + i);
}

// A tile of one head, (steps, n) each: what the backward pass knows of it and the gradients it adds to.
struct Tile {
    const float *r, *w, *k, *v, *a, *b, *dy, *sa, *dsa;
    float *dr, *dw, *dk, *da, *db;
};

// All steps of a tile forwards with S and then backwards with G = dL/dS, from S before the tile and G after it to G
// before it, reading the gradients of everything that lies along the keys; see backward. Of S, each step is kept.
template <int ROWS, int COLS>
inline __attribute__((always_inline)) void read_values_block(int n, int64_t steps, const Tile& tile, int row,
                                                             int column, const float* S_start, float* G,
                                                             vecf* history) {
    vecf m[ROWS][COLS];
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < COLS; j++) m[i][j] = simd::load(S_start + i * n + j * LANES);
    for (int64_t step = 0; step < steps; step++) {
        const int64_t values = step * n + row, keys = step * n + column;
        const float *v = tile.v + values, *sa = tile.sa + values, *dy = tile.dy + values, *dsa = tile.dsa + values;
        vecf* kept = history + step * ROWS * COLS;
        for (int j = 0; j < COLS; j++) {
            const int64_t at = keys + j * LANES;
            const vecf w = simd::load(tile.w + at), k = simd::load(tile.k + at), b = simd::load(tile.b + at);
            vecf da = simd::load(tile.da + at), dr = simd::load(tile.dr + at);
            for (int i = 0; i < ROWS; i++) {
                kept[i * COLS + j] = m[i][j];
                da += dsa[i] * m[i][j];
                m[i][j] = w * m[i][j] + (sa[i] * b + v[i] * k);
                dr += dy[i] * m[i][j];
            }
            simd::store(tile.da + at, da);
            simd::store(tile.dr + at, dr);
        }
    }
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < COLS; j++) m[i][j] = simd::load(G + i * n + j * LANES);
    for (int64_t step = steps - 1; step >= 0; step--) {
        const int64_t values = step * n + row, keys = step * n + column;
        const float *v = tile.v + values, *sa = tile.sa + values, *dy = tile.dy + values, *dsa = tile.dsa + values;
        const vecf* kept = history + step * ROWS * COLS;
        for (int j = 0; j < COLS; j++) {
            const int64_t at = keys + j * LANES;
            const vecf w = simd::load(tile.w + at), r = simd::load(tile.r + at), a = simd::load(tile.a + at);
            vecf dk = simd::load(tile.dk + at), db = simd::load(tile.db + at), dw = simd::load(tile.dw + at);
            for (int i = 0; i < ROWS; i++) {
                m[i][j] += dy[i] * r;
                dk += v[i] * m[i][j];
                db += sa[i] * m[i][j];
                dw += m[i][j] * kept[i * COLS + j];
                m[i][j] = w * m[i][j] + dsa[i] * a;
            }
            simd::store(tile.dk + at, dk);
            simd::store(tile.db + at, db);
            simd::store(tile.dw + at, dw);
        }
    }
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < COLS; j++) simd::store(G + i * n + j * LANES, m[i][j]);
}

template <int N>
void read_values(int n_runtime, int64_t steps, const Tile& tile, const float* S_start, float* G, vecf* history) {
    const int n = N ? N : n_runtime;
    constexpr int COLS = tiles::columns(N, 2), ROWS = BLOCK / COLS;
    for (int column = 0; column < n; column += COLS * LANES)
        for (int row = 0; row < n; row += ROWS)
            read_values_block<ROWS, COLS>(n, steps, tile, row, column, S_start + row * n + column, G + row * n + column,
                                          history);
}

// out = A^T x for A (n, n) with the result in lanes.
void multiply(int n, const float* matrix, const float* x, float* out) {
    std::fill(out, out + n, 0.0f);
    for (int i = 0; i < n; i++)
        for (int j = 0; j < n; j += LANES)
            simd::store(out + j, simd::load(out + j) + x[i] * simd::load(matrix + i * n + j));
}

// The rows one later than those of a tile; past the last one stand zeros, or a decay of 1.
template <typename T>
void pack_next(int64_t steps, bool last, int n, int64_t stride, const T* from, float* to) {
    pack(steps - last, n, stride, from + stride, to);
    if (last) std::fill(to + (steps - 1) * n, to + steps * n, 0.0f);
}

template <typename T>
void pack_next_decay(int64_t steps, bool last, int n, int64_t stride, const T* raw, float* decay) {
    pack_decay(steps - last, n, stride, raw + stride, nullptr, decay);
    if (last) std::fill(decay + (steps - 1) * n, decay + steps * n, 1.0f);
}

// T: what the rows are in memory, float or simd::bf16; states are fp32.
template <typename T>
struct Inputs {
    const T *r, *w, *k, *v, *a, *b;
    const float* state;
};

// One step by itself, from state to next (n, n) as they lie in memory: y = S' r is read off the old state, as
// S (w r) + sa (b r) + v (k r), together with sa = S a. `at` is where the step's rows begin. `scratch` holds
// (4 LANES + 9) n floats.
template <typename T>
void single_step(int n, const Inputs<T>& in, int64_t at, const float* state, float* scratch, T* y, float* next) {
    float *w = scratch, *wr = w + n, *sa = wr + n, *read = sa + n;
    float *r = read + n, *k = r + n, *v = k + n, *a = v + n, *b = a + n;
    float *lanes = b + n, *sums = lanes + 2 * n * LANES;  // of the rows for sa, then for `read`
    pack_decay(1, n, 0, in.w + at, nullptr, w);
    pack(1, n, 0, in.r + at, r);
    pack(1, n, 0, in.k + at, k);
    pack(1, n, 0, in.v + at, v);
    pack(1, n, 0, in.a + at, a);
    pack(1, n, 0, in.b + at, b);
    for (int j = 0; j < n; j += LANES) simd::store(wr + j, simd::load(w + j) * simd::load(r + j));
    for (int i = 0; i < n; i++) {
        vecf of_a = {}, of_wr = {};
        for (int j = 0; j < n; j += LANES) {
            const vecf row = simd::load(state + i * n + j);
            of_a += row * simd::load(a + j);
            of_wr += row * simd::load(wr + j);
        }
        simd::store(lanes + i * LANES, of_a);
        simd::store(lanes + (n + i) * LANES, of_wr);
    }
    transpose(2 * n, LANES, lanes, sums);  // so that a vector of rows is added up at a time
    for (int i = 0; i < 2 * n; i += LANES) {
        vecf total = {};
        for (int lane = 0; lane < LANES; lane++) total += simd::load(sums + lane * 2 * n + i);
        simd::store(sa + i, total);
    }
    const float br = dot(n, b, r), kr = dot(n, k, r);
    for (int i = 0; i < n; i++) {
        y[at + i] = T(read[i] + sa[i] * br + v[i] * kr);
        for (int j = 0; j < n; j += LANES)
            simd::store(next + i * n + j, simd::load(w + j) * simd::load(state + i * n + j) +
                                              (sa[i] * simd::load(b + j) + v[i] * simd::load(k + j)));
    }
}

template <int N, typename T>
void forward(const Sequences& seqs, int64_t heads, int n_runtime, const Inputs<T>& in, T* y, float* final_state) {
    const int n = N ? N : n_runtime;
    const int64_t stride = heads * n, tile = std::min(tiles::TILE, seqs.longest());
#pragma omp parallel if (seqs.rows() * stride * n > tiles::PARALLEL_WORK)
    {
        Scratch<float> scratch(std::max<int64_t>(7 * tile * n + n + n * n, (4 * LANES + 9) * n));
        float *r = scratch.data(), *w = r + tile * n, *k = w + tile * n, *v = k + tile * n, *a = v + tile * n;
        float *b = a + tile * n, *out = b + tile * n, *sa = out + tile * n, *state = sa + n;
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < seqs.count * heads; item++) {
            const int64_t sequence = item / heads, head = item % heads;
            const int64_t begin = seqs.begin(sequence), end = seqs.end(sequence);
            if (end - begin == 1) {
                const int64_t at = begin * stride + head * n;
                single_step(n, in, at, in.state + item * n * n, scratch.data(), y, final_state + item * n * n);
                continue;
            }
            transpose(n, n, in.state + item * n * n, state);
            pack(1, n, 0, in.a + begin * stride + head * n, a);
            multiply(n, state, a, sa);
            for (int64_t t0 = begin; t0 < end; t0 += tile) {
                const int64_t steps = std::min(tile, end - t0), at = t0 * stride + head * n;
                pack(steps, n, stride, in.r + at, r);
                pack(steps, n, stride, in.k + at, k);
                pack(steps, n, stride, in.v + at, v);
                pack(steps, n, stride, in.b + at, b);
                pack_next(steps, t0 + steps == end, n, stride, in.a + at, a);
                pack_decay(steps, n, stride, in.w + at, nullptr, w);
                read_keys<N, true>(n, steps, Direction::forwards, w, b, k, v, r, a, out, sa, nullptr, state);
                unpack(steps, n, stride, out, y + at);
            }
            transpose(n, n, state, final_state + item * n * n);
        }
    }
}

template <typename T>
struct Gradients {
    T *r, *w, *k, *v, *a, *b;
    float* state;
};

// With G_t = dL/dS_t, the gradients of what is read and written at a step are
//
//     G_t = G_{t+1} diag(w_{t+1}) + dsa_{t+1} a_{t+1}^T + dy_t r_t^T
//     dv_t = G_t k_t         dsa_t = G_t b_t        dw_t = colsum(G_t S_{t-1}), the product taken per element
//     dr_t = S_t^T dy_t      da_t = S_{t-1}^T dsa_t        dk_t = G_t^T v_t        db_t = G_t^T sa_t
//
// First G walks backwards for dv and dsa; then S forwards for sa, leaving S at the start of every tile; then each tile,
// the last one first, is walked forwards from there with S and backwards with G for everything else. Nothing divides by
// a decay to find an earlier state from a later one.
template <int N, typename T>
void backward(const Sequences& seqs, int64_t heads, int n_runtime, const Inputs<T>& in, const T* dy,
              const float* dfinal, const Gradients<T>& grad) {
    const int n = N ? N : n_runtime;
    const int64_t stride = heads * n, longest = seqs.longest(), tile = std::min(TILE, longest);
    const int64_t most_tiles = (longest + tile - 1) / tile, area = tile * n;
#pragma omp parallel if (seqs.rows() * stride * n > tiles::PARALLEL_WORK)
    {
        Scratch<float> whole((2 * longest + 1) * n + most_tiles * n * n);  // of a whole sequence
        float *dsa = whole.data(), *sa = dsa + longest * n, *starts = sa + (longest + 1) * n;
        Scratch<float> scratch(13 * area + 2 * n * n + n);
        float *r = scratch.data(), *w = r + area, *k = w + area, *v = k + area, *a = v + area, *b = a + area;
        float *dout = b + area, *g = dout + area, *sums = g + area;
        float *matrix = sums + 5 * area, *S_start = matrix + n * n, *carried = S_start + n * n;
        Scratch<vecf> history(tile * BLOCK);
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < seqs.count * heads; item++) {
            const int64_t sequence = item / heads, head = item % heads;
            const int64_t begin = seqs.begin(sequence), end = seqs.end(sequence);
            const int64_t tiles_here = (end - begin + tile - 1) / tile;

            transpose(n, n, dfinal + item * n * n, matrix);
            std::fill(carried, carried + n, 0.0f);
            for (int64_t i = tiles_here - 1; i >= 0; i--) {
                const int64_t t0 = begin + i * tile, steps = std::min(tile, end - t0), at = t0 * stride + head * n;
                const bool last = t0 + steps == end;
                pack_next_decay(steps, last, n, stride, in.w + at, w);
                pack_next(steps, last, n, stride, in.a + at, a);
                pack(steps, n, stride, in.r + at, r);
                pack(steps, n, stride, dy + at, dout);
                pack(steps, n, stride, in.k + at, k);
                pack(steps, n, stride, in.b + at, b);
                read_keys<N, true>(n, steps, Direction::backwards, w, a, r, dout, k, b, sums, carried, dsa + i * area,
                                   matrix);
                unpack(steps, n, stride, sums, grad.v + at);
            }

            transpose(n, n, in.state + item * n * n, matrix);
            pack(1, n, 0, in.a + begin * stride + head * n, a);
            multiply(n, matrix, a, sa);
            std::memcpy(carried, sa, n * sizeof(float));
            for (int64_t i = 0; i < tiles_here; i++) {
                const int64_t t0 = begin + i * tile, steps = std::min(tile, end - t0), at = t0 * stride + head * n;
                std::memcpy(starts + i * n * n, matrix, n * n * sizeof(float));
                pack_decay(steps, n, stride, in.w + at, nullptr, w);
                pack_next(steps, t0 + steps == end, n, stride, in.a + at, a);
                pack(steps, n, stride, in.b + at, b);
                pack(steps, n, stride, in.k + at, k);
                pack(steps, n, stride, in.v + at, v);
                read_keys<N, false>(n, steps, Direction::forwards, w, b, k, v, nullptr, a, nullptr, carried,
                                    sa + i * area + n, matrix);
            }

            float* G = grad.state + item * n * n;
            std::memcpy(G, dfinal + item * n * n, n * n * sizeof(float));
            for (int64_t i = tiles_here - 1; i >= 0; i--) {
                const int64_t t0 = begin + i * tile, steps = std::min(tile, end - t0), at = t0 * stride + head * n;
                pack(steps, n, stride, in.r + at, r);
                pack_decay(steps, n, stride, in.w + at, g, w);
                pack(steps, n, stride, in.k + at, k);
                pack(steps, n, stride, in.v + at, v);
                pack(steps, n, stride, in.a + at, a);
                pack(steps, n, stride, in.b + at, b);
                pack(steps, n, stride, dy + at, dout);
                std::fill(sums, sums + 5 * area, 0.0f);
                float *dr = sums, *dw = dr + area, *dk = dw + area, *da = dk + area, *db = da + area;
                transpose(n, n, starts + i * n * n, S_start);
                const Tile all{r, w, k, v, a, b, dout, sa + i * area, dsa + i * area, dr, dw, dk, da, db};
                read_values<N>(n, steps, all, S_start, G, history.data());
                for (int64_t j = 0; j < steps * n; j += LANES) {  // to the raw w: d exp(g) / dw = g exp(g)
                    const vecf log_decay = simd::load(g + j), slope = log_decay * simd::load(w + j);
                    simd::store(dw + j, log_decay < DEAD ? vecf{} : simd::load(dw + j) * slope);  // infinity times 0
                }
                unpack(steps, n, stride, dr, grad.r + at);
                unpack(steps, n, stride, dw, grad.w + at);
                unpack(steps, n, stride, dk, grad.k + at);
                unpack(steps, n, stride, da, grad.a + at);
                unpack(steps, n, stride, db, grad.b + at);
            }
        }
    }
}

}  // namespace

// offsets: (sequences + 1) row numbers, or null when every sequence has `length` rows. head_size: a multiple of 16.
#define FORWARD(name, T)                                                                                          \
    EXPORT(name)(int64_t sequences, int64_t length, const int64_t* offsets, int64_t heads, int64_t head_size,     \
                 const T* r, const T* w, const T* k, const T* v, const T* a, const T* b, const float* state,      \
                 T* y, float* final_state) {                                                                      \
        const Sequences seqs{sequences, length, offsets};                                                         \
        const Inputs<T> in{r, w, k, v, a, b, state};                                                              \
        sized(head_size, [&](auto n) { forward<n>(seqs, heads, int(head_size), in, y, final_state); });           \
    }
FORWARD(visualrwkv_wkv7_forward, float)
FORWARD(visualrwkv_wkv7_forward_bf16, simd::bf16)

#define BACKWARD(name, T)                                                                                         \
    EXPORT(name)(int64_t sequences, int64_t length, const int64_t* offsets, int64_t heads, int64_t head_size,     \
                 const T* r, const T* w, const T* k, const T* v, const T* a, const T* b, const float* state,      \
                 const T* dy, const float* dfinal_state, T* dr, T* dw, T* dk, T* dv, T* da, T* db,                \
                 float* dstate) {                                                                                 \
        const Sequences seqs{sequences, length, offsets};                                                         \
        const Inputs<T> in{r, w, k, v, a, b, state};                                                              \
        const Gradients<T> grad{dr, dw, dk, dv, da, db, dstate};                                                  \
        sized(head_size, [&](auto n) { backward<n>(seqs, heads, int(head_size), in, dy, dfinal_state, grad); });  \
    }
BACKWARD(visualrwkv_wkv7_backward, float)
BACKWARD(visualrwkv_wkv7_backward_bf16, simd::bf16)
