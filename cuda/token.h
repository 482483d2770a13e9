// What the steps of all versions of RWKV share: the work of one thread of a team that takes B sequences one token on.
//
// A phase multiplies matrices, or works on heads, and ends in a barrier. What lies between, vectors of C, every thread
// does for itself if there is one sequence, which costs less than a barrier; else each does its share of the sequences.
#pragma once

#include <omp.h>

#include <initializer_list>
#include <utility>

#include "packed.h"
#include "simd.h"
#include "team.h"

namespace token {
inline namespace ISA {

using packed::Matrix;
using packed::Vectors;
using simd::FLOATS;
using simd::vecf;

constexpr int64_t MIXTURES = 6;

// As visualrwkv/ops/token_step.py lays it out.
struct Network {
    int64_t version, layers, C, head_size, F, V, integers;  // integers: the large matrices are of int8 or int4
    const float *ln0_weight, *ln0_bias, *ln_out_weight, *ln_out_bias;
    float eps, group_eps;
    Matrix head;
    const void* blocks;  // of the version's own kind

    int64_t heads() const { return C / head_size; }
};

struct Call {
    int64_t B;
    const float *x, *att_shift, *ffn_shift, *wkv;               // (B, C), (layers, B, C) twice, (layers, B, H, N, N)
    float *new_att_shift, *new_ffn_shift, *new_wkv, *logits;  // (B, V)
};

// What products give, of all threads together: each (B, ·).
struct Results {
    float *r, *k, *v, *g, *w, *a, *o, *y, *low[4], *delta[5], *wide, *gate, *first_value;

    static int64_t floats(const Network& n, int64_t B, int64_t rank) {
        return B * (14 * n.C + 4 * rank + n.F + packed::GROUP);
    }
    Results(float* at, const Network& n, int64_t B, int64_t rank) {
        auto take = [&](int64_t columns) { return std::exchange(at, at + B * columns); };
        for (float** one : {&r, &k, &v, &g, &w, &a, &o, &y, &delta[0], &delta[1], &delta[2], &delta[3], &delta[4]})
            *one = take(n.C);
        gate = delta[0];  // of the channel mix, which comes when the others are done
        first_value = take(n.C);
        for (float*& one : low) one = take(rank);
        wide = take(n.F);
    }
};

// Vectors between products: of each thread, or of all.
struct Buffers {
    float *x, *now, *before;  // (B, C): residual stream, normalised, and what the token before left
    Vectors in[MIXTURES], small[5], wide;

    static int64_t bytes(const Network& n, int64_t B, int64_t rank) {
        return packed::whole(3 * B * n.C * 4, packed::LINE) + MIXTURES * whole_bytes(B, n.C) +
               5 * whole_bytes(B, rank) + whole_bytes(B, n.F);
    }
    Buffers(char* at, const Network& n, int64_t B, int64_t rank, bool amx)
        : x(reinterpret_cast<float*>(at)), now(x + B * n.C), before(now + B * n.C),
          in{next(at += packed::whole(3 * B * n.C * 4, packed::LINE), B, n.C, amx), next(at, B, n.C, amx),
             next(at, B, n.C, amx), next(at, B, n.C, amx), next(at, B, n.C, amx), next(at, B, n.C, amx)},
          small{next(at, B, rank, amx), next(at, B, rank, amx), next(at, B, rank, amx), next(at, B, rank, amx),
                next(at, B, rank, amx)},
          wide(next(at, B, n.F, amx)) {}

  private:
    static int64_t whole_bytes(int64_t B, int64_t columns) {
        return packed::whole(Vectors::bytes(B, columns), packed::LINE);
    }
    static Vectors next(char*& at, int64_t B, int64_t columns, bool amx) {
        return Vectors(std::exchange(at, at + whole_bytes(B, columns)), B, columns, amx);
    }
};

inline vecf tanh(vecf x) { return 1.0f - 2.0f / (1.0f + simd::exp(x + x)); }

inline vecf squared_relu(vecf x) {
    const vecf positive = x > 0.0f ? x : vecf{};
    return positive * positive;
}

// f of count numbers, into `to`, which has room for whole vectors.
template <typename F>
inline void map(int64_t count, const float* from, float* to, F f) {
    int64_t i = 0;
    for (; i + FLOATS <= count; i += FLOATS) simd::store(to + i, f(simd::load(from + i)));
    if (i < count) {
        float rest[FLOATS] = {};
        std::copy(from + i, from + count, rest);
        simd::store(rest, f(simd::load(rest)));
        std::copy(rest, rest + count - i, to + i);
    }
}

inline void normalise(int64_t count, const float* x, float eps, const float* weight, const float* bias, float* to) {
    vecf s = {}, squares = {};
    for (int64_t i = 0; i < count; i += FLOATS) s += simd::load(x + i);
    const float mean = simd::sum(s) / count;
    for (int64_t i = 0; i < count; i += FLOATS) {
        const vecf d = simd::load(x + i) - mean;
        squares += d * d;
    }
    const float scale = 1 / std::sqrt(simd::sum(squares) / count + eps);
    for (int64_t i = 0; i < count; i += FLOATS)
        simd::store(to + i, (simd::load(x + i) - mean) * scale * simd::load(weight + i) + simd::load(bias + i));
}

struct Product {
    const Matrix& matrix;
    const Vectors& x;
    float* y;
};

class Worker {
  public:
    Worker(const Network& n, const Call& call, team::Team& team, int64_t id, const Results& results, Buffers& buffers,
           float* scratch)
        : n(n), call(call), B(call.B), results(results), buffers(buffers), scratch(scratch), team_(team), id_(id) {}

    bool alone() const { return B == 1; }
    // The sequences whose vectors this thread prepares.
    int64_t first() const { return alone() ? 0 : id_; }
    int64_t step() const { return alone() ? 1 : team_.threads; }
    bool writes_state() const { return !alone() || id_ == 0; }

    // What the team does together: units of work until none is left, and then all are done.
    template <typename F>
    void together(int64_t units, F f) {
        phase_++;
        for (int64_t unit; (unit = team_.claim(id_, phase_, units)) >= 0;) f(unit);
        team_.barrier();
    }

    // Until all have prepared their share of the vectors.
    void prepared() {
        if (!alone()) team_.barrier();
    }

    // The same for vectors that bf16 matrices read in the matrix unit.
    void prepared(const Matrix& matrix, const Vectors& x) {
        if (x.amx && matrix.kind == packed::BF16) alone() ? x.split(0, 1, matrix.columns) : x.split(id_, team_.threads, matrix.columns);
    }

    // Products of what was prepared.
    void multiply(std::initializer_list<Product> products) {
        prepared();
        if (buffers.in[0].amx) {
            for (const Product& p : products) prepared(p.matrix, p.x);
            prepared();
        }
        const int64_t size = buffers.in[0].amx ? packed::UNIT : 1;
        int64_t units = 0;
        for (const Product& p : products) units += (p.matrix.tiles() + size - 1) / size;
        together(units, [&](int64_t unit) {
            for (const Product& p : products) {
                const int64_t own = (p.matrix.tiles() + size - 1) / size;
                if (unit < own) {
                    const int64_t begin = unit * size, end = std::min(begin + size, p.matrix.tiles());
                    packed::multiply(p.matrix, p.x, begin, end, p.y, p.matrix.rows);
                    return;
                }
                unit -= own;
            }
        });
    }

    // A head's rows of a matrix of C rows, times vectors: (B, N) into scratch.
    void multiply_head(const Matrix& matrix, const Vectors& x, int64_t head, float* to) {
        const int64_t tiles = n.head_size / packed::ROWS, begin = head * tiles;
        packed::multiply(matrix, x, begin, begin + tiles, to - head * n.head_size, n.head_size);
    }

    // x to the layer norm `now`, and what the token before left in the state to `before` - `now`.
    void shift(int64_t b, const float* weight, const float* bias, const float* last, float* next) {
        const int64_t at = b * n.C;
        float *now = buffers.now + at, *before = buffers.before + at;
        normalise(n.C, buffers.x + at, n.eps, weight, bias, now);
        for (int64_t i = 0; i < n.C; i++) before[i] = last[at + i] - now[i];
        if (writes_state()) std::copy(now, now + n.C, next + at);
    }

    // now + (before - now) (mix + delta), prepared for a product.
    void mix(int64_t b, const float* mix, const float* delta, Vectors& to, bool integers, bool also_bf16 = false) {
        const float *now = buffers.now + b * n.C, *before = buffers.before + b * n.C;
        if (delta)
            for (int64_t i = 0; i < n.C; i++) scratch[i] = now[i] + before[i] * (mix[i] + delta[b * n.C + i]);
        else
            for (int64_t i = 0; i < n.C; i++) scratch[i] = now[i] + before[i] * mix[i];
        to.prepare(b, scratch, n.C, integers);
        if (integers && also_bf16) to.prepare(b, scratch, n.C, false);
    }

    // f(columns numbers of `from`), prepared as vector b.
    template <typename F>
    void prepare(int64_t b, const float* from, int64_t columns, Vectors& to, bool integers, F f) {
        map(columns, from, scratch, f);
        to.prepare(b, scratch, columns, integers);
    }

    // x += more.
    void add(int64_t b, const float* more) {
        float* x = buffers.x + b * n.C;
        for (int64_t i = 0; i < n.C; i++) x[i] += more[b * n.C + i];
    }

    const Network& n;
    const Call& call;
    const int64_t B;
    const Results& results;
    Buffers& buffers;
    float* scratch;  // of this thread

  private:
    team::Team& team_;
    const int64_t id_;
    uint16_t phase_ = 0;
};

// The whole step: `layer(worker, index)` is what the version brings.
template <typename Layer>
void run(const Network& n, const Call& call, int64_t threads, int64_t rank, Layer layer) {
    const int64_t B = call.B;
    const bool amx = packed::amx::available();
    const int64_t copies = B == 1 ? threads : 1;
    const int64_t of_buffers = Buffers::bytes(n, B, rank);
    const int64_t of_scratch = std::max({n.C, n.F, rank, 6 * B * n.head_size}) + 2 * packed::GROUP;
    thread_local simd::Scratch<char> kept;
    const int64_t of_results = packed::whole(Results::floats(n, B, rank) * 4, packed::LINE);
    char* memory = kept.reserve(of_results + copies * of_buffers + threads * of_scratch * 4 + packed::LINE);
    const Results results(reinterpret_cast<float*>(memory), n, B, rank);
    char* const after = memory + of_results;
    float* const scratch = reinterpret_cast<float*>(after + copies * of_buffers);
    team::Team team(threads);
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
#pragma omp single
        team.threads = threads = omp_get_num_threads();  // inside another parallel region it may be fewer
        const int64_t id = omp_get_thread_num();
        const team::Pinned pinned(id, threads);
        if (amx) packed::amx::begin(std::min(packed::amx::BATCH, B));
        Buffers buffers(after + (copies > 1 ? id * of_buffers : 0), n, B, rank, amx);
        Worker worker(n, call, team, id, results, buffers, scratch + id * of_scratch);
        for (int64_t b = worker.first(); b < B; b += worker.step())
            normalise(n.C, call.x + b * n.C, n.eps, n.ln0_weight, n.ln0_bias, buffers.x + b * n.C);
        for (int64_t l = 0; l < n.layers; l++) layer(worker, l);
        for (int64_t b = worker.first(); b < B; b += worker.step()) {
            normalise(n.C, buffers.x + b * n.C, n.eps, n.ln_out_weight, n.ln_out_bias, worker.scratch);
            buffers.in[0].prepare(b, worker.scratch, n.C, n.head.kind != packed::BF16);
        }
        worker.multiply({{n.head, buffers.in[0], call.logits}});
        if (amx) packed::amx::end();
    }
}

}  // namespace ISA
}  // namespace token
