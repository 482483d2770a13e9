// Token shift and mix on the CPU: with s_t the token before t (at a sequence's start what came before it),
//
//     out[m]_t = x_t + (s_t - x_t) c[m]_t        c[m]_t = mix[m] + delta[m]_t
//
// One pass over memory, the rows in fixed pieces, so that sums do not depend on the number of threads.
//
// Layout: x (rows, C) with the sequences one after another in the rows, last (S, C), mix (M, C), delta and out
// (M, rows, C).
#include <algorithm>
#include <cstdint>
#include <cstring>

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
struct Walk {
    const Sizes& sizes;
    const float *x, *last;
    int64_t row, sequence;

    Walk(const Sizes& sizes, const float* x, const float* last, int64_t row)
        : sizes(sizes), x(x), last(last), row(row), sequence(sizes.sequence(row)) {}
    bool starts() const { return row == sizes.begin(sequence); }
    const float* now() const { return x + row * sizes.C; }
    const float* before() const { return starts() ? last + sequence * sizes.C : now() - sizes.C; }
    void next() {
        if (++row == sizes.begin(sequence + 1)) sequence++;
    }
};

}  // namespace

// delta may be null.
EXPORT(visualrwkv_mix_forward)(int64_t sequences, int64_t length, const int64_t* offsets, int64_t M, int64_t C,
                               const float* x, const float* last, const float* mix, const float* delta, float* out) {
    const Sizes sizes = {sequences, length, offsets, M, C};
    const int64_t rows = sizes.rows();
#pragma omp parallel for schedule(static) if (rows * C * M > PARALLEL_WORK)
    for (int64_t piece = 0; piece < sizes.pieces(); piece++) {
        const int64_t end = std::min(rows, (piece + 1) * PIECE);
        for (Walk walk(sizes, x, last, piece * PIECE); walk.row < end; walk.next()) {
            const float *__restrict now = walk.now(), *__restrict before = walk.before();
            for (int64_t m = 0; m < M; m++) {
                const float* __restrict weight = mix + m * C;
                float* __restrict to = out + (m * rows + walk.row) * C;
                if (delta) {
                    const float* __restrict more = delta + (m * rows + walk.row) * C;
                    for (int64_t c = 0; c < C; c++) to[c] = now[c] + (before[c] - now[c]) * (weight[c] + more[c]);
                } else {
                    for (int64_t c = 0; c < C; c++) to[c] = now[c] + (before[c] - now[c]) * weight[c];
                }
            }
        }
    }
}

// delta and ddelta may be null. dmix_parts (pieces, M, C): partial sums for the caller to add up in a fixed order.
EXPORT(visualrwkv_mix_backward)(int64_t sequences, int64_t length, const int64_t* offsets, int64_t M, int64_t C,
                                const float* x, const float* last, const float* mix, const float* delta,
                                const float* dout, float* dx, float* dlast, float* dmix_parts, float* ddelta) {
    const Sizes sizes = {sequences, length, offsets, M, C};
    const int64_t rows = sizes.rows();
#pragma omp parallel if (rows * C * M > PARALLEL_WORK)
    {
        simd::Scratch<float> to_before(C);  // a row's gradient for the token before it
#pragma omp for schedule(static)
        for (int64_t piece = 0; piece < sizes.pieces(); piece++) {
            const int64_t end = std::min(rows, (piece + 1) * PIECE);
            std::memset(dmix_parts + piece * M * C, 0, M * C * sizeof(float));
            // The row after the piece belongs to another, but what it owes to our last row is ours.
            for (Walk walk(sizes, x, last, piece * PIECE); walk.row < std::min(rows, end + 1); walk.next()) {
                const bool ours = walk.row < end, starts = walk.starts();
                if (!ours && starts) break;
                const float *__restrict now = walk.now(), *__restrict before = walk.before();
                float *__restrict shifted = to_before.data(), *__restrict dnow = dx + walk.row * C;
                std::memset(shifted, 0, C * sizeof(float));
                if (ours) std::memset(dnow, 0, C * sizeof(float));
                for (int64_t m = 0; m < M; m++) {
                    const int64_t at = (m * rows + walk.row) * C;
                    const float *__restrict weight = mix + m * C, *__restrict g = dout + at;
                    const float* __restrict more = delta + (delta ? at : 0);
                    float* __restrict dmix = dmix_parts + (piece * M + m) * C;
                    float* __restrict dmore = ddelta + (delta ? at : 0);
                    if (!ours) {
                        for (int64_t c = 0; c < C; c++) shifted[c] += g[c] * (weight[c] + (delta ? more[c] : 0.0f));
                    } else if (delta) {
                        for (int64_t c = 0; c < C; c++) {
                            const float share = g[c] * (weight[c] + more[c]), d = g[c] * (before[c] - now[c]);
                            shifted[c] += share;
                            dnow[c] += g[c] - share;
                            dmix[c] += d;
                            dmore[c] = d;
                        }
                    } else {
                        for (int64_t c = 0; c < C; c++) {
                            const float share = g[c] * weight[c];
                            shifted[c] += share;
                            dnow[c] += g[c] - share;
                            dmix[c] += g[c] * (before[c] - now[c]);
                        }
                    }
                }
                if (starts) {
                    std::memcpy(dlast + walk.sequence * C, shifted, C * sizeof(float));
                } else if (walk.row > piece * PIECE) {
                    float* __restrict dbefore = dnow - C;
                    for (int64_t c = 0; c < C; c++) dbefore[c] += shifted[c];
                }
            }
        }
    }
}
