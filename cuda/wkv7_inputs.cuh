// WKV-7 on a GPU: what all its kernels take.
#pragma once

#include "gpu.cuh"

namespace {

using gpu::bf16;
using gpu::Pack;
using gpu::Sequences;
using gpu::WARP;

constexpr int CHUNK = 64;       // steps between the states that are kept
constexpr float DEAD = -17.0f;  // log decay below which its gradient is under fp32's resolution

template <typename T>
struct Inputs {
    const T *r, *w, *k, *v, *a, *b;
};

// Gradients of the inputs, dv in their dtype. With several splits of the value rows, the others are fp32 and have the
// splits as their first dimension: parts of sums.
struct Gradients {
    void *r, *w, *k, *v, *a, *b;
    float* state;
    int splits;
};

template <typename T>
__device__ __forceinline__ void store_part(void* to, bool parts, int64_t at, float x) {
    if (parts) {
        gpu::store(static_cast<float*>(to) + at, x);
    } else {
        gpu::store(static_cast<T*>(to) + at, gpu::from_float<T>(x));
    }
}

}  // namespace
