"""The parts of a step by one token, for B sequences at once, each one kernel (cuda/decode.cu) on CUDA.

B sequences, C channels, H heads, N head size (C = H N), M mixtures. Activations are fp32 or bf16, parameters and states
fp32, but for the matrices of `gemv_step`, which are bf16. There are no gradients, states are changed in place, nothing
waits for the GPU, and with `out` nothing is allocated: a whole token can be captured in a CUDA graph. A layer of RWKV-6:

    norm_mix_step, gemv_step (tanh), gemv_step, mix_step,    time mix: what the data adds to the mixtures
    gemv_step (r, k, v, g, decay), gemv_step (decay),        its products
    wkv6_step, gemv_step (plus the residual stream),
    norm_mix_step, gemv_step (relu², sigmoid),               channel mix
    gemv_step (times the receptance, plus the residual stream)

Beside each stands its reference in plain torch, which also runs where there is no kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from visualrwkv.ops import library

HEAD_SIZES = (16, 32, 64, 128)  # of the kernels
MOST_CHANNELS = 32768
MOST_PRODUCTS, MOST_SEQUENCES = 8, 8  # of one gemv_step; as in cuda/decode.cu


# Layer norm, token shift, mix ----------------------------------------------------------------------------------------


def norm_mix_step(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, shift: Tensor, mix: Tensor, out: Tensor | None = None
) -> Tensor:
    """Layer norm x (B, C), move the token shift on, and mix: mix (M, C) → (M, B, C) in x's dtype.

    weight, bias (C,). shift (2, B, C) is changed in place: shift[0], what the last step normalised, goes to shift[1] and
    makes room for this one. out[m] = new + (old - new) mix[m].
    """
    B, C = x.shape
    _check(x=(x, (B, C)), weight=(weight, (C,)), bias=(bias, (C,)), shift=(shift, (2, B, C)), mix=(mix, (len(mix), C)))
    out = _out(out, x, (len(mix), B, C))
    form = _norm_mix_cuda if _on_cuda(x) and C % 4 == 0 and C <= MOST_CHANNELS else norm_mix_step_reference
    return form(x, weight, bias, eps, shift, mix, out)


def norm_mix_step_reference(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, shift: Tensor, mix: Tensor, out: Tensor
) -> Tensor:
    now = F.layer_norm(x.to(weight.dtype), x.shape[1:], weight, bias, eps)
    shift[1] = shift[0]
    shift[0] = now
    return out.copy_(now + (shift[1] - now) * mix[:, None])


def _norm_mix_cuda(x, weight, bias, eps, shift, mix, out):
    sizes = (library.DTYPE_CODES[x.dtype], *x.shape, len(mix))
    library.launch("norm_mix_step", *sizes, eps, x, weight, bias, shift, mix, out)
    return out


def mix_step(shift: Tensor, mix: Tensor, delta: Tensor, out: Tensor | None = None) -> Tensor:
    """Mixtures that depend on the data too: shift (2, B, C) as `norm_mix_step` left it, mix (M, C), delta (M, B, C) →
    (M, B, C) in delta's dtype: shift[0] + (shift[1] - shift[0]) (mix[m] + delta[m])."""
    M, B, C = delta.shape
    _check(delta=(delta, (M, B, C)), shift=(shift, (2, B, C)), mix=(mix, (M, C)))
    out = _out(out, delta, delta.shape)
    form = _mix_cuda if _on_cuda(delta) and C % 4 == 0 and C <= MOST_CHANNELS else mix_step_reference
    return form(shift, mix, delta, out)


def mix_step_reference(shift: Tensor, mix: Tensor, delta: Tensor, out: Tensor) -> Tensor:
    return out.copy_(shift[0] + (shift[1] - shift[0]) * (mix[:, None] + delta))


def _mix_cuda(shift, mix, delta, out):
    M, B, C = delta.shape
    library.launch("mix_step", library.DTYPE_CODES[delta.dtype], B, C, M, shift, mix, delta, out)
    return out


# Matrices times vectors ----------------------------------------------------------------------------------------------

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {  # in the order in which cuda/decode.cu numbers them
    "none": lambda x: x,
    "relu_squared": lambda x: torch.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True)
