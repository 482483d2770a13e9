// Weights packed for products with few vectors, which cost what reading the weights costs.
//
// A matrix lies in tiles of 16 rows by 64 bytes a row (32 columns of bf16, 64 of int8, 128 of int4), those of the same
// rows one after another, so that a thread reads memory in one line. Rows and columns are filled up with zeros; integer
// matrices to whole groups of 128 columns. Of int4 a byte holds column j of its group in the low half and j + 64 in the
// high half, each 8 too large. Weights of int8 have a scale a row, those of int4 one a row and group: (tile, group, 16).
//
// Vectors are prepared once for all matrices that read them: for bf16 weights as fp32, the even columns of every 32 before
// the odd ones, as weights come out of their 32-bit words; for integers as int8 with a scale a group.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "amx.h"
#include "dot.h"
#include "simd.h"

namespace packed {
inline namespace ISA {

using simd::FLOATS;
using simd::vecf;
using simd::veci;

constexpr int64_t ROWS = 16, LINE = 64, TILE = ROWS * LINE, GROUP = 128;
constexpr int64_t AHEAD = 4096;  // bytes from a load to the prefetch beside it
enum Kind : int64_t { BF16 = 0, INT8 = 1, INT4 = 2 };

inline int64_t whole(int64_t count, int64_t of) { return (count + of - 1) / of * of; }

// As visualrwkv/ops/token_step.py lays it out.
struct Matrix {
    const uint8_t* data;
    const float* scales;
    int64_t rows, columns, kind;

    int64_t tiles() const { return (rows + ROWS - 1) / ROWS; }
    int64_t groups() const { return (columns + GROUP - 1) / GROUP; }
    int64_t blocks() const { return kind == BF16 ? (columns + 31) / 32 : kind == INT8 ? 2 * groups() : groups(); }
    const uint8_t* tile(int64_t t) const { return data + t * blocks() * TILE; }
};

// `count` vectors of up to `most` columns, prepared for a kind of weights.
struct Vectors {
    float* floats;         // (count, most)
    uint16_t* parts;       // what amx.h reads instead, made of them in columns as they stand
    int8_t* ints;          // (count, most)
    float* scales;         // (count, most / GROUP)
    int32_t* sums;         // of the ints of each group
    int64_t count, most;
    bool amx;

    static int64_t bytes(int64_t count, int64_t columns) {
        const int64_t most = whole(columns, GROUP);
        return whole(count, amx::BATCH) * most * 2 * amx::PARTS + count * (most * 5 + most / GROUP * 8) + 4 * LINE;
    }
    // In memory of bytes(), aligned to a line.
    Vectors(char* memory, int64_t count, int64_t columns, bool amx) : count(count), most(whole(columns, GROUP)), amx(amx) {
        parts = reinterpret_cast<uint16_t*>(memory), memory += whole(count, amx::BATCH) * most * 2 * amx::PARTS;
        floats = reinterpret_cast<float*>(memory), memory += count * most * 4;
        ints = reinterpret_cast<int8_t*>(memory), memory += whole(count * most, LINE);
        scales = reinterpret_cast<float*>(memory), memory += whole(count * most / GROUP * 4, LINE);
        sums = reinterpret_cast<int32_t*>(memory);
    }

    // Vector number b, for weights of bf16 or of integers. x is followed by memory that may be overwritten with zeros.
    void prepare(int64_t b, float* x, int64_t columns, bool integers) {
        std::fill(x + columns, x + whole(columns, integers ? GROUP : 32), 0.0f);
        if (integers)
            to_ints(b, x, columns);
        else if (amx)
            std::copy(x, x + whole(columns, 32), floats + b * most);
        else
            for (int64_t k = 0; k < columns; k += 32)
                for (int64_t i = 0; i < 16; i++) {
                    floats[b * most + k + i] = x[k + 2 * i];
                    floats[b * most + k + 16 + i] = x[k + 2 * i + 1];
                }
    }

    // For amx.h, when all are prepared: this thread's share of the columns, as a line there holds all vectors.
    void split(int64_t thread, int64_t threads, int64_t columns) const {
        const int64_t blocks = (columns + 31) / 32;
        const int64_t begin = thread * blocks / threads * 32, end = (thread + 1) * blocks / threads * 32;
        for (int64_t first = 0; first < count; first += amx::BATCH)
            amx::split(floats + first * most, std::min(amx::BATCH, count - first), width(), most, begin, end, most,
                       parts + first * most * amx::PARTS);
    }
    // Vectors that the matrix unit takes at once.
    int64_t width() const { return std::min(amx::BATCH, count); }

    void to_ints(int64_t b, const float* x, int64_t columns) {
        for (int64_t g = 0; g * GROUP < columns; g++) {
            const float* from = x + g * GROUP;
            vecf top = {};
            for (int64_t k = 0; k < GROUP; k += FLOATS) {
                const vecf a = simd::load(from + k), m = a < 0.0f ? -a : a;
                top = m > top ? m : top;
            }
            float largest = 0;
            for (int i = 0; i < FLOATS; i++) largest = std::max(largest, top[i]);
            const float scale = largest / 127, inverse = largest > 0 ? 127 / largest : 0;
            const float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
            int8_t* to = ints + b * most + g * GROUP;
            int32_t sum = 0;
            for (int64_t k = 0; k < GROUP; k++) {
                const auto q = static_cast<int32_t>((from[k] * inverse + round) - round);
                sum += q;
                to[k] = static_cast<int8_t>(q);
            }
            scales[b * (most / GROUP) + g] = scale;
            sums[b * (most / GROUP) + g] = sum;
        }
    }
};

// A tile's rows times vectors --------------------------------------------------------------------------------------

// R rows from `tile` on times NB vectors: out[b * ROWS + r].
template <int R, int NB>
inline void bf16_rows(const uint8_t* tile, int64_t blocks, const float* x, int64_t stride, float* out) {
    vecf sum[R][NB] = {};
    for (int64_t block = 0; block < blocks; block++, tile += TILE, x += 32) {
#pragma GCC unroll 4
        for (int part = 0; part < 16; part += FLOATS) {
            vecf even[NB], odd[NB];
            for (int b = 0; b < NB; b++) {
                even[b] = simd::load(x + b * stride + part);
                odd[b] = simd::load(x + b * stride + 16 + part);
            }
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) {
                if (part == 0) __builtin_prefetch(tile + r * LINE + AHEAD);
                const veci pair = (veci)simd::load(reinterpret_cast<const float*>(tile + r * LINE) + part);
                const vecf low = (vecf)(pair << 16), high = (vecf)(pair & static_cast<int32_t>(0xffff0000));
                for (int b = 0; b < NB; b++) {
                    sum[r][b] += low * even[b];
                    sum[r][b] += high * odd[b];
                }
            }
        }
    }
    for (int b = 0; b < NB; b++) {
        vecf of_vector[R];
        for (int r = 0; r < R; r++) of_vector[r] = sum[r][b];
        lane_sums<R>(of_vector, out + b * ROWS);
    }
}

// R rows of integers from `tile` on times NB vectors from `first` on; `scales` those of the tile (a row's of int8, which
// the caller multiplies with, are not read).
template <int R, int NB, Kind KIND>
inline void int_rows(const uint8_t* tile, int64_t groups, const float* scales, const Vectors& x, int64_t first,
                     float* out) {
    Lanes sum[R][NB] = {};
    constexpr int64_t STEP = KIND == INT8 ? 2 * TILE : TILE;
    const int64_t of_vector = x.most / GROUP;
    for (int64_t g = 0; g < groups; g++, tile += STEP) {
#pragma GCC unroll 4
        for (int b = 0; b < NB; b++) {
            const int64_t at = (first + b) * of_vector + g;
            const Group group(x.ints + (first + b) * x.most + g * GROUP, x.sums[at]);
            const float scale = x.scales[at];
            float factors[R];
            for (int r = 0; r < R; r++) factors[r] = KIND == INT4 ? scale * scales[g * ROWS + r] : scale;
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) {
                const uint8_t* w = tile + r * LINE;
                if (b == 0) __builtin_prefetch(w + AHEAD);
                if (b == 0 && KIND == INT8) __builtin_prefetch(w + AHEAD + TILE);
                if constexpr (KIND == INT8)
                    sum[r][b] += group.dot8(w, w + TILE) * factors[r];
                else
                    sum[r][b] += group.dot4(w) * factors[r];
            }
        }
    }
    for (int b = 0; b < NB; b++) {
        Lanes of_vector[R];
        for (int r = 0; r < R; r++) of_vector[r] = sum[r][b];
        totals<R>(of_vector, out + b * ROWS);
    }
}

