"""RWKV-6 against an independent numpy form, written from the equations of the x060 family in float64."""

import numpy as np
import pytest
import torch

from visualrwkv.config import RWKV_PRESETS, RWKVConfig
from visualrwkv.rwkv.rwkv6 import RWKV6, Order

CONFIG = RWKVConfig(n_layer=4, n_embd=32, head_size=16, vocab_size=70, mix_rank=4, decay_rank=6)


# The equations: x (T, C), one sequence -------------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def layer_norm(x, p):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p["weight"] + p["bias"]


def group_norm(x, heads, p):
    grouped = x.reshape(len(x), heads, -1)
    centred = grouped - grouped.mean(-1, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 6.4e-4)
    return normal.reshape(x.shape) * p["weight"] + p["bias"]


def shift(x):
    return np.concatenate([np.zeros_like(x[:1]), x[:-1]])


def time_mix(x, p, heads, head_size):
    T, C = x.shape
    xx = shift(x) - x
    low = np.tanh((x + xx * p["time_maa_x"][0, 0]) @ p["time_maa_w1"]).reshape(T, 5, -1)
    mixed = {
        name: x + xx * (p[f"time_maa_{name}"][0, 0] + low[:, i] @ p["time_maa_w2"][i]) for i, name in enumerate("wkvrg")
    }
    r, k, v = mixed["r"] @ p["receptance.weight"].T, mixed["k"] @ p["key.weight"].T, mixed["v"] @ p["value.weight"].T
    g = mixed["g"] @ p["gate.weight"].T
    g = g * sigmoid(g)
    w = p["time_decay"][0, 0] + np.tanh(mixed["w"] @ p["time_decay_w1"]) @ p["time_decay_w2"]
    decay = np.exp(-np.exp(w))
    y = np.zeros((T, C))
    for h in range(heads):
        part = slice(h * head_size, (h + 1) * head_size)
        S = np.zeros((head_size, head_size))  # [value i, key j]
        for t in range(T):
            kv = np.outer(v[t, part], k[t, part])
            y[t, part] = (S + p["time_faaaa"][h] * kv) @ r[t, part]
            S = S * decay[t, part] + kv
    out = group_norm(y, heads, p.under("ln_x")) * g
    return out @ p["output.weight"].T


def channel_mix(x, p):
    xx = shift(x) - x
    k = np.maximum((x + xx * p["time_maa_k"][0, 0]) @ p["key.weight"].T, 0) ** 2
    return sigmoid((x + xx * p["time_maa_r"][0, 0]) @ p["receptance.weight"].T) * (k @ p["value.weight"].T)


class Weights(dict):
    """A state dict in float64; `under` gives the part below a name."""

    def under(self, name):
        return Weights({k[len(name) + 1 :]: v for k, v in self.items() if k.startswith(f"{name}.")})


def language_model(x, p, config):
    """Embeddings (T, C) -> the hidden states after ln_out."""
    x = layer_norm(x, p.under("blocks.0.ln0"))
    for i in range(config.n_layer):
        block = p.under(f"blocks.{i}")
        x = x + time_mix(layer_norm(x, block.under("ln1")), block.under("att"), config.n_head, config.head_size)
        x = x + channel_mix(layer_norm(x, block.under("ln2")), block.under("ffn"))
    return layer_norm(x, p.under("ln_out"))


# The module ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def net(randomise):
    torch.manual_seed(0)
    return randomise(RWKV6(CONFIG)).double().requires_grad_(False)


@pytest.fixture(scope="module")
def weights(net):
    return Weights({k: v.numpy() for k, v in net.state_dict().items()})


