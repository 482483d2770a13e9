// What surrounds the recurrence of RWKV-7 on the CPU, in one pass over memory for each of three steps. With s the
// logistic function and kk = k removal / |k removal| per head,
//
//     value = v + (first - v) s(share + share0)
//
//     w = -softplus(-(decay + decay0)) - 0.5        key = k (1 + (s(rate + rate0) - 1) replacement)
//     a = -kk                                       b = kk s(rate + rate0)
//
//     out = (normalised(y) scale + shift + (sum over the head of r key bonus) value) gate
//
// Gradients start from the inputs again: nothing else is kept. Rows go in fixed pieces, so that sums do not depend on
// the number of threads.
//
// Layout: everything (rows, C), C being heads of N channels, N a multiple of 16, fp32 or bf16; weights (1, C), (4, C) and
// (3, C), fp32, in the order of the enums.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace {

using simd::FLOATS;
using simd::load;
using simd::sigmoid;
using simd::store;
using simd::sum;
using simd::vecf;

constexpr int64_t PIECE = 64;               // rows; visualrwkv/ops/gates7.py sizes the partial sums by it
constexpr int64_t PARALLEL_WORK = 1 << 14;  // elements below which waking a second thread costs more than it saves
constexpr float LEAST = 1e-12f;             // length that kk is divided by

enum Before { DECAY, RATE, REMOVAL, REPLACEMENT, BEFORE };
enum After { BONUS, SCALE, SHIFT, AFTER };

struct Sizes {
    int64_t rows, heads, N;

    int64_t C() const { return heads * N; }
    int64_t pieces() const { return (rows + PIECE - 1) / PIECE; }
};

// log(1 + e) of 0 <= e <= 1, by the series of 2 artanh(e / (2 + e)).
inline vecf log_of_1_and(vecf e) {
    const vecf s = e / (2.0f + e), t = s * s;
    vecf p = t * (1.0f / 13) + 1.0f / 11;
    p = p * t + 1.0f / 9;
    p = p * t + 1.0f / 7;
    p = p * t + 1.0f / 5;
    p = p * t + 1.0f / 3;
    return 2.0f * s + 2.0f * s * t * p;
}

inline vecf raw_decay(vecf z) {
    const vecf low = z < 0.0f ? z : vecf{}, minus = z < 0.0f ? z : -z;
    return low - log_of_1_and(simd::exp(minus)) - 0.5f;
}

template <typename Work>
inline void each_vector(int64_t N, Work work) {
    for (int64_t i = 0; i < N; i += FLOATS) work(i);
}

inline void add(float* to, vecf x) { store(to, load(to) + x); }

// Calls work(piece, row) for every row, and begin(piece) before a piece's first.
template <typename Begin, typename Work>
void each_row(const Sizes& sizes, Begin begin, Work work) {
#pragma omp parallel for schedule(static) if (sizes.rows * sizes.C() > PARALLEL_WORK)
    for (int64_t piece = 0; piece < sizes.pieces(); piece++) {
        begin(piece);
        const int64_t end = std::min(sizes.rows, (piece + 1) * PIECE);
        for (int64_t row = piece * PIECE; row < end; row++) work(piece, row);
    }
}

template <typename T>
void mix_values(const Sizes& sizes, const T* v, const T* share, const T* first, const float* share0, T* value) {
    const int64_t C = sizes.C();
    each_row(sizes, [](int64_t) {}, [&](int64_t, int64_t row) {
        const int64_t at = row * C;
        each_vector(C, [&](int64_t i) {
            const vecf v_i = load(v + at + i), part = sigmoid(load(share + at + i) + load(share0 + i));
            store(value + at + i, v_i + (load(first + at + i) - v_i) * part);
        });
    });
}

