"""bi-WKV, the attention of Vision-RWKV (arXiv 2403.02308, equation 5): every token reads every other one, per channel

    y_t = (e^(u + k_t) v_t + sum_{i≠t} e^(k_i - (|t-i|-1) w) v_i) / (e^(u + k_t) + sum_{i≠t} e^(k_i - (|t-i|-1) w))

B batch, T time (image tokens), C channels. w and u are already divided by T; w may be negative.
Three forms: compiled (cuda/biwkv.cpp, cuda/biwkv.cu), torch (prefix sums), and the reference (all pairs of tokens).
"""

from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from visualrwkv.ops import library

CHUNK = 64  # tokens that a block of the CUDA kernels joins: CHUNK in cuda/biwkv.cu
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def bi_wkv(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Run bi-WKV: w, u (C,) already divided by T, k, v (B, T, C) → y (B, T, C) in v's dtype.

    T ≥ 1, any C. Inputs are fp32, bf16 or fp16 (fp64 stays fp64); the whole decay |w| T plus the spread of k in a
    channel may come to several hundred. Gradients reach every input.

    Raises ValueError for shapes, dtypes or devices that do not fit together.
    """
    _check(w, u, k, v)
    compiled = library.has_cuda() if k.is_cuda else library.COMPILED and k.is_cpu
    if compiled and not any(x.dtype is torch.float64 for x in (w, u, k, v)):
        return bi_wkv_compiled(w, u, k, v)
    return bi_wkv_torch(w, u, k, v)


def bi_wkv_reference(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The equation: a softmax over all pairs of tokens; shapes as in `bi_wkv`. For tests."""
    dtype = v.dtype
    compute = torch.float64 if any(x.dtype is torch.float64 for x in (w, u, k, v)) else torch.float32
    w, u, k, v = (x.to(compute) for x in (w, u, k, v))
    t = torch.arange(k.shape[1], device=k.device)
    distance = (t[:, None] - t).abs()[..., None]  # (T, T, 1)
    bias = torch.where(distance == 0, u, -(distance - 1) * w)  # (T, T, C)
    weights = torch.softmax(bias + k[:, None], dim=2)  # (B, T, T, C)
    return (weights * v[:, None]).sum(2).to(dtype)


def bi_wkv_torch(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two prefix sums, over the tokens before and after, in plain torch on any device; shapes as in `bi_wkv`.

    e^(k_i + w i) summed over i < t and scaled by e^(-w (t-1)) is the past's share, its mirror image the future's: only
    positive terms are added, so nothing cancels.
    """
    dtype, T = v.dtype, k.shape[1]
    # fp64 for its range: e^(w i) is far from 1 at the ends. Apple's GPUs have only fp32.
    w, u, k, v = (x.to(torch.float32 if x.device.type == "mps" else torch.float64) for x in (w, u, k, v))
    t = torch.arange(T, device=k.device, dtype=k.dtype) - (T - 1) / 2  # centred, which halves the range
    rising, falling = torch.exp(t[:, None] * w), torch.exp(t[:, None] * -w)  # (T, C)
    e_k = torch.exp(k - k.detach().amax(1, keepdim=True))
    sums = []
    for x in (e_k * v, e_k):
        past = (x * rising).cumsum(1)  # up to and with t
        future = (x * falling).flip(1).cumsum(1).flip(1)
        shares = torch.exp(u) * x
        shares = shares + torch.nn.functional.pad(past[:, :-1] * falling[:-1], (0, 0, 1, 0))
        shares = shares + torch.nn.functional.pad(future[:, 1:] * rising[1:], (0, 0, 0, 1))
        sums.append(shares)
    return (sums[0] / sums[1]).to(dtype)


# The compiled form ---------------------------------------------------------------------------------------------------


def bi_wkv_compiled(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two scans in C++ or CUDA; shapes as in `bi_wkv`. The kernels take bf16 k and v as they are, on CUDA alone."""
    same = k.is_cuda and k.dtype is v.dtype and v.dtype in library.DTYPE_CODES
    k_, v_ = (k, v) if same else (k.float(), v.float())
    return torch.ops.visualrwkv.bi_wkv_forward(w.float(), u.float(), k_, v_).to(v.dtype)


torch.library.define("visualrwkv::bi_wkv_forward", "(Tensor w, Tensor u, Tensor k, Tensor v) -> Tensor")
torch.library.define(
    "visualrwkv::bi_wkv_backward",
    "(Tensor w, Tensor u, Tensor k, Tensor v, Tensor dy) -> (Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("visualrwkv::bi_wkv_forward")
def _(w, u, k, v):
    return v.new_empty(v.shape)


@torch.library.register_fake("visualrwkv::bi_wkv_backward")
def _(w, u, k, v, dy):
    return tuple(x.new_empty(x.shape) for x in (w, u, k, v))


@torch.library.impl("visualrwkv::bi_wkv_forward", "CPU")
def _(w, u, k, v):
    w, u, k, v = (x.contiguous() for x in (w, u, k, v))
    y = torch.empty_like(v)
    c_forward = library.function("visualrwkv_biwkv_forward", *(c_int64,) * 3, *(c_void_p,) * 5)
    c_forward(*k.shape, *(x.data_ptr() for x in (w, u, k, v, y)))
    return y


@torch.library.impl("visualrwkv::bi_wkv_backward", "CPU")
def _(w, u, k, v, dy):
    B, T, C = k.shape
    w, u, k, v, dy = (x.contiguous() for x in (w, u, k, v, dy))
    dw_parts, du_parts = (w.new_empty((B, C), dtype=torch.float64) for _ in range(2))
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    c_backward = library.function("visualrwkv_biwkv_backward", *(c_int64,) * 3, *(c_void_p,) * 9)
    c_backward(B, T, C, *(x.data_ptr() for x in (w, u, k, v, dy, dw_parts, du_parts, dk, dv)))
    return dw_parts.sum(0).float(), du_parts.sum(0).float(), dk, dv


def _forward_cuda(w, u, k, v):
    w, u, k, v = (x.contiguous() for x in (w, u, k, v))
    y, (workspace, *_) = torch.empty_like(v), _workspace(k, 1)
    library.launch("biwkv_forward", library.DTYPE_CODES[v.dtype], *k.shape, w, u, k, v, y, workspace)
    return y


def _backward_cuda(w, u, k, v, dy):
    w, u, k, v, dy = (x.contiguous() for x in (w, u, k, v, dy))
    dk, dv, (workspace, *parts) = torch.empty_like(k), torch.empty_like(v), _workspace(k, 2)
    library.launch("biwkv_backward", library.DTYPE_CODES[v.dtype], *k.shape, w, u, k, v, dy, workspace, *parts, dk, dv)
    dw, du = (part.sum(0) for part in parts)
    return dw, du, dk, dv


torch.library.impl("visualrwkv::bi_wkv_forward", "CUDA", _forward_cuda)
torch.library.impl("visualrwkv::bi_wkv_backward", "CUDA", _backward_cuda)


def _workspace(k: Tensor, scans: int) -> tuple[Tensor, Tensor, Tensor]:
    """For every scan 6 numbers per chunk and channel, a sum on both sides of it; and the chunks' partial dw and du."""
    B, T, C = k.shape
    chunks = -(-T // CHUNK)
    workspace = k.new_empty((scans, 2, B, chunks if chunks > 1 else 0, 3, C), dtype=torch.float32)
    dw_parts, du_parts = k.new_empty((2, B * chunks if scans == 2 else 0, C), dtype=torch.float32)
    return workspace, dw_parts, du_parts


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    return torch.ops.visualrwkv.bi_wkv_backward(*ctx.saved_tensors, dy)


torch.library.register_autograd("visualrwkv::bi_wkv_forward", _backward, setup_context=_setup_context)


def _check(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> None:
    if k.dim() != 3 or v.shape != k.shape or 0 in k.shape:
        raise ValueError(f"k, v must share one shape (B, T, C) without a zero, not {tuple(k.shape)}, {tuple(v.shape)}")
    C = k.shape[2]
    if w.shape != (C,) or u.shape != (C,):
        raise ValueError(f"w, u must be (C,) = {(C,)}, not {tuple(w.shape)}, {tuple(u.shape)}")
    for name, x in (("w", w), ("u", u), ("k", k), ("v", v)):
        if x.device != k.device:
            raise ValueError(f"all inputs must be on one device, but k is on {k.device} and {name} on {x.device}")
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} must be one of {DTYPES}, not {x.dtype}")
