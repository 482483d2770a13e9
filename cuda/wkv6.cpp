// WKV-6 on the CPU. Per sequence and head, with a state S of N keys by N values and the decay w = exp(-exp(raw w)):
//
//     y_t = r_t^T (S_{t-1} + diag(u) k_t v_t^T)        S_t = diag(w_t) S_{t-1} + k_t v_t^T
//
// Everything expensive here, forward and backward, is one kind of loop, the scan:
//
//     out_t += x_t^T A        A <- w_t A + p_t q_t^T
//
// whose matrix A has its decay either on the rows or on the columns (lanes). A block of A stays in registers while the
// scan walks a tile of time, so each element of A costs two multiply-adds per step and no memory traffic.
//
// Layout: r, k, v, w, y (rows, H, N) with the sequences one after another in the rows; u (H, N); states (S, H, N, N).
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
using tiles::TILE;
using tiles::transpose;
using tiles::unpack;

constexpr int BLOCK = simd::REGISTERS / 2;  // vectors of a matrix that stay in registers, the rest are operands
constexpr float DEAD = -17.0f;  // log decay below which d/dw = g e^g (...) is under fp32's resolution; see backward

enum class Decay { rows, lanes };

// Rows that the next tile will be packed from, and rows that this one's results go to. They lie too far apart for the
// machine to guess, so a scan, which has the memory to itself, asks for them while it computes: a line of each a step.
struct Ahead {
    const void *read[4], *written[4];  // one may stand there several times
    int64_t stride;                    // in bytes, and so `row`: of a head's part of a row
    int64_t row;

    // The line that block number `block` of a scan follows down the rows.
    const char* line(const void* const tensors[4], int block) const {
        constexpr int LINE = 64;
        return static_cast<const char*>(tensors[block * LINE / row % 4]) + block * LINE % row;
    }
};

// The scan over a packed tile of `steps` rows of n floats. ROWS x COLS vectors of `matrix` (n, n) stay in registers.
template <int ROWS, int COLS, Decay DECAY>
inline __attribute__((always_inline)) void scan_blocks(int n, int64_t steps, Direction direction, const float* x,
                                                       const float* w, const float* p, const float* q, float* out,
                                                       float* matrix, const Ahead& ahead) {
    int number = 0;
    for (int column = 0; column < n; column += COLS * LANES) {
        for (int row = 0; row < n; row += ROWS) {
            const char* next = ahead.line(ahead.read, number);
            const char* results = ahead.line(ahead.written, number++);
            float* block = matrix + row * n + column;
            vecf a[ROWS][COLS];
            for (int i = 0; i < ROWS; i++)
                for (int c = 0; c < COLS; c++) a[i][c] = simd::load(block + i * n + c * LANES);
            for (int64_t step = 0; step < steps; step++) {
                int64_t t = (direction == Direction::forwards ? step : steps - 1 - step) * n;
                const float *x_t = x + t + row, *p_t = p + t + row, *w_row = w + t + row;
                const float *q_t = q + t + column, *w_lane = w + t + column;
                float* out_t = out + t + column;
                __builtin_prefetch(next + step * ahead.stride);
                __builtin_prefetch(results + step * ahead.stride, 1);
                vecf y[COLS], q_c[COLS];
                for (int c = 0; c < COLS; c++) {
                    y[c] = simd::load(out_t + c * LANES);
                    q_c[c] = simd::load(q_t + c * LANES);
                }
                for (int i = 0; i < ROWS; i++) {
                    for (int c = 0; c < COLS; c++) {
                        vecf decay = DECAY == Decay::rows ? simd::splat(w_row[i]) : simd::load(w_lane + c * LANES);
                        y[c] += x_t[i] * a[i][c];
                        a[i][c] = decay * a[i][c] + p_t[i] * q_c[c];
                    }
                }
                for (int c = 0; c < COLS; c++) simd::store(out_t + c * LANES, y[c]);
            }
            for (int i = 0; i < ROWS; i++)
                for (int c = 0; c < COLS; c++) simd::store(block + i * n + c * LANES, a[i][c]);
        }
    }
}

