// The parts of a step by one token, for B sequences at once: each is one launch, allocates nothing and waits for
// nothing, so that a whole token's steps can be captured in a CUDA graph.
//
//     norm_mix      layer norm of the residual stream, token shift, and its mixtures
//     mix           mixtures that depend on the data too (RWKV-6)
//     gemv          several products of a bf16 matrix and a vector, with what is done to the results
//     wkv6, wkv7    a step of the recurrence, and what follows it per head: group norm, (RWKV-7) the bonus, the gate
//
// Activations are T, fp32 or bf16; parameters (but the matrices) and states are fp32. Sums are fp32.
#include "gpu.cuh"

namespace {

using gpu::bf16;
using gpu::Pack;
using gpu::WARP;

constexpr int WARPS = 8, THREADS = WARPS * WARP;

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// The sum over the block, for every thread. `shared` has room for a float of every warp; it may be used again after the
// next barrier.
__device__ __forceinline__ float block_sum(float x, float* shared) {
    const int warps = (blockDim.x + WARP - 1) / WARP;
    x = gpu::warp_sum(x);
    if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = x;
    __syncthreads();
    float sum = 0.0f;
    for (int i = 0; i < warps; i++) sum += shared[i];
    return sum;
}

template <typename T, int COUNT>
__device__ __forceinline__ Pack<float, COUNT> read(const T* from) {
    const auto pack = gpu::load(reinterpret_cast<const Pack<T, COUNT>*>(from));
    Pack<float, COUNT> x;
#pragma unroll
    for (int i = 0; i < COUNT; i++) x.at[i] = gpu::to_float(pack.at[i]);
    return x;
}

template <typename T, int COUNT>
__device__ __forceinline__ void write(T* to, const Pack<float, COUNT>& x) {
    Pack<T, COUNT> pack;
#pragma unroll
    for (int i = 0; i < COUNT; i++) pack.at[i] = gpu::from_float<T>(x.at[i]);
    gpu::store(reinterpret_cast<Pack<T, COUNT>*>(to), pack);
}

// Layer norm, shift, mix ----------------------------------------------------------------------------------------------

// x (B, C), shift (2, B, C): what the last step normalised, then what the step before it did. A block has 4 THREADS
// channels of one sequence, and reads all of the sequence's x for the mean and the deviation.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    norm_mix(int64_t B, int64_t C, int64_t M, float eps, const T* x, const float* weight, const float* bias,
             float* shift, const float* mix, T* out) {
    float* row = reinterpret_cast<float*>(gpu::shared_memory());
    float* sums = row + C;
    const int64_t columns = (C + 4 * THREADS - 1) / (4 * THREADS), b = blockIdx.x / columns;
    float sum = 0.0f;
    for (int64_t c = threadIdx.x * 4; c < C; c += 4 * THREADS) {
        const auto part = read<T, 4>(x + b * C + c);
        *reinterpret_cast<Pack<float, 4>*>(row + c) = part;
        sum += part.at[0] + part.at[1] + part.at[2] + part.at[3];
    }
    const float mean = block_sum(sum, sums) / C;
    sum = 0.0f;
    for (int64_t c = threadIdx.x * 4; c < C; c += 4 * THREADS)  // each thread what it wrote itself
        for (int i = 0; i < 4; i++) sum += (row[c + i] - mean) * (row[c + i] - mean);
    const float scale = 1.0f / sqrtf(block_sum(sum, sums + WARPS) / C + eps);
    const int64_t c = (blockIdx.x % columns * THREADS + threadIdx.x) * 4;
    if (c >= C) return;
    const auto part = *reinterpret_cast<const Pack<float, 4>*>(row + c);
    const auto gain = read<float, 4>(weight + c), offset = read<float, 4>(bias + c);
    const auto before = read<float, 4>(shift + b * C + c);
    Pack<float, 4> now;
#pragma unroll
    for (int i = 0; i < 4; i++) now.at[i] = (part.at[i] - mean) * scale * gain.at[i] + offset.at[i];
    write(shift + b * C + c, now);
    write(shift + (B + b) * C + c, before);
    for (int64_t m = 0; m < M; m++) {
        auto mixed = read<float, 4>(mix + m * C + c);
#pragma unroll
        for (int i = 0; i < 4; i++) mixed.at[i] = now.at[i] + (before.at[i] - now.at[i]) * mixed.at[i];
        write(out + (m * B + b) * C + c, mixed);
    }
}

