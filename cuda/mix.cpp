// Token shift and mix on the CPU: with s_t the token before t (at a sequence's start what came before it),
//
//     out[m]_t = x_t + (s_t - x_t) c[m]_t        c[m]_t = mix[m] + delta[m]_t
//
// One pass over memory, the rows in fixed pieces, so that sums do not depend on the number of threads.
//
// Layout: x (rows, C) with the sequences one after another in the rows, last (S, C), mix (M, C), delta (M, rows, C), out
// M tensors (rows, C). x, delta and out are all fp32 or all bf16, or x alone is fp32; sums and products are fp32.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "simd.h"

namespace {

constexpr int64_t PIECE = 128;              // rows; visualrwkv/ops/mix.py sizes the partial sums by it
constexpr int64_t PARALLEL_WORK = 1 << 15;  // elements below which waking a second thread costs more than it saves

struct Sizes {
    int64_t sequences, length;
    const int64_t* offsets;  // (S + 1), or null for equal lengths
    int64_t M, C;

    int64_t begin(int64_t s) const { return offsets ? offsets[s] : s * length; }
    int64_t rows() const { return begin(sequences); }
    int64_t pieces() const { return (rows() + PIECE - 1) / PIECE; }
    // The sequence that a row lies in.
    int64_t sequence(int64_t row) const {
        if (!offsets) return row / length;
        int64_t low = 0, high = sequences;
        while (high - low > 1) {
            const int64_t middle = (low + high) / 2;
            (offsets[middle] <= row ? low : high) = middle;
        }
        return low;
    }
};

// The rows of a piece in order: each one's token before, and whether its sequence starts there.
template <typename X>
struct Walk {
    const Sizes& sizes;
    const X* x;
    const float* last;
    X* start;  // (C): room for what came before a sequence, in x's type
    int64_t row, sequence;

