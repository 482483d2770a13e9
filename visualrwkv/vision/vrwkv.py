"""Vision-RWKV, arXiv 2403.02308: a bidirectional RWKV over patches, at linear cost in their number.

Two families: `vrwkv` mixes by `bi_wkv`, with decays over distance; `vrwkv6` by the recurrence of RWKV-6 in both directions.
Names of parameters are those of the public classification checkpoints without their `backbone.` prefix.
B pictures, P = h·w patches in row-major order, D width, H heads, N head size.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visualrwkv.config import VISION_PRESETS, VRWKVConfig, preset
from visualrwkv.files import fill, read_tensors
from visualrwkv.ops import bi_wkv, bidirectional_wkv6
from visualrwkv.ops.elementwise import relu_squared
from visualrwkv.vision.shift import q_shift


class SpatialMix(nn.Module):
    """Mixes over patches with the bidirectional `bi_wkv`."""

    def __init__(self, config: VRWKVConfig, layer: int):
        super().__init__()
        D = config.width
        rho, tau = layer / max(config.depth - 1, 1), 1 - layer / config.depth
        i = torch.arange(D)
        self.spatial_decay = nn.Parameter(-5 + 8 * (i / (D - 1)) ** (0.7 + 1.3 * rho))
        self.spatial_first = nn.Parameter(math.log(0.3) + 0.5 * ((i + 1) % 3 - 1))
        mix = (i / D).view(1, 1, D)
        self.spatial_mix_k = nn.Parameter(mix**tau)
        self.spatial_mix_v = nn.Parameter(mix**tau + 0.3 * rho)
        self.spatial_mix_r = nn.Parameter(mix ** (0.5 * tau))
        self.key = nn.Linear(D, D, bias=False)
        self.value = nn.Linear(D, D, bias=False)
        self.receptance = nn.Linear(D, D, bias=False)
        self.output = nn.Linear(D, D, bias=False)
        self.key_norm = nn.LayerNorm(D) if config.key_norm else nn.Identity()

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, P, D) -> (B, P, D)."""
        T = x.shape[1]
        s = q_shift(x, grid)
        k = self.key(torch.lerp(s, x, self.spatial_mix_k))  # μ·x + (1 − μ)·shift(x)
        v = self.value(torch.lerp(s, x, self.spatial_mix_v))
        r = torch.sigmoid_(self.receptance(torch.lerp(s, x, self.spatial_mix_r)))
        del s  # memory at large pictures, here and below: what nothing reads any more goes at once
        y = self.key_norm(bi_wkv(self.spatial_decay / T, self.spatial_first / T, k, v))
        del k, v
        return self.output(r * y)


