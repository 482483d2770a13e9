"""Elementwise steps and orders whose gradients PyTorch would take more passes over memory for."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)², elementwise: RWKV's activation between the two products of its channel mix."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _ReluSquared.apply(x)
    return torch.relu(x).square_()


def reorder(x: Tensor, read: Tensor, back: Tensor) -> Tensor:
    """The rows of x (T, …) in the order `read` (T,), a permutation with the inverse `back` (T,)."""
    return _Reorder.apply(x, read, back)


class _ReluSquared(torch.autograd.Function):
    """Keeps one tensor, and needs two products where max and square by themselves need six passes."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        positive = torch.relu(x)
        ctx.save_for_backward(positive)
        return positive.square()

    @staticmethod
    @once_differentiable
    def backward(ctx, slope: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return (slope * positive).mul_(2)


class _Reorder(torch.autograd.Function):
    """The gradient of a permutation is read, where that of any gather would be added onto zeros."""

    @staticmethod
    def forward(ctx, x: Tensor, read: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x.index_select(0, read)

    @staticmethod
    @once_differentiable
    def backward(ctx, slope: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return slope.index_select(0, back), None, None
