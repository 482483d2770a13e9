// WKV-6 on a GPU, step by step: for head sizes and GPUs that the tensor-core kernels do not take.
#pragma once

#include "wkv6_blocks.cuh"

namespace {

// 128 threads share 16 rows or columns of a state, eight threads each. Any head size that is a multiple of 16.
constexpr int LINES = 16, PARTNERS = 8, PLAIN_THREADS = LINES * PARTNERS;
constexpr int STEPS = 8;  // loaded together

struct PlainShape {
    int n, stride;  // of a line of a state, with a gap so that lines lie in different banks
    __device__ __host__ explicit PlainShape(int64_t head_size) : n(static_cast<int>(head_size)), stride(n + PARTNERS) {}
};

__device__ __forceinline__ float sum_of_partners(float x) {
    for (int other = 1; other < PARTNERS; other *= 2) x += __shfl_xor_sync(gpu::ALL_LANES, x, other);
    return x;
}

// The decay, and in *log the log decay, of a raw w.
__device__ __forceinline__ float decay_of(float w, float* log = nullptr) {
    const float g = -expf(w);
    if (log) *log = g;
    return expf(g);
}

template <typename T>
__device__ __forceinline__ float load_float(const T* p) {
    return gpu::to_float(gpu::load(p));
}

// Of 16 value columns: out_t = sum_i x_t[i] (A[i] + u[i] p_t[i] q_t) and A[i] <- w_t[i] A[i] + p_t[i] q_t. Forwards
// that is y (x = r, p = k, q = v) with A = S, backwards dv (x = k, p = r, q = dy) with A = dL/dS.
template <typename T>
struct Scan {
    const T *x, *p, *q, *w;
    const float *u, *initial;
    T* out;
    float *final_state, *states;
};

inline size_t scan_bytes(int64_t n) {
    return sizeof(float) * (LINES * (n + PARTNERS) + 3 * STEPS * n + n + STEPS * LINES);
}

template <typename T, bool BACKWARDS>
__global__ void scan_steps(gpu::Sequences seqs, int64_t heads, int64_t head_size, Scan<T> in) {
    const PlainShape shape(head_size);
    const int n = shape.n, line = threadIdx.x / PARTNERS, partner = threadIdx.x % PARTNERS;
    float* x = reinterpret_cast<float*>(gpu::shared_memory());
    float *p = x + STEPS * n, *w = p + STEPS * n, *u = w + STEPS * n, *q = u + n, *A = q + STEPS * LINES;
    float* own = A + line * shape.stride;
    const int64_t groups = n / LINES, item = blockIdx.x / groups, head = item % heads, stride = heads * n;
    const int value = static_cast<int>(blockIdx.x % groups) * LINES;
    const Span rows = span(seqs, item / heads);
    for (int i = threadIdx.x; i < n; i += PLAIN_THREADS) u[i] = gpu::load(in.u + head * n + i);
    const auto element = [&](int i) { return static_cast<int64_t>(i) * n + value + line; };
    for (int i = partner; i < n; i += PARTNERS)
        own[i] = in.initial ? gpu::load(in.initial + item * n * n + element(i)) : 0.0f;
    const int length = static_cast<int>(rows.end - rows.begin), tiles = (length + STEPS - 1) / STEPS;
    for (int walked = 0; walked < tiles; walked++) {
        const int tile = BACKWARDS ? tiles - 1 - walked : walked;
        const int64_t at = (rows.begin + tile * STEPS) * stride + head * n;
        const int count = minimum(length - tile * STEPS, STEPS);
        __syncthreads();
        for (int i = threadIdx.x; i < count * n; i += PLAIN_THREADS) {
            const int64_t from = at + i / n * stride + i % n;
            x[i] = load_float(in.x + from);
            p[i] = load_float(in.p + from);
            w[i] = decay_of(load_float(in.w + from));
        }
        for (int i = threadIdx.x; i < count * LINES; i += PLAIN_THREADS)
            q[i] = load_float(in.q + at + i / LINES * stride + value + i % LINES);
        __syncthreads();
        if (in.states && tile * STEPS % CHUNK == 0) {
            float* to = in.states + ((rows.first_slot + tile * STEPS / CHUNK) * heads + head) * n * n;
            for (int i = partner; i < n; i += PARTNERS) gpu::store(to + element(i), own[i]);
        }
        for (int step = 0; step < count; step++) {
            const int t = BACKWARDS ? count - 1 - step : step;
            const float q_t = q[t * LINES + line];
            float out = 0.0f;
            for (int i = partner; i < n; i += PARTNERS) {
                const float new_value = p[t * n + i] * q_t;
                out += x[t * n + i] * (own[i] + u[i] * new_value);
                own[i] = w[t * n + i] * own[i] + new_value;
            }
            out = sum_of_partners(out);
            if (partner == 0) gpu::store(in.out + at + t * stride + value + line, gpu::from_float<T>(out));
        }
    }
    for (int i = partner; i < n; i += PARTNERS) gpu::store(in.final_state + item * n * n + element(i), own[i]);
}

inline size_t keys_bytes(int64_t n) {
    return sizeof(float) * (2 * LINES * (n + PARTNERS) + 2 * STEPS * n + 4 * STEPS * LINES + CHUNK * LINES);
}

// dr, dk, dw, du of 16 keys, dg by the telescoped rule: with A_t = rowsum(G_t S_t), dg_t = A_t - k_t dk'_t and
// A_{t-1} = dg_t + r_t dr'_t, formed afresh at the end of every chunk. Of the parts of sums that the caller expects,
// the first is the sum and the others are zero.
template <typename T, typename Out>
__global__ void backward_keys(gpu::Sequences seqs, int64_t heads, int64_t head_size, int64_t parts, Inputs<T> in,
                              const float* states, Gradients<T, Out> grad) {
    constexpr float DEAD = -17.0f;  // log decay below which g e^g is under fp32's resolution, but not the error of dg
    const PlainShape shape(head_size);
    const int n = shape.n, line = threadIdx.x / PARTNERS, partner = threadIdx.x % PARTNERS;
    float* v = reinterpret_cast<float*>(gpu::shared_memory());
    float *dy = v + STEPS * n, *r = dy + STEPS * n, *k = r + STEPS * LINES, *w = k + STEPS * LINES;
    float *log = w + STEPS * LINES, *dr = log + STEPS * LINES, *S = dr + CHUNK * LINES + line * shape.stride;
    float* G = S + LINES * shape.stride;
    const int64_t groups = n / LINES, item = blockIdx.x / groups, head = item % heads, stride = heads * n;
    const int64_t all = (seqs.offsets ? 1 : seqs.count) * seqs.length * stride;
    const int key = static_cast<int>(blockIdx.x % groups) * LINES;
    const Span rows = span(seqs, item / heads);
    const float u = gpu::load(in.u + head * n + key + line);
    const int64_t own_line = static_cast<int64_t>(key + line) * n;
    for (int j = partner; j < n; j += PARTNERS)
        G[j] = grad.dfinal ? gpu::load(grad.dfinal + item * n * n + own_line + j) : 0.0f;
    float du = 0.0f;
    const int length = static_cast<int>(rows.end - rows.begin);

    int64_t at = 0;
    int count = 0;
    const auto load_tile = [&](int tile) {
        at = (rows.begin + tile * STEPS) * stride + head * n;
        count = minimum(length - tile * STEPS, STEPS);
        __syncthreads();
        for (int i = threadIdx.x; i < count * n; i += PLAIN_THREADS) {
            const int64_t from = at + i / n * stride + i % n;
            v[i] = load_float(in.v + from);
            dy[i] = load_float(grad.dy + from);
        }
        for (int i = threadIdx.x; i < count * LINES; i += PLAIN_THREADS) {
            const int64_t from = at + i / LINES * stride + key + i % LINES;
            r[i] = load_float(in.r + from);
            k[i] = load_float(in.k + from);
            w[i] = decay_of(load_float(in.w + from), log + i);
        }
        __syncthreads();
    };

    for (int chunk = (length + CHUNK - 1) / CHUNK - 1; chunk >= 0; chunk--) {
        const int first = chunk * (CHUNK / STEPS), tiles = (minimum(length - chunk * CHUNK, CHUNK) + STEPS - 1) / STEPS;
        const float* start = states + ((rows.first_slot + chunk) * heads + head) * n * n + own_line;
        for (int j = partner; j < n; j += PARTNERS) S[j] = gpu::load(start + j);
        for (int tile = first; tile < first + tiles; tile++) {
            load_tile(tile);
            for (int t = 0; t < count; t++) {
                const int i = t * LINES + line;
                float sum = 0.0f;
                for (int j = partner; j < n; j += PARTNERS) {
                    sum += S[j] * dy[t * n + j];
                    S[j] = w[i] * S[j] + k[i] * v[t * n + j];
                }
                sum = sum_of_partners(sum);
                if (partner == 0) dr[(tile - first) * STEPS * LINES + i] = sum;
            }
        }
        __syncwarp();
        float A = 0.0f;
        for (int j = partner; j < n; j += PARTNERS) A += G[j] * S[j];
        A = sum_of_partners(A);
        for (int tile = first + tiles - 1; tile >= first; tile--) {
            load_tile(tile);
            for (int t = count - 1; t >= 0; t--) {
                const int i = t * LINES + line;
                float dk = 0.0f, v_dy = 0.0f;
                for (int j = partner; j < n; j += PARTNERS) {
                    dk += G[j] * v[t * n + j];
                    v_dy += v[t * n + j] * dy[t * n + j];
                    G[j] = w[i] * G[j] + r[i] * dy[t * n + j];
                }
                dk = sum_of_partners(dk);
                v_dy = sum_of_partners(v_dy);
                const float dr_t = dr[(tile - first) * STEPS * LINES + i], dg = A - k[i] * dk;
                A = dg + r[i] * dr_t;
                du += r[i] * k[i] * v_dy;
                if (partner == 0) {
                    const int64_t to = at + t * stride + key + line;
                    gpu::store(grad.dr + to, gpu::from_float<Out>(dr_t + u * k[i] * v_dy));
                    gpu::store(grad.dk + to, gpu::from_float<Out>(dk + u * r[i] * v_dy));
                    gpu::store(grad.dw + to, gpu::from_float<Out>(log[i] < DEAD ? 0.0f : log[i] * dg));
                    for (int64_t part = 1; part < parts; part++)
                        for (Out* x : {grad.dr, grad.dk, grad.dw})
                            gpu::store(x + part * all + to, gpu::from_float<Out>(0.0f));
                }
            }
        }
    }
    if (partner == 0) {
        for (int64_t part = 0; part < parts; part++)
            gpu::store(grad.du + (part * seqs.count * heads + item) * n + key + line, part ? 0.0f : du);
    }
}

}  // namespace