// shift as norm_mix left it, delta (M, B, C)
template <typename T>
__global__ void __launch_bounds__(THREADS)
    mix_delta(int64_t B, int64_t C, int64_t M, const float* shift, const float* mix, const T* delta, T* out) {
    const int64_t at = (blockIdx.x * static_cast<int64_t>(THREADS) + threadIdx.x) * 4, b = at / C, c = at % C;
    if (b >= B) return;
    const auto now = read<float, 4>(shift + at), before = read<float, 4>(shift + B * C + at);
#pragma unroll 2
    for (int64_t m = 0; m < M; m++) {
        auto mixed = read<float, 4>(mix + m * C + c);
        const auto more = read<T, 4>(delta + m * B * C + at);
#pragma unroll
        for (int i = 0; i < 4; i++) mixed.at[i] = now.at[i] + (before.at[i] - now.at[i]) * (mixed.at[i] + more.at[i]);
        write(out + m * B * C + at, mixed);
    }
}

// Matrices times vectors ----------------------------------------------------------------------------------------------

constexpr int PRODUCTS = 8;   // in one launch, at most
constexpr int UNDER_WAY = 8;  // loads of eight weights that a lane has started at once

// as visualrwkv/ops/decode.py numbers them
enum Activation : int64_t { NONE = 0, RELU_SQUARED = 1, SIGMOID = 2, SILU = 3, TANH = 4 };

// y = activation(W x) * times + plus: W (rows, columns), x (B, columns), times, plus (null: without) and y (B, rows).
struct Product {
    const bf16* weight;
    const void *x, *times, *plus;
    int64_t rows, columns, activation, y;  // y: where the result begins in the output
    int64_t first_block;
};

struct Products {
    Product at[PRODUCTS];
    int count;
};

__device__ __forceinline__ float activated(float x, int64_t activation) {
    if (activation == RELU_SQUARED) return x > 0 ? x * x : x < 0 ? 0.0f : x;  // NaN stays NaN
    if (activation == SIGMOID) return sigmoid(x);
    if (activation == SILU) return x * sigmoid(x);
    if (activation == TANH) return tanhf(x);
    return x;
}

// A warp has ROWS rows, and for BATCH vectors at once: the weights are read once. The vectors go through shared memory
// as fp32; of each eight values the first four lie in one half and the last four in the other, so that the lanes' reads
// of 16 bytes lie side by side.
template <typename T, int BATCH, int ROWS>
__global__ void __launch_bounds__(THREADS, BATCH < 8 ? 2 : 1) gemv(Products products, int64_t batch, T* out) {
    constexpr int PACKS = UNDER_WAY / ROWS, TILE = PACKS * 8 * WARP;  // TILE: columns
    float* tile = reinterpret_cast<float*>(gpu::shared_memory());  // (BATCH, 2, TILE / 2)
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int64_t block = blockIdx.x;
    int which = 0;
    while (which + 1 < products.count && products.at[which + 1].first_block <= block) which++;
    const Product& p = products.at[which];
    const int64_t first_row = ((block - p.first_block) * WARPS + warp) * ROWS;
    float sums[ROWS][BATCH] = {};
    for (int64_t begin = 0; begin < p.columns; begin += TILE) {
        Pack<bf16, 8> weights[ROWS][PACKS];
#pragma unroll
        for (int row = 0; row < ROWS; row++)
#pragma unroll
            for (int i = 0; i < PACKS; i++) {
                const int64_t column = begin + (i * WARP + lane) * 8;
                const int64_t from = (first_row + row) * p.columns + column;
                weights[row][i] = {};
                if (first_row + row < p.rows && column < p.columns)
                    weights[row][i] = gpu::load(reinterpret_cast<const Pack<bf16, 8>*>(p.weight + from));
            }
        if (begin > 0) __syncthreads();
        for (int i = threadIdx.x; i < BATCH * TILE / 4; i += THREADS) {
            const int b = i / (TILE / 4), four = i % (TILE / 4);
            const int64_t column = begin + four * 4;
            Pack<float, 4> x = {};
            if (b < batch && column < p.columns) x = read<T, 4>(static_cast<const T*>(p.x) + b * p.columns + column);
            *reinterpret_cast<Pack<float, 4>*>(tile + (b * 2 + four % 2) * (TILE / 2) + four / 2 * 4) = x;
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < PACKS; i++)
#pragma unroll
            for (int b = 0; b < BATCH; b++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const auto x = *reinterpret_cast<const Pack<float, 4>*>(tile + (b * 2 + half) * (TILE / 2) +
                                                                            (i * WARP + lane) * 4);
#pragma unroll
                    for (int row = 0; row < ROWS; row++)
#pragma unroll
                        for (int j = 0; j < 4; j++)
                            sums[row][b] += gpu::to_float(weights[row][i].at[half * 4 + j]) * x.at[j];
                }
    }
    float mine = 0.0f;  // lane i finishes result i of the warp's ROWS * BATCH
#pragma unroll
    for (int row = 0; row < ROWS; row++)
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
            const float sum = gpu::warp_sum(sums[row][b]);
            if (lane == row * BATCH + b) mine = sum;
        }
    const int64_t row = first_row + lane / BATCH, b = lane % BATCH;
    if (lane >= ROWS * BATCH || row >= p.rows || b >= batch) return;
    float y = activated(mine, p.activation);
    if (p.times) y *= gpu::to_float(gpu::load(static_cast<const T*>(p.times) + b * p.rows + row));
    if (p.plus) y += gpu::to_float(gpu::load(static_cast<const T*>(p.plus) + b * p.rows + row));
    gpu::store(out + p.y + b * p.rows + row, gpu::from_float<T>(y));
}

