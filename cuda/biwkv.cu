// bi-WKV (Vision-RWKV, equation 5). Per channel, with x_i = e^{k_i} and a symmetric sum over all positions,
//
//     M(p)_t = e^u p_t + sum_{i != t} e^{-(|t-i|-1) w} p_i        y = M(x v) / M(x)
//
// M is a past P_t (i < t) and a future F_t (i > t), two scans: P_{t+1} = e^{-w} P_t + p_t, F the same from the other
// end. A sum is held as a pair times a power of two: (a, b, m) is (a, b) 2^m with m near the largest exponent in it, so
// neither a wide spread of k nor a long decay can overflow or vanish. Decays over more than STEPS tokens are taken off
// exponents, so that rounding does not build up over T.
//
// Layout: w, u (C); k, v, y (B, T, C), one channel per lane. A thread holds STEPS tokens of a channel in registers, a
// block CHUNK tokens of 32 channels; chunks learn of each other through their sums in the workspace:
//
//     chunk_sums   the sums of every chunk, as its neighbours on both sides see them
//     scan         in place: what reaches every chunk from outside, on both sides
//     outputs      y
//
// so k and v are read twice and nothing else of their size is touched; a single chunk needs the last kernel alone. The
// gradient is the same operator on a_t = dy_t / M(x)_t and b_t = a_t y_t, and needs chunk_sums, scan, reader_sums, scan
// and gradients: k and v are read three times, dy twice.
#include "gpu.cuh"

