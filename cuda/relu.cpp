// The activation of RWKV's channel mix on the CPU, max(x, 0)^2, and its gradient, each in one pass over memory.
#include <algorithm>
#include <cstdint>

#include "simd.h"

namespace {

using simd::FLOATS;
using simd::vecf;

constexpr int64_t PIECE = 1 << 14;  // elements that a thread takes at a time

inline vecf positive(vecf x) { return x < 0.0f ? vecf{} : x; }  // NaN stays NaN

// f(i, count) of every piece; the last may fill no vector.
template <typename F>
void each_piece(int64_t count, F f) {
#pragma omp parallel for schedule(static) if (count > PIECE)
    for (int64_t begin = 0; begin < count; begin += PIECE) f(begin, std::min(PIECE, count - begin));
}

template <typename T>
void forward(int64_t count, const T* x, T* out) {
    each_piece(count, [=](int64_t begin, int64_t size) {
        int64_t i = begin;
        for (; i + FLOATS <= begin + size; i += FLOATS) {
            const vecf p = positive(simd::load(x + i));
            simd::store(out + i, p * p);
        }
        for (; i < begin + size; i++) {
            const float p = float(x[i]) < 0 ? 0 : float(x[i]);
            out[i] = T(p * p);
        }
    });
}

template <typename T>
void backward(int64_t count, const T* x, const T* slope, T* dx) {
    each_piece(count, [=](int64_t begin, int64_t size) {
        int64_t i = begin;
        for (; i + FLOATS <= begin + size; i += FLOATS)
            simd::store(dx + i, 2.0f * positive(simd::load(x + i)) * simd::load(slope + i));
        for (; i < begin + size; i++) dx[i] = T(2 * (float(x[i]) < 0 ? 0 : float(x[i])) * float(slope[i]));
    });
}

}  // namespace

EXPORT(visualrwkv_relu_squared)(int64_t count, const float* x, float* out) { forward(count, x, out); }
EXPORT(visualrwkv_relu_squared_bf16)(int64_t count, const simd::bf16* x, simd::bf16* out) { forward(count, x, out); }
EXPORT(visualrwkv_relu_squared_backward)(int64_t count, const float* x, const float* slope, float* dx) {
    backward(count, x, slope, dx);
}
EXPORT(visualrwkv_relu_squared_backward_bf16)(int64_t count, const simd::bf16* x, const simd::bf16* slope,
                                              simd::bf16* dx) {
    backward(count, x, slope, dx);
}