class SpatialMix6(nn.Module):
    """Mixes over patches with `bidirectional_wkv6`, token shift and decay depending on the data as in RWKV-6."""

    def __init__(self, config: VRWKVConfig, layer: int):
        super().__init__()
        D, N = config.width, config.head_size
        self.n_head, self.head_size = D // N, N
        rho, tau = layer / max(config.depth - 1, 1), 1 - layer / config.depth
        i = torch.arange(D)
        mix, ramp = (i / D).view(1, 1, D), i / (D - 1)
        self.time_maa_x = nn.Parameter(1 - mix**tau)
        self.time_maa_w = nn.Parameter(1 - mix**tau)
        self.time_maa_k = nn.Parameter(1 - mix**tau)
        self.time_maa_v = nn.Parameter(1 - (mix**tau + 0.3 * rho))
        self.time_maa_r = nn.Parameter(1 - mix ** (0.5 * tau))
        self.time_maa_g = nn.Parameter(1 - mix ** (0.5 * tau))
        self.time_maa_w1 = nn.Parameter(torch.empty(D, 5 * 32).uniform_(-1e-4, 1e-4))
        self.time_maa_w2 = nn.Parameter(torch.empty(5, 32, D).uniform_(-1e-4, 1e-4))
        self.time_decay = nn.Parameter((-6 + 5 * ramp ** (0.7 + 1.3 * rho)).view(1, 1, D))
        self.time_decay_w1 = nn.Parameter(torch.empty(D, 64).uniform_(-1e-4, 1e-4))
        self.time_decay_w2 = nn.Parameter(torch.empty(64, D).uniform_(-1e-4, 1e-4))
        self.time_faaaa = nn.Parameter((rho * (1 - ramp) + 0.1 * ((i + 1) % 3 - 1)).view(-1, N))
        self.receptance = nn.Linear(D, D, bias=False)
        self.key = nn.Linear(D, D, bias=False)
        self.value = nn.Linear(D, D, bias=False)
        self.gate = nn.Linear(D, D, bias=False)
        self.output = nn.Linear(D, D, bias=False)
        self.key_norm = nn.LayerNorm(D) if config.key_norm else nn.Identity()
        self.ln_x = nn.GroupNorm(self.n_head, D)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, P, D) -> (B, P, D)."""
        B, P, D = x.shape
        shift = q_shift(x, grid, self.n_head) - x
        low = torch.tanh((x + shift * self.time_maa_x) @ self.time_maa_w1)
        delta = torch.einsum("bpnr,nrd->nbpd", low.view(B, P, 5, -1), self.time_maa_w2)
        maa = torch.stack([self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g])
        xw, xk, xv, xr, xg = (x + shift * (maa + delta)).unbind(0)
        w = self.time_decay + torch.tanh(xw @ self.time_decay_w1) @ self.time_decay_w2
        r, k, v, w = (
            t.view(B, P, self.n_head, self.head_size) for t in (self.receptance(xr), self.key(xk), self.value(xv), w)
        )
        y = self.key_norm(bidirectional_wkv6(r, k, v, w, self.time_faaaa).flatten(2))
        return self.output(self.ln_x(y.flatten(0, 1)).view(B, P, D) * F.silu(self.gate(xg)))


class ChannelMix(nn.Module):
    """Mixes over channels: squared ReLU with a receptance gate, after the same four-way shift."""

    def __init__(self, config: VRWKVConfig, layer: int):
        super().__init__()
        D = config.width
        self.n_head = D // config.head_size if config.kind == "vrwkv6" else 1
        mix = (torch.arange(D) / D).view(1, 1, D) ** (1 - layer / config.depth)
        self.spatial_mix_k = nn.Parameter(mix.clone())
        self.spatial_mix_r = nn.Parameter(mix.clone())
        self.key = nn.Linear(D, config.ffn_rate * D, bias=False)
        self.receptance = nn.Linear(D, D, bias=False)
        self.value = nn.Linear(config.ffn_rate * D, D, bias=False)
        self.key_norm = nn.LayerNorm(config.ffn_rate * D) if config.key_norm else nn.Identity()

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, P, D) -> (B, P, D)."""
        s = q_shift(x, grid, self.n_head)
        r = torch.sigmoid_(self.receptance(torch.lerp(s, x, self.spatial_mix_r)))
        k = self.key(torch.lerp(s, x, self.spatial_mix_k))
        del s
        return r * self.value(self.key_norm(relu_squared(k)))


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """In training, what a branch adds to each picture (B, P, D) left out at that rate, and 1 / (1 − rate) times else."""
    return x * F.dropout(x.new_ones(len(x), 1, 1), rate) if training and rate else x


class Block(nn.Module):
    """Spatial mix, then channel mix; the norm before them or, in the larger members of the family, after them."""

    def __init__(self, config: VRWKVConfig, layer: int):
        super().__init__()
        D = config.width
        if layer == 0:
            self.ln0 = nn.LayerNorm(D)
        self.ln1 = nn.LayerNorm(D)
        self.ln2 = nn.LayerNorm(D)
        self.att = (SpatialMix6 if config.kind == "vrwkv6" else SpatialMix)(config, layer)
        self.ffn = ChannelMix(config, layer)
        self.layer, self.post_norm = layer, config.post_norm
        self.drop_path = config.drop_path * layer / max(config.depth - 1, 1)
        self.gamma1: nn.Parameter | float = 1.0
        self.gamma2: nn.Parameter | float = 1.0
        if config.layer_scale:
            del self.gamma1, self.gamma2
            self.gamma1 = nn.Parameter(torch.full((D,), config.layer_scale))
            self.gamma2 = nn.Parameter(torch.full((D,), config.layer_scale))

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, P, D) -> (B, P, D)."""
        if self.layer == 0:
            x = self.ln0(x)
        drop = self.drop_path, self.training
        if self.post_norm:
            x = x + drop_path(self.gamma1 * self.ln1(self.att(x, grid)), *drop)
            return x + drop_path(self.gamma2 * self.ln2(self.ffn(x, grid)), *drop)
        x = x + drop_path(self.gamma1 * self.att(self.ln1(x), grid), *drop)
        return x + drop_path(self.gamma2 * self.ffn(self.ln2(x), grid), *drop)


class PatchEmbed(nn.Module):
    """A convolution whose stride is the patch; sizes that do not divide are padded with zeros at the right and bottom."""

    def __init__(self, config: VRWKVConfig):
        super().__init__()
        self.patch = config.patch_size
        self.projection = nn.Conv2d(3, config.width, self.patch, self.patch)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D, ⌈H/patch⌉, ⌈W/patch⌉)."""
        H, W = pixels.shape[-2:]
        pixels = F.pad(pixels, (0, -W % self.patch, 0, -H % self.patch))
        if not (pixels.is_cpu and self.projection.weight.dtype is torch.bfloat16):
            return self.projection(pixels)
        # A CPU's convolution of bf16 takes 400 bytes a pixel and nine times as long as one product of matrices.
        patches = pixels.unflatten(3, (-1, self.patch)).unflatten(2, (-1, self.patch))  # (B, 3, h, patch, w, patch)
        rows = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)  # (B, h, w, 3 patch²)
        return F.linear(rows, self.projection.weight.flatten(1), self.projection.bias).permute(0, 3, 1, 2)


