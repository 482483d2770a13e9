// CUDA on a CPU, as far as these kernels need it: the same .cu source, compiled by g++ with -DCUDA_EMULATED, runs one
// fiber per CUDA thread, block after block. It is made to find mistakes, not to be fast:
//
// - warps can run in different orders (`visualrwkv_emulator_schedule`), which exposes a missing barrier;
// - shared memory starts as NaN in every block, and an asynchronous copy arrives only when it is waited for;
// - a barrier that not all threads reach is reported, instead of hanging;
// - bytes of global memory moved by gpu.cuh's loads, stores and copies are counted (`visualrwkv_emulator_bytes`).
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
typedef void* cudaStream_t;
typedef int cudaError_t;
constexpr cudaError_t cudaSuccess = 0;

struct __nv_bfloat16 {
    uint16_t bits;
};
struct __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
inline float __bfloat162float(__nv_bfloat16 b) {
    uint32_t bits = static_cast<uint32_t>(b.bits) << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float x, float y) { return x / y; }

namespace emulator {

constexpr int WARP = 32, MOST_THREADS = 1024;

struct Copy {
    void* to;
    const void* from;
    int bytes, filled;  // the rest is zero
};

struct Barrier {
    int waiting = 0;
    unsigned generation = 0;
};

struct Fiber {
    ucontext_t start;
    jmp_buf context;  // where it went on from since: cheaper than swapcontext(), which calls the kernel each time
    bool started;
    const Barrier* barrier;  // it waits for the end of this generation
    unsigned generation;
    std::unique_ptr<char[]> stack;
    bool done;
    std::vector<std::vector<Copy>> groups;  // committed copies that have not arrived
    std::vector<Copy> open;
};

inline jmp_buf scheduler;
inline std::vector<Fiber> fibers(MOST_THREADS);
inline std::function<void()> kernel;
inline dim3 block_index, block_size, grid_size;
inline int threads, current, order = 0;
inline uint64_t progress = 0, bytes = 0;
inline Barrier block_barrier, warp_barriers[MOST_THREADS / WARP];
inline uint64_t exchange[MOST_THREADS][8];  // what the threads of a warp show each other
inline std::vector<char> shared;

// Go on with a fiber until it waits or ends.
inline void resume(Fiber& fiber) {
    if (fiber.done || (fiber.barrier && fiber.barrier->generation == fiber.generation)) return;
    if (_setjmp(scheduler)) return;
    if (fiber.started) _longjmp(fiber.context, 1);
    fiber.started = true;
    setcontext(&fiber.start);
}

inline void wait(Barrier& barrier, int count) {
    const unsigned generation = barrier.generation;
    if (++barrier.waiting == count) {
        barrier.waiting = 0;
        barrier.generation++;
        progress++;
        return;
    }
    Fiber& fiber = fibers[current];
    fiber.barrier = &barrier;
    fiber.generation = generation;
    if (!_setjmp(fiber.context)) _longjmp(scheduler, 1);
}

inline void wait_block() { wait(block_barrier, threads); }
inline void wait_warp() { wait(warp_barriers[current / WARP], std::min(WARP, threads - current / WARP * WARP)); }

inline void run_fiber() {
    kernel();
    fibers[current].done = true;
    progress++;
    _longjmp(scheduler, 1);
}

// Each thread of a warp until it waits; with order 1 or 2, the first or the last warp as far as it gets.
inline void run_block() {
    const int warps = (threads + WARP - 1) / WARP;
    for (;;) {
        const uint64_t before = progress;
        for (int i = 0; i < warps; i++) {
            const int warp = order == 2 ? warps - 1 - i : i;
            uint64_t seen;
            do {
                seen = progress;
                for (int lane = 0; lane < WARP && warp * WARP + lane < threads; lane++) {
                    current = warp * WARP + (order == 2 ? std::min(WARP, threads - warp * WARP) - 1 - lane : lane);
                    resume(fibers[current]);
                }
            } while (order != 0 && progress != seen);
        }
        bool live = false;
        for (int i = 0; i < threads; i++) live |= !fibers[i].done;
        if (!live) return;
        if (progress == before) {
            fprintf(stderr, "emulator: a barrier that not all threads reach\n");
            abort();
        }
    }
}

template <typename Body>
cudaError_t launch(dim3 grid, dim3 block, size_t shared_bytes, Body body) {
    threads = static_cast<int>(block.x * block.y * block.z);
    if (threads > MOST_THREADS || grid.y > 65535 || grid.z > 65535) return 9;  // cudaErrorInvalidConfiguration
    kernel = body;
    grid_size = grid;
    block_size = block;
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                block_index = dim3(x, y, z);
                shared.assign(shared_bytes + 128, static_cast<char>(0xff));
                block_barrier = Barrier();
                for (Barrier& barrier : warp_barriers) barrier = Barrier();
                for (int i = 0; i < threads; i++) {
                    Fiber& fiber = fibers[i];
                    constexpr size_t STACK = 1 << 17;
                    if (!fiber.stack) fiber.stack.reset(new char[STACK]);
                    fiber.done = false;
                    fiber.groups.clear();
                    fiber.open.clear();
                    fiber.started = false;
                    fiber.barrier = nullptr;
                    getcontext(&fiber.start);
                    fiber.start.uc_stack.ss_sp = fiber.stack.get();
                    fiber.start.uc_stack.ss_size = STACK;
                    makecontext(&fiber.start, run_fiber, 0);
                }
                run_block();
            }
    return cudaSuccess;
}