// N fixed at compile time for the usual head sizes; N = 0 takes any multiple of 16 at run time.
template <int N, Decay DECAY>
void scan(int n, int64_t steps, Direction direction, const float* x, const float* w, const float* p, const float* q,
          float* out, float* matrix, const Ahead& ahead) {
    constexpr int COLS = tiles::columns(N, simd::REGISTERS / 8);
    constexpr int ROWS = BLOCK / COLS;
    scan_blocks<ROWS, COLS, DECAY>(N ? N : n, steps, direction, x, w, p, q, out, matrix, ahead);
}

float dot(int n, const float* a, const float* b, const float* c) {
    vecf s = {};
    for (int i = 0; i < n; i += LANES) s += simd::load(a + i) * simd::load(b + i) * simd::load(c + i);
    return simd::sum(s);
}

// T: what r, k, v, w, y and their gradients are in memory, float or simd::bf16; everything else is fp32.
template <typename T>
struct Inputs {
    const T *r, *k, *v, *w;
    const float *u, *state;
};

template <int N, typename T>
void forward(const Sequences& seqs, int64_t heads, int n_runtime, const Inputs<T>& in, T* y, float* final_state) {
    const int n = N ? N : n_runtime;
    const int64_t size = sizeof(T), stride = heads * n, tile = std::min(TILE, seqs.longest());
#pragma omp parallel if (seqs.rows() * stride * n > tiles::PARALLEL_WORK)
    {
        Scratch<float> scratch(5 * tile * n);
        float *r = scratch.data(), *k = r + tile * n, *v = k + tile * n, *w = v + tile * n, *out = w + tile * n;
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < seqs.count * heads; item++) {
            const int64_t sequence = item / heads, head = item % heads;
            const float* u = in.u + head * n;
            float* state = final_state + item * n * n;
            std::memcpy(state, in.state + item * n * n, n * n * sizeof(float));
            for (int64_t t0 = seqs.begin(sequence), end = seqs.end(sequence); t0 < end; t0 += tile) {
                const int64_t steps = std::min(tile, end - t0), at = t0 * stride + head * n;
                pack(steps, n, stride, in.r + at, r);
                pack(steps, n, stride, in.k + at, k);
                pack(steps, n, stride, in.v + at, v);
                pack_decay(steps, n, stride, in.w + at, nullptr, w);
                for (int64_t t = 0; t < steps; t++) {  // the current token reaches the output through u alone
                    const float ruk = dot(n, r + t * n, u, k + t * n);
                    for (int j = 0; j < n; j += LANES) simd::store(out + t * n + j, ruk * simd::load(v + t * n + j));
                }
                const int64_t next = t0 + tile < end ? at + tile * stride : at;
                const Ahead ahead{{in.r + next, in.k + next, in.v + next, in.w + next},
                                  {y + at, y + at, y + at, y + at},
                                  stride * size,
                                  n * size};
                scan<N, Decay::rows>(n, steps, Direction::forwards, r, w, k, v, out, state, ahead);
                unpack(steps, n, stride, out, y + at);
            }
        }
    }
}

template <typename T>
struct Gradients {
    T *r, *k, *v, *w;
    float *u, *state;  // u: partial sums (S, H, N), added up by the caller in a fixed order
};

