// What the kernels say to the machine: loads and stores of global memory, asynchronous copies, tensor-core products, a
// launch. No torch here, and no CUDA library: a kernel file compiles with nvcc alone, or with g++ (see emulator.cuh).
//
// Global memory is touched only through load(), store() and copy_async(), so that the emulator can count the bytes.
#pragma once

#ifdef CUDA_EMULATED
#include "emulator.cuh"
#else
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#endif

namespace gpu {

typedef __nv_bfloat16 bf16;
constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

enum Dtype : int64_t { FLOAT32 = 0, BFLOAT16 = 1 };  // as visualrwkv/ops/library.py numbers them

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
    return __float2bfloat16_rn(x);
}

// Several values moved as one; aligned to its size.
template <typename T, int COUNT>
struct alignas(sizeof(T) * COUNT) Pack {
    T at[COUNT];
};

template <typename T>
__device__ __forceinline__ T load(const T* p) {
#ifdef CUDA_EMULATED
    emulator::bytes += sizeof(T);
#endif
    return *p;
}

template <typename T>
__device__ __forceinline__ void store(T* p, T x) {
#ifdef CUDA_EMULATED
    emulator::bytes += sizeof(T);
#endif
    *p = x;
}

// Neighbouring values of a thread, computed with in fp32 and moved as one.
template <int COUNT>
struct Values {
    float at[COUNT];
};

template <int COUNT, typename T>
__device__ __forceinline__ Values<COUNT> read(const T* from) {
    const auto pack = load(reinterpret_cast<const Pack<T, COUNT>*>(from));
    Values<COUNT> x;
#pragma unroll
    for (int i = 0; i < COUNT; i++) x.at[i] = to_float(pack.at[i]);
    return x;
}

template <int COUNT, typename T>
__device__ __forceinline__ void write(T* to, const Values<COUNT>& x) {
    Pack<T, COUNT> pack;
#pragma unroll
    for (int i = 0; i < COUNT; i++) pack.at[i] = from_float<T>(x.at[i]);
    store(reinterpret_cast<Pack<T, COUNT>*>(to), pack);
}

// Copy BYTES (4, 8 or 16) to shared memory without waiting; where `real` is false, zeros, and `from` is not read.
// copy_commit() closes a group of copies; copy_wait<KEEP>() waits until at most KEEP groups are under way, for this
// thread's copies: a __syncthreads() must follow before others read them.
template <int BYTES>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool real) {
#ifdef CUDA_EMULATED
    emulator::bytes += real ? BYTES : 0;
    emulator::fibers[emulator::current].open.push_back({to, from, BYTES, real ? BYTES : 0});
#elif __CUDA_ARCH__ >= 800
    const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(to));
    const int filled = real ? BYTES : 0;
    if constexpr (BYTES == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(filled) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(at), "l"(from), "n"(BYTES), "r"(filled)
                     : "memory");
    }
#else  // no asynchronous copies before sm_80
    typedef Pack<unsigned, BYTES / 4> Words;
    *static_cast<Words*>(to) = real ? *static_cast<const Words*>(from) : Words{};
#endif
}

__device__ __forceinline__ void copy_commit() {
#ifdef CUDA_EMULATED
    emulator::Fiber& fiber = emulator::fibers[emulator::current];
    fiber.groups.push_back(fiber.open);
    fiber.open.clear();
#elif __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int KEEP>
__device__ __forceinline__ void copy_wait() {
#ifdef CUDA_EMULATED
    emulator::arrive(emulator::fibers[emulator::current], KEEP);
#elif __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(KEEP) : "memory");
#endif
}

// Tensor cores (sm_80 and later). Fragments of m16n8k16, with g = lane / 4 and q = lane % 4:
//   A (16 x 16), registers 0..3: rows g, g + 8, g, g + 8; columns 2q, 2q + 1 (registers 2, 3: + 8)
//   B (16 x 8), registers 0, 1: rows 2q, 2q + 1 (register 1: + 8), column g
//   C (16 x 8), values 0..3: rows g, g, g + 8, g + 8; columns 2q, 2q + 1, 2q, 2q + 1
// so two neighbouring C tiles of a row, rounded to pairs, are an A fragment of a next product.

__device__ __forceinline__ unsigned pack(float low, float high) {
    const __nv_bfloat162 pair = {__float2bfloat16_rn(low), __float2bfloat16_rn(high)};
    unsigned bits;
    memcpy(&bits, &pair, 4);
    return bits;
}
__device__ __forceinline__ unsigned pack(bf16 low, bf16 high) {
    const __nv_bfloat162 pair = {low, high};
    unsigned bits;
    memcpy(&bits, &pair, 4);
    return bits;
}

// c += a b, operands bf16, sums fp32.
__device__ __forceinline__ void mma(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#ifdef CUDA_EMULATED
    emulator::mma(c, a, b);
#elif __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Four 8 x 8 matrices of 16-bit values from shared memory; lane i names row i % 8 (16 bytes) of matrix i / 8. Register m
// holds of matrix m: row lane / 4, columns 2 (lane % 4), + 1; transposed: rows 2 (lane % 4), + 1, column lane / 4.
template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(unsigned (&to)[4], const void* row) {
#ifdef CUDA_EMULATED
    emulator::ldmatrix(to, row, TRANSPOSED);
#elif __CUDA_ARCH__ >= 750
    const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(row));
    if constexpr (TRANSPOSED) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(at)
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(at)
                     : "memory");
    }
#endif
}

template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
    for (int offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(ALL_LANES, x, offset);
    return x;
}

// The block's dynamic shared memory, the only kind these kernels use: the emulator fills it with NaN.
__device__ __forceinline__ char* shared_memory() {
#ifdef CUDA_EMULATED
    return emulator::shared_memory();
#else
    extern __shared__ __align__(128) char dynamic_shared_memory[];
    return dynamic_shared_memory;
#endif
}

// kernel<<<grid, block, shared_bytes, stream>>>(arguments...); the error of the launch, 0 for none.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Arguments... arguments) {
#ifdef CUDA_EMULATED
    (void)stream;
    return emulator::launch(grid, block, shared_bytes, [=] { kernel(arguments...); });
#else
    if (shared_bytes > 48 * 1024) {  // more than every kernel may have must be asked for
        const cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
        if (error != cudaSuccess) return error;
    }
    kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
    return cudaGetLastError();
#endif
}

// Where the sequences lie in the rows: equal lengths, or device-side offsets (count + 1).
struct Sequences {
    int64_t count, length;
    const int64_t* offsets;

    __device__ int64_t begin(int64_t s) const { return offsets ? offsets[s] : s * length; }
    __device__ int64_t end(int64_t s) const { return offsets ? offsets[s + 1] : (s + 1) * length; }
    // The first slot of a sequence in a buffer with one slot per `chunk` steps, which needs rows / chunk + count slots.
    __device__ int64_t first_slot(int64_t s, int64_t chunk) const { return begin(s) / chunk + s; }
};

}  // namespace gpu
