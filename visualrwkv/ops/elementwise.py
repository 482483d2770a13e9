"""Elementwise steps and orders whose gradients PyTorch would take more passes over memory for."""

from __future__ import annotations

from ctypes import c_int64, c_void_p

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from visualrwkv.ops import library


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)², elementwise: RWKV's activation between the two products of its channel mix."""
    if x.is_cpu and library.COMPILED and x.dtype in library.ON_CPU:
        return torch.ops.visualrwkv.relu_squared(x)
    if torch.is_grad_enabled() and x.requires_grad:
        return _ReluSquared.apply(x)
    return torch.relu(x).square_()


def reorder(x: Tensor, read: Tensor, back: Tensor) -> Tensor:
    """The rows of x (T, …) in the order `read` (T,), a permutation with the inverse `back` (T,)."""
    return _Reorder.apply(x, read, back)


torch.library.define("visualrwkv::relu_squared", "(Tensor x) -> Tensor")
torch.library.define("visualrwkv::relu_squared_backward", "(Tensor x, Tensor slope) -> Tensor")


@torch.library.register_fake("visualrwkv::relu_squared")
def _(x):
    return x.new_empty(x.shape)


@torch.library.register_fake("visualrwkv::relu_squared_backward")
def _(x, slope):
    return x.new_empty(x.shape)


@torch.library.impl("visualrwkv::relu_squared", "CPU")
def _(x):
    return _each("visualrwkv_relu_squared", x)


@torch.library.impl("visualrwkv::relu_squared_backward", "CPU")
def _(x, slope):
    return _each("visualrwkv_relu_squared_backward", x, slope.to(x.dtype))


def _each(name: str, *tensors: Tensor) -> Tensor:
    """What a C function of so many tensors makes of each of their elements."""
    tensors = tuple(t.contiguous() for t in tensors)
    out = torch.empty_like(tensors[0])
    call = library.function(name + library.ON_CPU[out.dtype], c_int64, *(c_void_p,) * (len(tensors) + 1))
    call(out.numel(), *(t.data_ptr() for t in (*tensors, out)))
    return out


torch.library.register_autograd(
    "visualrwkv::relu_squared",
    lambda ctx, slope: torch.ops.visualrwkv.relu_squared_backward(*ctx.saved_tensors, slope),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


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