// With G_t = dL/dS_t, primes marking the parts without u, and products of a vector and a vector taken per element:
//
//     dr'_t = S_{t-1} dy_t       dk'_t = G_t v_t       dv'_t = G_t^T k_t       G_{t-1} = diag(w_t) G_t + r_t dy_t^T
//
// are three scans. The gradient of the log decay g needs no scan of its own: with A_t = rowsum(G_t S_t),
//
//     dg_t = w_t rowsum(G_t S_{t-1}) = A_t - k_t dk'_t       A_{t-1} = dg_t + r_t dr'_t
//
// A is formed afresh from both matrices at the end of every tile, so rounding errors add up over TILE steps at most.
template <int N, typename T>
void backward(const Sequences& seqs, int64_t heads, int n_runtime, const Inputs<T>& in, const T* dy,
              const float* dfinal, const Gradients<T>& grad) {
    const int n = N ? N : n_runtime;
    const int64_t size = sizeof(T), stride = heads * n, tile = std::min(TILE, seqs.longest());
#pragma omp parallel if (seqs.rows() * stride * n > tiles::PARALLEL_WORK)
    {
        Scratch<float> scratch(7 * tile * n + 2 * n * n), checkpoints, whole;
        float *r = scratch.data(), *k = r + tile * n, *v = k + tile * n, *dout = v + tile * n;
        float *dk = dout + tile * n, *dv = dk + tile * n;
        float *A = dv + tile * n, *G_transposed = A + tile * n, *S_transposed = G_transposed + n * n;
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < seqs.count * heads; item++) {
            const int64_t sequence = item / heads, head = item % heads;
            const int64_t begin = seqs.begin(sequence), end = seqs.end(sequence);
            const int64_t tiles_here = (end - begin + tile - 1) / tile;
            const float* u = in.u + head * n;
            float* G = grad.state + item * n * n;
            float* du = grad.u + item * n;
            float* states = checkpoints.reserve(tiles_here * n * n);  // S^T at the end of each tile
            float* all_w = whole.reserve(3 * (end - begin) * n);      // the decay, its logarithm, dr': needed twice
            float *all_g = all_w + (end - begin) * n, *all_dr = all_g + (end - begin) * n;
            std::memcpy(G, dfinal + item * n * n, n * n * sizeof(float));
            std::fill(du, du + n, 0.0f);
            transpose(n, n, G, G_transposed);
            transpose(n, n, in.state + item * n * n, S_transposed);

            for (int64_t i = 0; i < tiles_here; i++) {
                const int64_t t0 = begin + i * tile, steps = std::min(tile, end - t0), at = t0 * stride + head * n;
                pack(steps, n, stride, in.k + at, k);
                pack(steps, n, stride, in.v + at, v);
                pack(steps, n, stride, dy + at, dout);
                float *w = all_w + (t0 - begin) * n, *dr = all_dr + (t0 - begin) * n;
                pack_decay(steps, n, stride, in.w + at, all_g + (t0 - begin) * n, w);
                std::fill(dr, dr + steps * n, 0.0f);
                const int64_t next = t0 + tile < end ? at + tile * stride : at;
                const T *next_k = in.k + next, *next_v = in.v + next, *next_dy = dy + next, *next_w = in.w + next;
                const Ahead ahead{
                    {next_k, next_v, next_dy, next_w}, {next_k, next_v, next_dy, next_w}, stride * size, n * size};
                scan<N, Decay::lanes>(n, steps, Direction::forwards, dout, w, v, k, dr, S_transposed, ahead);
                std::memcpy(states + i * n * n, S_transposed, n * n * sizeof(float));
            }

            for (int64_t i = tiles_here - 1; i >= 0; i--) {
                const int64_t t0 = begin + i * tile, steps = std::min(tile, end - t0), at = t0 * stride + head * n;
                pack(steps, n, stride, in.r + at, r);
                pack(steps, n, stride, in.k + at, k);
                pack(steps, n, stride, in.v + at, v);
                pack(steps, n, stride, dy + at, dout);
                const float* w = all_w + (t0 - begin) * n;
                float *g = all_g + (t0 - begin) * n, *dr = all_dr + (t0 - begin) * n;
                const float* S_end = states + i * n * n;
                for (int c = 0; c < n; c += LANES) {
                    vecf a = {};
                    for (int j = c; j < c + n * n; j += n) a += simd::load(S_end + j) * simd::load(G_transposed + j);
                    simd::store(A + c, a);
                }
                std::fill(dk, dk + steps * n, 0.0f);
                const int64_t next = i > 0 ? at - tile * stride : at;
                const T *next_r = in.r + next, *next_k = in.k + next, *next_v = in.v + next, *next_dy = dy + next;
                const T *to_r = grad.r + at, *to_k = grad.k + at, *to_v = grad.v + at, *to_w = grad.w + at;
                const Ahead ahead{{next_r, next_k, next_v, next_dy}, {to_r, to_k, to_v, to_w}, stride * size, n * size};
                scan<N, Decay::lanes>(n, steps, Direction::backwards, v, w, dout, r, dk, G_transposed, ahead);
                std::fill(dv, dv + steps * n, 0.0f);
                scan<N, Decay::rows>(n, steps, Direction::backwards, k, w, r, dout, dv, G, ahead);
                for (int64_t tn = (steps - 1) * n; tn >= 0; tn -= n) {  // the results take their inputs' places
                    const float v_dy = dot(n, v + tn, dout + tn), ruk = dot(n, r + tn, u, k + tn);
                    for (int c = 0; c < n; c += LANES) {
                        const vecf r_t = simd::load(r + tn + c), k_t = simd::load(k + tn + c), u_c = simd::load(u + c);
                        const vecf dr_t = simd::load(dr + tn + c), dk_t = simd::load(dk + tn + c);
                        const vecf g_t = simd::load(g + tn + c), dg = simd::load(A + c) - k_t * dk_t;
                        simd::store(A + c, dg + r_t * dr_t);
                        // A dead channel's dg is zero up to a rounding error, which g (down to -exp(8)) would magnify.
                        simd::store(g + tn + c, g_t < DEAD ? vecf{} : g_t * dg);
                        simd::store(dr + tn + c, dr_t + u_c * k_t * v_dy);
                        simd::store(dk + tn + c, dk_t + u_c * r_t * v_dy);
                        simd::store(dv + tn + c, simd::load(dv + tn + c) + ruk * simd::load(dout + tn + c));
                        simd::store(du + c, simd::load(du + c) + r_t * k_t * v_dy);
                    }
                }
                unpack(steps, n, stride, dr, grad.r + at);
                unpack(steps, n, stride, dk, grad.k + at);
                unpack(steps, n, stride, dv, grad.v + at);
                unpack(steps, n, stride, g, grad.w + at);
            }
        }
    }
}

}  // namespace

