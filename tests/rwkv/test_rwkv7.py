"""RWKV-7: its names and sizes are those of the public files, which open without sizes. Its equations: test_network.py."""

from dataclasses import replace

import pytest
import torch

from visualrwkv.checkpoint import load_model
from visualrwkv.config import RWKV_PRESETS, RWKVConfig
from visualrwkv.rwkv.rwkv7 import RWKV7

CONFIG = RWKVConfig(3, 32, 16, 70, version=7, decay_rank=6, rate_rank=4, value_rank=3, gate_rank=5)


@pytest.fixture(scope="module")
def net(randomise):
    return randomise(RWKV7(CONFIG)).requires_grad_(False)


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
    weights = dict(net.state_dict())
    if unread:  # some files hold them, for no reason
        weights |= {f"blocks.0.att.{k}": weights[f"blocks.1.att.{k}"].clone() for k in ("v0", "v1", "v2")}
    torch.save(weights, tmp_path / "rwkv7.pth")
    model = load_model(tmp_path / "rwkv7.pth")
    assert model.config.rwkv == replace(CONFIG, first_value=unread)
    assert model.rwkv.state_dict().keys() == weights.keys()
    ids = torch.arange(9)
    logits, _ = model(ids[None])
    torch.testing.assert_close(logits[0], net.head(net(net.emb(ids), torch.tensor([0, 9]))[0]), rtol=0, atol=0)


def test_a_file_that_lacks_a_part_is_one_sentence(net, tmp_path):
    weights = {k: v for k, v in net.state_dict().items() if k != "blocks.1.att.v1"}
    torch.save(weights, tmp_path / "cut.pth")
    with pytest.raises(ValueError, match=r"cut\.pth is no RWKV-7: it lacks rwkv\.blocks\.1\.att\.v1"):
        load_model(tmp_path / "cut.pth")
