"""What surrounds the recurrence of RWKV-7 ("Goose", arXiv 2503.14456, section 4): what `wkv7` reads, and what is made of
what it says. With σ the logistic function and kk = k removal / |k removal| per head,

    value = v + (first - v) σ(share + share0)

    w = -softplus(-(decay + decay0)) - 0.5        key = k (1 + (σ(rate + rate0) - 1) replacement)
    a = -kk                                       b = kk σ(rate + rate0)

    out = (normalised(y) scale + shift + (sum over the head of r key bonus) value) gate

T tokens, C channels, H heads, N head size. Weights have C numbers in any shape; gradients reach them and every input.
Two forms: compiled (cuda/gates7.cpp, cuda/gates7.cu), one pass over memory for each of the three, and torch, which is also
the reference.
"""

from __future__ import annotations

from ctypes import c_float, c_int64, c_void_p
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from visualrwkv.ops import library
from visualrwkv.ops.sequences import aligned, has_float64

PIECE = 64  # rows with a partial sum of their own: PIECE in cuda/gates7.cpp and cuda/gates7.cu


def mix_values(v: Tensor, share: Tensor, first: Tensor, share0: Tensor, heads: int) -> Tensor:
    """v, share and first, the first layer's values (T, C) → value (T, C)."""
    if _compiled_takes(heads, v, share, first, share0):
        return _run("mix_values", (v, share, first), (share0,), heads)[0]
    return mix_values_torch(v, share, first, share0)


def mix_values_torch(v: Tensor, share: Tensor, first: Tensor, share0: Tensor) -> Tensor:
    """The equation, in plain torch on any device; shapes as in `mix_values`."""
    return torch.lerp(v, first, torch.sigmoid(share0.reshape(-1).to(v.dtype) + share))


def before_wkv7(
    k: Tensor,
    decay: Tensor,
    rate: Tensor,
    decay0: Tensor,
    rate0: Tensor,
    removal: Tensor,
    replacement: Tensor,
    heads: int,
) -> tuple[Tensor, ...]:
    """k, decay, rate (T, C) → w, key, a, b (T, C) in k's dtype: what `wkv7` reads beside r and the values."""
    weights = decay0, rate0, removal, replacement
    if _compiled_takes(heads, k, decay, rate, *weights):
        return _run("before_wkv7", (k, decay, rate), weights, heads)
    return before_wkv7_torch(k, decay, rate, *weights, heads)


def before_wkv7_torch(
    k: Tensor,
    decay: Tensor,
    rate: Tensor,
    decay0: Tensor,
    rate0: Tensor,
    removal: Tensor,
    replacement: Tensor,
    heads: int,
) -> tuple[Tensor, ...]:
    """The equations, in plain torch on any device; shapes as in `before_wkv7`."""
    dtype = k.dtype  # under autocast a product's, not the parameters'
    w = -F.softplus(-(decay0.reshape(-1) + decay)) - 0.5  # a decay between 0.545 and 1
    rate = torch.sigmoid(rate0.reshape(-1).to(dtype) + rate)
    kk = F.normalize((k * removal.reshape(-1).to(dtype)).unflatten(-1, (heads, -1)), dim=-1)
    kk = kk.flatten(-2).to(dtype)  # CUDA's autocast raises a norm
    return w.to(dtype), k * (1 + (rate - 1) * replacement.reshape(-1).to(dtype)), -kk, kk * rate


def after_wkv7(
    y: Tensor,
    r: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    bonus: Tensor,
    scale: Tensor,
    shift: Tensor,
    heads: int,
    eps: float,
) -> Tensor:
    """y, r, key, value, gate (T, C) → (T, C): the time mix before its last product. eps is added to y's variance."""
    if _compiled_takes(heads, y, r, key, value, gate, bonus, scale, shift):
        return _run("after_wkv7", (y, r, key, value, gate), (bonus, scale, shift), heads, eps)[0]
    return after_wkv7_torch(y, r, key, value, gate, bonus, scale, shift, heads, eps)


def after_wkv7_torch(
    y: Tensor,
    r: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    bonus: Tensor,
    scale: Tensor,
    shift: Tensor,
    heads: int,
    eps: float,
) -> Tensor:
    """The equation, in plain torch on any device; shapes as in `after_wkv7`."""
    own = (r * key * bonus.reshape(-1).to(y.dtype)).unflatten(-1, (heads, -1)).sum(-1, keepdim=True)
    own = (own * value.unflatten(-1, (heads, -1))).flatten(-2)  # the current token, by a way of its own
    return (F.group_norm(y, heads, scale, shift, eps) + own) * gate


# The compiled form ---------------------------------------------------------------------------------------------------

INPUTS = {"mix_values": "v share first", "before_wkv7": "k decay rate", "after_wkv7": "y r key value gate"}
OUTPUTS = {"mix_values": "value", "before_wkv7": "w key a b", "after_wkv7": "out"}


