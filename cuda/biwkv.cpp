// bi-WKV (Vision-RWKV, equation 5) on the CPU. Per channel, with x -> M(x) a symmetric sum over all positions,
//
//     M(x)_t = e^u x_t + sum_{i != t} e^{-(|t-i|-1) w} x_i            y = M(e^k v) / M(e^k)
//
// M is two scans: the past, P_{t+1} = e^{-w} P_t + x_t, and the future, the same from the other end. e^k is taken
// relative to the channel's largest k. Sums and decay are double: in fp32 the rounding of e^{-w} alone, raised to the
// distance, costs 1e-5 at a thousand tokens, and double's range replaces a running maximum and its exps; decay in all
// (|w| T) plus the spread of k may come to several hundred.
//
// Where they come to less than fp32's range, as in models, the forward pass walks in tiles of a few tokens: fp32 inside
// a tile, where the rounding of a few steps does no harm, and double from tile to tile.
//
// Layout: w, u (C); k, v, y (B, T, C), C in lanes. One piece of work is one picture and a vector of channels.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "simd.h"

namespace {

using simd::Scratch;
using simd::vecd;
using simd::vecf;

constexpr int LANES = simd::DOUBLES;
constexpr int64_t PARALLEL_WORK = 1 << 14;  // elements below which waking a second thread costs more than it saves

// The last channels of a row may be fewer than a vector: lanes past `count` read as zero and are not written.
inline vecd load(const float* p, int count) {
    if (count == LANES) return __builtin_convertvector(*reinterpret_cast<const simd::half_vecf_anywhere*>(p), vecd);
    vecd x = {};
    for (int i = 0; i < count; i++) x[i] = p[i];
    return x;
}

inline void store(float* p, vecd x, int count) {
    if (count == LANES) {
        *reinterpret_cast<simd::half_vecf_anywhere*>(p) = __builtin_convertvector(x, simd::half_vecf);
    } else {
        for (int i = 0; i < count; i++) p[i] = static_cast<float>(x[i]);
    }
}

// A vector of channels of one picture.
struct Channels {
    int64_t T, C;
    int count;
    const float *k, *v;
    vecd decay, e_u, k_max;  // e^-w, e^u, the largest k