template <typename T, int BATCH, int ROWS>
int start_gemv(Products products, int64_t batch, void* out, cudaStream_t stream) {
    int64_t blocks = 0;
    for (int i = 0; i < products.count; i++) {
        products.at[i].first_block = blocks;
        blocks += (products.at[i].rows + WARPS * ROWS - 1) / (WARPS * ROWS);
    }
    if (blocks > 0x7fffffff) return 1;
    constexpr size_t SHARED = BATCH * UNDER_WAY / ROWS * 8 * WARP * sizeof(float);
    return gpu::launch(gemv<T, BATCH, ROWS>, dim3(static_cast<unsigned>(blocks)), dim3(THREADS), SHARED, stream,
                       products, batch, static_cast<T*>(out));
}

template <typename T>
int start_gemv(const Products& products, int64_t batch, void* out, cudaStream_t stream) {
    if (batch == 1) return start_gemv<T, 1, 2>(products, batch, out, stream);
    if (batch == 2) return start_gemv<T, 2, 2>(products, batch, out, stream);
    if (batch <= 4) return start_gemv<T, 4, 2>(products, batch, out, stream);
    return start_gemv<T, 8, 4>(products, batch, out, stream);
}

// The recurrence ------------------------------------------------------------------------------------------------------

// A block has one head of one sequence. Its threads lie over the matrix (N, N) in packs of four columns, LANES to a
// row, and pass over it GROUPS rows at a time.
template <int N>
struct Layout {
    static constexpr int LANES = N / 4, THREADS = N * LANES < 256 ? N * LANES : 256, GROUPS = THREADS / LANES;
    static constexpr int PASSES = N / GROUPS;
};

struct Head {
    int64_t B, H;
    float eps;
    float* state;                // (B, H, N, N)
    const float *weight, *bias;  // of the group norm, (H N)
};

// What follows the recurrence: y (N) in shared memory, on thread i < N its channel i.
template <int N>
__device__ __forceinline__ float normalised(const Head& head, const float* y, float* sums, int64_t h) {
    const int i = threadIdx.x;
    const float x = i < N ? y[i] : 0.0f;
    const float mean = block_sum(x, sums) / N;
    const float variance = block_sum(i < N ? (x - mean) * (x - mean) : 0.0f, sums + WARPS) / N;
    if (i >= N) return 0.0f;
    return (x - mean) / sqrtf(variance + head.eps) * gpu::load(head.weight + h * N + i) +
           gpu::load(head.bias + h * N + i);
}