class Product:
    """activation(x Wᵀ) · times + plus: weight (O, C) bf16, x (B, C), times and plus (B, O) or None → (B, O)."""

    weight: Tensor
    x: Tensor
    activation: str = "none"
    times: Tensor | None = None
    plus: Tensor | None = None


def gemv_step(products: Sequence[Product], out: Tensor | None = None) -> list[Tensor]:
    """Up to eight products in one launch, each weight read once: the results, in x's dtype, one after another in `out`.

    B at most 8, one B and one dtype for all, C a multiple of 8. out: flat, of the size of all results.
    """
    first = products[0].x
    if not 0 < len(products) <= MOST_PRODUCTS or not 0 < len(first) <= MOST_SEQUENCES:
        raise ValueError(f"products and B must be 1 to 8, not {len(products)} and {len(first)}")
    for p in products:
        B, (O, C) = len(first), p.weight.shape
        if p.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {p.activation!r}")
        if C % 8:
            raise ValueError(f"weight must have a multiple of 8 columns, not {tuple(p.weight.shape)}")
        others = {n: (t, (B, O)) for n, t in (("times", p.times), ("plus", p.plus)) if t is not None}
        _check(first=(first, tuple(first.shape)), weight=(p.weight, (O, C)), x=(p.x, (B, C)), **others)
        if p.weight.dtype is not torch.bfloat16 or {t.dtype for t, _ in (*others.values(), (p.x, ()))} != {first.dtype}:
            raise ValueError("weights must be bf16, and x, times and plus of all products of one dtype")
    out = _out(out, first, (sum(len(p.weight) for p in products) * len(first),))
    return (_gemv_cuda if _on_cuda(first) else gemv_step_reference)(products, out)


def gemv_step_reference(products: Sequence[Product], out: Tensor) -> list[Tensor]:
    results = _results(products, out)
    for p, result in zip(products, results, strict=True):
        compute = torch.promote_types(p.x.dtype, torch.float32)
        y = ACTIVATIONS[p.activation](p.x.to(compute) @ p.weight.to(compute).T)
        y = y if p.times is None else y * p.times
        result.copy_(y if p.plus is None else y + p.plus)
    return results


def _gemv_cuda(products, out):
    results = _results(products, out)
    activations = list(ACTIVATIONS)
    rows = [
        (
            *(0 if t is None else t.data_ptr() for t in (p.weight, p.x, p.times, p.plus)),
            *(*p.weight.shape, activations.index(p.activation), y.storage_offset() - out.storage_offset()),
        )
        for p, y in zip(products, results, strict=True)
    ]
    table = torch.tensor(rows, dtype=torch.int64)  # in the host's memory: the launch copies it
    x = products[0].x
    library.launch("gemv_step", library.DTYPE_CODES[x.dtype], len(x), len(rows), table.data_ptr(), out)
    return results


def _results(products: Sequence[Product], out: Tensor) -> list[Tensor]:
    """Where each product's result lies in `out`."""
    B = len(products[0].x)
    parts = out.split([B * len(p.weight) for p in products])
    return [part.view(B, -1) for part in parts]


# The recurrences -----------------------------------------------------------------------------------------------------


