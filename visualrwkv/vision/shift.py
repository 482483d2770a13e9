"""Q-Shift: how each patch of Vision-RWKV sees its neighbours. B pictures, P = h·w patches in row-major order, D width."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def q_shift(x: Tensor, grid: tuple[int, int], heads: int = 1) -> Tensor:
    """Each patch's neighbours: a quarter of every head's channels each from the left, the right, above, below; zero at
    borders.

    x (B, P, D) -> (B, P, D). The order of the quarters is that of the released checkpoints, not of the paper's eq. 9.
    """
    return QShift.apply(x, grid, heads)


class QShift(torch.autograd.Function):
    """`q_shift`; its gradient is the same shift the other way, where autograd would copy the whole once per quarter."""

    @staticmethod
    def forward(ctx, x: Tensor, grid: tuple[int, int], heads: int) -> Tensor:
        ctx.sizes = grid, heads
        return moved(x, grid, heads, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor) -> tuple[Tensor, None, None]:
        grid, heads = ctx.sizes
        return moved(d_out, grid, heads, -1), None, None


def moved(x: Tensor, grid: tuple[int, int], heads: int, way: int) -> Tensor:
    """The four quarters of x (B, P, D) moved by one patch each, zeros following; way -1: back again."""
    B, P, D = x.shape
    q = D // heads // 4
    x = x.reshape(B, *grid, heads, D // heads)
    out = torch.empty_like(x)
    for quarter, (axis, step) in enumerate(((2, 1), (2, -1), (1, 1), (1, -1))):
        from_, to = (t[..., quarter * q : (quarter + 1) * q] for t in (x, out))
        count = x.shape[axis] - 1
        source, target = (0, 1) if step * way > 0 else (1, 0)
        to.narrow(axis, target, count).copy_(from_.narrow(axis, source, count))
        to.select(axis, 0 if target else count).zero_()
    out[..., 4 * q :] = x[..., 4 * q :]
    return out.view(B, P, D)