// r, k, v, w (raw), g (B, H N), u (H, N); the state is (key, value). out = norm(y) silu(g)
template <typename T, int N>
__global__ void __launch_bounds__(Layout<N>::THREADS)
    wkv6(Head head, const T* r_all, const T* k_all, const T* v_all, const T* w_all, const float* u_all, const T* g,
         T* out) {
    using L = Layout<N>;
    float* r = reinterpret_cast<float*>(gpu::shared_memory());
    float *k = r + N, *v = k + N, *decay = v + N, *u = decay + N, *sums = u + N, *parts = sums + 2 * WARPS;
    const int64_t h = blockIdx.x % head.H, channel = static_cast<int64_t>(blockIdx.x) * N;
    const int group = threadIdx.x / L::LANES, column = threadIdx.x % L::LANES * 4;
    float* state = head.state + channel * N + column;
    Pack<float, 4> S[L::PASSES];
#pragma unroll
    for (int pass = 0; pass < L::PASSES; pass++) S[pass] = read<float, 4>(state + (pass * L::GROUPS + group) * N);
    if (threadIdx.x < N) {
        const int i = threadIdx.x;
        r[i] = gpu::to_float(gpu::load(r_all + channel + i));
        k[i] = gpu::to_float(gpu::load(k_all + channel + i));
        v[i] = gpu::to_float(gpu::load(v_all + channel + i));
        decay[i] = expf(-expf(gpu::to_float(gpu::load(w_all + channel + i))));
        u[i] = gpu::load(u_all + h * N + i);
    }
    __syncthreads();
    float y[4] = {};
#pragma unroll
    for (int pass = 0; pass < L::PASSES; pass++) {
        const int i = pass * L::GROUPS + group;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float kv = k[i] * v[column + j];
            y[j] += r[i] * (S[pass].at[j] + u[i] * kv);
            S[pass].at[j] = decay[i] * S[pass].at[j] + kv;
        }
        write(state + i * N, S[pass]);
    }
#pragma unroll
    for (int j = 0; j < 4; j++) parts[group * N + column + j] = y[j];
    __syncthreads();
    if (threadIdx.x < N) {
        float sum = 0.0f;
        for (int i = 0; i < L::GROUPS; i++) sum += parts[i * N + threadIdx.x];
        r[threadIdx.x] = sum;  // nobody needs r any more
    }
    const float x = normalised<N>(head, r, sums, h);
    if (threadIdx.x >= N) return;
    const float gate = gpu::to_float(gpu::load(g + channel + threadIdx.x));
    gpu::store(out + channel + threadIdx.x, gpu::from_float<T>(x * gate * sigmoid(gate)));
}

// r, w (raw), k, v, a, b, g (B, H N), bonus (H, N); the state is (value, key). out = (norm(y) + (r k bonus) v) g
template <typename T, int N>
__global__ void __launch_bounds__(Layout<N>::THREADS)
    wkv7(Head head, const T* r_all, const T* w_all, const T* k_all, const T* v_all, const T* a_all, const T* b_all,
         const float* bonus, const T* g, T* out) {
    using L = Layout<N>;
    float* r = reinterpret_cast<float*>(gpu::shared_memory());
    float *decay = r + N, *k = decay + N, *v = k + N, *a = v + N, *b = a + N, *y = b + N, *sums = y + N;
    const int64_t h = blockIdx.x % head.H, channel = static_cast<int64_t>(blockIdx.x) * N;
    const int group = threadIdx.x / L::LANES, column = threadIdx.x % L::LANES * 4;
    float* state = head.state + channel * N + column;
    Pack<float, 4> S[L::PASSES];
#pragma unroll
    for (int pass = 0; pass < L::PASSES; pass++) S[pass] = read<float, 4>(state + (pass * L::GROUPS + group) * N);
    float rk = 0.0f;
    if (threadIdx.x < N) {
        const int i = threadIdx.x;
        r[i] = gpu::to_float(gpu::load(r_all + channel + i));
        decay[i] = expf(-expf(gpu::to_float(gpu::load(w_all + channel + i))));
        k[i] = gpu::to_float(gpu::load(k_all + channel + i));
        v[i] = gpu::to_float(gpu::load(v_all + channel + i));
        a[i] = gpu::to_float(gpu::load(a_all + channel + i));
        b[i] = gpu::to_float(gpu::load(b_all + channel + i));
        rk = r[i] * k[i] * gpu::load(bonus + h * N + i);
    }
    rk = block_sum(rk, sums);
#pragma unroll
    for (int pass = 0; pass < L::PASSES; pass++) {
        const int i = pass * L::GROUPS + group;
        float sa = 0.0f, sum = 0.0f;
#pragma unroll
        for (int j = 0; j < 4; j++) sa += S[pass].at[j] * a[column + j];
#pragma unroll
        for (int offset = L::LANES / 2; offset > 0; offset /= 2) sa += __shfl_xor_sync(gpu::ALL_LANES, sa, offset);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            S[pass].at[j] = S[pass].at[j] * decay[column + j] + sa * b[column + j] + v[i] * k[column + j];
            sum += S[pass].at[j] * r[column + j];
        }
#pragma unroll
        for (int offset = L::LANES / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(gpu::ALL_LANES, sum, offset);
        write(state + i * N, S[pass]);
        if (column == 0) y[i] = sum;
    }
    __syncthreads();
    const float x = normalised<N>(head, y, sums + WARPS, h);
    if (threadIdx.x >= N) return;
    const float gate = gpu::to_float(gpu::load(g + channel + threadIdx.x));
    gpu::store(out + channel + threadIdx.x, gpu::from_float<T>((x + rk * v[threadIdx.x]) * gate));
}

