// bi-WKV in tiles of a few tokens, as a forward pass may walk where decay in all and the spread of k are within fp32's
// range: fp32 inside a tile, where the rounding of a few steps does no harm, and double from tile to tile.
//
// e^k, taken relative to the channel's largest k, and e^k v are added up from the end for what lies beyond each tile, and
// again from the start for the answers. Several groups of channels go side by side through the rows, so that a visit to
// a row reads as much of it as a cache line's neighbours and the page's address are good for.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "simd.h"

namespace biwkv {
inline namespace ISA {

using simd::vecf;

constexpr int VECTORS = 2, WIDE = VECTORS * simd::FLOATS;  // channels taken together: two chains of dependent sums
constexpr int64_t TILE = 16;
constexpr float RANGE = 60.0f;  // of the exponents: e^60 and e^-60 times a few thousand are well within fp32

// Rows lie too far apart for the machine to guess, so they are asked for a tile before they are needed.
inline void fetch(const float* row) {
    for (int c = 0; c < VECTORS; c++) __builtin_prefetch(row + c * simd::FLOATS);
}

// Of WIDE channels what does not depend on the token.
struct Constants {
    alignas(64) float e_u[WIDE], k_max[WIDE], power[TILE + 1][WIDE];  // power[n]: decay over n tokens
    alignas(64) double whole[WIDE];                                   // and over a whole tile
};

constexpr int64_t BAND = 4;  // groups of WIDE channels that one piece of work takes together, so that a row is one visit

// The smallest and largest k of `groups` groups, (groups, WIDE) each.
inline void bounds(int64_t T, int64_t C, int64_t groups, const float* k, float* least, float* most) {
    for (int64_t i = 0; i < groups * WIDE; i++) least[i] = most[i] = k[i];
    for (int64_t t0 = 0; t0 < T; t0 += TILE) {
        for (int64_t g = 0; g < groups; g++) {
            vecf low[VECTORS], high[VECTORS];
            for (int c = 0; c < VECTORS; c++) {
                low[c] = simd::load(least + g * WIDE + c * simd::FLOATS);
                high[c] = simd::load(most + g * WIDE + c * simd::FLOATS);
            }
            for (int64_t t = t0; t < std::min(T, t0 + TILE); t++) {
                fetch(k + (t + TILE) * C + g * WIDE);
                for (int c = 0; c < VECTORS; c++) {
                    const vecf k_t = simd::load(k + t * C + g * WIDE + c * simd::FLOATS);
                    high[c] = k_t > high[c] ? k_t : high[c];
                    low[c] = k_t < low[c] ? k_t : low[c];
                }
            }
            for (int c = 0; c < VECTORS; c++) {
                simd::store(least + g * WIDE + c * simd::FLOATS, low[c]);
                simd::store(most + g * WIDE + c * simd::FLOATS, high[c]);
            }
        }
    }
}

// False if some channel's exponents may leave RANGE; w, u, least, most: of the group's channels.
inline bool prepare(int64_t T, const float* w, const float* u, const float* least, const float* most, Constants& to) {
    for (int i = 0; i < WIDE; i++) {
        const float range = most[i] - least[i] + std::fabs(w[i]) * static_cast<float>(T) + std::fabs(u[i]);
        if (!(range < RANGE)) return false;  // also for NaN
    }
    for (int i = 0; i < WIDE; i++) {
        to.k_max[i] = most[i];
        to.e_u[i] = static_cast<float>(std::exp(static_cast<double>(u[i])));
        for (int n = 0; n <= TILE; n++) to.power[n][i] = static_cast<float>(std::exp(-static_cast<double>(w[i]) * n));
        to.whole[i] = std::exp(-static_cast<double>(w[i]) * TILE);
    }
    return true;
}

// Sums of e^k v and e^k, of the tokens before or after a tile.
struct Carry {
    alignas(64) double numerator[WIDE], denominator[WIDE];

    void step(const double* decay, const float* numerator_in, const float* denominator_in) {
        for (int i = 0; i < WIDE; i++) numerator[i] = decay[i] * numerator[i] + numerator_in[i];
        for (int i = 0; i < WIDE; i++) denominator[i] = decay[i] * denominator[i] + denominator_in[i];
    }
};

// One group of WIDE channels; k, v, y begin at its first channel. futures: room for one Carry a tile.
struct Group {
    int64_t T, C;
    const float *k, *v;
    float* y;
    Constants of;
    Carry carry, *futures;

    static vecf lane(const float* row, int c) { return simd::load(row + c * simd::FLOATS); }

    // e^k and e^k v of a tile, and the scan over them.
    struct Tile {
        alignas(64) float e_k[TILE][WIDE], e_kv[TILE][WIDE];
        vecf decay[VECTORS], numerator[VECTORS], denominator[VECTORS];

        Tile(const Group& g, int64_t t0, int64_t steps) {
            for (int c = 0; c < VECTORS; c++) decay[c] = lane(g.of.power[1], c);
            for (int64_t s = 0; s < steps; s++) {
                for (int c = 0; c < VECTORS; c++) {  // exponents from -RANGE to 0
                    const vecf e = simd::exp_or_zero(lane(g.k + (t0 + s) * g.C, c) - lane(g.of.k_max, c));
                    simd::store(e_k[s] + c * simd::FLOATS, e);
                    simd::store(e_kv[s] + c * simd::FLOATS, e * lane(g.v + (t0 + s) * g.C, c));
                }
            }
            clear();
        }
        void clear() {
            for (int c = 0; c < VECTORS; c++) numerator[c] = denominator[c] = vecf{};
        }
        void add(int64_t s, int c) {
            numerator[c] = decay[c] * numerator[c] + lane(e_kv[s], c);
            denominator[c] = decay[c] * denominator[c] + lane(e_k[s], c);
        }
        void carry_on(Carry& carry, const double* whole) const {
            alignas(64) float sums[2][WIDE];
            for (int c = 0; c < VECTORS; c++) {
                simd::store(sums[0] + c * simd::FLOATS, numerator[c]);
                simd::store(sums[1] + c * simd::FLOATS, denominator[c]);
            }
            carry.step(whole, sums[0], sums[1]);
        }
    };

    // From the last tile, which may be short as nothing comes after it, to the first.
    void look_back(int64_t tile) {
        futures[tile] = carry;
        const int64_t t0 = tile * TILE, steps = std::min(TILE, T - t0);
        Tile here(*this, t0, steps);
        for (int64_t s = steps - 1; s >= 0; s--) {
            fetch(k + (t0 + s - TILE) * C);  // the tile that is next
            fetch(v + (t0 + s - TILE) * C);
            for (int c = 0; c < VECTORS; c++) here.add(s, c);
        }
        here.carry_on(carry, of.whole);
    }

    // From the first tile to the last.
    void answer(int64_t tile) {
        const int64_t t0 = tile * TILE, steps = std::min(TILE, T - t0);
        Tile here(*this, t0, steps);
        alignas(64) float before[2][WIDE], beyond[2][WIDE], after[2][TILE][WIDE];
        for (int i = 0; i < WIDE; i++) {
            before[0][i] = static_cast<float>(carry.numerator[i]);
            before[1][i] = static_cast<float>(carry.denominator[i]);
            beyond[0][i] = static_cast<float>(futures[tile].numerator[i]);
            beyond[1][i] = static_cast<float>(futures[tile].denominator[i]);
        }
        for (int64_t s = steps - 1; s >= 0; s--) {
            fetch(k + (t0 + s + TILE) * C);
            fetch(v + (t0 + s + TILE) * C);
            for (int c = 0; c < VECTORS; c++) {
                const vecf power = lane(of.power[steps - 1 - s], c);
                simd::store(after[0][s] + c * simd::FLOATS, here.numerator[c] + power * lane(beyond[0], c));
                simd::store(after[1][s] + c * simd::FLOATS, here.denominator[c] + power * lane(beyond[1], c));
                here.add(s, c);
            }
        }
        here.clear();
        for (int64_t s = 0; s < steps; s++) {
            for (int c = 0; c < VECTORS; c++) {
                __builtin_prefetch(y + (t0 + s + TILE) * C + c * simd::FLOATS, 1);
                const vecf power = lane(of.power[s], c), e_u = lane(of.e_u, c);
                const vecf above =
                    here.numerator[c] + power * lane(before[0], c) + lane(after[0][s], c) + e_u * lane(here.e_kv[s], c);
                const vecf below =
                    here.denominator[c] + power * lane(before[1], c) + lane(after[1][s], c) + e_u * lane(here.e_k[s], c);
                simd::store(y + (t0 + s) * C + c * simd::FLOATS, above / below);
                here.add(s, c);
            }
        }
        here.carry_on(carry, of.whole);
    }
};

}  // namespace ISA
}  // namespace biwkv
