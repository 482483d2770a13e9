// One token of RWKV-7 on the CPU, all layers and the head, for B sequences: visualrwkv/rwkv/rwkv7.py in fp32 with packed
// weights.
#include "token.h"

namespace {

using packed::Matrix;
using simd::FLOATS;
using simd::vecf;
using token::Call;
using token::Network;
using token::Worker;

// As visualrwkv/ops/token_step.py lays it out. Mixtures in the order r, w, k, v, a, g.
struct Block {
    const float *ln1_weight, *ln1_bias, *ln2_weight, *ln2_bias, *group_weight, *group_bias;
    const float *mix, *decay, *rate, *value_share, *removal, *replacement, *bonus, *ffn_mix;  // (6, C), (C) …
    Matrix decay_in, rate_in, share_in, gate_in, decay_out, rate_out, share_out, gate_out;
    Matrix receptance, key, value, output, ffn_key, ffn_value;
};

// S' = S (diag(d) - kk (kk a)) + v k and y = S' r of one head; N values by N keys.
void wkv(int64_t N, const float* r, const float* d, const float* k, const float* v, const float* kk, const float* a,
         const float* S, float* next, float* y) {
    for (int64_t i = 0; i < N; i++) {
        const float* row = S + i * N;
        float* to = next + i * N;
        vecf removed = {}, read = {};
        for (int64_t j = 0; j < N; j += FLOATS) removed += simd::load(row + j) * simd::load(kk + j);
        const float along = -simd::sum(removed), value = v[i];
        for (int64_t j = 0; j < N; j += FLOATS) {
            const vecf kk_a = simd::load(kk + j) * simd::load(a + j);
            const vecf s = simd::load(row + j) * simd::load(d + j) + along * kk_a + value * simd::load(k + j);
            simd::store(to + j, s);
            read += s * simd::load(r + j);
        }
        y[i] = simd::sum(read);
    }
}

void heads(Worker& worker, const Block& p, int64_t layer) {
    const Network& n = worker.n;
    const int64_t N = n.head_size, B = worker.B, states = layer * B * n.heads();
    const auto& in = worker.results;
    auto& low = worker.buffers.small;
    worker.together(n.heads(), [&](int64_t head) {
        const int64_t at = head * N;
        float *decay = worker.scratch, *rate = decay + B * N, *share = rate + B * N, *gate = share + B * N;
        float *kk = gate + B * N, *y = kk + N;
        worker.multiply_head(p.decay_out, low[0], head, decay);
        worker.multiply_head(p.rate_out, low[1], head, rate);
        if (layer > 0) worker.multiply_head(p.share_out, low[2], head, share);
        worker.multiply_head(p.gate_out, low[3], head, gate);
        for (int64_t b = 0; b < B; b++) {
            const int64_t row = b * n.C + at, state = (states + b * n.heads() + head) * N * N;
            float *d = decay + b * N, *a = rate + b * N, *k = in.k + row, *v = in.v + row, *o = in.o + row;
            const float* r = in.r + row;
            vecf squares = {}, own = {};
            for (int64_t i = 0; i < N; i += FLOATS) {
                const float limit = -0.60653066f;  // -exp(-0.5): exp(-exp(w)) with w = -softplus(-x) - 0.5
                const vecf x = simd::load(p.decay + at + i) + simd::load(d + i);
                simd::store(d + i, simd::exp(limit * simd::sigmoid(x)));
                const vecf learned = simd::sigmoid(simd::load(p.rate + at + i) + simd::load(a + i));
                simd::store(a + i, learned);
                const vecf key = simd::load(k + i), removal = key * simd::load(p.removal + at + i);
                squares += removal * removal;
                simd::store(kk + i, removal);
                const vecf replaced = key * (1.0f + (learned - 1.0f) * simd::load(p.replacement + at + i));
                simd::store(k + i, replaced);
                own += simd::load(r + i) * replaced * simd::load(p.bonus + at + i);
                float* first = in.first_value + row + i;
                const vecf value = simd::load(v + i);
                if (layer == 0) {
                    simd::store(first, value);
                } else {
                    const vecf x = simd::load(p.value_share + at + i) + simd::load(share + b * N + i);
                    simd::store(v + i, value + (simd::load(first) - value) * simd::sigmoid(x));
                }
            }
            const float length = 1 / std::max(std::sqrt(simd::sum(squares)), 1e-12f), current = simd::sum(own);
            for (int64_t i = 0; i < N; i += FLOATS) simd::store(kk + i, length * simd::load(kk + i));
            wkv(N, r, d, k, v, kk, a, worker.call.wkv + state, worker.call.new_wkv + state, y);
            token::normalise(N, y, n.group_eps, p.group_weight + at, p.group_bias + at, y);
            for (int64_t i = 0; i < N; i += FLOATS)
                simd::store(o + i, (simd::load(y + i) + current * simd::load(v + i)) * simd::load(gate + b * N + i));
        }
    });
}

void layer(Worker& worker, const Block& p, int64_t l) {
    const Network& n = worker.n;
    const int64_t B = worker.B, C = n.C, state = l * B * C;
    const auto& out = worker.results;
    auto& buffers = worker.buffers;
    auto& in = buffers.in;
    auto& low = buffers.small;
    const auto same = [](vecf x) { return x; };
    const auto each = [&](auto f) {
        for (int64_t b = worker.first(); b < B; b += worker.step()) f(b);
    };
    each([&](int64_t b) {
        worker.shift(b, p.ln1_weight, p.ln1_bias, worker.call.att_shift + state, worker.call.new_att_shift + state);
        const bool integers[] = {n.integers != 0, false, n.integers != 0, n.integers != 0, false, false};
        for (int m = 0; m < 6; m++) worker.mix(b, p.mix + m * C, nullptr, in[m], integers[m], m == 3);
    });
    worker.multiply({{p.receptance, in[0], out.r},
                     {p.key, in[2], out.k},
                     {p.value, in[3], out.v},
                     {p.decay_in, in[1], out.low[0]},
                     {p.rate_in, in[4], out.low[1]},
                     {p.share_in, in[3], out.low[2]},
                     {p.gate_in, in[5], out.low[3]}});
    each([&](int64_t b) {
        const int64_t ranks[] = {p.decay_in.rows, p.rate_in.rows, p.share_in.rows, p.gate_in.rows};
        worker.prepare(b, out.low[0] + b * ranks[0], ranks[0], low[0], false, token::tanh);
        worker.prepare(b, out.low[1] + b * ranks[1], ranks[1], low[1], false, same);
        worker.prepare(b, out.low[2] + b * ranks[2], ranks[2], low[2], false, same);
        worker.prepare(b, out.low[3] + b * ranks[3], ranks[3], low[3], false, simd::sigmoid);
    });
    worker.prepared();
    const Matrix* outs[] = {&p.decay_out, &p.rate_out, &p.share_out, &p.gate_out};
    for (int m = 0; m < 4; m++) worker.prepared(*outs[m], low[m]);
    worker.prepared();
    heads(worker, p, l);
    each([&](int64_t b) { worker.prepare(b, out.o + b * C, C, in[0], n.integers, same); });
    worker.multiply({{p.output, in[0], out.y}});
    each([&](int64_t b) {
        worker.add(b, out.y);
        worker.shift(b, p.ln2_weight, p.ln2_bias, worker.call.ffn_shift + state, worker.call.new_ffn_shift + state);
        worker.mix(b, p.ffn_mix, nullptr, in[0], n.integers);
    });
    worker.multiply({{p.ffn_key, in[0], out.wide}});
    each([&](int64_t b) { worker.prepare(b, out.wide + b * n.F, n.F, buffers.wide, n.integers, token::squared_relu); });
    worker.multiply({{p.ffn_value, buffers.wide, out.y}});
    each([&](int64_t b) { worker.add(b, out.y); });
}

}  // namespace

// rank: the most rows of a matrix that leads to a low rank.
EXPORT(visualrwkv_token7)(const Network* n, const Call* call, int64_t threads, int64_t rank) {
    const auto* blocks = static_cast<const Block*>(n->blocks);
    token::run(*n, *call, threads, rank, [&](Worker& worker, int64_t l) { layer(worker, blocks[l], l); });
}