// offsets: (sequences + 1) row numbers, or null when every sequence has `length` rows. head_size: a multiple of 16.
#define FORWARD(name, T)                                                                                          \
    EXPORT(name)(int64_t sequences, int64_t length, const int64_t* offsets, int64_t heads, int64_t head_size,     \
                 const T* r, const T* k, const T* v, const T* w, const float* u, const float* state, T* y,        \
                 float* final_state) {                                                                            \
        const Inputs<T> in{r, k, v, w, u, state};                                                                 \
        const Sequences seqs{sequences, length, offsets};                                                         \
        sized(head_size, [&](auto n) { forward<n>(seqs, heads, int(head_size), in, y, final_state); });           \
    }
FORWARD(visualrwkv_wkv6_forward, float)
FORWARD(visualrwkv_wkv6_forward_bf16, simd::bf16)

// du_parts: (sequences, heads, head_size), one partial gradient of u per sequence.
#define BACKWARD(name, T)                                                                                         \
    EXPORT(name)(int64_t sequences, int64_t length, const int64_t* offsets, int64_t heads, int64_t head_size,     \
                 const T* r, const T* k, const T* v, const T* w, const float* u, const float* state, const T* dy, \
                 const float* dfinal_state, T* dr, T* dk, T* dv, T* dw, float* du_parts, float* dstate) {         \
        const Inputs<T> in{r, k, v, w, u, state};                                                                 \
        const Gradients<T> grad{dr, dk, dv, dw, du_parts, dstate};                                                \
        const Sequences seqs{sequences, length, offsets};                                                         \
        sized(head_size, [&](auto n) { backward<n>(seqs, heads, int(head_size), in, dy, dfinal_state, grad); });  \
    }
BACKWARD(visualrwkv_wkv6_backward, float)
BACKWARD(visualrwkv_wkv6_backward_bf16, simd::bf16)
