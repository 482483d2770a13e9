"""Vision-RWKV against an independent numpy form, written from its equations, with every pair of patches in bi-WKV."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from visualrwkv.checkpoint import load_vision
from visualrwkv.config import VRWKVConfig
from visualrwkv.vision.shift import q_shift as patches_shifted
from visualrwkv.vision.vrwkv import VRWKV, vrwkv

PRE = VRWKVConfig(depth=3, width=16, patch_size=8, image_size=32, pos_grid=4)
POST = VRWKVConfig(depth=3, width=16, patch_size=8, image_size=32, pos_grid=4, post_norm=True, layer_scale=0.7)
KEYED = VRWKVConfig(2, 16, patch_size=8, image_size=32, pos_grid=4, post_norm=True, layer_scale=0.7, key_norm=True)
SIX = VRWKVConfig(2, 32, patch_size=8, image_size=32, pos_grid=4, kind="vrwkv6", head_size=16)
SIX_POST = VRWKVConfig(*(2, 32, 8, 32, 4), post_norm=True, layer_scale=0.7, key_norm=True, kind="vrwkv6", head_size=16)
PRE_SCALED = VRWKVConfig(depth=2, width=20, patch_size=4, image_size=16, pos_grid=4, layer_scale=0.5, ffn_rate=3)


# The equations: patches (h, w, D) ------------------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def layer_norm(x, weights, name):
    centred = x - x.mean(-1, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return normal * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def q_shift(x, heads=1):
    """Quarters of the channels (of every head) from the left, the right, above, below; zero outside."""
    if heads > 1:
        return np.concatenate([q_shift(part) for part in np.split(x, heads, -1)], -1)
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


def mixed(x, mu, matrix, heads=1):
    return (x * mu[0, 0] + q_shift(x, heads) * (1 - mu[0, 0])) @ matrix.T


def key_norm(x, p, name):
    return layer_norm(x, p, f"{name}.key_norm") if f"{name}.key_norm.weight" in p else x


def spatial_mix(x, p, name):
    D, T = x.shape[-1], x.shape[0] * x.shape[1]
    k, v, r = (
        mixed(x, p[f"{name}.spatial_mix_{n[0]}"], p[f"{name}.{n}.weight"]) for n in ("key", "value", "receptance")
    )
    y = bi_wkv(
        p[f"{name}.spatial_decay"] / T, p[f"{name}.spatial_first"] / T, k.reshape(T, D), v.reshape(T, D)
    ).reshape(x.shape)
    return (sigmoid(r) * key_norm(y, p, name)) @ p[f"{name}.output.weight"].T


def spatial_mix6(x, p, name, heads):
    """Every pair of patches: how much is left of i's key at t, times what r reads of it."""
    (h, w, D), T, N = x.shape, x.shape[0] * x.shape[1], x.shape[2] // heads
    shift = q_shift(x, heads) - x
    low = np.tanh((x + shift * p[f"{name}.time_maa_x"][0, 0]) @ p[f"{name}.time_maa_w1"]).reshape(h, w, 5, -1)
    xw, xk, xv, xr, xg = (
        (x + shift * (p[f"{name}.time_maa_{n}"][0, 0] + low[:, :, i] @ p[f"{name}.time_maa_w2"][i])).reshape(T, D)
        for i, n in enumerate("wkvrg")
    )
    r, k, v, g = (
        a @ p[f"{name}.{n}.weight"].T for a, n in ((xr, "receptance"), (xk, "key"), (xv, "value"), (xg, "gate"))
    )
    lost = np.exp(p[f"{name}.time_decay"][0, 0] + np.tanh(xw @ p[f"{name}.time_decay_w1"]) @ p[f"{name}.time_decay_w2"])
    u = p[f"{name}.time_faaaa"].reshape(D)
    y = np.zeros((T, D))
    for t in range(T):
        for i in range(T):
            between = lost[min(i, t) + 1 : max(i, t)].sum(0)
            weight = r[t] * k[i] * (u if i == t else np.exp(-between))
            y[t] += weight.reshape(heads, N).sum(1).repeat(N) * v[i]
    y = key_norm(y, p, name).reshape(T, heads, N)
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)
    y = y.reshape(T, D) * p[f"{name}.ln_x.weight"] + p[f"{name}.ln_x.bias"]
    return ((y * g * sigmoid(g)) @ p[f"{name}.output.weight"].T).reshape(x.shape)


