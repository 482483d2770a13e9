// WKV-7 on a GPU, step by step: for head sizes and GPUs that the tensor-core kernels do not take.
#pragma once

#include "wkv7_inputs.cuh"

namespace {

// One step's vectors for the whole block, `count` of them side by side; the second is the raw decay if `decays`.
template <typename T, int N>
__device__ __forceinline__ void stage(float* to, int64_t at, const T* const (&from)[5], int count, bool decays) {
    __syncthreads();
    for (int i = 0; i < count; i++) {
        const float x = gpu::to_float(gpu::load(from[i] + at + threadIdx.x));
        to[i * N + threadIdx.x] = decays && i == 1 ? expf(-expf(x)) : x;
    }
    __syncthreads();
}

// A block per sequence and head, a thread per value: its row of the state.
template <typename T, int N>
__global__ void __launch_bounds__(N, 1) plain_forward(Sequences seqs, int64_t heads, Inputs<T> in, const float* state,
                                                      T* y, float* final_state, float* states) {
    float* vectors = reinterpret_cast<float*>(gpu::shared_memory());
    const float *r = vectors, *w = r + N, *k = w + N, *a = k + N, *b = a + N;
    const int64_t item = blockIdx.x, sequence = item / heads, head = item % heads;
    const int64_t begin = seqs.begin(sequence), end = seqs.end(sequence), row = threadIdx.x;
    const T* const staged[5] = {in.r, in.w, in.k, in.a, in.b};
    float S[N];
#pragma unroll
    for (int j = 0; j < N; j++) S[j] = state ? gpu::load(state + (item * N + row) * N + j) : 0.0f;
#pragma unroll 1
    for (int64_t t = begin; t < end; t++) {
        const int64_t at = (t * heads + head) * N;
        if (states && (t - begin) % CHUNK == 0) {
            const int64_t slot = seqs.first_slot(sequence, CHUNK) + (t - begin) / CHUNK;
#pragma unroll
            for (int j = 0; j < N; j++) gpu::store(states + ((slot * heads + head) * N + row) * N + j, S[j]);
        }
        stage<T, N>(vectors, at, staged, 5, true);
        const float v = gpu::to_float(gpu::load(in.v + at + row));
        float sa = 0, out = 0;
#pragma unroll
        for (int j = 0; j < N; j++) sa += S[j] * a[j];
#pragma unroll
        for (int j = 0; j < N; j++) {
            S[j] = S[j] * w[j] + sa * b[j] + v * k[j];
            out += S[j] * r[j];
        }
        gpu::store(y + at + row, gpu::from_float<T>(out));
    }
#pragma unroll
    for (int j = 0; j < N; j++) gpu::store(final_state + (item * N + row) * N + j, S[j]);
}

// With G_t = dL/dS_t, the current output included:
//
//     dv = G k        dsa = G b        dk = G^T v        db = G^T sa        G_{t-1} = G diag(w) + dsa a^T
//     dr_t = S_t^T dy        da_t = S_{t-1}^T dsa
//
// The chunks are taken in reverse. In each the block walks four times, from the kept state or from G, never dividing a
// state back: rows of S for sa, rows of G for dsa, columns of G, columns of S. G lies in grad.state between the chunks.
// The gradient of the log decay, colsum(G_t S_{t-1}) w_t, follows from them: with P_t = colsum((G_t - dy r^T) S_t),
//
//     dg_t = P_{t-1} - a da        P_t = dg_t + k dk + b db - r dr
//
// and P is formed afresh at the start of every chunk, so rounding errors add up over CHUNK steps at most.
template <typename T, int N>
__global__ void __launch_bounds__(N, 1) plain_backward(Sequences seqs, int64_t heads, Inputs<T> in, const float* states,
                                                    const T* dy, const float* dfinal, Gradients grad) {
    float* vectors = reinterpret_cast<float*>(gpu::shared_memory());
    float *sas = vectors + 5 * N, *dsas = sas + CHUNK * N, *change = dsas + CHUNK * N;  // (CHUNK, N) each
    const int64_t item = blockIdx.x, sequence = item / heads, head = item % heads, i = threadIdx.x;
    const int64_t begin = seqs.begin(sequence), end = seqs.end(sequence), square = N * N;
    const bool parts = grad.splits > 1;
    float* G = grad.state + item * square;
#pragma unroll 4
    for (int j = 0; j < N; j++) {
        gpu::store(G + j * N + i, dfinal ? gpu::load(dfinal + item * square + j * N + i) : 0.0f);
    }
    const float *v0 = vectors, *v1 = v0 + N, *v2 = v1 + N, *v3 = v2 + N, *v4 = v3 + N;  // what was staged
    for (int64_t chunk = (end - begin - 1) / CHUNK; chunk >= 0; chunk--) {
        const int64_t t0 = begin + chunk * CHUNK, slot = seqs.first_slot(sequence, CHUNK) + chunk;
        const int steps = static_cast<int>(end - t0 < CHUNK ? end - t0 : CHUNK);
        const float* S_begin = states + (slot * heads + head) * square;
        const auto at = [&](int t) { return ((t0 + t) * heads + head) * N; };
        const auto own = [&](const T* x, int t) { return gpu::to_float(gpu::load(x + at(t) + i)); };
        float x[N];

#pragma unroll
        for (int j = 0; j < N; j++) x[j] = gpu::load(S_begin + i * N + j);
#pragma unroll 1
        for (int t = 0; t < steps; t++) {
            stage<T, N>(vectors, at(t), {in.a, in.w, in.b, in.k, nullptr}, 4, true);
            const float v = own(in.v, t);
            float sa = 0;
#pragma unroll
            for (int j = 0; j < N; j++) sa += x[j] * v0[j];
#pragma unroll
            for (int j = 0; j < N; j++) x[j] = x[j] * v1[j] + sa * v2[j] + v * v3[j];
            sas[t * N + i] = sa;
        }

        __syncthreads();  // G was stored by columns
#pragma unroll
        for (int j = 0; j < N; j++) x[j] = gpu::load(G + i * N + j);
#pragma unroll 1
        for (int t = steps - 1; t >= 0; t--) {
            stage<T, N>(vectors, at(t), {in.r, in.w, in.k, in.a, in.b}, 5, true);
            const float dout = own(dy, t);
            float dv = 0, dsa = 0;
#pragma unroll
            for (int j = 0; j < N; j++) {
                x[j] += dout * v0[j];
                dv += x[j] * v2[j];
                dsa += x[j] * v4[j];
            }
#pragma unroll
            for (int j = 0; j < N; j++) x[j] = x[j] * v1[j] + dsa * v3[j];
            dsas[t * N + i] = dsa;
            gpu::store(static_cast<T*>(grad.v) + at(t) + i, gpu::from_float<T>(dv));
        }

        __syncthreads();  // from here on the thread owns a column
#pragma unroll
        for (int j = 0; j < N; j++) x[j] = gpu::load(G + j * N + i);
#pragma unroll 1
        for (int t = steps - 1; t >= 0; t--) {
            stage<T, N>(vectors, at(t), {in.v, dy, nullptr, nullptr, nullptr}, 2, false);
            const float r = own(in.r, t), w = expf(-expf(own(in.w, t))), a = own(in.a, t);
            const float *sa = sas + t * N, *dsa = dsas + t * N;
            float dk = 0, db = 0;
#pragma unroll
            for (int j = 0; j < N; j++) {
                x[j] += v1[j] * r;
                dk += x[j] * v0[j];
                db += x[j] * sa[j];
                x[j] = x[j] * w + dsa[j] * a;
            }
            change[t * N + i] = own(in.k, t) * dk + own(in.b, t) * db;
            store_part<T>(grad.k, parts, at(t) + i, dk);
            store_part<T>(grad.b, parts, at(t) + i, db);
        }
        float P = 0;
#pragma unroll
        for (int j = 0; j < N; j++) {
            gpu::store(G + j * N + i, x[j]);
            P += x[j] * gpu::load(S_begin + j * N + i);
        }

#pragma unroll
        for (int j = 0; j < N; j++) x[j] = gpu::load(S_begin + j * N + i);
#pragma unroll 1
        for (int t = 0; t < steps; t++) {
            stage<T, N>(vectors, at(t), {in.v, dy, nullptr, nullptr, nullptr}, 2, false);
            const float g = -expf(own(in.w, t)), w = expf(g), k = own(in.k, t), b = own(in.b, t);
            const float *sa = sas + t * N, *dsa = dsas + t * N;
            float dr = 0, da = 0;
#pragma unroll
            for (int j = 0; j < N; j++) {
                da += x[j] * dsa[j];
                x[j] = x[j] * w + sa[j] * b + v0[j] * k;
                dr += x[j] * v1[j];
            }
            const float dg = P - own(in.a, t) * da;
            P = dg + change[t * N + i] - own(in.r, t) * dr;
            store_part<T>(grad.r, parts, at(t) + i, dr);
            store_part<T>(grad.a, parts, at(t) + i, da);
            store_part<T>(grad.w, parts, at(t) + i, g < DEAD ? 0.0f : g * dg);
            for (int split = 1; split < grad.splits; split++) {  // all of the sums are in the first part
                const int64_t there = split * seqs.end(seqs.count - 1) * heads * N + at(t) + i;
                for (void* part : {grad.r, grad.w, grad.k, grad.a, grad.b}) store_part<T>(part, true, there, 0.0f);
            }
        }
    }
}

}  // namespace
