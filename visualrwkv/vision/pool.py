"""From patches to a chosen number of image tokens."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def pool(patches: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Average patches (I, h·w, D) of a grid (h, w) over a side × side grid -> image tokens (I, side², D), row-major."""
    if grid == (side, side):
        return patches
    x = patches.transpose(1, 2).unflatten(2, grid)
    return F.adaptive_avg_pool2d(x, side).flatten(2).transpose(1, 2)
