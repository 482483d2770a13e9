"""Vision-RWKV for dense prediction: maps from several depths and at several strides, as detectors and segmenters read them.

The maps are what blocks give, not normalised. Finer and coarser ones come of a simple feature pyramid, as ViTDet's (arXiv
2203.16527): transposed convolutions double a map, max pooling halves it. B pictures of H x W pixels, D width.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from visualrwkv.vision.vrwkv import VRWKV


class MapNorm(nn.LayerNorm):
    """LayerNorm over the channels of maps (B, D, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, D, h, w)."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def rescale(width: int, patch: int, stride: int) -> nn.Module:
    """Maps (B, D, h, w) at the stride of the patches -> at another, both in pixels."""
    if stride >= patch:
        return nn.MaxPool2d(stride // patch, ceil_mode=True) if stride > patch else nn.Identity()
    steps: list[nn.Module] = []
    for _ in range(int(math.log2(patch // stride))):
        steps += [nn.ConvTranspose2d(width, width, 2, 2), MapNorm(width), nn.GELU()]
    return nn.Sequential(*steps[:-2])


class Features(nn.Module):
    """An encoder's maps, as timm's `features_only` gives them, with timm's `feature_info`.

    out_indices: blocks, rising, negative ones from the end, or the number of last ones; by default four evenly spread.
    strides: pixels between a map's places, one for each block: the patch times a power of two. By default, for four maps,
    a quarter of the patch, a half, the patch and two patches; for any other number the patch for all.
    The encoder is taken over: what comes after the last map goes. ValueError names a block or a stride that cannot be.
    """

    def __init__(
        self,
        encoder: VRWKV,
        out_indices: Sequence[int] | int | None = None,
        strides: Sequence[int] | None = None,
    ):
        super().__init__()
        from timm.models import FeatureInfo

        depth, width, patch = encoder.config.depth, encoder.config.width, encoder.config.patch_size
        self.out_indices = blocks(depth, out_indices)
        if strides is None:
            pyramid = (patch // 4, patch // 2, patch, 2 * patch)
            strides = pyramid if len(self.out_indices) == 4 and patch % 4 == 0 else (patch,) * len(self.out_indices)
        self.strides = checked(strides, patch, len(self.out_indices))
        encoder.layers = encoder.layers[: self.out_indices[-1] + 1]
        encoder.head, encoder.ln1 = None, nn.Identity()  # type: ignore[assignment]
        self.encoder = encoder
        self.levels = nn.ModuleList(rescale(width, patch, stride) for stride in self.strides)
        # timm's table has a row for each block; those between two maps lead to the second.
        reached = [
            next((s for i, s in zip(self.out_indices, self.strides) if i >= n), self.strides[-1]) for n in range(depth)
        ]
        rows = [{"num_chs": width, "reduction": stride, "module": f"layers.{n}"} for n, stride in enumerate(reached)]
        self.feature_info = FeatureInfo(rows, self.out_indices)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Normalised pictures (B, 3, H, W) of any size -> for each stride s a map (B, D, ⌈H/s⌉, ⌈W/s⌉)."""
        H, W = pixels.shape[-2:]
        x, grid = self.encoder.embed(pixels)
        maps: list[Tensor] = []
        for n, layer in enumerate(self.encoder.layers):
            x = layer(x, grid)
            if n in self.out_indices:
                stride = self.strides[len(maps)]
                level = self.levels[len(maps)](x.transpose(1, 2).unflatten(2, grid))
                maps.append(level[..., : -(-H // stride), : -(-W // stride)])  # what lies over the padding goes
        return maps


class FeaturePyramid(nn.Module):
    """Features under a feature pyramid network (arXiv 1612.03144): what torchvision's detectors take as a backbone."""

    def __init__(self, features: Features, out_channels: int = 256):
        super().__init__()
        from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

        self.features, self.out_channels = features, out_channels
        channels = features.feature_info.channels()
        self.fpn = FeaturePyramidNetwork(channels, out_channels, LastLevelMaxPool(), norm_layer=MapNorm)

    def forward(self, pixels: Tensor) -> OrderedDict[str, Tensor]:
        """Normalised pictures (B, 3, H, W) -> maps (B, out_channels, ⌈H/s⌉, ⌈W/s⌉) by their numbers, and a coarser one."""
        return self.fpn(OrderedDict((str(n), level) for n, level in enumerate(self.features(pixels))))


def blocks(depth: int, out_indices: Sequence[int] | int | None) -> tuple[int, ...]:
    """The blocks that `Features` reads of an encoder of that depth, counted from 0."""
    if out_indices is None:
        levels = min(4, depth)
        return tuple((n + 1) * depth // levels - 1 for n in range(levels))
    wanted = range(-out_indices, 0) if isinstance(out_indices, int) else out_indices
    found = tuple(n + depth if n < 0 else n for n in wanted)
    if not found or list(found) != sorted(set(found)) or found[0] < 0 or found[-1] >= depth:
        raise ValueError(
            f"out_indices is {out_indices}; of {depth} blocks it must name some, rising, from 0 to {depth - 1}"
        )
    return found


def checked(strides: Sequence[int], patch: int, count: int) -> tuple[int, ...]:
    """Those strides, or a ValueError that names the one that does not go."""
    if len(strides) != count:
        raise ValueError(f"strides are {tuple(strides)}, {len(strides)} for {count} maps; give one for each map")
    for stride in strides:
        times = max(stride, patch) / min(stride, patch) if stride > 0 else 0.0
        if times not in (1, 2, 4, 8, 16):
            raise ValueError(
                f"a stride is {stride}; with patches of {patch} pixels it must be {patch} times a power of two"
            )
    if list(strides) != sorted(strides):
        raise ValueError(f"strides are {tuple(strides)}; deeper maps must not be finer")
    return tuple(strides)