namespace {

using gpu::WARP;

constexpr int STEPS = 8;                // tokens of a thread
constexpr int WARPS = 8;                // of a block, at most
constexpr int CHUNK = STEPS * WARPS;    // tokens of a block; visualrwkv/ops/biwkv.py sizes the workspace by it
constexpr float EMPTY = -1e30f;         // the exponent of a sum of nothing: below all others, and still finite
constexpr float LOG2_E = 1.44269504f;

// Of a result that is at most 1 beside a sum that is at least 1, what is below fp32's normal range may be 0.
__device__ __forceinline__ float exp2_of(float x) {
#ifdef CUDA_EMULATED
    return exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// (a, b) 2^m
struct Sums {
    float a, b, m;

    __device__ void add(float a_new, float b_new, float m_new) {
        const float rise = m_new - m, small = exp2_of(-fabsf(rise));
        const float of_old = rise > 0 ? small : 1.0f, of_new = rise > 0 ? 1.0f : small;
        a = a * of_old + a_new * of_new;
        b = b * of_old + b_new * of_new;
        m = fmaxf(m, m_new);
    }
    __device__ void add(const Sums& other) { add(other.a, other.b, other.m); }
    __device__ Sums faded(float exponent) const { return {a, b, m - exponent}; }
};

__device__ __forceinline__ Sums nothing() { return {0.0f, 0.0f, EMPTY}; }

struct Shape {
    int64_t B, T, C;

    __host__ __device__ int64_t chunks() const { return (T + CHUNK - 1) / CHUNK; }
    __host__ __device__ int64_t groups() const { return (C + WARP - 1) / WARP; }
};

// Which tokens and channel a thread has; `count` tokens are real, none of a channel past the last.
struct Place {
    int64_t picture, chunk, channel, first;  // first: of its elements in (B, T, C)
    int warp, lane, count;

    __device__ Place(const Shape& shape) {
        const int64_t block = blockIdx.x, group = block / shape.chunks() % shape.groups();
        warp = threadIdx.x / WARP;
        lane = threadIdx.x % WARP;
        chunk = block % shape.chunks();
        picture = block / shape.chunks() / shape.groups();
        channel = group * WARP + lane;
        const int64_t token = chunk * CHUNK + warp * STEPS, left = shape.T - token;
        count = channel >= shape.C || left <= 0 ? 0 : left < STEPS ? static_cast<int>(left) : STEPS;
        first = (picture * shape.T + token) * shape.C + channel;
    }
};

// Where the sums of a chunk lie in the workspace: (past and future, B, chunks, 3, C).
__device__ __forceinline__ int64_t slot(const Shape& shape, int side, int64_t picture, int64_t chunk, int64_t channel) {
    return (((side * shape.B + picture) * shape.chunks() + chunk) * 3) * shape.C + channel;
}
__device__ __forceinline__ Sums load_sums(const float* p, int64_t C) {
    return {gpu::load(p), gpu::load(p + C), gpu::load(p + 2 * C)};
}
__device__ __forceinline__ void store_sums(float* p, int64_t C, const Sums& sums) {
    gpu::store(p, sums.a);
    gpu::store(p + C, sums.b);
    gpu::store(p + 2 * C, sums.m);
}

template <typename T>
__device__ __forceinline__ void read(float (&x)[STEPS], const T* from, const Place& place, int64_t C) {
#pragma unroll
    for (int j = 0; j < STEPS; j++)
        x[j] = j < place.count ? gpu::to_float(gpu::load(from + place.first + j * C)) : 0.0f;
}

// k in powers of two
template <typename T>
__device__ __forceinline__ void read_exponents(float (&m)[STEPS], const T* k, const Place& place, int64_t C) {
    read(m, k, place, C);
#pragma unroll
    for (int j = 0; j < STEPS; j++) m[j] = j < place.count ? m[j] * LOG2_E : EMPTY;
}

// The terms (a, b) 2^m of a thread's tokens. Where decays are small enough, which a block decides for all its channels,
// they share one exponent, and sums over them need no exponentials; else each has its own.
template <bool NEAR>
struct Terms {
    float a[STEPS], b[STEPS], m[NEAR ? 1 : STEPS];

    __device__ float exponent(int j) const { return m[NEAR ? 0 : j]; }
};

// Over STEPS tokens a weight may change by 2^16: far from what fp32 cannot hold, also squared, or beside a sum's own
// distance from its exponent, which is as much. The warps of a block have the same channels and come to one answer.
__device__ __forceinline__ bool are_near(float w, float u) {
    float most = fmaxf(fabsf(w) * STEPS, fabsf(u));
    if (!(most <= 3e38f)) most = 0.0f;  // not finite: broken either way, and no other channel's business
    for (int offset = WARP / 2; offset > 0; offset /= 2)
        most = fmaxf(most, __shfl_xor_sync(gpu::ALL_LANES, most, offset));
    return most <= 16.0f;
}

// The terms (x v, x) of the tokens.
template <bool NEAR>
__device__ __forceinline__ Terms<NEAR> terms_of(const float (&m)[STEPS], const float (&v)[STEPS]) {
    Terms<NEAR> x;
    if constexpr (NEAR) {
        x.m[0] = EMPTY;
#pragma unroll
        for (int j = 0; j < STEPS; j++) x.m[0] = fmaxf(x.m[0], m[j]);
    }
#pragma unroll
    for (int j = 0; j < STEPS; j++) {
        if constexpr (NEAR) {
            x.b[j] = exp2_of(m[j] - x.m[0]);
            x.a[j] = v[j] * x.b[j];
        } else {
            x.a[j] = v[j];
            x.b[j] = 1.0f;
            x.m[j] = m[j];
        }
    }
    return x;
}

// From `start`, what reaches the first token (backwards: the last), over all tokens to what reaches the one after;
// visit(j, sums) with what reaches token j.
template <bool BACKWARDS, bool NEAR, typename Visit>
__device__ __forceinline__ Sums walk(const Terms<NEAR>& x, const Sums& start, float w, Visit visit) {
    if constexpr (NEAR) {
        Sums sums = {start.a, start.b, fmaxf(start.m, x.m[0])};
        const float decay = exp2_of(-w), of_start = exp2_of(start.m - sums.m), of_terms = exp2_of(x.m[0] - sums.m);
        sums.a *= of_start;
        sums.b *= of_start;
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            const int j = BACKWARDS ? STEPS - 1 - i : i;
            visit(j, sums);
            sums.a = sums.a * decay + x.a[j] * of_terms;
            sums.b = sums.b * decay + x.b[j] * of_terms;
        }
        return sums;
    } else {
        Sums sums = start;
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            const int j = BACKWARDS ? STEPS - 1 - i : i;
            visit(j, sums.faded(w * i));
            sums.add(x.a[j], x.b[j], x.m[j] + w * (i + 1));
        }
        return sums.faded(w * STEPS);
    }
}