inline char* shared_memory() {
    const uintptr_t at = reinterpret_cast<uintptr_t>(shared.data());
    return reinterpret_cast<char*>((at + 127) / 128 * 128);
}

// threadIdx needs the running fiber at each use
struct ThreadIndex {
    struct X {
        operator unsigned() const { return current % block_size.x; }
    } x;
    struct Y {
        operator unsigned() const { return current / block_size.x % block_size.y; }
    } y;
    struct Z {
        operator unsigned() const { return current / (block_size.x * block_size.y); }
    } z;
};

// A value that each thread of the warp shows, and reads from lane `from`; like __shfl_sync.
template <typename T>
T shuffle(T value, int from) {
    static_assert(sizeof(T) <= 8, "one register or two");
    memcpy(exchange[current], &value, sizeof(T));
    wait_warp();
    T read;
    memcpy(&read, exchange[current / WARP * WARP + (from & (WARP - 1))], sizeof(T));
    wait_warp();
    return read;
}

inline float bf16_at(uint64_t pair, int high) {
    uint32_t bits = high ? static_cast<uint32_t>(pair) & 0xffff0000u : static_cast<uint32_t>(pair) << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

// mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32, by the fragment layouts of the PTX manual
inline void mma(float* c, const unsigned* a, const unsigned* b) {
    const int lane = current % WARP, first = current - lane, group = lane / 4, pair = lane % 4;
    for (int i = 0; i < 4; i++) exchange[current][i] = a[i];
    for (int i = 0; i < 2; i++) exchange[current][4 + i] = b[i];
    wait_warp();
    for (int e = 0; e < 4; e++) {
        const int row = group + 8 * (e / 2), column = pair * 2 + (e & 1);
        float sum = c[e];
        for (int k = 0; k < 16; k++) {
            const float x = bf16_at(exchange[first + row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)], k & 1);
            const float y = bf16_at(exchange[first + column * 4 + k % 8 / 2][4 + k / 8], k & 1);
            sum += x * y;
        }
        c[e] = sum;
    }
    wait_warp();
}

// ldmatrix.sync.aligned.m8n8.x4[.trans].shared.b16: lane i names row i % 8 of matrix i / 8
inline void ldmatrix(unsigned* to, const void* row, bool transposed) {
    const int lane = current % WARP, first = current - lane;
    exchange[current][0] = reinterpret_cast<uint64_t>(row);
    wait_warp();
    for (int matrix = 0; matrix < 4; matrix++) {
        uint16_t pair[2];
        for (int i = 0; i < 2; i++) {
            const int r = transposed ? lane % 4 * 2 + i : lane / 4, c = transposed ? lane / 4 : lane % 4 * 2 + i;
            memcpy(&pair[i], reinterpret_cast<const uint16_t*>(exchange[first + matrix * 8 + r][0]) + c, 2);
        }
        memcpy(&to[matrix], pair, 4);
    }
    wait_warp();
}

inline void arrive(Fiber& fiber, size_t keep) {
    while (fiber.groups.size() > keep) {
        for (const Copy& copy : fiber.groups.front()) {
            memcpy(copy.to, copy.from, copy.filled);
            memset(static_cast<char*>(copy.to) + copy.filled, 0, copy.bytes - copy.filled);
        }
        fiber.groups.erase(fiber.groups.begin());
    }
}

}  // namespace emulator

// The order of warps from now on: 0 in turn, 1 the first as far as it gets, 2 the last.
extern "C" __attribute__((used)) inline void visualrwkv_emulator_schedule(int64_t order) {
    emulator::order = static_cast<int>(order);
}

// Bytes of global memory moved since the last call.
extern "C" __attribute__((used)) inline int64_t visualrwkv_emulator_bytes() {
    return static_cast<int64_t>(std::exchange(emulator::bytes, 0));
}

#define threadIdx (emulator::ThreadIndex{})
#define blockIdx emulator::block_index
#define blockDim emulator::block_size
#define gridDim emulator::grid_size
inline void __syncthreads() { emulator::wait_block(); }
inline void __syncwarp(unsigned = ~0u) { emulator::wait_warp(); }
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
    return emulator::shuffle(value, lane);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return emulator::shuffle(value, emulator::current % emulator::WARP ^ mask);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int delta) {
    const int lane = emulator::current % emulator::WARP;
    return emulator::shuffle(value, lane < delta ? lane : lane - delta);
}
template <typename T>
T __shfl_down_sync(unsigned, T value, int delta) {
    const int lane = emulator::current % emulator::WARP;
    return emulator::shuffle(value, lane + delta >= emulator::WARP ? lane : lane + delta);
}