def wkv6_step(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    g: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """A step of `wkv6`, group norm and gate: r, k, v, w (raw), g (B, C), u (H, N) → norm(y) silu(g) (B, C).

    state (B, H, N_key, N_value) is changed in place. weight, bias (C,) and eps are the group norm's, a group per head.
    """
    B, H, N = _check_heads(u, state, weight, bias, r=r, k=k, v=v, w=w, g=g)
    out = _out(out, r, (B, H * N))
    form = _wkv6_cuda if _on_cuda(r) and N in HEAD_SIZES else wkv6_step_reference
    return form(r, k, v, w, u, state, weight, bias, eps, g, out)


def wkv6_step_reference(r, k, v, w, u, state, weight, bias, eps, g, out) -> Tensor:
    r, k, v, w = (x.view(state.shape[:3]).to(state.dtype) for x in (r, k, v, w))
    kv = k[..., :, None] * v[..., None, :]  # (B, H, N_key, N_value)
    y = torch.einsum("bhi,bhij->bhj", r, state + u[..., None] * kv)
    state.mul_(torch.exp(-torch.exp(w))[..., None]).add_(kv)
    return out.copy_(_group_norm(y, weight, bias, eps) * F.silu(g.to(y.dtype)))


def _wkv6_cuda(r, k, v, w, u, state, weight, bias, eps, g, out):
    sizes = (library.DTYPE_CODES[r.dtype], *state.shape[:3], eps)
    library.launch("wkv6_step", *sizes, r, k, v, w, u, state, weight, bias, g, out)
    return out


def wkv7_step(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    bonus: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    g: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """A step of `wkv7`, group norm, bonus and gate: r, w (raw), k, v, a, b, g (B, C), bonus (H, N) →
    (norm(y) + (Σ r k bonus) v) g, (B, C); the sum is over a head.

    state (B, H, N_value, N_key) is changed in place. weight, bias (C,) and eps are the group norm's, a group per head.
    """
    B, H, N = _check_heads(bonus, state, weight, bias, r=r, w=w, k=k, v=v, a=a, b=b, g=g)
    out = _out(out, r, (B, H * N))
    form = _wkv7_cuda if _on_cuda(r) and N in HEAD_SIZES else wkv7_step_reference
    return form(r, w, k, v, a, b, bonus, state, weight, bias, eps, g, out)


def wkv7_step_reference(r, w, k, v, a, b, bonus, state, weight, bias, eps, g, out) -> Tensor:
    r, w, k, v, a, b = (x.view(state.shape[:3]).to(state.dtype) for x in (r, w, k, v, a, b))
    sa = torch.einsum("bhij,bhj->bhi", state, a)
    state.mul_(torch.exp(-torch.exp(w))[..., None, :])
    state.add_(sa[..., :, None] * b[..., None, :] + v[..., :, None] * k[..., None, :])
    y = torch.einsum("bhij,bhj->bhi", state, r)
    y = _group_norm(y, weight, bias, eps) + ((r * k * bonus).sum(-1, keepdim=True) * v).flatten(1)
    return out.copy_(y * g)


def _wkv7_cuda(r, w, k, v, a, b, bonus, state, weight, bias, eps, g, out):
    sizes = (library.DTYPE_CODES[r.dtype], *state.shape[:3], eps)
    library.launch("wkv7_step", *sizes, r, w, k, v, a, b, state, bonus, weight, bias, g, out)
    return out


def _group_norm(y: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """y (B, H, N) → (B, H N)."""
    return F.group_norm(y.flatten(1), y.shape[1], weight, bias, eps)


# Inputs --------------------------------------------------------------------------------------------------------------


def _on_cuda(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in library.DTYPE_CODES and library.has_cuda()


def _out(out: Tensor | None, like: Tensor, shape: Sequence[int]) -> Tensor:
    if out is None:
        return like.new_empty(shape)
    _check(like=(like, tuple(like.shape)), out=(out, tuple(shape)))
    if out.dtype is not like.dtype:
        raise ValueError(f"out must be {like.dtype}, not {out.dtype}")
    return out


def _check(**tensors: tuple[Tensor, tuple[int, ...]]) -> None:
    """ValueError unless each has its shape, lies in one piece, and all are on one device."""
    (first, (x, _)), *_ = tensors.items()
    for name, (tensor, shape) in tensors.items():
        if tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(f"{name} must be {shape} and contiguous, not {tuple(tensor.shape)}, {tensor.stride()}")
        if tensor.device != x.device:
            raise ValueError(f"all must be on one device, but {first} is on {x.device} and {name} on {tensor.device}")


def _check_heads(per_head: Tensor, state: Tensor, weight: Tensor, bias: Tensor, **rows: Tensor) -> tuple[int, int, int]:
    """B, H, N, after a look at all shapes and dtypes."""
    H, N = per_head.shape
    B, C = len(state), H * N
    of_rows = {name: (x, (B, C)) for name, x in rows.items()}
    _check(
        **of_rows, state=(state, (B, H, N, N)), per_head=(per_head, (H, N)), weight=(weight, (C,)), bias=(bias, (C,))
    )
    if len({x.dtype for x in rows.values()}) > 1:
        raise ValueError(f"{', '.join(rows)} must be of one dtype")
    if len({x.dtype for x in (per_head, state, weight, bias)}) > 1 or state.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"parameters and state must be fp32 (fp64 with fp64 inputs), not {state.dtype}")
    return B, H, N