template <typename T, int N>
int start_wkv6(const Head& head, const void* r, const void* k, const void* v, const void* w, const float* u,
               const void* g, void* out, cudaStream_t stream) {
    using L = Layout<N>;
    const size_t shared = (5 * N + 2 * WARPS + L::GROUPS * N) * sizeof(float);
    return gpu::launch(wkv6<T, N>, dim3(static_cast<unsigned>(head.B * head.H)), dim3(L::THREADS), shared, stream, head,
                       static_cast<const T*>(r), static_cast<const T*>(k), static_cast<const T*>(v),
                       static_cast<const T*>(w), u, static_cast<const T*>(g), static_cast<T*>(out));
}

template <typename T, int N>
int start_wkv7(const Head& head, const void* r, const void* w, const void* k, const void* v, const void* a,
               const void* b, const float* bonus, const void* g, void* out, cudaStream_t stream) {
    using L = Layout<N>;
    const size_t shared = (7 * N + 3 * WARPS) * sizeof(float);
    return gpu::launch(wkv7<T, N>, dim3(static_cast<unsigned>(head.B * head.H)), dim3(L::THREADS), shared, stream, head,
                       static_cast<const T*>(r), static_cast<const T*>(w), static_cast<const T*>(k),
                       static_cast<const T*>(v), static_cast<const T*>(a), static_cast<const T*>(b), bonus,
                       static_cast<const T*>(g), static_cast<T*>(out));
}

template <typename T>
int start_norm_mix(int64_t B, int64_t C, int64_t M, float eps, const void* x, const float* weight, const float* bias,
                   float* shift, const float* mix, void* out, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(B * ((C + 4 * THREADS - 1) / (4 * THREADS))));
    return gpu::launch(norm_mix<T>, grid, dim3(THREADS), (C + 2 * WARPS) * sizeof(float), stream, B, C, M, eps,
                       static_cast<const T*>(x), weight, bias, shift, mix, static_cast<T*>(out));
}

template <typename T>
int start_mix(int64_t B, int64_t C, int64_t M, const float* shift, const float* mix, const void* delta, void* out,
              cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>((B * C / 4 + THREADS - 1) / THREADS));
    return gpu::launch(mix_delta<T>, grid, dim3(THREADS), 0, stream, B, C, M, shift, mix, static_cast<const T*>(delta),
                       static_cast<T*>(out));
}

bool any_head(int64_t B, int64_t H) { return B > 0 && H > 0 && B <= 0x7fffffff / H; }

}  // namespace

// C a multiple of 4, at most 32768, and every tensor at a multiple of 16 bytes, here and below.
extern "C" int visualrwkv_cuda_norm_mix_step(int64_t dtype, int64_t B, int64_t C, int64_t M, float eps, const void* x,
                                             const float* weight, const float* bias, float* shift, const float* mix,
                                             void* out, cudaStream_t stream) {
    if (B < 1 || B > 0xffff || C < 1 || C % 4 || C > 32768) return 1;
    if (dtype == gpu::FLOAT32) return start_norm_mix<float>(B, C, M, eps, x, weight, bias, shift, mix, out, stream);
    if (dtype == gpu::BFLOAT16) return start_norm_mix<bf16>(B, C, M, eps, x, weight, bias, shift, mix, out, stream);
    return 1;
}

