// Token shift and mix: with s_t the token before t (at a sequence's start what came before it),
//
//     out[m]_t = x_t + (s_t - x_t) c[m]_t        c[m]_t = mix[m] + delta[m]_t
//
// Layout: x (rows, C) with the sequences one after another in the rows, last (S, C) and mix (M, C) fp32, delta
// (M, rows, C), out M tensors (rows, C). A thread has VALUES neighbouring channels and walks RUN rows, so it reads each
// row once and knows the one before; a block has RUN rows for each of its warps.
#include "gpu.cuh"

namespace {

using gpu::read;
using gpu::Sequences;
using gpu::Values;
using gpu::WARP;
using gpu::write;

constexpr int RUN = 8, WARPS = 8, MOST = 8;  // MOST: mixes
constexpr int PIECE = RUN * WARPS;           // rows of a block; visualrwkv/ops/mix.py sizes the partial sums by it

struct Sizes {
    Sequences sequences;
    int64_t rows, M, C;
};

// The sequence that a row lies in: the last one that begins at it or before. One lane searches for the warp.
__device__ __forceinline__ int64_t sequence_of(const Sequences& sequences, int64_t row) {
    if (!sequences.offsets) return row / sequences.length;
    int64_t low = 0;
    if (threadIdx.x % WARP == 0) {
        int64_t high = sequences.count;
        while (high - low > 1) {
            const int64_t middle = (low + high) / 2;
            if (gpu::load(sequences.offsets + middle) <= row)
                low = middle;
            else
                high = middle;
        }
    }
    return __shfl_sync(gpu::ALL_LANES, low, 0);
}

// One tensor for each mixture.
template <typename T>
struct Mixtures {
    T* of[MOST];
};

// The rows of a thread in order.
template <int VALUES>
struct Walk {
    int64_t first, end, channel, row, sequence, begin, next_begin;
    const Sequences& sequences;