template <typename T>
void mix_values_backward(const Sizes& sizes, const T* v, const T* share, const T* first, const float* share0,
                         const T* dvalue, T* dv, T* dshare, T* dfirst, float* dshare0) {
    const int64_t C = sizes.C();
    const auto begin = [&](int64_t piece) { std::memset(dshare0 + piece * C, 0, C * sizeof(float)); };
    each_row(sizes, begin, [&](int64_t piece, int64_t row) {
        const int64_t at = row * C;
        each_vector(C, [&](int64_t i) {
            const vecf part = sigmoid(load(share + at + i) + load(share0 + i)), slope = load(dvalue + at + i);
            const vecf taken = slope * part;
            const vecf ds = taken * (1.0f - part) * (load(first + at + i) - load(v + at + i));
            store(dv + at + i, slope - taken);
            store(dfirst + at + i, taken);
            store(dshare + at + i, ds);
            add(dshare0 + piece * C + i, ds);
        });
    });
}

// Of a head: one over the length of k removal, or over LEAST.
template <typename T>
float inverse_length(const T* k, const float* removal, int64_t N) {
    vecf squares = {};
    each_vector(N, [&](int64_t i) {
        const vecf q = load(k + i) * load(removal + i);
        squares += q * q;
    });
    return 1 / std::max(std::sqrt(sum(squares)), LEAST);
}

template <typename T>
struct Inputs {
    const T *k, *decay, *rate;
};

template <typename T>
void before(const Sizes& sizes, const Inputs<T>& in, const float* weights, T* w, T* key, T* a, T* b) {
    const int64_t N = sizes.N, C = sizes.C();
    each_row(sizes, [](int64_t) {}, [&](int64_t, int64_t row) {
        for (int64_t head = 0; head < sizes.heads; head++) {
            const float* p = weights + head * N;
            const int64_t at = row * C + head * N;
            const float inverse = inverse_length(in.k + at, p + REMOVAL * C, N);
            each_vector(N, [&](int64_t i) {
                const vecf k = load(in.k + at + i), rate = sigmoid(load(in.rate + at + i) + load(p + RATE * C + i));
                const vecf kk = k * load(p + REMOVAL * C + i) * inverse;
                store(w + at + i, raw_decay(load(in.decay + at + i) + load(p + DECAY * C + i)));
                store(key + at + i, k * (1.0f + (rate - 1.0f) * load(p + REPLACEMENT * C + i)));
                store(a + at + i, -kk);
                store(b + at + i, kk * rate);
            });
        }
    });
}

template <typename T>
void before_backward(const Sizes& sizes, const Inputs<T>& in, const float* weights, const T* dw, const T* dkey,
                     const T* da, const T* db, T* dk, T* ddecay, T* drate, float* dweights) {
    const int64_t N = sizes.N, C = sizes.C();
    const auto begin = [&](int64_t piece) { std::memset(dweights + piece * BEFORE * C, 0, BEFORE * C * sizeof(float)); };
    each_row(sizes, begin, [&](int64_t piece, int64_t row) {
        for (int64_t head = 0; head < sizes.heads; head++) {
            const float* p = weights + head * N;
            float* dp = dweights + piece * BEFORE * C + head * N;
            const int64_t at = row * C + head * N;
            const float inverse = inverse_length(in.k + at, p + REMOVAL * C, N);
            vecf sums = {};
            each_vector(N, [&](int64_t i) {
                const vecf rate = sigmoid(load(in.rate + at + i) + load(p + RATE * C + i));
                const vecf kk = load(in.k + at + i) * load(p + REMOVAL * C + i) * inverse;
                sums += kk * (load(db + at + i) * rate - load(da + at + i));
            });
            const float along = inverse < 1 / LEAST ? sum(sums) : 0;  // a length below LEAST does not count
            each_vector(N, [&](int64_t i) {
                const vecf k = load(in.k + at + i), removal = load(p + REMOVAL * C + i);
                const vecf replacement = load(p + REPLACEMENT * C + i), slope = load(dkey + at + i);
                const vecf rate = sigmoid(load(in.rate + at + i) + load(p + RATE * C + i));
                const vecf kk = k * removal * inverse, db_i = load(db + at + i);
                const vecf dq = (db_i * rate - load(da + at + i) - kk * along) * inverse;
                store(dk + at + i, slope * (1.0f + (rate - 1.0f) * replacement) + dq * removal);
                add(dp + REMOVAL * C + i, dq * k);
                add(dp + REPLACEMENT * C + i, slope * k * (rate - 1.0f));
                const vecf dr = (slope * k * replacement + db_i * kk) * rate * (1.0f - rate);
                store(drate + at + i, dr);
                add(dp + RATE * C + i, dr);
                const vecf z = load(in.decay + at + i) + load(p + DECAY * C + i), dz = load(dw + at + i) * sigmoid(-z);
                store(ddecay + at + i, dz);
                add(dp + DECAY * C + i, dz);
            });
        }
    });
}