// Tile t times vectors `first` to first + NB: out (NB, ROWS).
template <int NB>
void tile_times(const Matrix& m, const Vectors& x, int64_t t, int64_t first, float* out) {
    constexpr int R = simd::REGISTERS / 2 / NB;
    for (int r = 0; r < ROWS; r += R) {
        const uint8_t* tile = m.tile(t) + r * LINE;
        const float* scales = m.kind == INT4 ? m.scales + t * m.groups() * ROWS + r : nullptr;
        if (m.kind == BF16)
            bf16_rows<R, NB>(tile, m.blocks(), x.floats + first * x.most, x.most, out + r);
        else if (m.kind == INT8)
            int_rows<R, NB, INT8>(tile, m.groups(), nullptr, x, first, out + r);
        else
            int_rows<R, NB, INT4>(tile, m.groups(), scales, x, first, out + r);
    }
    if (m.kind == INT8)
        for (int b = 0; b < NB; b++)
            for (int r = 0; r < ROWS; r++) out[b * ROWS + r] *= m.scales[t * ROWS + r];
}

constexpr int64_t UNIT = amx::TILES;  // tiles that are multiplied at once in a batch

// Tiles begin to end of m times all vectors: y[b * stride + row].
inline void multiply(const Matrix& m, const Vectors& x, int64_t begin, int64_t end, float* y, int64_t stride) {
    alignas(64) float out[UNIT * ROWS * amx::BATCH];
    if (m.kind == BF16 && x.amx) {
        const int64_t size = m.blocks() * TILE;
        for (; begin < end; begin += UNIT) {
            const int64_t tiles = std::min(UNIT, end - begin), rows = std::min(tiles * ROWS, m.rows - begin * ROWS);
            for (int64_t first = 0; first < x.count; first += amx::BATCH) {
                amx::multiply(m.tile(begin), tiles, size, m.blocks(), x.parts + first * x.most * amx::PARTS, x.most,
                              x.width(), out);
                for (int64_t b = 0; b < std::min(amx::BATCH, x.count - first); b++)
                    for (int64_t r = 0; r < rows; r++)
                        y[(first + b) * stride + begin * ROWS + r] = out[r * x.width() + b];
            }
        }
        return;
    }
    for (; begin < end; begin++) {
        const int64_t rows = std::min(ROWS, m.rows - begin * ROWS);
        for (int64_t first = 0; first < x.count;) {
            const int64_t left = x.count - first, now = left >= 4 ? 4 : left >= 2 ? 2 : 1;
            if (now == 4)
                tile_times<4>(m, x, begin, first, out);
            else if (now == 2)
                tile_times<2>(m, x, begin, first, out);
            else
                tile_times<1>(m, x, begin, first, out);
            for (int64_t b = 0; b < now; b++)
                std::memcpy(y + (first + b) * stride + begin * ROWS, out + b * ROWS, rows * sizeof(float));
            first += now;
        }
    }
}

}  // namespace ISA
}  // namespace packed