struct Sides {
    Sums past, future;
};

// What the warps of a block tell each other: what reaches the chunk from outside, and their own sums.
struct Exchange {
    Sums carried[2][WARP], own[2][WARPS][WARP];
};
struct Shared {
    float w[WARP], u[WARP];
    Exchange tokens, readers;
    float parts[2][WARPS * WARP];
};

__device__ __forceinline__ Shared& shared_memory() { return *reinterpret_cast<Shared*>(gpu::shared_memory()); }

// Each number once in a block: w and u in powers of two, and out of the workspace what reaches the chunk from outside,
// which is nothing where there is no workspace. A barrier must follow.
__device__ __forceinline__ void read_channels(const Shape& shape, const Place& place, const float* w, const float* u) {
    if (place.warp > 0) return;
    const bool real = place.channel < shape.C;
    shared_memory().w[place.lane] = real ? gpu::load(w + place.channel) * LOG2_E : 0.0f;
    shared_memory().u[place.lane] = real && u ? gpu::load(u + place.channel) * LOG2_E : 0.0f;
}
__device__ __forceinline__ void read_carried(Exchange& exchange, const Shape& shape, const Place& place,
                                             const float* workspace) {
    if (place.warp > 0) return;
    const bool real = workspace && place.channel < shape.C;
    for (int side = 0; side < 2; side++) {
        const int64_t at = slot(shape, side, place.picture, place.chunk, place.channel);
        exchange.carried[side][place.lane] = real ? load_sums(workspace + at, shape.C) : nothing();
    }
}

// The sums over a thread's tokens as its neighbours see them: the token after, and the token before.
template <bool NEAR>
__device__ __forceinline__ Sides own_sums(const Terms<NEAR>& x, float w) {
    const auto ignore = [](int, const Sums&) {};
    return {walk<false>(x, nothing(), w, ignore), walk<true>(x, nothing(), w, ignore)};
}

// What reaches a thread's first and last token from outside. Every thread of the block comes here.
__device__ __forceinline__ Sides sums_outside(const Sides& own, float w, Exchange& exchange) {
    const int warps = blockDim.x / WARP, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    exchange.own[0][warp][lane] = own.past;
    exchange.own[1][warp][lane] = own.future;
    __syncthreads();
    Sides from = {exchange.carried[0][lane], exchange.carried[1][lane]};
    for (int i = 0; i < warp; i++) {
        from.past = from.past.faded(w * STEPS);
        from.past.add(exchange.own[0][i][lane]);
    }
    for (int i = warps - 1; i > warp; i--) {
        from.future = from.future.faded(w * STEPS);
        from.future.add(exchange.own[1][i][lane]);
    }
    return from;
}

// The sums of the whole chunk as its neighbours see them; nothing reaches `exchange` from outside.
__device__ __forceinline__ void store_chunk(const Shape& shape, const Place& place, const Sides& own, float w,
                                            Exchange& exchange, float* workspace) {
    Sides all = sums_outside(own, w, exchange);
    if (place.channel >= shape.C) return;
    if (place.warp == WARPS - 1) {
        all.past = all.past.faded(w * STEPS);
        all.past.add(own.past);
        store_sums(workspace + slot(shape, 0, place.picture, place.chunk, place.channel), shape.C, all.past);
    }
    if (place.warp == 0) {
        all.future = all.future.faded(w * STEPS);
        all.future.add(own.future);
        store_sums(workspace + slot(shape, 1, place.picture, place.chunk, place.channel), shape.C, all.future);
    }
}

struct Attention {
    Sums past[STEPS], future[STEPS];                  // of (x v, x), as each token sees them
    float y[STEPS], over_total[STEPS], most[STEPS];   // the output; M(x) is 2^most / over_total
};