    __device__ Walk(const Sizes& sizes) : sequences(sizes.sequences) {
        const int64_t columns = (sizes.C + WARP * VALUES - 1) / (WARP * VALUES);
        first = row = blockIdx.x / columns * PIECE + threadIdx.x / WARP * RUN;
        end = first + RUN < sizes.rows ? first + RUN : sizes.rows;
        channel = (blockIdx.x % columns * WARP + threadIdx.x % WARP) * VALUES;
        sequence = sequence_of(sequences, row < sizes.rows ? row : sizes.rows - 1);
        begin = sequences.begin(sequence);
        next_begin = sequences.end(sequence);
        if (channel >= sizes.C) end = first;
    }
    __device__ bool starts() const { return row == begin; }
    __device__ void next() {
        row++;
        while (row == next_begin && sequence + 1 < sequences.count) {
            begin = row;
            next_begin = sequences.end(++sequence);
        }
    }
};

// The block's channels of mix, zero past the last.
template <int VALUES>
__device__ __forceinline__ float* read_mix(const Sizes& sizes, const float* mix, int64_t channel) {
    float* shared = reinterpret_cast<float*>(gpu::shared_memory());
    for (int m = threadIdx.x / WARP; m < sizes.M; m += WARPS) {
        Values<VALUES> x = {};
        if (channel < sizes.C) x = read<VALUES>(mix + m * sizes.C + channel);
#pragma unroll
        for (int i = 0; i < VALUES; i++) shared[(m * VALUES + i) * WARP + threadIdx.x % WARP] = x.at[i];
    }
    __syncthreads();
    return shared;
}

// mix[m] + delta[m]_t of a thread's channels
template <int VALUES, typename T>
__device__ __forceinline__ Values<VALUES> weights(const float* mix, int m, const T* delta, int64_t at) {
    Values<VALUES> c = {};
    if (delta) c = read<VALUES>(delta + at);
#pragma unroll
    for (int i = 0; i < VALUES; i++) c.at[i] += mix[(m * VALUES + i) * WARP + threadIdx.x % WARP];
    return c;
}

template <typename T, int VALUES>
__device__ __forceinline__ Values<VALUES> token_before(const Sizes& sizes, const Walk<VALUES>& walk, const T* x,
                                                       const float* last) {
    if (walk.starts()) return read<VALUES>(last + walk.sequence * sizes.C + walk.channel);
    return read<VALUES>(x + (walk.row - 1) * sizes.C + walk.channel);
}

template <typename T, int VALUES>
__global__ void __launch_bounds__(WARPS* WARP)
    forward(Sizes sizes, const T* x, const float* last, const float* mix_all, const T* delta, Mixtures<T> out) {
    Walk<VALUES> walk(sizes);
    const float* mix = read_mix<VALUES>(sizes, mix_all, walk.channel);
    if (walk.row >= walk.end) return;
    Values<VALUES> before = token_before(sizes, walk, x, last);
    for (; walk.row < walk.end; walk.next()) {
        if (walk.starts() && walk.row > walk.first) before = token_before(sizes, walk, x, last);
        const int64_t at = walk.row * sizes.C + walk.channel;
        const Values<VALUES> now = read<VALUES>(x + at);
#pragma unroll
        for (int m = 0; m < MOST; m++) {
            if (m == sizes.M) break;
            Values<VALUES> mixed = weights<VALUES>(mix, m, delta, m * sizes.rows * sizes.C + at);
#pragma unroll
            for (int i = 0; i < VALUES; i++) mixed.at[i] = now.at[i] + (before.at[i] - now.at[i]) * mixed.at[i];
            write(out.of[m] + at, mixed);
        }
        before = now;
    }
}

template <typename T, int VALUES>
__global__ void __launch_bounds__(WARPS* WARP)
    backward(Sizes sizes, const T* x, const float* last, const float* mix_all, const T* delta, Mixtures<const T> dout,
             T* dx, float* dlast, float* dmix_parts, T* ddelta) {
    Walk<VALUES> walk(sizes);
    const int64_t channel = walk.channel, C = sizes.C;
    const float* mix = read_mix<VALUES>(sizes, mix_all, channel);
    // dbefore: the gradient of the row before, without what this row owes it
    Values<VALUES> dmix[MOST] = {}, before = {}, dbefore = {};
    if (walk.row < walk.end) before = token_before(sizes, walk, x, last);
    // The row after the last is another thread's, but what it owes to our last row is ours.
    for (; walk.first < walk.end && walk.row <= walk.end; walk.next()) {
        const bool ours = walk.row < walk.end, starts = walk.row < sizes.rows && walk.starts();
        const int64_t at = walk.row * C + channel;
        Values<VALUES> now = {}, dnow = {}, shifted = {};
        if (ours) {
            if (starts && walk.row > walk.first) before = token_before(sizes, walk, x, last);
            now = read<VALUES>(x + at);
        }
        if (ours || (walk.row < sizes.rows && !starts)) {
#pragma unroll
            for (int m = 0; m < MOST; m++) {
                if (m == sizes.M) break;
                const int64_t with_delta = m * sizes.rows * C + at;
                const Values<VALUES> g = read<VALUES>(dout.of[m] + at);
                const Values<VALUES> c = weights<VALUES>(mix, m, delta, with_delta);
                Values<VALUES> d;
#pragma unroll
                for (int i = 0; i < VALUES; i++) {
                    shifted.at[i] += g.at[i] * c.at[i];
                    dnow.at[i] += g.at[i] - g.at[i] * c.at[i];
                    d.at[i] = g.at[i] * (before.at[i] - now.at[i]);
                    if (ours) dmix[m].at[i] += d.at[i];
                }
                if (ddelta && ours) write(ddelta + with_delta, d);
            }
        }
        if (walk.row > walk.first) {
#pragma unroll
            for (int i = 0; i < VALUES; i++) dbefore.at[i] += starts ? 0.0f : shifted.at[i];
            write(dx + at - C, dbefore);
        }
        if (ours && starts) write(dlast + walk.sequence * C + channel, shifted);
        before = now;
        dbefore = dnow;
    }
    // dmix over the block's rows, warp after warp, in the place of mix
    float* sums = reinterpret_cast<float*>(gpu::shared_memory());
    for (int warp = 0; warp < WARPS; warp++) {
        __syncthreads();
        if (static_cast<int>(threadIdx.x / WARP) != warp) continue;
#pragma unroll
        for (int m = 0; m < MOST; m++) {
            if (m == sizes.M) break;
#pragma unroll
            for (int i = 0; i < VALUES; i++) {
                float& sum = sums[(m * VALUES + i) * WARP + threadIdx.x % WARP];
                sum = (warp ? sum : 0.0f) + dmix[m].at[i];
            }
        }
    }
    __syncthreads();
    if (channel >= C) return;
    const int64_t piece = walk.first / PIECE;
    for (int m = threadIdx.x / WARP; m < sizes.M; m += WARPS) {
        Values<VALUES> sum;
#pragma unroll
        for (int i = 0; i < VALUES; i++) sum.at[i] = sums[(m * VALUES + i) * WARP + threadIdx.x % WARP];
        write(dmix_parts + (piece * sizes.M + m) * C + channel, sum);
    }
}

// What a kernel reads and writes; of the mixtures arrays of M pointers in the host's memory.
struct Pointers {
    const void* x;
    const float *last, *mix;
    const void* delta;
    const void* const* dout;
    void* const* out;
    void* dx;
    float *dlast, *dmix_parts;
    void* ddelta;

