// What surrounds the recurrence of RWKV-7, each of three steps in one pass over memory; formulas in gates7.cpp.
//
// Layout: everything (rows, C), C being heads of N channels, fp32 or bf16; weights (1, C), (4, C) and (3, C) fp32 in the
// order of the enums. A warp has a row of a head, PER = N / 32 neighbouring channels in each lane, so that what is summed
// over a head stays in registers; a block has PIECE rows of one head.
#include "gpu.cuh"

namespace {

using gpu::read;
using gpu::Values;
using gpu::WARP;
using gpu::warp_sum;
using gpu::write;

constexpr int WARPS = 8, PIECE = 64;  // visualrwkv/ops/gates7.py sizes the partial sums by PIECE
constexpr float LEAST = 1e-12f;       // length that kk is divided by

enum Before { DECAY, RATE, REMOVAL, REPLACEMENT, BEFORE };
enum After { BONUS, SCALE, SHIFT, AFTER };

struct Sizes {
    int64_t rows, heads, N;

    __host__ __device__ int64_t C() const { return heads * N; }
};

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ __forceinline__ float raw_decay(float z) { return fminf(z, 0.0f) - log1pf(expf(-fabsf(z))) - 0.5f; }

template <int PER>
__device__ __forceinline__ float head_sum(const Values<PER>& x) {
    float s = x.at[0];
#pragma unroll
    for (int i = 1; i < PER; i++) s += x.at[i];
    return warp_sum(s);
}

// f of every channel of a lane
template <int PER, typename F>
__device__ __forceinline__ Values<PER> map(F f) {
    Values<PER> y;
#pragma unroll
    for (int i = 0; i < PER; i++) y.at[i] = f(i);
    return y;
}

// Calls work(at, p, sums) for the rows of this warp: where its lane's channels are, their COUNT weights, and what to add
// their gradients to. The block's sums go to `parts` (pieces, COUNT, C), if that is not null, warp after warp.
template <int PER, int COUNT, typename Work>
__device__ __forceinline__ void each_row(const Sizes& sizes, const float* weights, float* parts, Work work) {
    const int64_t head = blockIdx.x % sizes.heads, piece = blockIdx.x / sizes.heads, C = sizes.C();
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int64_t channel = head * sizes.N + lane * PER;
    Values<PER> p[COUNT], sums[COUNT] = {};
#pragma unroll
    for (int k = 0; k < COUNT; k++) p[k] = read<PER>(weights + k * C + channel);
    const int64_t end = (piece + 1) * PIECE < sizes.rows ? (piece + 1) * PIECE : sizes.rows;
    for (int64_t row = piece * PIECE + warp; row < end; row += WARPS) work(row * C + channel, p, sums);
    if (!parts) return;
    Values<PER>* shared = reinterpret_cast<Values<PER>*>(gpu::shared_memory());  // (COUNT, WARP)
    for (int turn = 0; turn < WARPS; turn++) {
        __syncthreads();
        if (warp != turn) continue;
#pragma unroll
        for (int k = 0; k < COUNT; k++) {
            Values<PER>& sum = shared[k * WARP + lane];
            sum = map<PER>([&](int i) { return (turn ? sum.at[i] : 0.0f) + sums[k].at[i]; });
        }
    }
    __syncthreads();
    for (int k = warp; k < COUNT; k += WARPS) write(parts + (piece * COUNT + k) * C + channel, shared[k * WARP + lane]);
}

template <typename T>
struct ValueRows {
    const T *v, *share, *first;
    const float* share0;
    const T* dvalue;
    T *value, *dv, *dshare, *dfirst;
    float* dshare0;
};

template <typename T, int PER>
__global__ void __launch_bounds__(WARPS* WARP) values_forward(Sizes sizes, ValueRows<T> t) {
    each_row<PER, 1>(sizes, t.share0, nullptr, [&](int64_t at, const Values<PER>* p, Values<PER>*) {
        const Values<PER> v = read<PER>(t.v + at), share = read<PER>(t.share + at), first = read<PER>(t.first + at);
        write(t.value + at, map<PER>([&](int i) {
                  return v.at[i] + (first.at[i] - v.at[i]) * sigmoid(share.at[i] + p->at[i]);
              }));
    });
}

template <typename T, int PER>
__global__ void __launch_bounds__(WARPS* WARP) values_backward(Sizes sizes, ValueRows<T> t) {
    each_row<PER, 1>(sizes, t.share0, t.dshare0, [&](int64_t at, const Values<PER>* p, Values<PER>* sums) {
        const Values<PER> v = read<PER>(t.v + at), share = read<PER>(t.share + at), first = read<PER>(t.first + at);
        const Values<PER> slope = read<PER>(t.dvalue + at);
        Values<PER> kept, taken, moved;
#pragma unroll
        for (int i = 0; i < PER; i++) {
            const float part = sigmoid(share.at[i] + p->at[i]);
            taken.at[i] = slope.at[i] * part;
            kept.at[i] = slope.at[i] - taken.at[i];
            moved.at[i] = taken.at[i] * (1.0f - part) * (first.at[i] - v.at[i]);
            sums->at[i] += moved.at[i];
        }
        write(t.dv + at, kept);
        write(t.dfirst + at, taken);
        write(t.dshare + at, moved);
    });
}

template <typename T>
struct BeforeRows {
    const T *k, *decay, *rate;
    const float* weights;
    const T *dw, *dkey, *da, *db;
    T *w, *key, *a, *b, *dk, *ddecay, *drate;
    float* dweights;
};

template <typename T, int PER>
__global__ void __launch_bounds__(WARPS* WARP) before_forward(Sizes sizes, BeforeRows<T> t) {
    each_row<PER, BEFORE>(sizes, t.weights, nullptr, [&](int64_t at, const Values<PER>* p, Values<PER>*) {
        const Values<PER> k = read<PER>(t.k + at), decay = read<PER>(t.decay + at), raw = read<PER>(t.rate + at);
        const Values<PER> q = map<PER>([&](int i) { return k.at[i] * p[REMOVAL].at[i]; });
        const float inverse = 1.0f / fmaxf(sqrtf(head_sum(map<PER>([&](int i) { return q.at[i] * q.at[i]; }))), LEAST);
        const Values<PER> rate = map<PER>([&](int i) { return sigmoid(raw.at[i] + p[RATE].at[i]); });
        write(t.w + at, map<PER>([&](int i) { return raw_decay(decay.at[i] + p[DECAY].at[i]); }));
        write(t.key + at, map<PER>([&](int i) {
                  return k.at[i] * (1.0f + (rate.at[i] - 1.0f) * p[REPLACEMENT].at[i]);
              }));
        write(t.a + at, map<PER>([&](int i) { return -q.at[i] * inverse; }));
        write(t.b + at, map<PER>([&](int i) { return q.at[i] * inverse * rate.at[i]; }));
    });
}

template <typename T, int PER>
__global__ void __launch_bounds__(WARPS* WARP) before_backward(Sizes sizes, BeforeRows<T> t) {
    each_row<PER, BEFORE>(sizes, t.weights, t.dweights, [&](int64_t at, const Values<PER>* p, Values<PER>* sums) {
        const Values<PER> k = read<PER>(t.k + at), decay = read<PER>(t.decay + at), raw = read<PER>(t.rate + at);
        const Values<PER> dw = read<PER>(t.dw + at), dkey = read<PER>(t.dkey + at);
        const Values<PER> da = read<PER>(t.da + at), db = read<PER>(t.db + at);
        const Values<PER> q = map<PER>([&](int i) { return k.at[i] * p[REMOVAL].at[i]; });
        const float length = sqrtf(head_sum(map<PER>([&](int i) { return q.at[i] * q.at[i]; })));
        const float inverse = 1.0f / fmaxf(length, LEAST);
        const Values<PER> rate = map<PER>([&](int i) { return sigmoid(raw.at[i] + p[RATE].at[i]); });
        const Values<PER> dkk = map<PER>([&](int i) { return db.at[i] * rate.at[i] - da.at[i]; });
        const float sum = head_sum(map<PER>([&](int i) { return q.at[i] * inverse * dkk.at[i]; }));
        const float along = length > LEAST ? sum : 0.0f;  // a length below LEAST does not count
        Values<PER> dk, ddecay, drate;
#pragma unroll
        for (int i = 0; i < PER; i++) {
            const float kk = q.at[i] * inverse, dq = (dkk.at[i] - kk * along) * inverse, slope = dkey.at[i];
            dk.at[i] = slope * (1.0f + (rate.at[i] - 1.0f) * p[REPLACEMENT].at[i]) + dq * p[REMOVAL].at[i];
            sums[REMOVAL].at[i] += dq * k.at[i];
            sums[REPLACEMENT].at[i] += slope * k.at[i] * (rate.at[i] - 1.0f);
            const float through = slope * k.at[i] * p[REPLACEMENT].at[i] + db.at[i] * kk;
            drate.at[i] = through * rate.at[i] * (1.0f - rate.at[i]);
            sums[RATE].at[i] += drate.at[i];
            ddecay.at[i] = dw.at[i] * sigmoid(-decay.at[i] - p[DECAY].at[i]);
            sums[DECAY].at[i] += ddecay.at[i];
        }
        write(t.dk + at, dk);
        write(t.ddecay + at, ddecay);
        write(t.drate + at, drate);
    });
}

template <typename T>
struct AfterRows {
    const T *y, *r, *key, *value, *gate;
    const float* weights;
    float eps;
    const T* dout;
    T *out, *dy, *dr, *dkey, *dvalue, *dgate;
    float* dweights;
};

// A row of a head: y normalised, and the weight of its current token's value.
template <typename T, int PER>
struct Head {
    Values<PER> y, r, key, value, gate;
    float scale, own;