template <bool NEAR>
__device__ __forceinline__ void attend(Attention& at, const Terms<NEAR>& x, const Sides& outside, float w, float u) {
    walk<true>(x, outside.future, w, [&](int j, const Sums& future) { at.future[j] = future; });
    walk<false>(x, outside.past, w, [&](int j, const Sums& past) {
        const Sums& future = at.future[j];
        at.past[j] = past;
        const float self = x.exponent(j) + u, most = fmaxf(self, fmaxf(past.m, future.m));
        const float of_past = exp2_of(past.m - most), of_future = exp2_of(future.m - most);
        const float of_self = exp2_of(self - most);
        at.over_total[j] = __fdividef(1.0f, past.b * of_past + future.b * of_future + x.b[j] * of_self);
        at.y[j] = (past.a * of_past + future.a * of_future + x.a[j] * of_self) * at.over_total[j];
        at.most[j] = most;
    });
}

template <typename T>
__global__ void __launch_bounds__(WARPS* WARP, 4)
    chunk_sums(Shape shape, const float* w_all, const T* k, const T* v_all, float* workspace) {
    Shared& shared = shared_memory();
    const Place place(shape);
    float m[STEPS], v[STEPS];
    read_exponents(m, k, place, shape.C);
    read(v, v_all, place, shape.C);
    read_channels(shape, place, w_all, nullptr);
    read_carried(shared.tokens, shape, place, nullptr);
    __syncthreads();
    const float w = shared.w[place.lane];
    const Sides own = are_near(w, 0.0f) ? own_sums(terms_of<true>(m, v), w) : own_sums(terms_of<false>(m, v), w);
    store_chunk(shape, place, own, w, shared.tokens, workspace);
}

// Every chunk's sums become what reaches it from outside. A block has one side of 32 channels of one picture; each of
// its warps a run of chunks.
__global__ void __launch_bounds__(WARPS* WARP) scan(Shape shape, const float* w_all, float* workspace) {
    Exchange& exchange = shared_memory().tokens;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, side = blockIdx.x % 2;
    const int64_t group = blockIdx.x / 2 % shape.groups(), picture = blockIdx.x / 2 / shape.groups();
    const int64_t channel = group * WARP + lane, chunks = shape.chunks(), run = (chunks + WARPS - 1) / WARPS;
    const int64_t begin = warp * run, end = begin + run < chunks ? begin + run : chunks;
    const bool real = channel < shape.C;
    const float w = real ? gpu::load(w_all + channel) * (LOG2_E * CHUNK) : 0.0f;  // the decay over a chunk
    const auto place = [&](int64_t i) {
        return workspace + slot(shape, side, picture, side ? chunks - 1 - i : i, channel);
    };
    Sums sums = nothing();
    if (real) {
#pragma unroll 4
        for (int64_t i = begin; i < end; i++) {
            const Sums next = load_sums(place(i), shape.C);
            sums = sums.faded(w);
            sums.add(next);
        }
    }
    exchange.own[0][warp][lane] = sums;
    __syncthreads();
    if (!real) return;
    sums = nothing();
    for (int i = 0; i < warp; i++) {
        sums = sums.faded(w * run);
        sums.add(exchange.own[0][i][lane]);
    }
#pragma unroll 4
    for (int64_t i = begin; i < end; i++) {
        const Sums next = load_sums(place(i), shape.C);
        store_sums(place(i), shape.C, sums);
        sums = sums.faded(w);
        sums.add(next);
    }
}

template <bool NEAR, typename T>
__device__ __forceinline__ void write_outputs(const Shape& shape, const Place& place, const float (&m)[STEPS],
                                              const float (&v)[STEPS], float w, float u, T* y) {
    const Terms<NEAR> x = terms_of<NEAR>(m, v);
    const Sides outside = sums_outside(own_sums(x, w), w, shared_memory().tokens);
    Attention at;
    attend(at, x, outside, w, u);
#pragma unroll
    for (int j = 0; j < STEPS; j++)
        if (j < place.count) gpu::store(y + place.first + j * shape.C, gpu::from_float<T>(at.y[j]));
}

