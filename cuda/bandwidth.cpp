// How fast memory is read: what a step by one token is measured against.
#include <omp.h>

#include <cstdint>

#include "simd.h"
#include "team.h"

using simd::FLOATS;
using simd::vecf;
using simd::veci;

// Reads `bytes` (a multiple of 1024), a thread its own part in one line, and puts into *sum what it read. ahead: bytes from a
// load to the prefetch beside it; 0: none.
EXPORT(visualrwkv_read)(const char* data, int64_t bytes, int64_t ahead, int64_t threads, int64_t* sum) {
    int64_t all = 0;
#pragma omp parallel num_threads(static_cast<int>(threads)) reduction(+ : all)
    {
        const int64_t id = omp_get_thread_num(), count = omp_get_num_threads();
        const team::Pinned pinned(id, count);
        const int64_t pieces = bytes / 1024;
        veci found[4] = {};
        for (int64_t piece = id * pieces / count; piece < (id + 1) * pieces / count; piece++) {
            const char* at = data + piece * 1024;
            for (int line = 0; line < 1024; line += 64) {
                if (ahead) __builtin_prefetch(at + line + ahead);
                for (int part = 0; part < 64; part += SIMD_BYTES)
                    found[line / 64 % 4] ^= (veci)simd::load(reinterpret_cast<const float*>(at + line + part));
            }
        }
        for (const veci& x : found)
            for (int i = 0; i < FLOATS; i++) all += x[i];
    }
    *sum = all;
}
