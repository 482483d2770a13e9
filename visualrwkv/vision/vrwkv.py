"""Vision-RWKV, arXiv 2403.02308: a bidirectional RWKV over patches, at linear cost in their number.

Names of parameters are those of the public classification checkpoints without their `backbone.` prefix.
B pictures, P = h·w patches in row-major order, D width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visualrwkv.config import VISION_PRESETS, VisionConfig, preset
from visualrwkv.ops import bi_wkv


def q_shift(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Each patch's neighbours: a quarter of the channels each from the left, the right, above, below; zero at borders.

    x (B, P, D) -> (B, P, D). The order of the quarters is that of the released checkpoints, not of the paper's eq. 9.
    """
    B, P, D = x.shape
    q = D // 4
    x = x.view(B, *grid, D)
    out = torch.zeros_like(x)
    out[:, :, 1:, :q] = x[:, :, :-1, :q]
    out[:, :, :-1, q : 2 * q] = x[:, :, 1:, q : 2 * q]
    out[:, 1:, :, 2 * q : 3 * q] = x[:, :-1, :, 2 * q : 3 * q]
    out[:, :-1, :, 3 * q : 4 * q] = x[:, 1:, :, 3 * q : 4 * q]
    out[..., 4 * q :] = x[..., 4 * q :]
    return out.view(B, P, D)


class SpatialMix(nn.Module):
    """Mixes over patches with the bidirectional `bi_wkv`."""

    def __init__(self, config: VisionConfig, layer: int):
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

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, P, D) -> (B, P, D)."""
        T = x.shape[1]
        s = q_shift(x, grid)
        k = self.key(s.lerp(x, self.spatial_mix_k))  # μ·x + (1 − μ)·shift(x)
        v = self.value(s.lerp(x, self.spatial_mix_v))
        r = self.receptance(s.lerp(x, self.spatial_mix_r))
        y = bi_wkv(self.spatial_decay / T, self.spatial_first / T, k, v)
        return self.output(torch.sigmoid(r) * y)


class ChannelMix(nn.Module):
    """Mixes over channels: squared ReLU with a receptance gate, after the same four-way shift."""

    def __init__(self, config: VisionConfig, layer: int):
        super().__init__()
        D = config.width
        mix = (torch.arange(D) / D).view(1, 1, D) ** (1 - layer / config.depth)
        self.spatial_mix_k = nn.Parameter(mix.clone())
        self.spatial_mix_r = nn.Parameter(mix.clone())
        self.key = nn.Linear(D, config.ffn_rate * D, bias=False)
        self.receptance = nn.Linear(D, D, bias=False)
        self.value = nn.Linear(config.ffn_rate * D, D, bias=False)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, P, D) -> (B, P, D)."""
        s = q_shift(x, grid)
        k = torch.relu(self.key(s.lerp(x, self.spatial_mix_k))).square()
        r = self.receptance(s.lerp(x, self.spatial_mix_r))
        return torch.sigmoid(r) * self.value(k)


class Block(nn.Module):
    """Spatial mix, then channel mix; the norm before them or, in the larger members of the family, after them."""

    def __init__(self, config: VisionConfig, layer: int):
        super().__init__()
        D = config.width
        if layer == 0:
            self.ln0 = nn.LayerNorm(D)
        self.ln1 = nn.LayerNorm(D)
        self.ln2 = nn.LayerNorm(D)
        self.att = SpatialMix(config, layer)
        self.ffn = ChannelMix(config, layer)
        self.layer, self.post_norm = layer, config.post_norm
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
        if self.post_norm:
            x = x + self.gamma1 * self.ln1(self.att(x, grid))
            return x + self.gamma2 * self.ln2(self.ffn(x, grid))
        x = x + self.gamma1 * self.att(self.ln1(x), grid)
        return x + self.gamma2 * self.ffn(self.ln2(x), grid)


class PatchEmbed(nn.Module):
    """A convolution whose stride is the patch; sizes that do not divide are padded with zeros at the right and bottom."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.patch = config.patch_size
        self.projection = nn.Conv2d(3, config.width, self.patch, self.patch)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D, ⌈H/patch⌉, ⌈W/patch⌉)."""
        H, W = pixels.shape[-2:]
        return self.projection(F.pad(pixels, (0, -W % self.patch, 0, -H % self.patch)))


class VRWKV(nn.Module):
    """The encoder. Takes any picture size; the position table is interpolated to its grid."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.pos_embed = nn.Parameter(torch.zeros(1, config.pos_grid**2, config.width))
        self.patch_embed = PatchEmbed(config)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.depth))
        self.ln1 = nn.LayerNorm(config.width)
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The position table for a grid of patches -> (1, h·w, D)."""
        side = self.config.pos_grid
        if grid == (side, side):
            return self.pos_embed
        table = self.pos_embed.view(1, side, side, -1).permute(0, 3, 1, 2).float()  # fp32: bicubic in bf16 is coarse
        table = F.interpolate(table, size=grid, mode="bicubic", align_corners=False)
        return table.flatten(2).transpose(1, 2).to(self.pos_embed.dtype)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pictures (B, 3, H, W) -> patches (B, P, D), row-major, after the final norm."""
        x = self.patch_embed(pixels)
        grid = (x.shape[-2], x.shape[-1])
        x = x.flatten(2).transpose(1, 2) + self.positions(grid)
        for layer in self.layers:
            x = layer(x, grid)
        return self.ln1(x)


def vrwkv(name: str) -> VRWKV:
    """A freshly initialised encoder of a preset size; ValueError names the sizes there are."""
    return VRWKV(preset(VISION_PRESETS, name, "vision preset"))