    __device__ __forceinline__ Head(const AfterRows<T>& t, int64_t at, const Values<PER>& bonus, int64_t N)
        : y(read<PER>(t.y + at)), r(read<PER>(t.r + at)), key(read<PER>(t.key + at)), value(read<PER>(t.value + at)),
          gate(read<PER>(t.gate + at)) {
        const float mean = head_sum(y) / N;
        own = head_sum(map<PER>([&](int i) { return r.at[i] * key.at[i] * bonus.at[i]; }));
        y = map<PER>([&](int i) { return y.at[i] - mean; });
        scale = 1.0f / sqrtf(head_sum(map<PER>([&](int i) { return y.at[i] * y.at[i]; })) / N + t.eps);
        y = map<PER>([&](int i) { return y.at[i] * scale; });
    }
    __device__ __forceinline__ float whole(int i, const Values<PER>* p) const {
        return y.at[i] * p[SCALE].at[i] + p[SHIFT].at[i] + own * value.at[i];
    }
};

template <typename T, int PER>
__global__ void __launch_bounds__(WARPS* WARP) after_forward(Sizes sizes, AfterRows<T> t) {
    each_row<PER, AFTER>(sizes, t.weights, nullptr, [&](int64_t at, const Values<PER>* p, Values<PER>*) {
        const Head<T, PER> h(t, at, p[BONUS], sizes.N);
        write(t.out + at, map<PER>([&](int i) { return h.whole(i, p) * h.gate.at[i]; }));
    });
}

template <typename T, int PER>
__global__ void __launch_bounds__(WARPS* WARP) after_backward(Sizes sizes, AfterRows<T> t) {
    each_row<PER, AFTER>(sizes, t.weights, t.dweights, [&](int64_t at, const Values<PER>* p, Values<PER>* sums) {
        const Head<T, PER> h(t, at, p[BONUS], sizes.N);
        const Values<PER> d = read<PER>(t.dout + at), du = map<PER>([&](int i) { return d.at[i] * h.gate.at[i]; });
        const Values<PER> dnormal = map<PER>([&](int i) { return du.at[i] * p[SCALE].at[i]; });
        const float slope = head_sum(dnormal) / sizes.N;
        const float share = head_sum(map<PER>([&](int i) { return dnormal.at[i] * h.y.at[i]; })) / sizes.N;
        const float own = head_sum(map<PER>([&](int i) { return du.at[i] * h.value.at[i]; }));
        write(t.dgate + at, map<PER>([&](int i) { return d.at[i] * h.whole(i, p); }));
        write(t.dvalue + at, map<PER>([&](int i) { return du.at[i] * h.own; }));
        write(t.dy + at, map<PER>([&](int i) { return h.scale * (dnormal.at[i] - slope - h.y.at[i] * share); }));
        write(t.dr + at, map<PER>([&](int i) { return own * h.key.at[i] * p[BONUS].at[i]; }));
        write(t.dkey + at, map<PER>([&](int i) { return own * h.r.at[i] * p[BONUS].at[i]; }));
#pragma unroll
        for (int i = 0; i < PER; i++) {
            sums[BONUS].at[i] += own * h.r.at[i] * h.key.at[i];
            sums[SCALE].at[i] += du.at[i] * h.y.at[i];
            sums[SHIFT].at[i] += du.at[i];
        }
    });
}

// Starts a kernel on t; `count` weights have gradients, whose sums are in shared memory.
template <typename Rows>
int start(void (*kernel)(Sizes, Rows), const Sizes& sizes, const Rows& t, int count, cudaStream_t stream) {
    const int64_t pieces = (sizes.rows + PIECE - 1) / PIECE;
    if (!kernel || sizes.rows < 1 || sizes.heads < 1 || pieces > 0x7fffffff / sizes.heads) return 1;
    const dim3 grid(static_cast<unsigned>(pieces * sizes.heads)), block(WARPS * WARP);
    return gpu::launch(kernel, grid, block, count * sizes.N * sizeof(float), stream, sizes, t);
}

// Of a kernel the one for this head size, or null.
#define SIZED(kernel, T, N) \
    (N == 32 ? kernel<T, 1> : N == 64 ? kernel<T, 2> : N == 128 ? kernel<T, 4> : nullptr)

// Calls `work` with a value of the rows' type.
template <typename Work>
int typed(int64_t dtype, Work work) {
    return dtype == gpu::FLOAT32 ? work(float{}) : dtype == gpu::BFLOAT16 ? work(gpu::bf16{}) : 1;
}

template <typename T>
const T* in(const void* p) {
    return static_cast<const T*>(p);
}
template <typename T>
T* to(void* p) {
    return static_cast<T*>(p);
}

}  // namespace

