// One token of RWKV-6 and RWKV-5 on the CPU, all layers and the head, for B sequences: visualrwkv/rwkv/rwkv6.py in fp32
// with packed weights. RWKV-5 has no data-dependent mixtures and decays, so their phases fall out.
#include "token.h"

namespace {

using packed::Matrix;
using simd::FLOATS;
using simd::vecf;
using token::Call;
using token::Network;
using token::Worker;

// As visualrwkv/ops/token_step.py lays it out. Mixtures in the order w, k, v, r, g; in RWKV-5 the first is not read.
struct Block {
    const float *ln1_weight, *ln1_bias, *ln2_weight, *ln2_bias, *group_weight, *group_bias;
    const float *mix_x, *mix, *decay, *bonus, *ffn_mix;  // (C), (5, C), (C), (C), (2, C): k, r
    Matrix mix_in, mix_out[5], decay_in, decay_out, receptance, key, value, gate, output;
    Matrix ffn_key, ffn_receptance, ffn_value;

    bool data_dependent() const { return mix_in.data != nullptr; }
};

// y = r (S + u k v) and S' = w S + k v of one head; N keys by N values.
void wkv(int64_t N, const float* r, const float* k, const float* v, const float* w, const float* u, const float* S,
         float* next, float* y) {
    float bonus = 0;
    for (int64_t i = 0; i < N; i++) bonus += r[i] * u[i] * k[i];
    for (int64_t j = 0; j < N; j++) y[j] = bonus * v[j];
    for (int64_t i = 0; i < N; i++) {
        const float *row = S + i * N, r_i = r[i], k_i = k[i], w_i = w[i];
        float* to = next + i * N;
        for (int64_t j = 0; j < N; j += FLOATS) {
            const vecf s = simd::load(row + j);
            simd::store(y + j, simd::load(y + j) + r_i * s);
            simd::store(to + j, w_i * s + k_i * simd::load(v + j));
        }
    }
}

void heads(Worker& worker, const Block& p, int64_t layer) {
    const Network& n = worker.n;
    const int64_t N = n.head_size, B = worker.B, states = layer * B * n.heads();
    const auto& in = worker.results;
    worker.together(n.heads(), [&](int64_t head) {
        const int64_t at = head * N;
        float *decays = worker.scratch, *w = decays + B * N;
        if (p.data_dependent()) worker.multiply_head(p.decay_out, worker.buffers.small[0], head, decays);
        for (int64_t b = 0; b < B; b++) {
            for (int64_t i = 0; i < N; i += FLOATS) {
                vecf raw = simd::load(p.decay + at + i);
                if (p.data_dependent()) raw += simd::load(decays + b * N + i);
                simd::store(w + i, simd::exp(-simd::exp(raw)));
            }
            const int64_t row = b * n.C + at, state = (states + b * n.heads() + head) * N * N;
            float* o = in.o + row;
            wkv(N, in.r + row, in.k + row, in.v + row, w, p.bonus + at, worker.call.wkv + state,
                worker.call.new_wkv + state, o);
            token::normalise(N, o, n.group_eps, p.group_weight + at, p.group_bias + at, o);
            for (int64_t i = 0; i < N; i += FLOATS) {
                const vecf g = simd::load(in.g + row + i);
                simd::store(o + i, simd::load(o + i) * g * simd::sigmoid(g));
            }
        }
    });
}

void layer(Worker& worker, const Block& p, int64_t l) {
    const Network& n = worker.n;
    const int64_t B = worker.B, C = n.C, state = l * B * C;
    const auto& out = worker.results;
    auto& buffers = worker.buffers;
    const auto same = [](vecf x) { return x; };
    const auto each = [&](auto f) {
        for (int64_t b = worker.first(); b < B; b += worker.step()) f(b);
    };
    each([&](int64_t b) {
        worker.shift(b, p.ln1_weight, p.ln1_bias, worker.call.att_shift + state, worker.call.new_att_shift + state);
        if (p.data_dependent()) worker.mix(b, p.mix_x, nullptr, buffers.in[0], false);
    });
    if (p.data_dependent()) {
        worker.multiply({{p.mix_in, buffers.in[0], out.low[0]}});
        const int64_t rank = p.mix_in.rows / 5;
        each([&](int64_t b) {
            for (int m = 0; m < 5; m++)
                worker.prepare(b, out.low[0] + (b * 5 + m) * rank, rank, buffers.small[m], false, token::tanh);
        });
        worker.multiply({{p.mix_out[0], buffers.small[0], out.delta[0]},
                         {p.mix_out[1], buffers.small[1], out.delta[1]},
                         {p.mix_out[2], buffers.small[2], out.delta[2]},
                         {p.mix_out[3], buffers.small[3], out.delta[3]},
                         {p.mix_out[4], buffers.small[4], out.delta[4]}});
    }
    each([&](int64_t b) {
        for (int m = p.data_dependent() ? 0 : 1; m < 5; m++)
            worker.mix(b, p.mix + m * C, p.data_dependent() ? out.delta[m] : nullptr, buffers.in[m], m && n.integers);
    });
    worker.multiply({{p.key, buffers.in[1], out.k},
                     {p.value, buffers.in[2], out.v},
                     {p.receptance, buffers.in[3], out.r},
                     {p.gate, buffers.in[4], out.g},
                     {p.decay_in, buffers.in[0], out.low[0]}});
    if (p.data_dependent()) {
        const int64_t rank = p.decay_in.rows;
        each([&](int64_t b) { worker.prepare(b, out.low[0] + b * rank, rank, buffers.small[0], false, token::tanh); });
        worker.prepared();
        worker.prepared(p.decay_out, buffers.small[0]);
        worker.prepared();
    }
    heads(worker, p, l);
    each([&](int64_t b) { worker.prepare(b, out.o + b * C, C, buffers.in[0], n.integers, same); });
    worker.multiply({{p.output, buffers.in[0], out.y}});
    each([&](int64_t b) {
        worker.add(b, out.y);
        worker.shift(b, p.ln2_weight, p.ln2_bias, worker.call.ffn_shift + state, worker.call.new_ffn_shift + state);
        worker.mix(b, p.ffn_mix, nullptr, buffers.in[0], n.integers);
        worker.mix(b, p.ffn_mix + C, nullptr, buffers.in[1], n.integers);
    });
    worker.multiply({{p.ffn_key, buffers.in[0], out.wide}, {p.ffn_receptance, buffers.in[1], out.gate}});
    each([&](int64_t b) { worker.prepare(b, out.wide + b * n.F, n.F, buffers.wide, n.integers, token::squared_relu); });
    worker.multiply({{p.ffn_value, buffers.wide, out.y}});
    each([&](int64_t b) {
        float* x = buffers.x + b * C;
        const float *gate = out.gate + b * C, *more = out.y + b * C;
        for (int64_t i = 0; i < C; i += FLOATS)
            simd::store(x + i, simd::load(x + i) + simd::sigmoid(simd::load(gate + i)) * simd::load(more + i));
    });
}

}  // namespace

// rank: the most rows of a matrix that leads to a low rank.
EXPORT(visualrwkv_token6)(const Network* n, const Call* call, int64_t threads, int64_t rank) {
    const auto* blocks = static_cast<const Block*>(n->blocks);
    token::run(*n, *call, threads, rank, [&](Worker& worker, int64_t l) { layer(worker, blocks[l], l); });
}
