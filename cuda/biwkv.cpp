// bi-WKV (Vision-RWKV, equation 5) on the CPU. Per channel, with x -> M(x) a symmetric sum over all positions,
//
//     M(x)_t = e^u x_t + sum_{i != t} e^{-(|t-i|-1) w} x_i            y = M(e^k v) / M(e^k)
//
// M is two scans: the past, P_{t+1} = e^{-w} P_t + x_t, and the future, the same from the other end. e^k is taken
// relative to the channel's largest k. Sums and decay are double: in fp32 the rounding of e^{-w} alone, raised to the
// distance, costs 1e-5 at a thousand tokens, and double's range replaces a running maximum and its exps; decay in all
// (|w| T) plus the spread of k may come to several hundred.
//
// Where they come to less than fp32's range, as in models, the forward pass is that of biwkv_tiles.h.
//
// Layout: w, u (C); k, v, y (B, T, C), C in lanes. One piece of work is one picture and a vector of channels,
// or a band of them in tiles.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "biwkv_tiles.h"
#include "simd.h"

namespace {

using biwkv::BAND;
using biwkv::Carry;
using biwkv::Group;
using biwkv::TILE;
using biwkv::WIDE;
using simd::Scratch;
using simd::vecd;

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

}  // namespace

EXPORT(visualrwkv_biwkv_forward)(int64_t B, int64_t T, int64_t C, const float* w, const float* u, const float* k,
                                 const float* v, float* y) {
    // Bands as wide as leaves every thread two of them.
    const int64_t shares = 2 * omp_get_max_threads(), all = (C + WIDE - 1) / WIDE, tiles = (T + TILE - 1) / TILE;
    const int64_t band = std::max<int64_t>(1, std::min(BAND, B * all / shares)), bands = (all + band - 1) / band;
#pragma omp parallel if (B * T * C > PARALLEL_WORK)
    {
        Scratch<ForwardStep> steps;
        Scratch<Carry> futures(BAND * tiles);
        Scratch<Group> groups(BAND);
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < B * bands; item++) {
            const int64_t first = item % bands * band * WIDE, picture = item / bands * T * C;
            const int64_t count = std::min(band, (C - first) / WIDE);
            float least[BAND * WIDE], most[BAND * WIDE];
            biwkv::bounds(T, C, count, k + picture + first, least, most);
            int64_t ready = 0;
            const auto one_by_one = [&](int64_t channel, int64_t end) {
                for (int64_t block = channel / LANES; block * LANES < end; block++) {
                    const Channels channels(T, C, item / bands, block, w, u, k, v);
                    forward(channels, steps.reserve(T), y + picture + block * LANES);
                }
            };
            for (int64_t g = 0; g < count; g++) {
                const int64_t channel = first + g * WIDE, at = picture + channel;
                Group& group = groups.data()[ready];
                if (biwkv::prepare(T, w + channel, u + channel, least + g * WIDE, most + g * WIDE, group.of)) {
                    group.T = T, group.C = C, group.k = k + at, group.v = v + at, group.y = y + at;
                    group.carry = {}, group.futures = futures.data() + ready++ * tiles;
                } else {
                    one_by_one(channel, channel + WIDE);
                }
            }
            one_by_one(first + count * WIDE, std::min(C, first + band * WIDE));
            for (int64_t tile = tiles - 1; tile >= 0; tile--)
                for (int64_t g = 0; g < ready; g++) groups.data()[g].look_back(tile);
            for (int64_t g = 0; g < ready; g++) groups.data()[g].carry = {};
            for (int64_t tile = 0; tile < tiles; tile++)
                for (int64_t g = 0; g < ready; g++) groups.data()[g].answer(tile);
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