def channel_mix(x, p, name, heads):
    k = np.maximum(mixed(x, p[f"{name}.spatial_mix_k"], p[f"{name}.key.weight"], heads), 0) ** 2
    k = key_norm(k, p, name)
    r = mixed(x, p[f"{name}.spatial_mix_r"], p[f"{name}.receptance.weight"], heads)
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
    heads = config.width // config.head_size if config.kind == "vrwkv6" else 1

    def att(x, name):
        return spatial_mix6(x, p, name, heads) if config.kind == "vrwkv6" else spatial_mix(x, p, name)

    for i in range(config.depth):
        at = f"layers.{i}"
        g1, g2 = p.get(f"{at}.gamma1", 1.0), p.get(f"{at}.gamma2", 1.0)
        if config.post_norm:
            x = x + g1 * layer_norm(att(x, f"{at}.att"), p, f"{at}.ln1")
            x = x + g2 * layer_norm(channel_mix(x, p, f"{at}.ffn", heads), p, f"{at}.ln2")
        else:
            x = x + g1 * att(layer_norm(x, p, f"{at}.ln1"), f"{at}.att")
            x = x + g2 * channel_mix(layer_norm(x, p, f"{at}.ln2"), p, f"{at}.ffn", heads)
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


CONFIGS = {"pre": PRE, "post": POST, "pre-scaled": PRE_SCALED, "keyed": KEYED, "six": SIX, "six-post": SIX_POST}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
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


@pytest.mark.parametrize(("D", "heads"), [(8, 1), (10, 1), (16, 2)])  # of 10 channels two are left over
@pytest.mark.parametrize("grid", [(3, 4), (1, 3)])
def test_the_shift_has_its_gradient(D, heads, grid):
    x = torch.randn(2, grid[0] * grid[1], D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: patches_shifted(x, grid, heads), x)


def test_single_precision_is_close(make):
    images = pictures(32, 32)
    wanted = make(POST)(images)
    torch.testing.assert_close(make(POST).float()(images.float()).double(), wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("H", "W"), [(32, 32), (24, 40), (31, 17)])
def test_patches_in_bf16_are_the_convolutions(make, H, W):
    embed = make(PRE).patch_embed.bfloat16()
    pixels = torch.randn(2, 3, H, W, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = embed(pixels)
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found.float(), embed.float()(pixels.float()), rtol=2.0**-8, atol=1e-3)


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
    ("name", "count", "tensors"),
    [
        ("vrwkv_t", 6_155_176, 225),
        ("vrwkv_s", 23_820_136, 249),
        ("vrwkv_b", 93_645_544, 249),
        ("vrwkv_l", 334_881_768, 587),
        ("vrwkv6_t", 7_641_256, 345),
        ("vrwkv6_s", 27_677_032, 369),
        ("vrwkv6_b", 104_898_280, 369),
    ],
)
def test_released_sizes(name, count, tensors):
    with torch.device("meta"):
        net = vrwkv(name)
    shapes = {k: tuple(v.shape) for k, v in net.state_dict().items()}
    assert len(shapes) == tensors
    assert sum(p.numel() for p in net.parameters()) == count
    if name in ("vrwkv_t", "vrwkv_s", "vrwkv_b"):
        wanted = public_shapes(12, net.config.width, 14, bool(net.config.layer_scale))
        assert shapes == wanted | {"head.fc.weight": (1000, net.config.width), "head.fc.bias": (1000,)}