class Head(nn.ModuleDict):
    """The classifier of the smaller members of the family: one layer, by its public name."""

    def __init__(self, width: int, classes: int):
        super().__init__({"fc": nn.Linear(width, classes)})

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, classes)."""
        return self["fc"](x)


def make_head(config: VRWKVConfig) -> nn.Module | None:
    """The classifier that a config asks for: none, one layer, or the largest member's two."""
    D, hidden, classes = config.width, config.head_width, config.classes
    if hidden:
        return nn.Sequential(nn.Linear(D, hidden), nn.Tanh(), nn.Linear(hidden, classes))
    return Head(D, classes) if classes else None


class VRWKV(nn.Module):
    """The encoder. Takes any picture size; the position table is interpolated to its grid."""

    config: VRWKVConfig

    def __init__(self, config: VRWKVConfig):
        super().__init__()
        self.config = config
        self.pos_embed = nn.Parameter(torch.zeros(1, config.pos_grid**2, config.width))
        self.patch_embed = PatchEmbed(config)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.depth))
        self.ln1 = nn.LayerNorm(config.width)
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
        self.head = make_head(config)

    def grid(self, pixels: Tensor) -> tuple[int, int]:
        """Patches down and across pictures (B, 3, H, W)."""
        size = self.config.patch_size
        return -(-pixels.shape[-2] // size), -(-pixels.shape[-1] // size)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The position table for a grid of patches -> (1, h·w, D)."""
        side = self.config.pos_grid
        if grid == (side, side):
            return self.pos_embed
        table = self.pos_embed.view(1, side, side, -1).permute(0, 3, 1, 2).float()  # fp32: bicubic in bf16 is coarse
        table = F.interpolate(table, size=grid, mode="bicubic", align_corners=False)
        return table.flatten(2).transpose(1, 2).to(self.pos_embed.dtype)

    def embed(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """What the first block reads of pictures (B, 3, H, W): patches (B, P, D), and their grid."""
        x = self.patch_embed(pixels)
        grid = (x.shape[-2], x.shape[-1])
        return x.flatten(2).transpose(1, 2) + self.positions(grid), grid

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pictures (B, 3, H, W) -> patches (B, P, D), row-major, after the final norm."""
        x, grid = self.embed(pixels)
        for layer in self.layers:
            x = layer(x, grid)
        return self.ln1(x)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameters belong to which layer, as timm's layer-wise learning rates ask."""
        layers = [(r"^layers\.(\d+)", None), (r"^ln1", (99999,))]  # timm's way of saying: the last
        return {"stem": r"^pos_embed|^patch_embed|^layers\.0\.ln0", "blocks": layers}

    def forward_head(self, features: Tensor) -> Tensor:
        """Patches (B, P, D), as `forward` gives them -> logits (B, classes)."""
        if self.head is None:
            raise ValueError("this encoder has no classifier; its config says classes = 0")
        return self.head(features.mean(1))


def vrwkv(name: str, weights: str | Path | None = None) -> VRWKV:
    """An encoder of a preset size, freshly initialised or with the weights of an official classification checkpoint or of a
    directory that training left; it has as many classes as they.

    ValueError names the sizes there are, or what in the file does not fit.
    """
    config = preset(VISION_PRESETS, name, "vision preset")
    if weights is None:
        return VRWKV(config)
    given = official_names(read_tensors(weights))
    last = given.get("head.2.weight" if config.head_width else "head.fc.weight")
    net = VRWKV(config if last is None else replace(config, classes=len(last)))
    fill(net, given, weights)
    return net


def official_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an official checkpoint by our names: without `module.` and `backbone.`."""
    return {k.removeprefix("module.").removeprefix("backbone."): v for k, v in weights.items()}
