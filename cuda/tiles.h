// What the recurrences over time share on the CPU: where sequences lie in the rows of a tensor (rows, heads, n), and
// tiles, some steps of one head packed side by side, (steps, n), so that a scan reads them from the nearest cache.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "simd.h"

namespace tiles {
inline namespace ISA {

using simd::vecf;

constexpr int LANES = simd::FLOATS;
constexpr int64_t TILE = 64;                // steps in a tile
constexpr int64_t PARALLEL_WORK = 1 << 16;  // state elements touched below which waking a second thread costs more

// Vectors side by side in a block of a matrix: as many as are wanted and divide every row of N floats (N = 0: any
// multiple of 16).
constexpr int columns(int N, int wanted) { return std::min(wanted, (N ? N : 16) / LANES); }

template <int N>
using Size = std::integral_constant<int, N>;

// Calls `pass` with the head size as a type: 0 for one that is only known at run time.
template <typename Pass>
void sized(int64_t head_size, Pass pass) {
    switch (head_size) {
        case 16: return pass(Size<16>{});
        case 32: return pass(Size<32>{});
        case 64: return pass(Size<64>{});
        case 128: return pass(Size<128>{});
        default: return pass(Size<0>{});
    }
}

enum class Direction { forwards, backwards };

// Sequences one after another: equal lengths, or offsets (count + 1).
struct Sequences {
    int64_t count, length;
    const int64_t* offsets;

    int64_t begin(int64_t s) const { return offsets ? offsets[s] : s * length; }
    int64_t end(int64_t s) const { return offsets ? offsets[s + 1] : (s + 1) * length; }
    int64_t rows() const { return end(count - 1); }
    int64_t longest() const {
        int64_t most = 0;
        for (int64_t s = 0; s < count; s++) most = std::max(most, end(s) - begin(s));
        return most;
    }
};

// T: what a tensor holds, float or simd::bf16; a tile is fp32.
template <typename T>
void pack(int64_t steps, int n, int64_t stride, const T* from, float* to) {
    for (int64_t t = 0; t < steps; t++)
        for (int i = 0; i < n; i++) to[t * n + i] = float(from[t * stride + i]);
}

template <typename T>
void unpack(int64_t steps, int n, int64_t stride, const float* from, T* to) {
    for (int64_t t = 0; t < steps; t++)
        for (int i = 0; i < n; i++) to[t * stride + i] = T(from[t * n + i]);
}

// The decay exp(-exp(raw)) and, where it is wanted, its logarithm -exp(raw).
template <typename T>
void pack_decay(int64_t steps, int n, int64_t stride, const T* raw, float* log_decay, float* decay) {
    pack(steps, n, stride, raw, decay);
    for (int64_t i = 0; i < steps * n; i += LANES) {
        const vecf g = -simd::exp_or_zero(simd::load(decay + i));
        if (log_decay) simd::store(log_decay + i, g);
        simd::store(decay + i, simd::exp_or_zero(g));
    }
}

// 4 x 4 floats, a size whose shuffles every machine has.
inline void transpose_block(const float* from, int from_stride, float* to, int to_stride) {
    typedef float four __attribute__((vector_size(16)));
    typedef float four_anywhere __attribute__((vector_size(16), aligned(4), may_alias));
    four rows[4], mixed[4];
    for (int i = 0; i < 4; i++) rows[i] = *reinterpret_cast<const four_anywhere*>(from + i * from_stride);
    for (int round = 0; round < 2; round++) {  // riffling rows i and i + 2 twice gathers the columns
        for (int i = 0; i < 2; i++) {
            const four x = rows[i], y = rows[i + 2];
            mixed[2 * i] = four{x[0], y[0], x[1], y[1]};
            mixed[2 * i + 1] = four{x[2], y[2], x[3], y[3]};
        }
        for (int i = 0; i < 4; i++) rows[i] = mixed[i];
    }
    for (int i = 0; i < 4; i++) *reinterpret_cast<four_anywhere*>(to + i * to_stride) = rows[i];
}

// (rows, columns), both multiples of 4, to (columns, rows).
inline void transpose(int rows, int columns, const float* from, float* to) {
    for (int i = 0; i < rows; i += 4)
        for (int j = 0; j < columns; j += 4) transpose_block(from + i * columns + j, columns, to + j * rows + i, rows);
}

inline float dot(int n, const float* a, const float* b) {
    vecf s = {};
    for (int i = 0; i < n; i += LANES) s += simd::load(a + i) * simd::load(b + i);
    return simd::sum(s);
}

}  // namespace ISA
}  // namespace tiles
