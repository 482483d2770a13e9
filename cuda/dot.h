// Dot products of rows of packed weights (packed.h) and vectors, by what the instruction set offers for integers.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>

#include "simd.h"

namespace packed {
inline namespace ISA {

using simd::FLOATS;
using simd::vecf;
using simd::veci;

// The sums of R vectors' lanes, which to add up one by one would take a tenth of the time of a product.
template <int R>
inline void lane_sums(const vecf* x, float* out) {
    veci even, odd;  // of the lanes of two vectors
    for (int i = 0; i < FLOATS; i++) even[i] = 2 * i, odd[i] = 2 * i + 1;
    for (int first = 0; first < R; first += FLOATS) {
        vecf v[FLOATS] = {};
        for (int i = 0; i < std::min(FLOATS, R - first); i++) v[i] = x[first + i];
#pragma GCC unroll 4
        for (int count = FLOATS / 2; count > 0; count /= 2)
#pragma GCC unroll 16
            for (int i = 0; i < count; i++)
                v[i] = __builtin_shuffle(v[2 * i], v[2 * i + 1], even) + __builtin_shuffle(v[2 * i], v[2 * i + 1], odd);
        for (int i = 0; i < std::min(FLOATS, R - first); i++) out[first + i] = v[0][i];
    }
}

// Integer dot products of 128 columns, as a vector whose lanes add up to the result. `sum` is the vector's own sum.
#if defined(__AVX512VNNI__)
typedef __m512 Lanes;
struct Group {
    __m512i first, second, start8, start4;
    Group(const int8_t* x, int32_t sum) {
        first = _mm512_loadu_si512(x), second = _mm512_loadu_si512(x + 64);
        // Weights must be unsigned: they are taken 128 or 8 too large, and what this adds is taken off beforehand.
        start8 = _mm512_zextsi128_si512(_mm_cvtsi32_si128(-128 * sum));
        start4 = _mm512_zextsi128_si512(_mm_cvtsi32_si128(-8 * sum));
    }
    Lanes dot8(const uint8_t* w, const uint8_t* more) const {
        const __m512i shift = _mm512_set1_epi8(-128);
        const __m512i a = _mm512_dpbusd_epi32(start8, _mm512_xor_si512(_mm512_loadu_si512(w), shift), first);
        return _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(a, _mm512_xor_si512(_mm512_loadu_si512(more), shift), second));
    }
    Lanes dot4(const uint8_t* w) const {
        const __m512i low = _mm512_set1_epi8(15), both = _mm512_loadu_si512(w);
        const __m512i a = _mm512_dpbusd_epi32(start4, _mm512_and_si512(both, low), first);
        return _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(a, _mm512_and_si512(_mm512_srli_epi16(both, 4), low), second));
    }
};
template <int R>
inline void totals(const Lanes* x, float* out) {
    vecf v[R];
    for (int r = 0; r < R; r++) v[r] = (vecf)x[r];
    lane_sums<R>(v, out);
}
#elif defined(__AVX2__)
typedef __m256 Lanes;
struct Group {
    __m256i x[4];
    int32_t sum;
    Group(const int8_t* from, int32_t sum) : sum(sum) {
        for (int i = 0; i < 4; i++) x[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from) + i);
    }
    // Pairs stay below 2 * 127 * 127: they fit 16 bits.
    static __m256i pairs(__m256i unsigned8, __m256i signed8) {
        return _mm256_madd_epi16(_mm256_maddubs_epi16(unsigned8, signed8), _mm256_set1_epi16(1));
    }
    Lanes dot8(const uint8_t* w, const uint8_t* more) const {
        __m256i s = _mm256_setzero_si256();
        for (int i = 0; i < 4; i++) {
            const __m256i q = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(i < 2 ? w : more) + i % 2);
            s = _mm256_add_epi32(s, pairs(_mm256_abs_epi8(q), _mm256_sign_epi8(x[i], q)));
        }
        return _mm256_cvtepi32_ps(s);
    }
    Lanes dot4(const uint8_t* w) const {
        const __m256i low = _mm256_set1_epi8(15);
        __m256i s = _mm256_zextsi128_si256(_mm_cvtsi32_si128(-8 * sum));
        for (int i = 0; i < 2; i++) {
            const __m256i q = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w) + i);
            s = _mm256_add_epi32(s, pairs(_mm256_and_si256(q, low), x[i]));
            s = _mm256_add_epi32(s, pairs(_mm256_and_si256(_mm256_srli_epi16(q, 4), low), x[i + 2]));
        }
        return _mm256_cvtepi32_ps(s);
    }
};
template <int R>
inline void totals(const Lanes* x, float* out) {
    for (int r = 0; r < R; r++) {
        out[r] = 0;
        for (int i = 0; i < 8; i++) out[r] += x[r][i];
    }
}
#else
typedef float Lanes;
struct Group {
    const int8_t* x;
    int32_t sum;
    Group(const int8_t* x, int32_t sum) : x(x), sum(sum) {}
    Lanes dot8(const uint8_t* w, const uint8_t* more) const {
        const auto *first = reinterpret_cast<const int8_t*>(w), *second = reinterpret_cast<const int8_t*>(more);
        int32_t s = 0;
        for (int i = 0; i < 64; i++) s += first[i] * x[i] + second[i] * x[i + 64];
        return static_cast<float>(s);
    }
    Lanes dot4(const uint8_t* w) const {
        int32_t s = -8 * sum;
        for (int i = 0; i < 64; i++) s += (w[i] & 15) * x[i] + (w[i] >> 4) * x[i + 64];
        return static_cast<float>(s);
    }
};
template <int R>
inline void totals(const Lanes* x, float* out) {
    std::copy(x, x + R, out);
}
#endif

}  // namespace ISA
}  // namespace packed