template <typename T>
__global__ void __launch_bounds__(WARPS* WARP, 3)
    outputs(Shape shape, const float* w_all, const float* u_all, const T* k, const T* v_all, const float* carries,
            T* y) {
    Shared& shared = shared_memory();
    const Place place(shape);
    float m[STEPS], v[STEPS];
    read_exponents(m, k, place, shape.C);
    read(v, v_all, place, shape.C);
    read_channels(shape, place, w_all, u_all);
    read_carried(shared.tokens, shape, place, carries);
    __syncthreads();
    const float w = shared.w[place.lane], u = shared.u[place.lane];
    if (are_near(w, u))
        write_outputs<true>(shape, place, m, v, w, u, y);
    else
        write_outputs<false>(shape, place, m, v, w, u, y);
}

// The readers of a token: with a_t = dy_t / M(x)_t and b_t = a_t y_t,
//
//     dv = x M(a)        dk = x (v M(a) - M(b))        du = sum_t e^u x_t (a_t v_t - b_t)
//
// and dw counts every pair i, t once for each token s strictly between them, since its weight is e^{-(|t-i|-1) w}:
//
//     dw = -sum_s e^{-w} (P_s(x v) F_s(a) - P_s(x) F_s(b) + F_s(x v) P_s(a) - F_s(x) P_s(b))
template <bool NEAR>
__device__ __forceinline__ Terms<NEAR> readers_of(const Attention& at, const float (&dy)[STEPS], int count) {
    Terms<NEAR> readers;
#pragma unroll
    for (int j = 0; j < STEPS; j++) {
        const bool real = j < count;
        readers.a[j] = real ? dy[j] * at.over_total[j] : 0.0f;
        readers.b[j] = real ? readers.a[j] * at.y[j] : 0.0f;
        if (!NEAR || j == 0) readers.m[j] = real ? -at.most[j] : EMPTY;
    }
    return readers;
}

template <bool NEAR>
__device__ __forceinline__ Sides own_readers(const Place& place, const float (&m)[STEPS], const float (&v)[STEPS],
                                             const float (&dy)[STEPS], float w, float u) {
    const Terms<NEAR> x = terms_of<NEAR>(m, v);
    const Sides outside = sums_outside(own_sums(x, w), w, shared_memory().tokens);
    Attention at;
    attend(at, x, outside, w, u);
    return own_sums(readers_of<NEAR>(at, dy, place.count), w);
}

template <typename T>
__global__ void __launch_bounds__(WARPS* WARP, 3)
    reader_sums(Shape shape, const float* w_all, const float* u_all, const T* k, const T* v_all, const T* dy_all,
                const float* carries, float* workspace) {
    Shared& shared = shared_memory();
    const Place place(shape);
    float m[STEPS], v[STEPS], dy[STEPS];
    read_exponents(m, k, place, shape.C);
    read(v, v_all, place, shape.C);
    read(dy, dy_all, place, shape.C);
    read_channels(shape, place, w_all, u_all);
    read_carried(shared.tokens, shape, place, carries);
    read_carried(shared.readers, shape, place, nullptr);
    __syncthreads();
    const float w = shared.w[place.lane], u = shared.u[place.lane];
    const Sides own =
        are_near(w, u) ? own_readers<true>(place, m, v, dy, w, u) : own_readers<false>(place, m, v, dy, w, u);
    store_chunk(shape, place, own, w, shared.readers, workspace);
}

// The sum over the block's warps, in order, for warp 0.
__device__ __forceinline__ float sum_of_warps(float x, float* shared) {
    shared[threadIdx.x] = x;
    __syncthreads();
    float sum = 0.0f;
    if (threadIdx.x < WARP)
        for (unsigned i = threadIdx.x; i < blockDim.x; i += WARP) sum += shared[i];
    return sum;
}