// Gradients of weights are (pieces, …): partial sums for the caller to add up in a fixed order. eps counts in `after`.

extern "C" int visualrwkv_cuda_mix_values(int64_t dtype, int64_t rows, int64_t heads, int64_t N, float, const void* v,
                                          const void* share, const void* first, const float* share0, void* value,
                                          cudaStream_t stream) {
    return typed(dtype, [&](auto x) {
        typedef decltype(x) T;
        ValueRows<T> t = {in<T>(v), in<T>(share), in<T>(first), share0};
        t.value = to<T>(value);
        return start<ValueRows<T>>(SIZED(values_forward, T, N), {rows, heads, N}, t, 0, stream);
    });
}

extern "C" int visualrwkv_cuda_mix_values_backward(int64_t dtype, int64_t rows, int64_t heads, int64_t N, float,
                                                   const void* v, const void* share, const void* first,
                                                   const float* share0, const void* dvalue, void* dv, void* dshare,
                                                   void* dfirst, float* dshare0, cudaStream_t stream) {
    return typed(dtype, [&](auto x) {
        typedef decltype(x) T;
        ValueRows<T> t = {in<T>(v), in<T>(share), in<T>(first), share0, in<T>(dvalue)};
        t.dv = to<T>(dv), t.dshare = to<T>(dshare), t.dfirst = to<T>(dfirst), t.dshare0 = dshare0;
        return start<ValueRows<T>>(SIZED(values_backward, T, N), {rows, heads, N}, t, 1, stream);
    });
}