    Channels(int64_t T, int64_t C, int64_t picture, int64_t block, const float* w, const float* u, const float* k_all,
             const float* v_all)
        : T(T), C(C) {
        const int64_t channel = block * LANES, at = picture * T * C + channel;
        count = static_cast<int>(C - channel < LANES ? C - channel : LANES);
        k = k_all + at;
        v = v_all + at;
        decay = e_u = vecd{};
        for (int i = 0; i < count; i++) {
            decay[i] = std::exp(-static_cast<double>(w[channel + i]));
            e_u[i] = std::exp(static_cast<double>(u[channel + i]));
        }
        k_max = k_at(0);
        for (int64_t t = 1; t < T; t++) {
            const vecd k_t = k_at(t);
            k_max = k_t > k_max ? k_t : k_max;
        }
    }
    vecd k_at(int64_t t) const { return load(k + t * C, count); }
    vecd v_at(int64_t t) const { return load(v + t * C, count); }
    vecd e_k_at(int64_t t) const { return simd::exp_negative(k_at(t) - k_max); }
};

struct ForwardStep {
    vecd e_k, numerator, denominator;  // e^k, and the future's share of both sums
};

void forward(const Channels& ch, ForwardStep* steps, float* y) {
    vecd numerator = {}, denominator = {};
    for (int64_t t = ch.T - 1; t >= 0; t--) {
        const vecd e_k = ch.e_k_at(t);
        steps[t] = {e_k, numerator, denominator};
        numerator = ch.decay * numerator + e_k * ch.v_at(t);
        denominator = ch.decay * denominator + e_k;
    }
    numerator = denominator = vecd{};
    for (int64_t t = 0; t < ch.T; t++) {
        const ForwardStep& future = steps[t];
        const vecd e_k = future.e_k, e_kv = e_k * ch.v_at(t);
        store(y + t * ch.C,
              (numerator + future.numerator + ch.e_u * e_kv) / (denominator + future.denominator + ch.e_u * e_k),
              ch.count);
        numerator = ch.decay * numerator + e_kv;
        denominator = ch.decay * denominator + e_k;
    }
}

struct BackwardStep {
    vecd e_k, numerator, denominator, numerator_dw, denominator_dw;  // e^k and the future's sums, with d/dw of them
    vecd a, b, m_a, m_b;                                             // see backward; m_a, m_b lack the future's share
};

// With a = dy / M(e^k) and b = a y (M is its own transpose):
//
//     dv = e^k M(a)     dk = e^k (v M(a) - M(b))     du = sum e^u e^k (a v - b)     dw = sum a M'(e^k v) - b M'(e^k)
//
// M' = dM/dw comes from the same scans: P'_{t+1} = e^{-w} (P'_t - P_t).
void backward(const Channels& ch, BackwardStep* steps, const float* dy, float* dk, float* dv, double* dw, double* du) {
    vecd numerator = {}, denominator = {}, numerator_dw = {}, denominator_dw = {};
    for (int64_t t = ch.T - 1; t >= 0; t--) {
        BackwardStep& s = steps[t];
        s.e_k = ch.e_k_at(t);
        s.numerator = numerator;
        s.denominator = denominator;
        s.numerator_dw = numerator_dw;
        s.denominator_dw = denominator_dw;
        numerator_dw = ch.decay * (numerator_dw - numerator);
        denominator_dw = ch.decay * (denominator_dw - denominator);
        numerator = ch.decay * numerator + s.e_k * ch.v_at(t);
        denominator = ch.decay * denominator + s.e_k;
    }
    numerator = denominator = numerator_dw = denominator_dw = vecd{};
    vecd past_a = {}, past_b = {}, dw_sum = {}, du_sum = {};
    for (int64_t t = 0; t < ch.T; t++) {
        BackwardStep& s = steps[t];
        const vecd v_t = ch.v_at(t), e_kv = s.e_k * v_t;
        const vecd total = denominator + s.denominator + ch.e_u * s.e_k;
        s.a = load(dy + t * ch.C, ch.count) / total;
        s.b = s.a * ((numerator + s.numerator + ch.e_u * e_kv) / total);
        dw_sum += s.a * (numerator_dw + s.numerator_dw) - s.b * (denominator_dw + s.denominator_dw);
        du_sum += ch.e_u * s.e_k * (s.a * v_t - s.b);
        s.m_a = ch.e_u * s.a + past_a;
        s.m_b = ch.e_u * s.b + past_b;
        past_a = ch.decay * past_a + s.a;
        past_b = ch.decay * past_b + s.b;
        numerator_dw = ch.decay * (numerator_dw - numerator);
        denominator_dw = ch.decay * (denominator_dw - denominator);
        numerator = ch.decay * numerator + e_kv;
        denominator = ch.decay * denominator + s.e_k;
    }
    vecd future_a = {}, future_b = {};
    for (int64_t t = ch.T - 1; t >= 0; t--) {
        const BackwardStep& s = steps[t];
        const vecd m_a = s.m_a + future_a, m_b = s.m_b + future_b;
        store(dv + t * ch.C, s.e_k * m_a, ch.count);
        store(dk + t * ch.C, s.e_k * (ch.v_at(t) * m_a - m_b), ch.count);
        future_a = ch.decay * future_a + s.a;
        future_b = ch.decay * future_b + s.b;
    }
    for (int i = 0; i < ch.count; i++) {
        dw[i] = dw_sum[i];
        du[i] = du_sum[i];
    }
}

// Tiles ---------------------------------------------------------------------------------------------------------------

constexpr int VECTORS = 2, WIDE = VECTORS * simd::FLOATS;  // channels taken together: two chains of dependent sums
constexpr int64_t TILE = 16;
constexpr float RANGE = 60.0f;  // of the exponents: e^60 and e^-60 times a few thousand are well within fp32

constexpr int64_t AHEAD = 12;  // rows are asked for so long before they are needed; they lie too far apart to be guessed

inline void fetch(const float* row) {
    for (int c = 0; c < VECTORS; c++) __builtin_prefetch(row + c * simd::FLOATS);
}

// Of WIDE channels what does not depend on the token.
struct Constants {
    alignas(64) float e_u[WIDE], k_max[WIDE], power[TILE + 1][WIDE];  // power[n]: decay over n tokens
    alignas(64) double whole[WIDE];                                   // and over a whole tile
};

// False if some channel's exponents may leave RANGE.
bool prepare(int64_t T, int64_t C, const float* w, const float* u, const float* k, Constants& to) {
    vecf most[VECTORS], least[VECTORS];
    for (int c = 0; c < VECTORS; c++) most[c] = least[c] = simd::load(k + c * simd::FLOATS);
    for (int64_t t = 1; t < T; t++) {
        fetch(k + (t + AHEAD) * C);
        for (int c = 0; c < VECTORS; c++) {
            const vecf k_t = simd::load(k + t * C + c * simd::FLOATS);
            most[c] = k_t > most[c] ? k_t : most[c];
            least[c] = k_t < least[c] ? k_t : least[c];
        }
    }
    float low[WIDE];
    for (int c = 0; c < VECTORS; c++) {
        simd::store(to.k_max + c * simd::FLOATS, most[c]);
        simd::store(low + c * simd::FLOATS, least[c]);
    }
    for (int i = 0; i < WIDE; i++) {
        const float range = to.k_max[i] - low[i] + std::fabs(w[i]) * static_cast<float>(T) + std::fabs(u[i]);
        if (!(range < RANGE)) return false;  // also for NaN
    }
    for (int i = 0; i < WIDE; i++) {
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

// WIDE channels. futures: room for one Carry a tile.
void forward_tiles(int64_t T, int64_t C, const Constants& of, const float* k, const float* v, Carry* futures, float* y) {
    const int64_t tiles = (T + TILE - 1) / TILE;
    alignas(64) float e_k[TILE][WIDE], e_kv[TILE][WIDE], after[2][TILE][WIDE], sums[2][WIDE];
    vecf decay[VECTORS], numerator[VECTORS], denominator[VECTORS];
    const auto lane = [](const float* row, int c) { return simd::load(row + c * simd::FLOATS); };
    const auto exponentials = [&](int64_t t0, int64_t steps) {
        for (int64_t s = 0; s < steps; s++) {
            for (int c = 0; c < VECTORS; c++) {
                const vecf e = simd::exp_or_zero(lane(k + (t0 + s) * C, c) - lane(of.k_max, c));  // from -RANGE to 0
                simd::store(e_k[s] + c * simd::FLOATS, e);
                simd::store(e_kv[s] + c * simd::FLOATS, e * lane(v + (t0 + s) * C, c));
            }
        }
    };
    const auto clear = [&] {
        for (int c = 0; c < VECTORS; c++) numerator[c] = denominator[c] = vecf{};
    };
    const auto add = [&](int64_t s, int c) {
        numerator[c] = decay[c] * numerator[c] + lane(e_kv[s], c);
        denominator[c] = decay[c] * denominator[c] + lane(e_k[s], c);
    };
    const auto put_sums = [&] {
        for (int c = 0; c < VECTORS; c++) {
            simd::store(sums[0] + c * simd::FLOATS, numerator[c]);
            simd::store(sums[1] + c * simd::FLOATS, denominator[c]);
        }
    };
    for (int c = 0; c < VECTORS; c++) decay[c] = lane(of.power[1], c);

    Carry carry = {};
    for (int64_t tile = tiles - 1; tile >= 0; tile--) {  // the last one may be short: nothing comes after it
        futures[tile] = carry;
        const int64_t steps = std::min(TILE, T - tile * TILE);
        exponentials(tile * TILE, steps);
        clear();
        for (int64_t s = steps - 1; s >= 0; s--) {
            fetch(v + (tile * TILE + s - TILE) * C);  // the tile that is next
            for (int c = 0; c < VECTORS; c++) add(s, c);
        }
        put_sums();
        carry.step(of.whole, sums[0], sums[1]);
    }
    carry = {};
    for (int64_t tile = 0; tile < tiles; tile++) {
        const int64_t t0 = tile * TILE, steps = std::min(TILE, T - t0);
        exponentials(t0, steps);
        alignas(64) float before[2][WIDE], beyond[2][WIDE];
        for (int i = 0; i < WIDE; i++) {
            before[0][i] = static_cast<float>(carry.numerator[i]);
            before[1][i] = static_cast<float>(carry.denominator[i]);
            beyond[0][i] = static_cast<float>(futures[tile].numerator[i]);
            beyond[1][i] = static_cast<float>(futures[tile].denominator[i]);
        }
        clear();
        for (int64_t s = steps - 1; s >= 0; s--) {
            for (int c = 0; c < VECTORS; c++) {
                const vecf power = lane(of.power[steps - 1 - s], c);
                simd::store(after[0][s] + c * simd::FLOATS, numerator[c] + power * lane(beyond[0], c));
                simd::store(after[1][s] + c * simd::FLOATS, denominator[c] + power * lane(beyond[1], c));
                add(s, c);
            }
        }
        clear();
        for (int64_t s = 0; s < steps; s++) {
            for (int c = 0; c < VECTORS; c++) __builtin_prefetch(y + (t0 + s + AHEAD) * C + c * simd::FLOATS, 1);
            for (int c = 0; c < VECTORS; c++) {
                const vecf power = lane(of.power[s], c), e_u = lane(of.e_u, c);
                const vecf above = numerator[c] + power * lane(before[0], c) + lane(after[0][s], c) + e_u * lane(e_kv[s], c);
                const vecf below = denominator[c] + power * lane(before[1], c) + lane(after[1][s], c) + e_u * lane(e_k[s], c);
                simd::store(y + (t0 + s) * C + c * simd::FLOATS, above / below);
                add(s, c);
            }
        }
        put_sums();
        carry.step(of.whole, sums[0], sums[1]);
    }
}

}  // namespace

EXPORT(visualrwkv_biwkv_forward)(int64_t B, int64_t T, int64_t C, const float* w, const float* u, const float* k,
                                 const float* v, float* y) {
    const int64_t groups = (C + WIDE - 1) / WIDE;
#pragma omp parallel if (B * T * C > PARALLEL_WORK)
    {
        Scratch<ForwardStep> steps;
        Scratch<Carry> futures((T + TILE - 1) / TILE);
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < B * groups; item++) {
            const int64_t picture = item / groups, channel = item % groups * WIDE, at = picture * T * C + channel;
            Constants constants;
            if (channel + WIDE <= C && prepare(T, C, w + channel, u + channel, k + at, constants)) {
                forward_tiles(T, C, constants, k + at, v + at, futures.data(), y + at);
                continue;
            }
            for (int64_t block = channel / LANES; block * LANES < std::min(C, channel + WIDE); block++) {
                const Channels channels(T, C, picture, block, w, u, k, v);
                forward(channels, steps.reserve(T), y + picture * T * C + block * LANES);
            }
        }
    }
}

// dw_parts, du_parts: (B, C), one partial gradient per picture, in double.
EXPORT(visualrwkv_biwkv_backward)(int64_t B, int64_t T, int64_t C, const float* w, const float* u, const float* k,
                                  const float* v, const float* dy, double* dw_parts, double* du_parts, float* dk,
                                  float* dv) {
    const int64_t blocks = (C + LANES - 1) / LANES;
#pragma omp parallel if (B * T * C > PARALLEL_WORK)
    {
        Scratch<BackwardStep> steps(T);
#pragma omp for schedule(static)
        for (int64_t item = 0; item < B * blocks; item++) {
            const int64_t picture = item / blocks, channel = item % blocks * LANES, at = picture * T * C + channel;
            const Channels channels(T, C, picture, item % blocks, w, u, k, v);
            backward(channels, steps.data(), dy + at, dk + at, dv + at, dw_parts + picture * C + channel,
                     du_parts + picture * C + channel);
        }
    }
}