// dk and dv; returns this thread's share of dw, and of du.
template <bool NEAR, typename T>
__device__ __forceinline__ void write_gradients(const Shape& shape, const Place& place, const float (&m)[STEPS],
                                                const float (&v)[STEPS], const float (&dy)[STEPS], float w, float u,
                                                T* dk, T* dv, float& dw, float& du) {
    const Terms<NEAR> x = terms_of<NEAR>(m, v);
    const Sides outside = sums_outside(own_sums(x, w), w, shared_memory().tokens);
    Attention at;
    attend(at, x, outside, w, u);
    const Terms<NEAR> readers = readers_of<NEAR>(at, dy, place.count);
    const Sides readers_outside = sums_outside(own_sums(readers, w), w, shared_memory().readers);
    Sums past[STEPS];
    walk<false>(readers, readers_outside.past, w, [&](int j, const Sums& sums) {
        past[j] = sums;
        const Sums& future = at.future[j];
        if (j < place.count) dw -= exp2_of(future.m + sums.m - w) * (future.a * sums.a - future.b * sums.b);
    });
    walk<true>(readers, readers_outside.future, w, [&](int j, const Sums& future) {
        if (j >= place.count) return;
        const Sums& before = at.past[j];
        dw -= exp2_of(before.m + future.m - w) * (before.a * future.a - before.b * future.b);
        const float of_past = exp2_of(m[j] + past[j].m), of_future = exp2_of(m[j] + future.m);
        const float of_self = exp2_of(m[j] + u + readers.exponent(j));
        du += of_self * (readers.a[j] * v[j] - readers.b[j]);
        const float a = past[j].a * of_past + future.a * of_future + readers.a[j] * of_self;
        const float b = past[j].b * of_past + future.b * of_future + readers.b[j] * of_self;
        gpu::store(dv + place.first + j * shape.C, gpu::from_float<T>(a));
        gpu::store(dk + place.first + j * shape.C, gpu::from_float<T>(v[j] * a - b));
    });
}

template <typename T>
__global__ void __launch_bounds__(WARPS* WARP, 2)
    gradients(Shape shape, const float* w_all, const float* u_all, const T* k, const T* v_all, const T* dy_all,
              const float* carries, const float* reader_carries, float* dw_parts, float* du_parts, T* dk, T* dv) {
    Shared& shared = shared_memory();
    const Place place(shape);
    float m[STEPS], v[STEPS], dy[STEPS], dw = 0.0f, du = 0.0f;
    read_exponents(m, k, place, shape.C);
    read(v, v_all, place, shape.C);
    read(dy, dy_all, place, shape.C);
    read_channels(shape, place, w_all, u_all);
    read_carried(shared.tokens, shape, place, carries);
    read_carried(shared.readers, shape, place, reader_carries);
    __syncthreads();
    const float w = shared.w[place.lane], u = shared.u[place.lane];
    if (are_near(w, u))
        write_gradients<true>(shape, place, m, v, dy, w, u, dk, dv, dw, du);
    else
        write_gradients<false>(shape, place, m, v, dy, w, u, dk, dv, dw, du);
    dw = sum_of_warps(dw, shared.parts[0]);
    du = sum_of_warps(du, shared.parts[1]);
    if (place.warp == 0 && place.count > 0) {
        const int64_t part = (place.picture * shape.chunks() + place.chunk) * shape.C + place.channel;
        gpu::store(dw_parts + part, dw);
        gpu::store(du_parts + part, du);
    }
}

struct Grid {
    dim3 blocks, threads, scan_blocks;
    explicit Grid(const Shape& shape)
        : blocks(static_cast<unsigned>(shape.B * shape.groups() * shape.chunks())),
          threads(static_cast<unsigned>((shape.T < CHUNK ? (shape.T + STEPS - 1) / STEPS : WARPS) * WARP)),
          scan_blocks(static_cast<unsigned>(shape.B * shape.groups() * 2)) {}
};

bool fits(const Shape& shape) {
    constexpr int64_t MOST = 0x7fffffff;  // blocks of a grid
    return shape.B > 0 && shape.T > 0 && shape.C > 0 && shape.B <= MOST / shape.chunks() / shape.groups() / 2;
}

template <typename T>
cudaError_t sums_between_chunks(const Shape& shape, const Grid& grid, const float* w, const void* k, const void* v,
                                float* workspace, cudaStream_t stream) {
    const cudaError_t error = gpu::launch(chunk_sums<T>, grid.blocks, grid.threads, sizeof(Shared), stream, shape, w,
                                          static_cast<const T*>(k), static_cast<const T*>(v), workspace);
    if (error != cudaSuccess) return error;
    return gpu::launch(scan, grid.scan_blocks, grid.threads, sizeof(Shared), stream, shape, w, workspace);
}

