"""DINOv2, SigLIP and SAM side by side: the encoder of the HD, UHD and v7.00 releases of VisualRWKV (arXiv 2410.11665).

All three see the same picture, in two sizes, and give maps of one grid, so that their channels can be joined. The networks
are timm's; names of parameters are those of the released files, which hold them.
B pictures, V views of each (1, or the whole and its four quarters), P = h·w patches row-major, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visualrwkv.config import TowersConfig

TOGETHER = 4  # views that SAM reads at once: its attention over 4,096 patches needs most of the memory


class Towers(nn.Module):
    """The three encoders. What it reads of a picture is one row: `sizes(config)`, each normalised for its encoder."""

    def __init__(self, config: TowersConfig):
        super().__init__()
        from timm import create_model

        self.config = config
        self.dino_featurizer: Any = create_model(
            "vit_large_patch14_reg4_dinov2",
            num_classes=0,
            img_size=config.image_size,
            depth=config.dino_depth,
            embed_dim=config.dino_width,
            num_heads=config.dino_width // 64,
        )
        self.siglip_featurizer: Any = create_model(
            "vit_so400m_patch14_siglip_384",
            num_classes=0,
            img_size=config.image_size,
            depth=config.siglip_depth,
            embed_dim=config.siglip_width,
            num_heads=max(config.siglip_width // 72, 1),
            mlp_ratio=(config.siglip_ffn + 0.5) / config.siglip_width,  # timm rounds the product down
        )
        self.sam_featurizer: Any = create_model(
            "samvit_base_patch16",
            num_classes=0,
            img_size=config.sam_size,
            depth=config.sam_depth,
            embed_dim=config.sam_width,
            num_heads=config.sam_width // 64,
            neck_chans=config.sam_out,
            global_attn_indexes=tuple(range(2, config.sam_depth, 3)),
        )
        sam: Any = self.sam_featurizer
        for block in sam.blocks:
            block.mlp = PublicMlp(block.mlp)

    def grid(self, pixels: Tensor) -> tuple[int, int]:
        """Patches down and across."""
        return self.config.grid, self.config.grid

    def forward(self, pixels: Tensor) -> Tensor:
        """What the processor made of pictures (B, V · row) -> patches (B, P, D)."""
        views = pixels.view(len(pixels), 5 if self.config.tiles else 1, -1)
        parts = views.split([size[0] * size[1] * size[2] for size in sizes(self.config)], 2)
        dino, siglip, sam = (x.reshape(-1, *size) for x, size in zip(parts, sizes(self.config)))
        maps = [
            self._penultimate(self.dino_featurizer, dino),
            self._penultimate(self.siglip_featurizer, siglip),
            torch.cat([F.pixel_unshuffle(self.sam_featurizer.forward_features(x), 2) for x in sam.split(TOGETHER)]),
        ]
        maps = [x.unflatten(0, views.shape[:2]) for x in maps]  # each (B, V, C, h, w)
        joined = [x[:, 0] for x in maps] + ([stitch(x[:, 1:]) for x in maps] if self.config.tiles else [])
        return torch.cat(joined, 1).flatten(2).transpose(1, 2)

    def _penultimate(self, net: Any, pixels: Tensor) -> Tensor:
        """The map (B, C, h, w) after the block before the last, without a norm."""
        (patches,) = net.get_intermediate_layers(pixels, n=[len(net.blocks) - 2])
        return patches.transpose(1, 2).unflatten(2, (self.config.grid, self.config.grid))


class PublicMlp(nn.Module):
    """SAM's MLP by the names of its own files, where timm has fc1 and fc2."""

    def __init__(self, mlp: Any):
        super().__init__()
        self.lin1, self.act, self.lin2 = mlp.fc1, mlp.act, mlp.fc2

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return self.lin2(self.act(self.lin1(x)))


def sizes(config: TowersConfig) -> list[tuple[int, int, int]]:
    """The pictures (3, H, W) that a view's row holds: for DINOv2, SigLIP and SAM."""
    return [(3, size, size) for size in (config.image_size, config.image_size, config.sam_size)]


def stitch(tiles: Tensor) -> Tensor:
    """Maps of the quarters (B, 4, C, h, w), top row first, each at half its grid -> one map (B, C, h, w)."""
    B, _, C, h, w = tiles.shape
    small = F.adaptive_avg_pool2d(tiles.flatten(0, 1), (h // 2, w // 2)).view(B, 2, 2, C, h // 2, w // 2)
    return small.permute(0, 3, 1, 4, 2, 5).reshape(B, C, h, w)