    Walk(const Sizes& sizes, const X* x, const float* last, X* start, int64_t row)
        : sizes(sizes), x(x), last(last), start(start), row(row), sequence(sizes.sequence(row)) {}
    bool starts() const { return row == sizes.begin(sequence); }
    const X* now() const { return x + row * sizes.C; }
    const X* before() const {
        if (!starts()) return now() - sizes.C;
        for (int64_t c = 0; c < sizes.C; c++) start[c] = X(last[sequence * sizes.C + c]);
        return start;
    }
    void next() {
        if (++row == sizes.begin(sequence + 1)) sequence++;
    }
};

template <typename X, typename T>
void forward(const Sizes& sizes, const X* x, const float* last, const float* mix, const T* delta, T* const* out) {
    const int64_t rows = sizes.rows(), M = sizes.M, C = sizes.C;
#pragma omp parallel if (rows * C * M > PARALLEL_WORK)
    {
        simd::Scratch<X> start(C);
#pragma omp for schedule(static)
        for (int64_t piece = 0; piece < sizes.pieces(); piece++) {
            const int64_t end = std::min(rows, (piece + 1) * PIECE);
            for (Walk<X> walk(sizes, x, last, start.data(), piece * PIECE); walk.row < end; walk.next()) {
                const X *__restrict now = walk.now(), *__restrict before = walk.before();
                for (int64_t m = 0; m < M; m++) {
                    const float* __restrict weight = mix + m * C;
                    T* __restrict to = out[m] + walk.row * C;
                    const T* __restrict more = delta + (delta ? (m * rows + walk.row) * C : 0);
                    if (delta) {
                        for (int64_t c = 0; c < C; c++) {
                            const float x_c = float(now[c]);
                            to[c] = T(x_c + (float(before[c]) - x_c) * (weight[c] + float(more[c])));
                        }
                    } else {
                        for (int64_t c = 0; c < C; c++) {
                            const float x_c = float(now[c]);
                            to[c] = T(x_c + (float(before[c]) - x_c) * weight[c]);
                        }
                    }
                }
            }
        }
    }
}

template <typename X, typename T>
void backward(const Sizes& sizes, const X* x, const float* last, const float* mix, const T* delta, const T* const* dout,
              X* dx, float* dlast, float* dmix_parts, T* ddelta) {
    const int64_t rows = sizes.rows(), M = sizes.M, C = sizes.C;
#pragma omp parallel if (rows * C * M > PARALLEL_WORK)
    {
        simd::Scratch<X> start(C);
        // A row's gradient but for what the next one owes it, that of the row before, and what a row owes the one before.
        simd::Scratch<float> mine(C), held(C), owed(C);
        float *__restrict dnow = mine.data(), *__restrict dbefore = held.data(), *__restrict shifted = owed.data();
        const auto write = [&](int64_t row, const float* __restrict from) {
            X* __restrict to = dx + row * C;
            for (int64_t c = 0; c < C; c++) to[c] = X(from[c]);
        };
#pragma omp for schedule(static)
        for (int64_t piece = 0; piece < sizes.pieces(); piece++) {
            const int64_t first = piece * PIECE, end = std::min(rows, first + PIECE);
            std::memset(dmix_parts + piece * M * C, 0, M * C * sizeof(float));
            // The row after the piece belongs to another, but what it owes to our last row is ours.
            Walk<X> walk(sizes, x, last, start.data(), first);
            for (; walk.row < std::min(rows, end + 1); walk.next()) {
                const bool ours = walk.row < end, starts = walk.starts();
                if (!ours && starts) break;
                const X *__restrict now = walk.now(), *__restrict before = walk.before();
                std::memset(shifted, 0, C * sizeof(float));
                std::memset(dnow, 0, C * sizeof(float));
                for (int64_t m = 0; m < M; m++) {
                    const int64_t at = (m * rows + walk.row) * C;
                    const float* __restrict weight = mix + m * C;
                    const T *__restrict g = dout[m] + walk.row * C, *__restrict more = delta + (delta ? at : 0);
                    float* __restrict dmix = dmix_parts + (piece * M + m) * C;
                    T* __restrict dmore = ddelta + (delta ? at : 0);
                    if (!ours && delta) {
                        for (int64_t c = 0; c < C; c++) shifted[c] += float(g[c]) * (weight[c] + float(more[c]));
                    } else if (!ours) {
                        for (int64_t c = 0; c < C; c++) shifted[c] += float(g[c]) * weight[c];
                    } else if (delta) {
                        for (int64_t c = 0; c < C; c++) {
                            const float g_c = float(g[c]), share = g_c * (weight[c] + float(more[c]));
                            const float d = g_c * (float(before[c]) - float(now[c]));
                            shifted[c] += share;
                            dnow[c] += g_c - share;
                            dmix[c] += d;
                            dmore[c] = T(d);
                        }
                    } else {
                        for (int64_t c = 0; c < C; c++) {
                            const float g_c = float(g[c]), share = g_c * weight[c];
                            shifted[c] += share;
                            dnow[c] += g_c - share;
                            dmix[c] += g_c * (float(before[c]) - float(now[c]));
                        }
                    }
                }
                if (starts) std::memcpy(dlast + walk.sequence * C, shifted, C * sizeof(float));
                if (walk.row > first) {
                    if (!starts)
                        for (int64_t c = 0; c < C; c++) dbefore[c] += shifted[c];
                    write(walk.row - 1, dbefore);
                }
                std::swap(dnow, dbefore);
            }
            if (walk.row == end) write(end - 1, dbefore);  // no row after the piece owed it anything
        }
    }
}

}  // namespace

// delta may be null.
#define FORWARD(name, X, T)                                                                                       \
    EXPORT(name)(int64_t sequences, int64_t length, const int64_t* offsets, int64_t M, int64_t C, const X* x,     \
                 const float* last, const float* mix, const T* delta, T* const* out) {                            \
        forward<X, T>({sequences, length, offsets, M, C}, x, last, mix, delta, out);                              \
    }
FORWARD(visualrwkv_mix_forward, float, float)
FORWARD(visualrwkv_mix_forward_bf16, simd::bf16, simd::bf16)
FORWARD(visualrwkv_mix_forward_narrow, float, simd::bf16)

// delta and ddelta may be null. dmix_parts (pieces, M, C): partial sums for the caller to add up in a fixed order.
#define BACKWARD(name, X, T)                                                                                      \
    EXPORT(name)(int64_t sequences, int64_t length, const int64_t* offsets, int64_t M, int64_t C, const X* x,     \
                 const float* last, const float* mix, const T* delta, const T* const* dout, X* dx, float* dlast,  \
                 float* dmix_parts, T* ddelta) {                                                                  \
        const Sizes sizes{sequences, length, offsets, M, C};                                                      \
        backward<X, T>(sizes, x, last, mix, delta, dout, dx, dlast, dmix_parts, ddelta);                          \
    }
BACKWARD(visualrwkv_mix_backward, float, float)
BACKWARD(visualrwkv_mix_backward_bf16, simd::bf16, simd::bf16)
BACKWARD(visualrwkv_mix_backward_narrow, float, simd::bf16)