template <typename T>
cudaError_t forward(const Shape& shape, const float* w, const float* u, const void* k, const void* v, void* y,
                    float* workspace, cudaStream_t stream) {
    const Grid grid(shape);
    const float* carries = nullptr;
    if (shape.chunks() > 1) {
        const cudaError_t error = sums_between_chunks<T>(shape, grid, w, k, v, workspace, stream);
        if (error != cudaSuccess) return error;
        carries = workspace;
    }
    return gpu::launch(outputs<T>, grid.blocks, grid.threads, sizeof(Shared), stream, shape, w, u,
                       static_cast<const T*>(k), static_cast<const T*>(v), carries, static_cast<T*>(y));
}

template <typename T>
cudaError_t backward(const Shape& shape, const float* w, const float* u, const void* k, const void* v, const void* dy,
                     float* workspace, float* dw_parts, float* du_parts, void* dk, void* dv, cudaStream_t stream) {
    const Grid grid(shape);
    const T *k_t = static_cast<const T*>(k), *v_t = static_cast<const T*>(v), *dy_t = static_cast<const T*>(dy);
    const float *carries = nullptr, *reader_carries = nullptr;
    if (shape.chunks() > 1) {
        float* reader_workspace = workspace + 6 * shape.B * shape.chunks() * shape.C;
        carries = workspace;
        reader_carries = reader_workspace;
        cudaError_t error = sums_between_chunks<T>(shape, grid, w, k, v, workspace, stream);
        if (error == cudaSuccess)
            error = gpu::launch(reader_sums<T>, grid.blocks, grid.threads, sizeof(Shared), stream, shape, w, u, k_t,
                                v_t, dy_t, carries, reader_workspace);
        if (error == cudaSuccess)
            error = gpu::launch(scan, grid.scan_blocks, grid.threads, sizeof(Shared), stream, shape, w,
                                reader_workspace);
        if (error != cudaSuccess) return error;
    }
    return gpu::launch(gradients<T>, grid.blocks, grid.threads, sizeof(Shared), stream, shape, w, u, k_t, v_t, dy_t,
                       carries, reader_carries, dw_parts, du_parts, static_cast<T*>(dk), static_cast<T*>(dv));
}

}  // namespace

// workspace: 6 B chunks C floats where there is more than one chunk, else unused.
extern "C" int visualrwkv_cuda_biwkv_forward(int64_t dtype, int64_t B, int64_t T, int64_t C, const float* w,
                                             const float* u, const void* k, const void* v, void* y, float* workspace,
                                             cudaStream_t stream) {
    const Shape shape = {B, T, C};
    if (!fits(shape)) return 1;
    if (dtype == gpu::FLOAT32) return forward<float>(shape, w, u, k, v, y, workspace, stream);
    if (dtype == gpu::BFLOAT16) return forward<gpu::bf16>(shape, w, u, k, v, y, workspace, stream);
    return 1;
}

// workspace: twice the forward's; dw_parts, du_parts (B chunks, C): partial sums for the caller to add up in a fixed
// order.
extern "C" int visualrwkv_cuda_biwkv_backward(int64_t dtype, int64_t B, int64_t T, int64_t C, const float* w,
                                              const float* u, const void* k, const void* v, const void* dy,
                                              float* workspace, float* dw_parts, float* du_parts, void* dk, void* dv,
                                              cudaStream_t stream) {
    const Shape shape = {B, T, C};
    if (!fits(shape)) return 1;
    if (dtype == gpu::FLOAT32)
        return backward<float>(shape, w, u, k, v, dy, workspace, dw_parts, du_parts, dk, dv, stream);
    if (dtype == gpu::BFLOAT16)
        return backward<gpu::bf16>(shape, w, u, k, v, dy, workspace, dw_parts, du_parts, dk, dv, stream);
    return 1;
}
