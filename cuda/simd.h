// Vectors as wide as the machine's registers, written with GCC's vector extensions: one source for AVX-512, AVX, SSE
// and NEON, and no intrinsics. (GCC 12 makes slow code of vectors wider than a register.)
//
// One library serves several instruction sets: each kernel is compiled once per set, with -DISA=avx512 and the like,
// and exports its functions under names that end so; cpu.cpp says which of them the processor runs. The set is also a
// namespace around everything inline, or the linker would keep one copy of a function for all. Compiled once, without
// ISA, the names are the plain ones.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#ifdef ISA
#define SIMD_JOIN(name, set) name##_##set
#define SIMD_EXPAND(name, set) SIMD_JOIN(name, set)
#define EXPORT(name) extern "C" void SIMD_EXPAND(name, ISA)
#else
#define ISA plain
#define EXPORT(name) extern "C" void name
#endif

namespace simd {
inline namespace ISA {

#if defined(__AVX512F__)
#define SIMD_BYTES 64
constexpr int REGISTERS = 32;
#elif defined(__AVX__)
#define SIMD_BYTES 32
constexpr int REGISTERS = 16;
#elif defined(__aarch64__)
#define SIMD_BYTES 16
constexpr int REGISTERS = 32;
#else
#define SIMD_BYTES 16
constexpr int REGISTERS = 16;
#endif
constexpr int FLOATS = SIMD_BYTES / 4;   // floats in a vector
constexpr int DOUBLES = SIMD_BYTES / 8;  // doubles in a vector

typedef float vecf __attribute__((vector_size(SIMD_BYTES)));
typedef int32_t veci __attribute__((vector_size(SIMD_BYTES)));
typedef double vecd __attribute__((vector_size(SIMD_BYTES)));
typedef int64_t vecl __attribute__((vector_size(SIMD_BYTES)));
typedef float half_vecf __attribute__((vector_size(SIMD_BYTES / 2)));  // as many floats as vecd has doubles

typedef float vecf_anywhere __attribute__((vector_size(SIMD_BYTES), aligned(4), may_alias));
typedef float half_vecf_anywhere __attribute__((vector_size(SIMD_BYTES / 2), aligned(4), may_alias));

inline vecf load(const float* p) { return *reinterpret_cast<const vecf_anywhere*>(p); }
inline void store(float* p, vecf x) { *reinterpret_cast<vecf_anywhere*>(p) = x; }
inline vecf splat(float x) { return x - vecf{}; }
inline vecd splat(double x) { return x - vecd{}; }

// A number of 16 bits in memory, in loops over which the compiler makes vectors; rounded to the nearest even.
struct bf16 {
    uint16_t bits;

    bf16() = default;
    explicit bf16(float x) {
        const uint32_t b = __builtin_bit_cast(uint32_t, x);
        const uint32_t rounded = (b + 0x7fff + (b >> 16 & 1)) >> 16, quiet = b >> 16 | 0x40;
        bits = uint16_t((b & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
    }
    explicit operator float() const { return __builtin_bit_cast(float, uint32_t(bits) << 16); }
};

typedef uint16_t shorts __attribute__((vector_size(SIMD_BYTES / 2)));  // as many as vecf has floats
typedef uint16_t shorts_anywhere __attribute__((vector_size(SIMD_BYTES / 2), aligned(2), may_alias));
typedef uint32_t vecu __attribute__((vector_size(SIMD_BYTES)));

inline vecf load(const bf16* p) {
    return (vecf)(__builtin_convertvector(*reinterpret_cast<const shorts_anywhere*>(p), vecu) << 16);
}
inline void store(bf16* p, vecf x) {
    const vecu b = (vecu)x, rounded = (b + 0x7fff + (b >> 16 & 1)) >> 16, quiet = b >> 16 | 0x40;
    const vecu kept = (b & 0x7fffffff) > 0x7f800000 ? quiet : rounded;
    *reinterpret_cast<shorts_anywhere*>(p) = __builtin_convertvector(kept, shorts);
}

inline float sum(vecf x) {
    float s[FLOATS];
    store(s, x);
    for (int width = FLOATS / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) s[i] += s[i + width];
    return s[0];
}

// e^x = p 2^n: x = n ln 2 + f with |f| <= ln 2 / 2, and a polynomial (Cephes) gives p = e^f.
inline vecf exp_parts(vecf x, veci& power) {
    const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, found in the low bits
    vecf shifted = x * 1.44269504f + shift;
    vecf n = shifted - shift;
    vecf f = x - n * 0.693359375f;
    f = f - n * -2.12194440e-4f;
    vecf p = f * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    power = (veci)shifted - (veci)splat(shift);
    return p * (f * f) + (f + 1.0f);
}

// exp(x), relative error about 1e-7 over the whole range; 0 below -104, infinity above 89, NaN stays NaN. 2^n is
// multiplied on in two halves, so that results below the normal range round correctly instead of wrapping around.
inline vecf exp(vecf x) {
    x = x < -104.0f ? splat(-104.0f) : x;
    x = x > 89.0f ? splat(89.0f) : x;
    veci power;
    const vecf p = exp_parts(x, power);
    veci half = power >> 1;
    vecf low = (vecf)((half + 127) << 23);
    vecf high = (vecf)((power - half + 127) << 23);
    return p * low * high;
}

inline vecf sigmoid(vecf x) { return 1.0f / (1.0f + exp(-x)); }

// The same for where numbers below the normal range may be 0 and those above e^88 be e^88: a quarter less work.
inline vecf exp_or_zero(vecf x) {
    const veci tiny = x < -87.0f;
    x = x > 88.0f ? splat(88.0f) : x;
    veci power;
    const vecf p = exp_parts(x, power);
    return tiny ? vecf{} : p * (vecf)((power + 127) << 23);
}

// exp(x) for x <= 0 in double: the range of double (to e^-708, 0 below), a relative error of 3e-10.
inline vecd exp_negative(vecd x) {
    vecl tiny = x < -708.0;
    x = tiny ? splat(-708.0) : x;
    const double shift = 6755399441055744.0;  // 1.5 * 2^52
    vecd shifted = x * 1.4426950408889634 + shift;
    vecd n = shifted - shift;
    vecd f = x - n * 0.69314718055994531;
    vecd p = f * (1.0 / 40320) + 1.0 / 5040;
    p = p * f + 1.0 / 720;
    p = p * f + 1.0 / 120;
    p = p * f + 1.0 / 24;
    p = p * f + 1.0 / 6;
    p = p * f + 0.5;
    p = p * f + 1.0;
    p = p * f + 1.0;
    vecl power = (vecl)shifted - (vecl)splat(shift);
    vecd scale = (vecd)((power + 1023) << 52);
    return tiny ? vecd{} : p * scale;
}

// Working memory of one thread, aligned to a cache line. reserve() keeps no old contents.
template <typename T>
class Scratch {
  public:
    Scratch() = default;
    explicit Scratch(size_t count) { reserve(count); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { std::free(data_); }

    T* reserve(size_t count) {
        if (count > size_) {
            std::free(data_);
            size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
            data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
            if (data_ == nullptr) throw std::bad_alloc();
            size_ = count;
        }
        return data_;
    }
    T* data() { return data_; }

  private:
    T* data_ = nullptr;
    size_t size_ = 0;
};

}  // namespace ISA
}  // namespace simd
