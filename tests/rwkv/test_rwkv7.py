"""RWKV-7 against an independent numpy form, written from the equations of the x070 family in float64."""

import numpy as np
import pytest
import torch

from visualrwkv.checkpoint import load_model
from visualrwkv.config import RWKV_PRESETS, RWKVConfig
from visualrwkv.rwkv.rwkv6 import Order
from visualrwkv.rwkv.rwkv7 import RWKV7

CONFIG = RWKVConfig(3, 32, 16, 70, version=7, decay_rank=6, rate_rank=4, value_rank=3, gate_rank=5)


# The equations: x (T, C), one sequence -------------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def layer_norm(x, p):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p["weight"] + p["bias"]


def mixed(x, p, names):
    before = np.concatenate([np.zeros_like(x[:1]), x[:-1]])
    return [x + (before - x) * p[f"x_{name}"][0, 0] for name in names]


def time_mix(x, p, heads, v_first):
    (T, C), N = x.shape, x.shape[1] // heads
    xr, xw, xk, xv, xa, xg = mixed(x, p, "rwkvag")
    r, k, v = xr @ p["receptance.weight"].T, xk @ p["key.weight"].T, xv @ p["value.weight"].T
    decay = np.exp(-np.exp(-0.5) * sigmoid(p["w0"][0, 0] + np.tanh(xw @ p["w1"]) @ p["w2"]))
    if v_first is None:
        v_first = v
    else:
        v = v + (v_first - v) * sigmoid(p["v0"][0, 0] + xv @ p["v1"] @ p["v2"])
    a = sigmoid(p["a0"][0, 0] + xa @ p["a1"] @ p["a2"])
    g = sigmoid(xg @ p["g1"]) @ p["g2"]
    kk = k * p["k_k"][0, 0]
    k = k * (1 + (a - 1) * p["k_a"][0, 0])
    y = np.zeros((T, C))
    for h in range(heads):
        part = slice(h * N, (h + 1) * N)
        S = np.zeros((N, N))  # [value i, key j]
        for t in range(T):
            unit = kk[t, part] / np.linalg.norm(kk[t, part])
            S = S * decay[t, part] - np.outer(S @ unit, unit * a[t, part]) + np.outer(v[t, part], k[t, part])
            out = S @ r[t, part]
            normal = (out - out.mean()) / np.sqrt(out.var() + 6.4e-4)
            own = (r[t, part] * k[t, part] * p["r_k"][h]).sum() * v[t, part]
            y[t, part] = normal * p["ln_x.weight"][part] + p["ln_x.bias"][part] + own
    return (y * g) @ p["output.weight"].T, v_first


def language_model(x, p, config):
    """Embeddings (T, C) -> the hidden states after ln_out."""

    def under(name):
        return {k[len(name) + 1 :]: v for k, v in p.items() if k.startswith(f"{name}.")}

    x, v_first = layer_norm(x, under("blocks.0.ln0")), None
    for i in range(config.n_layer):
        block = f"blocks.{i}"
        h = layer_norm(x, under(f"{block}.ln1"))
        out, v_first = time_mix(h, under(f"{block}.att"), config.n_head, v_first)
        x = x + out
        ffn = under(f"{block}.ffn")
        (xk,) = mixed(layer_norm(x, under(f"{block}.ln2")), ffn, "k")
        x = x + np.maximum(xk @ ffn["key.weight"].T, 0) ** 2 @ ffn["value.weight"].T
    return layer_norm(x, under("ln_out"))


# The module ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def net(randomise):
    torch.manual_seed(0)
    return randomise(RWKV7(CONFIG)).double().requires_grad_(False)


@pytest.fixture(scope="module")
def weights(net):
    return {k: v.numpy() for k, v in net.state_dict().items()}