extern "C" int visualrwkv_cuda_before_wkv7(int64_t dtype, int64_t rows, int64_t heads, int64_t N, float, const void* k,
                                           const void* decay, const void* rate, const float* weights, void* w,
                                           void* key, void* a, void* b, cudaStream_t stream) {
    return typed(dtype, [&](auto x) {
        typedef decltype(x) T;
        BeforeRows<T> t = {in<T>(k), in<T>(decay), in<T>(rate), weights};
        t.w = to<T>(w), t.key = to<T>(key), t.a = to<T>(a), t.b = to<T>(b);
        return start<BeforeRows<T>>(SIZED(before_forward, T, N), {rows, heads, N}, t, 0, stream);
    });
}

extern "C" int visualrwkv_cuda_before_wkv7_backward(int64_t dtype, int64_t rows, int64_t heads, int64_t N, float,
                                                    const void* k, const void* decay, const void* rate,
                                                    const float* weights, const void* dw, const void* dkey,
                                                    const void* da, const void* db, void* dk, void* ddecay, void* drate,
                                                    float* dweights, cudaStream_t stream) {
    return typed(dtype, [&](auto x) {
        typedef decltype(x) T;
        BeforeRows<T> t = {in<T>(k), in<T>(decay), in<T>(rate), weights, in<T>(dw), in<T>(dkey), in<T>(da), in<T>(db)};
        t.dk = to<T>(dk), t.ddecay = to<T>(ddecay), t.drate = to<T>(drate), t.dweights = dweights;
        return start<BeforeRows<T>>(SIZED(before_backward, T, N), {rows, heads, N}, t, BEFORE, stream);
    });
}