def _compiled_takes(heads: int, x: Tensor, *others: Tensor) -> bool:
    """Whether a library computes this: of heads that fill vectors, or warps."""
    if has_float64(x, *others):
        return False
    if x.is_cuda:
        return x.shape[-1] in (32 * heads, 64 * heads, 128 * heads) and library.has_cuda()
    return x.is_cpu and library.COMPILED and x.shape[-1] % (16 * heads) == 0


def _run(
    name: str, rows: tuple[Tensor, ...], weights: tuple[Tensor, ...], heads: int, eps: float = 0.0
) -> tuple[Tensor, ...]:
    """One step, in bf16 where all rows are and in fp32 otherwise; its outputs in the first row's dtype."""
    dtype = torch.bfloat16 if all(x.dtype is torch.bfloat16 for x in rows) else torch.float32
    stacked = torch.stack([x.reshape(-1).float() for x in weights])
    found = getattr(torch.ops.visualrwkv, name)(*(x.to(dtype) for x in rows), stacked, heads, eps)
    return tuple(x.to(rows[0].dtype) for x in _tuple(found))


def _register(name: str) -> None:
    """The op `name` (*inputs, weights, heads, eps) → outputs, and its backward (…, slopes of them) → slopes of the tensors."""
    inputs, outputs = [*INPUTS[name].split(), "weights"], OUTPUTS[name].split()
    arguments = ", ".join(f"Tensor {x}" for x in inputs) + ", int heads, float eps"
    slopes = "".join(f", Tensor d{x}" for x in outputs)
    torch.library.define(f"visualrwkv::{name}", f"({arguments}) -> ({', '.join(['Tensor'] * len(outputs))})")
    gradients = ", ".join(["Tensor"] * len(inputs))
    torch.library.define(f"visualrwkv::{name}_backward", f"({arguments}{slopes}) -> ({gradients})")
    count = len(inputs)

    @torch.library.register_fake(f"visualrwkv::{name}")
    def _(x, *more):
        found = tuple(x.new_empty(x.shape) for _ in outputs)
        return found if len(found) > 1 else found[0]

    @torch.library.register_fake(f"visualrwkv::{name}_backward")
    def _(*tensors_and):
        return tuple(x.new_empty(x.shape) for x in tensors_and[:count])

    def forward(call, *tensors_and):
        *tensors, heads, eps = tensors_and
        tensors = [aligned(x) for x in tensors]
        found = tuple(torch.empty_like(tensors[0]) for _ in outputs)
        call(name, heads, eps, *tensors, *found)
        return found if len(found) > 1 else found[0]

    def slopes_of(call, *tensors_and):
        heads, eps = tensors_and[count : count + 2]
        *rows, weights = [aligned(x) for x in tensors_and[:count]]
        slopes = [aligned(x.to(rows[0].dtype)) for x in tensors_and[count + 2 :]]
        found = [torch.empty_like(x) for x in rows]
        parts = weights.new_empty((-(-rows[0].shape[0] // PIECE), *weights.shape))
        call(f"{name}_backward", heads, eps, *rows, weights, *slopes, *found, parts)
        return *found, parts.sum(0)

    for device, call in (("CPU", _call_cpu), ("CUDA", _call_cuda)):
        torch.library.impl(f"visualrwkv::{name}", device, partial(forward, call))
        torch.library.impl(f"visualrwkv::{name}_backward", device, partial(slopes_of, call))

    def setup_context(ctx, inputs, output):
        *tensors, ctx.heads, ctx.eps = inputs
        ctx.save_for_backward(*tensors)

    def backward(ctx, *slopes):
        run = getattr(torch.ops.visualrwkv, f"{name}_backward")
        return *run(*ctx.saved_tensors, ctx.heads, ctx.eps, *slopes), None, None

    torch.library.register_autograd(f"visualrwkv::{name}", backward, setup_context=setup_context)


def _call_cpu(name: str, heads: int, eps: float, x: Tensor, *tensors: Tensor) -> None:
    """Call a C function: rows, heads, head size and eps come before the tensors."""
    T, C = x.shape
    words = (c_int64, c_int64, c_int64, c_float, *(c_void_p,) * (1 + len(tensors)))
    call = library.function(f"visualrwkv_{name}{library.ON_CPU[x.dtype]}", *words)
    call(T, heads, C // heads, eps, *(t.data_ptr() for t in (x, *tensors)))


def _call_cuda(name: str, heads: int, eps: float, x: Tensor, *tensors: Tensor) -> None:
    """Start a CUDA function: dtype, rows, heads, head size and eps come before the tensors."""
    T, C = x.shape
    library.launch(name, library.DTYPE_CODES[x.dtype], T, heads, C // heads, float(eps), x, *tensors)


def _tuple(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


for _name in INPUTS:
    _register(_name)