def row(*lengths):
    """Random ids of several sequences and their bounds."""
    ids = torch.randint(70, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    return ids, torch.tensor([0, *lengths]).cumsum(0)


def test_equals_the_equations(net, weights):
    ids, bounds = row(19)
    hidden, _ = net(net.emb(ids), bounds)
    wanted = language_model(weights["emb.weight"][ids.numpy()], weights, CONFIG)
    np.testing.assert_allclose(hidden.numpy(), wanted, atol=1e-10)
    np.testing.assert_allclose(net.head(hidden).numpy(), wanted @ weights["head.weight"].T, atol=1e-9)
    assert wanted.std(0).min() > 0.05


@pytest.mark.parametrize("length", [1, 2])
def test_short_sequences_equal_the_equations(net, weights, length):
    ids, bounds = row(length)
    hidden, _ = net(net.emb(ids), bounds)
    wanted = language_model(weights["emb.weight"][ids.numpy()], weights, CONFIG)
    np.testing.assert_allclose(hidden.numpy(), wanted, atol=1e-10)


def test_single_precision_is_close(net, weights):
    ids, bounds = row(19)
    single = RWKV6(CONFIG).requires_grad_(False)
    single.load_state_dict(net.state_dict())
    hidden, state = single(single.emb(ids), bounds)
    wanted = language_model(weights["emb.weight"][ids.numpy()], weights, CONFIG)
    np.testing.assert_allclose(hidden.numpy(), wanted, atol=2e-5)
    assert {t.dtype for t in (state.att_shift, state.ffn_shift, state.wkv)} == {torch.float32}


def test_packed_equals_the_equations_of_each(net, weights):
    lengths = (7, 1, 12, 2)
    ids, bounds = row(*lengths)
    hidden, state = net(net.emb(ids), bounds)
    assert len(state) == 4
    for i, (part, found) in enumerate(zip(ids.split(lengths), hidden.split(lengths))):
        wanted = language_model(weights["emb.weight"][part.numpy()], weights, CONFIG)
        np.testing.assert_allclose(found.numpy(), wanted, atol=1e-10)
        _, alone = net(net.emb(part), torch.tensor([0, len(part)]))
        torch.testing.assert_close(vars(state.select([i])), vars(alone), rtol=0, atol=1e-6)


@pytest.mark.parametrize("cut", [1, 8, 18])
def test_two_parts_with_the_state_between_equal_the_whole(randomise, cut):
    ids, bounds = row(19)
    net = randomise(RWKV6(CONFIG)).requires_grad_(False)  # single precision, as a state is
    whole, end = net(net.emb(ids), bounds)
    first, middle = net(net.emb(ids[:cut]), torch.tensor([0, cut]))
    second, last = net(net.emb(ids[cut:]), torch.tensor([0, 19 - cut]), middle)
    torch.testing.assert_close(torch.cat([first, second]), whole, rtol=0, atol=2e-5)
    torch.testing.assert_close(vars(last), vars(end), rtol=1e-4, atol=2e-5)


def test_the_given_state_is_not_changed(net):
    ids, bounds = row(5, 6)
    _, state = net(net.emb(ids), bounds)
    before = {k: v.clone() for k, v in vars(state).items()}
    _, after = net(net.emb(ids), bounds, state)
    torch.testing.assert_close(vars(state), before, rtol=0, atol=0)
    assert not torch.equal(after.wkv, state.wkv)


def test_a_block_reads_in_its_order_and_gives_back_in_the_rows(net):
    ids, bounds = row(9)
    read = torch.tensor([0, 1, 5, 4, 3, 2, 6, 7, 8])  # its own inverse
    found, _ = net(net.emb(ids), bounds, orders=[None, Order(read, read)])
    x = net.emb(ids)
    for i, block in enumerate(net.blocks):
        x = block(x if i % 2 == 0 else x[read], bounds, None)[0]
        x = x if i % 2 == 0 else x[read]
    torch.testing.assert_close(found, net.ln_out(x), rtol=0, atol=1e-12)
    assert not torch.allclose(found, net(net.emb(ids), bounds)[0])


# Names and sizes -----------------------------------------------------------------------------------------------------


def public_shapes(c, F):
    """Names and shapes of a public RWKV-6 checkpoint."""
    V, D, H, N, m, d = c.vocab_size, c.n_embd, c.n_head, c.head_size, c.mix_rank, c.decay_rank
    shapes = {"emb.weight": (V, D), "head.weight": (V, D)}
    norms = ["ln_out", "blocks.0.ln0"]
    for i in range(c.n_layer):
        att, ffn = f"blocks.{i}.att", f"blocks.{i}.ffn"
        norms += [f"blocks.{i}.ln1", f"blocks.{i}.ln2", f"{att}.ln_x"]
        shapes |= {f"{att}.time_maa_{n}": (1, 1, D) for n in "xwkvrg"} | {f"{att}.time_decay": (1, 1, D)}
        shapes |= {f"{att}.time_maa_w1": (D, 5 * m), f"{att}.time_maa_w2": (5, m, D)}
        shapes |= {f"{att}.time_decay_w1": (D, d), f"{att}.time_decay_w2": (d, D), f"{att}.time_faaaa": (H, N)}
        shapes |= {f"{att}.{n}.weight": (D, D) for n in ("receptance", "key", "value", "output", "gate")}
        shapes |= {f"{ffn}.time_maa_k": (1, 1, D), f"{ffn}.time_maa_r": (1, 1, D), f"{ffn}.receptance.weight": (D, D)}
        shapes |= {f"{ffn}.key.weight": (F, D), f"{ffn}.value.weight": (D, F)}
    return shapes | {f"{norm}.{part}": (D,) for norm in norms for part in ("weight", "bias")}


def test_names_and_shapes_are_the_public_ones(net):
    assert {k: tuple(v.shape) for k, v in net.state_dict().items()} == public_shapes(CONFIG, F=96)


@pytest.mark.parametrize(
    ("name", "F", "count"),
    [
        ("rwkv6-1b6", 7168, 1_599_873_024),
        ("rwkv6-3b", 8960, 3_099_863_040),
        ("rwkv6-7b", 14336, 7_635_746_816),
    ],
)
def test_released_sizes(name, F, count):
    config = RWKV_PRESETS[name]
    with torch.device("meta"):
        big = RWKV6(config)
    assert {k: tuple(v.shape) for k, v in big.state_dict().items()} == public_shapes(config, F)
    assert sum(p.numel() for p in big.parameters()) == count
