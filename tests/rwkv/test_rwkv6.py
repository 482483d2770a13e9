"""RWKV-6: its names and sizes are those of the public files. Its equations: test_network.py."""

import pytest
import torch

from visualrwkv.config import RWKV_PRESETS
from visualrwkv.rwkv.rwkv6 import RWKV6


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