def row(*lengths):
    """Random ids of several sequences and their bounds."""
    ids = torch.randint(70, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    return ids, torch.tensor([0, *lengths]).cumsum(0)


@pytest.mark.parametrize("length", [1, 2, 19])
def test_equals_the_equations(net, weights, length):
    ids, bounds = row(length)
    hidden, _ = net(net.emb(ids), bounds)
    wanted = language_model(weights["emb.weight"][ids.numpy()], weights, CONFIG)
    np.testing.assert_allclose(hidden.numpy(), wanted, atol=1e-9)
    assert wanted.std() > 0.05


def test_packed_equals_the_equations_of_each(net, weights):
    lengths = (7, 1, 12, 2)
    ids, bounds = row(*lengths)
    hidden, state = net(net.emb(ids), bounds)
    for i, (part, found) in enumerate(zip(ids.split(lengths), hidden.split(lengths))):
        wanted = language_model(weights["emb.weight"][part.numpy()], weights, CONFIG)
        np.testing.assert_allclose(found.numpy(), wanted, atol=1e-9)
        _, alone = net(net.emb(part), torch.tensor([0, len(part)]))
        torch.testing.assert_close(vars(state.select([i])), vars(alone), rtol=0, atol=1e-6)


@pytest.mark.parametrize("cut", [1, 8, 18])
def test_two_parts_with_the_state_between_equal_the_whole(randomise, cut):
    ids, bounds = row(19)
    net = randomise(RWKV7(CONFIG)).requires_grad_(False)  # single precision, as a state is
    whole, end = net(net.emb(ids), bounds)
    first, middle = net(net.emb(ids[:cut]), torch.tensor([0, cut]))
    second, last = net(net.emb(ids[cut:]), torch.tensor([0, 19 - cut]), middle)
    torch.testing.assert_close(torch.cat([first, second]), whole, rtol=0, atol=5e-5)
    torch.testing.assert_close(vars(last), vars(end), rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("first", [False, True])
def test_a_block_reads_in_its_order_and_gives_back_in_the_rows(net, first):
    ids, bounds = row(9)
    read = torch.tensor([0, 1, 5, 4, 3, 2, 6, 7, 8])  # its own inverse
    order = Order(read, read)
    found, _ = net(net.emb(ids), bounds, orders=[order, None] if first else [None, order])
    x, v_first = net.emb(ids), None
    for i, block in enumerate(net.blocks):
        turned = read if (i % 2 == 0) == first else torch.arange(9)
        x, _, values = block(x[turned], bounds, None, None if v_first is None else v_first[turned])
        x, v_first = x[turned], values[turned]
    torch.testing.assert_close(found, net.ln_out(x), rtol=0, atol=1e-12)
    assert not torch.allclose(found, net(net.emb(ids), bounds)[0])


def test_every_parameter_learns(randomise):
    net = randomise(RWKV7(CONFIG))
    ids, bounds = row(6, 9)
    hidden, _ = net(net.emb(ids), bounds)
    net.head(hidden).square().mean().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


# Names, sizes, files -------------------------------------------------------------------------------------------------


def public_shapes(c):
    """Names and shapes of a public RWKV-7 checkpoint."""
    V, C = c.vocab_size, c.n_embd
    shapes = {"emb.weight": (V, C), "head.weight": (V, C)}
    norms = ["ln_out", "blocks.0.ln0"]
    for i in range(c.n_layer):
        att, ffn = f"blocks.{i}.att", f"blocks.{i}.ffn"
        norms += [f"blocks.{i}.ln1", f"blocks.{i}.ln2", f"{att}.ln_x"]
        shapes |= {f"{att}.x_{n}": (1, 1, C) for n in "rwkvag"} | {f"{att}.{n}": (1, 1, C) for n in ("k_k", "k_a")}
        for name, rank in (("w", c.decay_rank), ("a", c.rate_rank), ("v", c.value_rank), ("g", c.gate_rank)):
            if name == "v" and i == 0:
                continue
            shapes |= {f"{att}.{name}1": (C, rank), f"{att}.{name}2": (rank, C)}
            shapes |= {} if name == "g" else {f"{att}.{name}0": (1, 1, C)}
        shapes |= {f"{att}.r_k": (c.n_head, c.head_size)}
        shapes |= {f"{att}.{n}.weight": (C, C) for n in ("receptance", "key", "value", "output")}
        shapes |= {f"{ffn}.x_k": (1, 1, C), f"{ffn}.key.weight": (4 * C, C), f"{ffn}.value.weight": (C, 4 * C)}
    return shapes | {f"{norm}.{part}": (C,) for norm in norms for part in ("weight", "bias")}


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("rwkv7-0b1", 191_034_624),
        ("rwkv7-0b4", 450_767_872),
        ("rwkv7-1b5", 1_527_404_544),
        ("rwkv7-2b9", 2_947_735_040),
    ],
)
def test_released_names_and_sizes(name, count):
    with torch.device("meta"):
        big = RWKV7(RWKV_PRESETS[name])
    assert {k: tuple(v.shape) for k, v in big.state_dict().items()} == public_shapes(RWKV_PRESETS[name])
    assert sum(p.numel() for p in big.parameters()) == count


@pytest.mark.parametrize("unread", [False, True])
def test_a_public_file_opens_without_sizes(net, tmp_path, unread):
    weights = {k: v.float() for k, v in net.state_dict().items()}
    if unread:  # some files hold them, for no reason
        weights |= {f"blocks.0.att.{k}": weights[f"blocks.1.att.{k}"].clone() for k in ("v0", "v1", "v2")}
    torch.save(weights, tmp_path / "rwkv7.pth")
    model = load_model(tmp_path / "rwkv7.pth")
    assert model.config.rwkv == CONFIG
    ids, bounds = row(9)
    logits, _ = model(ids[None])
    wanted = net.head(net(net.emb(ids), bounds)[0])
    torch.testing.assert_close(logits[0].double(), wanted, rtol=0, atol=1e-4)


def test_a_file_that_lacks_a_part_is_one_sentence(net, tmp_path):
    weights = {k: v for k, v in net.state_dict().items() if k != "blocks.1.att.v1"}
    torch.save(weights, tmp_path / "cut.pth")
    with pytest.raises(ValueError, match=r"cut\.pth is no RWKV-7: it lacks rwkv\.blocks\.1\.att\.v1"):
        load_model(tmp_path / "cut.pth")