extern "C" int visualrwkv_cuda_mix_step(int64_t dtype, int64_t B, int64_t C, int64_t M, const float* shift,
                                        const float* mix, const void* delta, void* out, cudaStream_t stream) {
    if (B < 1 || B > 0xffff || C < 1 || C % 4 || C > 32768) return 1;
    if (dtype == gpu::FLOAT32) return start_mix<float>(B, C, M, shift, mix, delta, out, stream);
    if (dtype == gpu::BFLOAT16) return start_mix<bf16>(B, C, M, shift, mix, delta, out, stream);
    return 1;
}

// products: `count` rows of 8 numbers in the host's memory, the members of Product down to y, pointers as addresses.
// columns are multiples of 8, B at most 8. The table may go when this returns.
extern "C" int visualrwkv_cuda_gemv_step(int64_t dtype, int64_t B, int64_t count, int64_t products, void* out,
                                         cudaStream_t stream) {
    if (B < 1 || B > 8 || count < 1 || count > PRODUCTS) return 1;
    const int64_t* table = reinterpret_cast<const int64_t*>(products);
    Products all = {};
    all.count = static_cast<int>(count);
    for (int64_t i = 0; i < count; i++, table += 8) {
        all.at[i] = {reinterpret_cast<const bf16*>(table[0]), reinterpret_cast<const void*>(table[1]),
                     reinterpret_cast<const void*>(table[2]), reinterpret_cast<const void*>(table[3]),
                     table[4], table[5], table[6], table[7], 0};
        if (table[4] < 1 || table[5] < 8 || table[5] % 8 || table[0] % 16 || table[1] % 16) return 1;
    }
    if (dtype == gpu::FLOAT32) return start_gemv<float>(all, B, out, stream);
    if (dtype == gpu::BFLOAT16) return start_gemv<bf16>(all, B, out, stream);
    return 1;
}

// N is 16, 32, 64 or 128.
extern "C" int visualrwkv_cuda_wkv6_step(int64_t dtype, int64_t B, int64_t H, int64_t N, float eps, const void* r,
                                         const void* k, const void* v, const void* w, const float* u, float* state,
                                         const float* weight, const float* bias, const void* g, void* out,
                                         cudaStream_t stream) {
    const Head head = {B, H, eps, state, weight, bias};
    if (!any_head(B, H)) return 1;
    const auto start = [&](auto size) {
        constexpr int n = decltype(size)::value;
        if (dtype == gpu::FLOAT32) return start_wkv6<float, n>(head, r, k, v, w, u, g, out, stream);
        if (dtype == gpu::BFLOAT16) return start_wkv6<bf16, n>(head, r, k, v, w, u, g, out, stream);
        return 1;
    };
    switch (N) {
        case 16: return start(std::integral_constant<int, 16>());
        case 32: return start(std::integral_constant<int, 32>());
        case 64: return start(std::integral_constant<int, 64>());
        case 128: return start(std::integral_constant<int, 128>());
        default: return 1;
    }
}

extern "C" int visualrwkv_cuda_wkv7_step(int64_t dtype, int64_t B, int64_t H, int64_t N, float eps, const void* r,
                                         const void* w, const void* k, const void* v, const void* a, const void* b,
                                         float* state, const float* bonus, const float* weight, const float* bias,
                                         const void* g, void* out, cudaStream_t stream) {
    const Head head = {B, H, eps, state, weight, bias};
    if (!any_head(B, H)) return 1;
    const auto start = [&](auto size) {
        constexpr int n = decltype(size)::value;
        if (dtype == gpu::FLOAT32) return start_wkv7<float, n>(head, r, w, k, v, a, b, bonus, g, out, stream);
        if (dtype == gpu::BFLOAT16) return start_wkv7<bf16, n>(head, r, w, k, v, a, b, bonus, g, out, stream);
        return 1;
    };
    switch (N) {
        case 16: return start(std::integral_constant<int, 16>());
        case 32: return start(std::integral_constant<int, 32>());
        case 64: return start(std::integral_constant<int, 64>());
        case 128: return start(std::integral_constant<int, 128>());
        default: return 1;
    }
}
