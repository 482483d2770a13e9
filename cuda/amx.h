// Tiles of bf16 weights times up to 16 vectors in the processor's matrix unit (AMX), where it has one.
//
// It multiplies bf16 alone, so a vector goes in as the sum of three: what bf16 holds of it, of the rest, and of the rest of
// that, which together are the whole 24 bits of fp32. Sums are fp32.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "simd.h"

#if defined(__AVX512VNNI__) && defined(__linux__) && defined(__GNUC__) && __GNUC__ >= 11
#define WITH_AMX
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace packed {
inline namespace ISA {
namespace amx {

constexpr int64_t BATCH = 16, TILES = 4, PARTS = 3;

// Columns begin to end (whole blocks of 32) of up to `width` vectors, `stride` apart, in their parts: (PARTS, columns / 2,
// width, 2).
inline void split(const float* x, int64_t vectors, int64_t width, int64_t stride, int64_t begin, int64_t end,
                  int64_t most, uint16_t* parts) {
    for (int64_t k = begin; k < end; k += 32) {
        for (int64_t b = 0; b < vectors; b++) {
            uint16_t held[PARTS][32];
            float rest[32];
            std::memcpy(rest, x + b * stride + k, sizeof rest);
            for (auto& part : held)
                for (int i = 0; i < 32; i++) {
                    uint32_t word;
                    std::memcpy(&word, rest + i, 4);
                    word = (word + 0x7fff + (word >> 16 & 1)) & 0xffff0000;  // to nearest, ties to even
                    float taken;
                    std::memcpy(&taken, &word, 4);
                    rest[i] -= taken;
                    part[i] = static_cast<uint16_t>(word >> 16);
                }
            for (int64_t part = 0; part < PARTS; part++)
                for (int64_t i = 0; i < 32; i += 2)
                    std::memcpy(parts + (part * most + k + i) * width + b * 2, held[part] + i, 4);
        }
    }
}

#ifdef WITH_AMX
#define AMX __attribute__((target("amx-tile,amx-bf16")))

// Whether there is one and the system lets this process have it. Asked once.
inline bool available() {
    static const bool yes = [] {
        uint32_t eax = 7, ebx, ecx = 0, edx;
        asm volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
        const bool there = edx >> 22 & 1 && edx >> 24 & 1;     // amx-bf16, amx-tile
        return there && syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM: tile data
    }();
    return yes;
}

// What a thread does before and after its products with up to `width` vectors at once.
AMX inline void begin(int64_t width) {
    struct alignas(64) {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
    } shape;
    for (int t = 0; t < 8; t++) {
        shape.bytes[t] = static_cast<uint16_t>(t == 4 ? 64 : 4 * width);  // 4: weights; 0 to 3: sums; 5 to 7: vectors
        shape.rows[t] = 16;
    }
    asm volatile("" ::"r"(&shape) : "memory");  // GCC believes that only the first bytes are read
    _tile_loadconfig(&shape);
}
AMX inline void end() { _tile_release(); }

// Up to TILES rows of tiles, `size` bytes apart, of `blocks` tiles each: out (16 * tiles, width).
AMX inline void multiply(const uint8_t* tile, int64_t tiles, int64_t size, int64_t blocks, const uint16_t* parts,
                         int64_t most, int64_t width, float* out) {
    constexpr int64_t LINE = 64, TILE = 1024, AHEAD = 4096;
    const int64_t part = width * most, line = 4 * width;
    auto prefetch = [](const uint8_t* from) __attribute__((always_inline)) {
        for (int i = 0; i < 16; i++) __builtin_prefetch(from + i * LINE);
    };
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t block = 0; block < blocks; block++, tile += TILE, parts += 32 * width) {
        _tile_loadd(5, parts, line);
        _tile_loadd(6, parts + part, line);
        _tile_loadd(7, parts + 2 * part, line);
        prefetch(tile + AHEAD);
        _tile_loadd(4, tile, LINE);
        _tile_dpbf16ps(0, 4, 5);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(0, 4, 7);
        if (tiles > 1) {
            prefetch(tile + size + AHEAD);
            _tile_loadd(4, tile + size, LINE);
            _tile_dpbf16ps(1, 4, 5);
            _tile_dpbf16ps(1, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (tiles > 2) {
            prefetch(tile + 2 * size + AHEAD);
            _tile_loadd(4, tile + 2 * size, LINE);
            _tile_dpbf16ps(2, 4, 5);
            _tile_dpbf16ps(2, 4, 6);
            _tile_dpbf16ps(2, 4, 7);
        }
        if (tiles > 3) {
            prefetch(tile + 3 * size + AHEAD);
            _tile_loadd(4, tile + 3 * size, LINE);
            _tile_dpbf16ps(3, 4, 5);
            _tile_dpbf16ps(3, 4, 6);
            _tile_dpbf16ps(3, 4, 7);
        }
    }
    _tile_stored(0, out, line);
    if (tiles > 1) _tile_stored(1, out + 16 * width, line);
    if (tiles > 2) _tile_stored(2, out + 32 * width, line);
    if (tiles > 3) _tile_stored(3, out + 48 * width, line);
}
#undef AMX
#else
inline bool available() { return false; }
inline void begin(int64_t) {}
inline void end() {}
inline void multiply(const uint8_t*, int64_t, int64_t, int64_t, const uint16_t*, int64_t, int64_t, float*) {}
#endif

}  // namespace amx
}  // namespace ISA
}  // namespace packed