extern "C" int visualrwkv_cuda_after_wkv7(int64_t dtype, int64_t rows, int64_t heads, int64_t N, float eps,
                                          const void* y, const void* r, const void* key, const void* value,
                                          const void* gate, const float* weights, void* out, cudaStream_t stream) {
    return typed(dtype, [&](auto x) {
        typedef decltype(x) T;
        AfterRows<T> t = {in<T>(y), in<T>(r), in<T>(key), in<T>(value), in<T>(gate), weights, eps};
        t.out = to<T>(out);
        return start<AfterRows<T>>(SIZED(after_forward, T, N), {rows, heads, N}, t, 0, stream);
    });
}

extern "C" int visualrwkv_cuda_after_wkv7_backward(int64_t dtype, int64_t rows, int64_t heads, int64_t N, float eps,
                                                   const void* y, const void* r, const void* key, const void* value,
                                                   const void* gate, const float* weights, const void* dout, void* dy,
                                                   void* dr, void* dkey, void* dvalue, void* dgate, float* dweights,
                                                   cudaStream_t stream) {
    return typed(dtype, [&](auto x) {
        typedef decltype(x) T;
        AfterRows<T> t = {in<T>(y), in<T>(r), in<T>(key), in<T>(value), in<T>(gate), weights, eps, in<T>(dout)};
        t.dy = to<T>(dy), t.dr = to<T>(dr), t.dkey = to<T>(dkey), t.dvalue = to<T>(dvalue), t.dgate = to<T>(dgate);
        t.dweights = dweights;
        return start<AfterRows<T>>(SIZED(after_backward, T, N), {rows, heads, N}, t, AFTER, stream);
    });
}