template <typename T>
struct Outputs {
    const T *y, *r, *key, *value, *gate;
};

// What normalises a head of y, and the weight of its current token's value.
struct Head {
    float mean, scale, own;

    template <typename T>
    Head(const Outputs<T>& in, const float* bonus, int64_t at, int64_t N, float eps) {
        vecf s = {}, weight = {}, squares = {};
        each_vector(N, [&](int64_t i) {
            s += load(in.y + at + i);
            weight += load(in.r + at + i) * load(in.key + at + i) * load(bonus + i);
        });
        mean = sum(s) / N, own = sum(weight);
        each_vector(N, [&](int64_t i) {
            const vecf d = load(in.y + at + i) - mean;
            squares += d * d;
        });
        scale = 1 / std::sqrt(sum(squares) / N + eps);
    }
};

template <typename T>
void after(const Sizes& sizes, const Outputs<T>& in, const float* weights, float eps, T* out) {
    const int64_t N = sizes.N, C = sizes.C();
    each_row(sizes, [](int64_t) {}, [&](int64_t, int64_t row) {
        for (int64_t head = 0; head < sizes.heads; head++) {
            const float* p = weights + head * N;
            const int64_t at = row * C + head * N;
            const Head h(in, p + BONUS * C, at, N, eps);
            each_vector(N, [&](int64_t i) {
                const vecf y = (load(in.y + at + i) - h.mean) * h.scale * load(p + SCALE * C + i);
                const vecf whole = y + load(p + SHIFT * C + i) + h.own * load(in.value + at + i);
                store(out + at + i, whole * load(in.gate + at + i));
            });
        }
    });
}

template <typename T>
void after_backward(const Sizes& sizes, const Outputs<T>& in, const float* weights, float eps, const T* dout, T* dy,
                    T* dr, T* dkey, T* dvalue, T* dgate, float* dweights) {
    const int64_t N = sizes.N, C = sizes.C();
    const auto begin = [&](int64_t piece) { std::memset(dweights + piece * AFTER * C, 0, AFTER * C * sizeof(float)); };
    each_row(sizes, begin, [&](int64_t piece, int64_t row) {
        for (int64_t head = 0; head < sizes.heads; head++) {
            const float* p = weights + head * N;
            float* dp = dweights + piece * AFTER * C + head * N;
            const int64_t at = row * C + head * N;
            const Head h(in, p + BONUS * C, at, N, eps);
            vecf slopes = {}, along = {}, owns = {};
            each_vector(N, [&](int64_t i) {
                const vecf y = (load(in.y + at + i) - h.mean) * h.scale, value = load(in.value + at + i);
                const vecf whole = y * load(p + SCALE * C + i) + load(p + SHIFT * C + i) + h.own * value;
                const vecf d = load(dout + at + i), du = d * load(in.gate + at + i);
                const vecf dnormal = du * load(p + SCALE * C + i);
                store(dgate + at + i, d * whole);
                store(dvalue + at + i, du * h.own);
                add(dp + SCALE * C + i, du * y);
                add(dp + SHIFT * C + i, du);
                slopes += dnormal;
                along += dnormal * y;
                owns += du * value;
            });
            const float slope = sum(slopes) / N, share = sum(along) / N, own = sum(owns);
            each_vector(N, [&](int64_t i) {
                const vecf y = (load(in.y + at + i) - h.mean) * h.scale;
                const vecf dnormal = load(dout + at + i) * load(in.gate + at + i) * load(p + SCALE * C + i);
                const vecf r = load(in.r + at + i), key = load(in.key + at + i), bonus = load(p + BONUS * C + i);
                store(dy + at + i, h.scale * (dnormal - slope - y * share));
                store(dr + at + i, own * key * bonus);
                store(dkey + at + i, own * r * bonus);
                add(dp + BONUS * C + i, own * r * key);
            });
        }
    });
}

}  // namespace

