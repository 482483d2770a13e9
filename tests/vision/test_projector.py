"""Projectors against their formulas."""

import numpy as np
import torch

from visualrwkv.vision.projector import make_projector


def test_gated(randomise):
    net = randomise(make_projector("gated", 12, 20)).double()
    p = {k: v.numpy() for k, v in net.state_dict().items()}
    assert {k: v.shape for k, v in p.items()} == {
        "gate.weight": (12, 12),
        "o_proj.weight": (20, 12),
        "ln_v.weight": (20,),
        "ln_v.bias": (20,),
    }
    x = np.random.default_rng(0).normal(size=(2, 3, 12))
    gated = (x / (1 + np.exp(-(x @ p["gate.weight"].T)))) @ p["o_proj.weight"].T
    centred = gated - gated.mean(-1, keepdims=True)
    wanted = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p["ln_v.weight"] + p["ln_v.bias"]
    np.testing.assert_allclose(net(torch.tensor(x)).detach().numpy(), wanted, atol=1e-12)


def test_linear():
    net = make_projector("linear", 12, 20).double()
    assert {k: tuple(v.shape) for k, v in net.state_dict().items()} == {"weight": (20, 12)}
    x = np.random.default_rng(0).normal(size=(3, 12))
    wanted = x @ net.weight.detach().numpy().T
    np.testing.assert_allclose(net(torch.tensor(x)).detach().numpy(), wanted, atol=1e-12)
