// Threads that work through one token together: barriers that cost less than a microsecond, and work that is divided
// beforehand, so that each thread reads memory in order, but may be taken over by one that is done, for on a shared
// machine a thread can be held up at any time.
#pragma once

#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "simd.h"

namespace team {
inline namespace ISA {

class Team {
  public:
    explicit Team(int64_t threads) : threads(threads), ranges_(new Range[threads]) {}

    // Until all are here. Waits awake for some microseconds, then lets others have the processor.
    void barrier() {
        const uint32_t now = generation_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
            arrived_.store(0, std::memory_order_relaxed);
            generation_.store(now + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; generation_.load(std::memory_order_acquire) == now; spins++) {
            if (spins < AWAKE)
                pause();
            else
                std::this_thread::yield();
        }
    }

    // Takes the next of `units` pieces of work of phase number `phase`, first from the own share, then from the end of
    // others'; -1 when all is taken. All threads count phases alike; a range of an earlier one is as good as untouched.
    int64_t claim(int64_t me, uint16_t phase, int64_t units) {
        for (int64_t i = 0; i < threads; i++) {
            const int64_t owner = (me + i) % threads;
            const uint64_t whole = word(phase, owner * units / threads, (owner + 1) * units / threads);
            std::atomic<uint64_t>& range = ranges_[owner].word;
            uint64_t seen = range.load(std::memory_order_relaxed);
            for (;;) {
                const uint64_t current = seen >> 48 == phase ? seen : whole;
                const int64_t begin = current >> 24 & MASK, end = current & MASK;
                if (begin >= end) break;
                const uint64_t rest = i == 0 ? word(phase, begin + 1, end) : word(phase, begin, end - 1);
                if (range.compare_exchange_weak(seen, rest, std::memory_order_relaxed)) return i == 0 ? begin : end - 1;
            }
        }
        return -1;
    }

    int64_t threads;

  private:
    static constexpr int AWAKE = 1000;
    static constexpr uint64_t MASK = (1 << 24) - 1;

    struct alignas(64) Range {
        std::atomic<uint64_t> word{0};  // phase, begin, end
    };

    static uint64_t word(uint16_t phase, int64_t begin, int64_t end) {
        return static_cast<uint64_t>(phase) << 48 | static_cast<uint64_t>(begin) << 24 | static_cast<uint64_t>(end);
    }
    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

    alignas(64) std::atomic<int64_t> arrived_{0};
    alignas(64) std::atomic<uint32_t> generation_{0};
    std::unique_ptr<Range[]> ranges_;
};

// Keeps a thread on a processor of its own while it lives, where there is one for each: else the system may start two
// on one. Where there are fewer or more processors, or threads are bound already, it leaves them alone.
class Pinned {
  public:
#if defined(__linux__)
    Pinned(int64_t thread, int64_t threads) {
        if (threads < 2 || sched_getaffinity(0, sizeof before_, &before_) || CPU_COUNT(&before_) != threads) return;
        cpu_set_t one;
        CPU_ZERO(&one);
        int64_t seen = 0;
        for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
            if (CPU_ISSET(cpu, &before_) && seen++ == thread) CPU_SET(cpu, &one);
        pinned_ = sched_setaffinity(0, sizeof one, &one) == 0;
    }
    ~Pinned() {
        if (pinned_) sched_setaffinity(0, sizeof before_, &before_);
    }

  private:
    cpu_set_t before_;
    bool pinned_ = false;
#else
    Pinned(int64_t, int64_t) {}
#endif
};

}  // namespace ISA
}  // namespace team