@pytest.mark.parametrize("name", ["vrwkv_t", "vrwkv6_t"])
@pytest.mark.parametrize("container", ["state_dict", "model", None])
def test_an_official_checkpoint_opens_by_name_and_without_it(tmp_path, name, container):
    torch.manual_seed(0)
    net = vrwkv(name).eval()
    weights = {k if k.startswith("head.") else f"backbone.{k}": v for k, v in net.state_dict().items()}
    torch.save({container: weights, "meta": {"epoch": 300}} if container else weights, tmp_path / "official.pth")
    by_name, by_shape = vrwkv(name, weights=tmp_path / "official.pth"), load_vision(tmp_path / "official.pth")
    images = torch.randn(1, 3, 64, 40, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        features = net(images)
        wanted = features.mean(1) @ net.head["fc"].weight.T + net.head["fc"].bias
        for found in (by_name, by_shape):
            assert found.config == net.config
            torch.testing.assert_close(found.forward_head(found(images)), wanted, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"official\.pth does not fit the model: missing layers"):
        vrwkv("vrwkv_s", weights=tmp_path / "official.pth")


def test_the_large_head_has_two_layers(randomise):
    config = VRWKVConfig(2, 16, 8, 32, 4, classes=7, head_width=24)
    net = randomise(VRWKV(config))
    features = net(torch.randn(2, 3, 32, 32))
    first, last = net.head[0], net.head[2]
    wanted = torch.tanh(features.mean(1) @ first.weight.T + first.bias) @ last.weight.T + last.bias
    torch.testing.assert_close(net.forward_head(features), wanted)
    assert [k for k in net.state_dict() if k.startswith("head")] == [
        f"head.{i}.{n}" for i in (0, 2) for n in ("weight", "bias")
    ]
    with pytest.raises(ValueError, match="no classifier"):
        VRWKV(PRE).forward_head(features)


# Drop path -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [PRE, POST], ids=["pre", "post"])
def test_drop_path_leaves_out_whole_pictures_and_makes_up_for_it(make, base):
    """Each block adds to a picture nothing, or 1 / (1 - rate) of what it would."""
    config = replace(base, drop_path=0.6)
    net = make(config).train()
    assert [layer.drop_path for layer in net.layers] == pytest.approx([0, 0.3, 0.6])
    last = net.layers[2]
    x = torch.randn(400, 16, 16, generator=torch.Generator().manual_seed(3)).double()
    last.ln2.weight.zero_(), last.ln2.bias.zero_()  # the second branch adds nothing
    torch.manual_seed(0)
    added = last(x, (4, 4)) - x
    whole = last.eval()(x, (4, 4)) - x
    out = (added == 0).all(2).all(1)
    assert 0.5 < out.double().mean() < 0.7
    torch.testing.assert_close(added[~out], whole[~out] / 0.4)


def test_drop_path_is_for_training_alone(make):
    images = pictures(32, 32)
    wanted = make(PRE).eval()(images)
    net = make(replace(PRE, drop_path=0.9))
    assert torch.equal(net.eval()(images), wanted)
    torch.manual_seed(0)
    assert not torch.allclose(net.train()(images), wanted, atol=1e-3)
    with pytest.raises(ValueError, match=r"drop_path is 1\.0; it must be at least 0 and below 1"):
        replace(PRE, drop_path=1.0)


def test_layer_scale_starts_at_its_value():
    net = VRWKV(POST)
    assert all((layer.gamma1 == 0.7).all() and (layer.gamma2 == 0.7).all() for layer in net.layers)


def test_presets_by_name():
    assert vrwkv("vrwkv_nano").config.width == 128
    with pytest.raises(ValueError, match=r"vision preset is 'vrwkv_huge'; allowed are .*vrwkv_nano"):
        vrwkv("vrwkv_huge")
