"""Vision-RWKV against an independent numpy form, written from its equations, with every pair of patches in bi-WKV."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from visualrwkv.config import VisionConfig
from visualrwkv.vision.vrwkv import VRWKV, vrwkv

PRE = VisionConfig(depth=3, width=16, patch_size=8, image_size=32, pos_grid=4)
POST = VisionConfig(depth=3, width=16, patch_size=8, image_size=32, pos_grid=4, post_norm=True, layer_scale=0.7)
PRE_SCALED = VisionConfig(depth=2, width=20, patch_size=4, image_size=16, pos_grid=4, layer_scale=0.5, ffn_rate=3)


# The equations: patches (h, w, D) ------------------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def layer_norm(x, weights, name):
    centred = x - x.mean(-1, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return normal * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def q_shift(x):
    """Quarters of the channels from the left, the right, above, below; zero outside."""
    h, w, D = x.shape
    out = np.zeros_like(x)
    for quarter, (down, right) in enumerate([(0, -1), (0, 1), (-1, 0), (1, 0)]):
        part = slice(quarter * D // 4, (quarter + 1) * D // 4)
        for i in range(h):
            for j in range(w):
                if 0 <= i + down < h and 0 <= j + right < w:
                    out[i, j, part] = x[i + down, j + right, part]
    return out


def bi_wkv(w, u, k, v):
    T = len(k)
    y = np.zeros_like(v)
    for t in range(T):
        weight = np.stack([np.exp(u + k[i]) if i == t else np.exp(-(abs(t - i) - 1) * w + k[i]) for i in range(T)])
        y[t] = (weight * v).sum(0) / weight.sum(0)
    return y


def mixed(x, mu, matrix):
    return (x * mu[0, 0] + q_shift(x) * (1 - mu[0, 0])) @ matrix.T


def spatial_mix(x, p, name):
    D, T = x.shape[-1], x.shape[0] * x.shape[1]
    k, v, r = (
        mixed(x, p[f"{name}.spatial_mix_{n[0]}"], p[f"{name}.{n}.weight"]) for n in ("key", "value", "receptance")
    )
    y = bi_wkv(
        p[f"{name}.spatial_decay"] / T, p[f"{name}.spatial_first"] / T, k.reshape(T, D), v.reshape(T, D)
    ).reshape(x.shape)
    return (sigmoid(r) * y) @ p[f"{name}.output.weight"].T


def channel_mix(x, p, name):
    k = np.maximum(mixed(x, p[f"{name}.spatial_mix_k"], p[f"{name}.key.weight"]), 0) ** 2
    r = mixed(x, p[f"{name}.spatial_mix_r"], p[f"{name}.receptance.weight"])
    return sigmoid(r) * (k @ p[f"{name}.value.weight"].T)


def encoder(picture, p, config, positions):
    """(3, H, W), position table (h, w, D) -> patches (P, D)."""
    size = config.patch_size
    H, W = picture.shape[1:]
    h, w = -(-H // size), -(-W // size)
    padded = np.zeros((3, h * size, w * size))
    padded[:, :H, :W] = picture
    kernel = p["patch_embed.projection.weight"]
    x = np.zeros((h, w, config.width))
    for i in range(h):
        for j in range(w):
            patch = padded[:, i * size : (i + 1) * size, j * size : (j + 1) * size]
            x[i, j] = (kernel * patch).sum((1, 2, 3)) + p["patch_embed.projection.bias"] + positions[i, j]
    x = layer_norm(x, p, "layers.0.ln0")
    for i in range(config.depth):
        at = f"layers.{i}"
        g1, g2 = p.get(f"{at}.gamma1", 1.0), p.get(f"{at}.gamma2", 1.0)
        if config.post_norm:
            x = x + g1 * layer_norm(spatial_mix(x, p, f"{at}.att"), p, f"{at}.ln1")
            x = x + g2 * layer_norm(channel_mix(x, p, f"{at}.ffn"), p, f"{at}.ln2")
        else:
            x = x + g1 * spatial_mix(layer_norm(x, p, f"{at}.ln1"), p, f"{at}.att")
            x = x + g2 * channel_mix(layer_norm(x, p, f"{at}.ln2"), p, f"{at}.ffn")
    return layer_norm(x, p, "ln1").reshape(h * w, -1)


# The module ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def make(randomise):
    def net(config):
        torch.manual_seed(0)
        return randomise(VRWKV(config)).double().requires_grad_(False)

    return net


def pictures(*shape):
    return torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(2)).double()


def table(net, h, w):
    """The position table of a grid, bicubic from the stored one."""
    side = net.config.pos_grid
    stored = net.pos_embed[0].view(side, side, -1)
    if (h, w) == (side, side):
        return stored.numpy()
    return F.interpolate(stored.permute(2, 0, 1)[None].float(), (h, w), mode="bicubic")[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("config", [PRE, POST, PRE_SCALED], ids=["pre", "post", "pre-scaled"])
def test_equals_the_equations(make, config):
    net = make(config)
    images = pictures(config.image_size, config.image_size)
    weights = {k: v.numpy() for k, v in net.state_dict().items()}
    found = net(images).numpy()
    for image, patches in zip(images, found):
        wanted = encoder(image.numpy(), weights, config, table(net, 4, 4))
        np.testing.assert_allclose(patches, wanted, atol=1e-9)
        assert wanted.std(0).min() > 0.05


@pytest.mark.parametrize(("H", "W"), [(35, 20), (8, 41), (3, 5), (48, 32), (40, 40)])
def test_any_size_equals_the_equations(make, H, W):
    net = make(PRE)
    h, w = -(-H // 8), -(-W // 8)
    images = pictures(H, W)
    found = net(images)
    assert found.shape == (2, h * w, 16)
    weights = {k: v.numpy() for k, v in net.state_dict().items()}
    wanted = encoder(images[1].numpy(), weights, PRE, table(net, h, w))
    np.testing.assert_allclose(found[1].numpy(), wanted, atol=1e-9)


def test_single_precision_is_close(make):
    images = pictures(32, 32)
    wanted = make(POST)(images)
    torch.testing.assert_close(make(POST).float()(images.float()).double(), wanted, rtol=0, atol=2e-5)


def test_positions_keep_rows_and_columns_apart(make):
    net = make(PRE)
    net.pos_embed.copy_(torch.arange(4.0).repeat_interleave(4).view(1, 16, 1).expand(1, 16, 16))  # the row's number
    found = net.positions((6, 3)).view(6, 3, 16)
    torch.testing.assert_close(found, found[:, :1, :1].expand_as(found), rtol=0, atol=1e-5)
    assert (found[1:, 0, 0] > found[:-1, 0, 0]).all()


# Names and sizes -----------------------------------------------------------------------------------------------------


def public_shapes(depth, C, grid, scaled):
    """Names and shapes of a public classification checkpoint without `backbone.` and head."""
    shapes = {"pos_embed": (1, grid**2, C), "patch_embed.projection.weight": (C, 3, 16, 16)}
    shapes["patch_embed.projection.bias"] = (C,)
    norms = ["ln1", "layers.0.ln0"]
    for i in range(depth):
        att, ffn = f"layers.{i}.att", f"layers.{i}.ffn"
        norms += [f"layers.{i}.ln1", f"layers.{i}.ln2"]
        shapes |= {f"{att}.spatial_decay": (C,), f"{att}.spatial_first": (C,)}
        shapes |= {f"{att}.spatial_mix_{n}": (1, 1, C) for n in "kvr"}
        shapes |= {f"{att}.{n}.weight": (C, C) for n in ("key", "value", "receptance", "output")}
        shapes |= {f"{ffn}.spatial_mix_{n}": (1, 1, C) for n in "kr"}
        shapes |= {f"{ffn}.key.weight": (4 * C, C), f"{ffn}.value.weight": (C, 4 * C)}
        shapes |= {f"{ffn}.receptance.weight": (C, C)}
        if scaled:
            shapes |= {f"layers.{i}.gamma1": (C,), f"layers.{i}.gamma2": (C,)}
    return shapes | {f"{norm}.{part}": (C,) for norm in norms for part in ("weight", "bias")}


@pytest.mark.parametrize(
    ("config", "count", "tensors"),
    [
        (VisionConfig(depth=12, width=192), 5_962_176, 223),
        (VisionConfig(depth=12, width=384, post_norm=True, layer_scale=1.0), 23_435_136, 247),
    ],
    ids=["VRWKV-T", "VRWKV-S"],
)
def test_released_sizes(config, count, tensors):
    with torch.device("meta"):
        net = VRWKV(config)
    shapes = {k: tuple(v.shape) for k, v in net.state_dict().items()}
    assert shapes == public_shapes(12, config.width, 14, bool(config.layer_scale))
    assert len(shapes) == tensors
    assert sum(p.numel() for p in net.parameters()) == count


def test_layer_scale_starts_at_its_value():
    net = VRWKV(POST)
    assert all((layer.gamma1 == 0.7).all() and (layer.gamma2 == 0.7).all() for layer in net.layers)


def test_presets_by_name():
    assert vrwkv("vrwkv_nano").config.width == 128
    with pytest.raises(ValueError, match=r"vision preset is 'vrwkv_huge'; allowed are .*vrwkv_nano"):
        vrwkv("vrwkv_huge")