// Gradients of weights are (pieces, …): partial sums for the caller to add up in a fixed order. eps counts in `after`.
#define GATES(T, ending)                                                                                          \
    EXPORT(visualrwkv_mix_values##ending)(int64_t rows, int64_t heads, int64_t N, float, const T* v,              \
                                          const T* share, const T* first, const float* share0, T* value) {        \
        mix_values<T>({rows, heads, N}, v, share, first, share0, value);                                          \
    }                                                                                                             \
    EXPORT(visualrwkv_mix_values_backward##ending)(                                                               \
        int64_t rows, int64_t heads, int64_t N, float, const T* v, const T* share, const T* first,                \
        const float* share0, const T* dvalue, T* dv, T* dshare, T* dfirst, float* dshare0) {                      \
        mix_values_backward<T>({rows, heads, N}, v, share, first, share0, dvalue, dv, dshare, dfirst, dshare0);   \
    }                                                                                                             \
    EXPORT(visualrwkv_before_wkv7##ending)(int64_t rows, int64_t heads, int64_t N, float, const T* k,             \
                                           const T* decay, const T* rate, const float* weights, T* w, T* key,     \
                                           T* a, T* b) {                                                          \
        before<T>({rows, heads, N}, {k, decay, rate}, weights, w, key, a, b);                                     \
    }                                                                                                             \
    EXPORT(visualrwkv_before_wkv7_backward##ending)(                                                              \
        int64_t rows, int64_t heads, int64_t N, float, const T* k, const T* decay, const T* rate,                 \
        const float* weights, const T* dw, const T* dkey, const T* da, const T* db, T* dk, T* ddecay, T* drate,   \
        float* dweights) {                                                                                        \
        before_backward<T>({rows, heads, N}, {k, decay, rate}, weights, dw, dkey, da, db, dk, ddecay, drate,      \
                           dweights);                                                                             \
    }                                                                                                             \
    EXPORT(visualrwkv_after_wkv7##ending)(int64_t rows, int64_t heads, int64_t N, float eps, const T* y,          \
                                          const T* r, const T* key, const T* value, const T* gate,                \
                                          const float* weights, T* out) {                                         \
        after<T>({rows, heads, N}, {y, r, key, value, gate}, weights, eps, out);                                  \
    }                                                                                                             \
    EXPORT(visualrwkv_after_wkv7_backward##ending)(                                                               \
        int64_t rows, int64_t heads, int64_t N, float eps, const T* y, const T* r, const T* key, const T* value,  \
        const T* gate, const float* weights, const T* dout, T* dy, T* dr, T* dkey, T* dvalue, T* dgate,           \
        float* dweights) {                                                                                        \
        after_backward<T>({rows, heads, N}, {y, r, key, value, gate}, weights, eps, dout, dy, dr, dkey, dvalue,   \
                          dgate, dweights);                                                                       \
    }
GATES(float, )
GATES(simd::bf16, _bf16)