    bool aligned(int64_t M) const {  // to packs of four
        uintptr_t bits = 0;
        const auto see = [&](const void* p) { bits |= reinterpret_cast<uintptr_t>(p); };
        for (const void* p : {x, delta, static_cast<const void*>(dx), static_cast<const void*>(ddelta)}) see(p);
        for (const float* p : {last, mix, static_cast<const float*>(dlast), static_cast<const float*>(dmix_parts)}) see(p);
        for (int m = 0; m < M; m++) see(dout ? dout[m] : out[m]);
        return bits % 16 == 0;
    }
};

template <typename T, typename P>
Mixtures<T> mixtures(P* const* from, int64_t M) {
    Mixtures<T> to = {};
    for (int m = 0; m < M; m++) to.of[m] = static_cast<T*>(from[m]);
    return to;
}

template <typename T, int VALUES>
int start(const Sizes& sizes, const Pointers& p, cudaStream_t stream) {
    const int64_t columns = (sizes.C + WARP * VALUES - 1) / (WARP * VALUES), pieces = (sizes.rows + PIECE - 1) / PIECE;
    if (pieces > 0x7fffffff / columns) return 1;
    const dim3 grid(static_cast<unsigned>(pieces * columns)), block(WARPS * WARP);
    const size_t shared = sizes.M * VALUES * WARP * sizeof(float);
    const T *x = static_cast<const T*>(p.x), *delta = static_cast<const T*>(p.delta);
    if (!p.dout)
        return gpu::launch(forward<T, VALUES>, grid, block, shared, stream, sizes, x, p.last, p.mix, delta,
                           mixtures<T>(p.out, sizes.M));
    return gpu::launch(backward<T, VALUES>, grid, block, shared, stream, sizes, x, p.last, p.mix, delta,
                       mixtures<const T>(p.dout, sizes.M), static_cast<T*>(p.dx), p.dlast, p.dmix_parts,
                       static_cast<T*>(p.ddelta));
}

int start(int64_t dtype, int64_t sequences, int64_t length, const int64_t* offsets, int64_t rows, int64_t M, int64_t C,
          const Pointers& p, cudaStream_t stream) {
    const Sizes sizes = {{sequences, length, offsets}, rows, M, C};
    if (M < 1 || M > MOST || rows < 1 || C < 1) return 1;
    const bool packs = C % 4 == 0 && p.aligned(M);
    if (dtype == gpu::FLOAT32) return packs ? start<float, 4>(sizes, p, stream) : start<float, 1>(sizes, p, stream);
    if (dtype == gpu::BFLOAT16)
        return packs ? start<gpu::bf16, 4>(sizes, p, stream) : start<gpu::bf16, 1>(sizes, p, stream);
    return 1;
}

}  // namespace

// offsets (S + 1) in device memory, or null for sequences of one length; delta may be null; out: M pointers, on the host.
extern "C" int visualrwkv_cuda_mix_forward(int64_t dtype, int64_t sequences, int64_t length, const int64_t* offsets,
                                           int64_t rows, int64_t M, int64_t C, const void* x, const float* last,
                                           const float* mix, const void* delta, void* const* out, cudaStream_t stream) {
    const Pointers p = {x, last, mix, delta, nullptr, out};
    return start(dtype, sequences, length, offsets, rows, M, C, p, stream);
}

// dmix_parts (pieces of 64 rows, M, C): partial sums for the caller to add up in a fixed order; ddelta null with delta.
extern "C" int visualrwkv_cuda_mix_backward(int64_t dtype, int64_t sequences, int64_t length, const int64_t* offsets,
                                            int64_t rows, int64_t M, int64_t C, const void* x, const float* last,
                                            const float* mix, const void* delta, const void* const* dout, void* dx,
                                            float* dlast, float* dmix_parts, void* ddelta, cudaStream_t stream) {
    const Pointers p = {x, last, mix, delta, dout, nullptr, dx, dlast, dmix_parts, ddelta};
    return start(dtype, sequences, length, offsets, rows, M, C, p, stream);
}
