"""WKV-7, the recurrence of RWKV-7 ("Goose", arXiv 2503.14456, section 4), per head with a matrix-valued state S:

    S_t = S_{t-1} (diag(exp(-exp(w_t))) + a_t b_t^T) + v_t k_t^T        y_t = S_t r_t

In the model a is -kk and b is kk times the in-context learning rate, with kk of length 1; the op takes any a and b.
B batch, T time, H heads, N head size, S sequences in a packed row; a state is (B or S, H, N_value, N_key).
Three forms: compiled (cuda/wkv7.cpp, cuda/wkv7.cu), torch (chunks of matrix products), and the reference (one step at a time).
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from visualrwkv.ops import library
from visualrwkv.ops.sequences import (
    aligned,
    call_cpu,
    check,
    has_float64,
    in_compute_dtype,
    launch_cuda,
    new_states,
    padded_rows,
    save_for_backward,
    sequence_starts,
    zero_state,
)

CHUNK = 32  # steps the torch form joins by matrix products before it moves the state on
WHOLE_HEAD = {torch.bfloat16: 112 * 1024, torch.float32: 222 * 1024}
"""Shared memory, in bytes, of the CUDA kernel that takes the gradients of a whole head in one block."""


def wkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the WKV-7 recurrence and return its output and final state.

    r, w, k, v, a, b (B, T, H, N), state (B, H, N_value, N_key) fp32 or None for zeros → y (B, T, H, N) in v's dtype,
    final state like `state`. w is raw: the decay is exp(-exp(w)). T ≥ 1. Inputs are fp32, bf16 or fp16, computed in
    fp32 (fp64 in fp64). Gradients reach every input, the initial state included, also through the final state.

    cu_seqlens (S + 1,) int32 or int64, rising from 0 to T: the row (B = 1) holds S sequences one after another, the
    recurrence restarts at each, and the states are (S, H, N, N).

    Raises ValueError for shapes, dtypes, devices or cu_seqlens that do not fit together.
    """
    check({"r": r, "w": w, "k": k, "v": v, "a": a, "b": b}, state, cu_seqlens)
    if _compiled_takes(r.device, r.shape[3]) and not has_float64(r, w, k, v, a, b, state):
        return wkv7_compiled(r, w, k, v, a, b, state, cu_seqlens)
    return wkv7_torch(r, w, k, v, a, b, state, cu_seqlens)


def wkv7_step(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token: r, w, k, v, a, b (B, H, N), state (B, H, N_value, N_key) → y (B, H, N) and a new state; as `wkv7`."""
    if r.dim() != 3:
        raise ValueError(f"a step takes one token, r (B, H, N), not {tuple(r.shape)}")
    r, w, k, v, a, b = (x.unsqueeze(1) for x in (r, w, k, v, a, b))
    y, S = wkv7(r, w, k, v, a, b, state)
    return y.squeeze(1), S


def wkv7_reference(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The equations, one step after another; shapes as in `wkv7`. For tests."""
    dtype = v.dtype
    r, w, k, v, a, b, S = in_compute_dtype((r, w, k, v, a, b), state, cu_seqlens)
    if cu_seqlens is not None:
        rows = [slice(start, end) for start, end in pairwise(sequence_starts(cu_seqlens, r.shape[1]))]
        parts = [
            wkv7_reference(r[:, s], w[:, s], k[:, s], v[:, s], a[:, s], b[:, s], S[i : i + 1])  # each on its own
            for i, s in enumerate(rows)
        ]
        return torch.cat([y for y, _ in parts], 1).to(dtype), torch.cat([S for _, S in parts])
    ys = []
    for r_t, w_t, k_t, v_t, a_t, b_t in zip(*(x.unbind(1) for x in (r, w, k, v, a, b)), strict=True):  # each (B, H, N)
        sa = torch.einsum("bhij,bhj->bhi", S, a_t)
        S = S * torch.exp(-torch.exp(w_t))[..., None, :] + sa[..., None] * b_t[..., None, :]
        S = S + v_t[..., None] * k_t[..., None, :]  # (B, H, N_value, N_key)
        ys.append(torch.einsum("bhij,bhj->bhi", S, r_t))
    return torch.stack(ys, 1).to(dtype), S


# The torch form ------------------------------------------------------------------------------------------------------


def wkv7_torch(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence as matrix products over chunks, in plain torch on any device; shapes as in `wkv7`.

    A packed row is computed as a padded batch, with a padding that leaves the states as they are.
    """
    dtype = v.dtype
    with torch.autocast(r.device.type, enabled=False):  # fp32: a product in bf16 would lose the state
        r, w, k, v, a, b, state = in_compute_dtype((r, w, k, v, a, b), state, cu_seqlens)
        # The clamp changes no decay (above 5 it is 0) but keeps 0 * infinity out of the gradient.
        decay = torch.exp(-torch.exp(w.clamp(max=20)))
        if cu_seqlens is None:
            y, S = _chunked(r, decay, k, v, a, b, state)
            return y.to(dtype), S
        rows, inside = padded_rows(cu_seqlens, r.shape[1])
        filled = inside[..., None, None]
        r, k, v, a, b = (torch.where(filled, x[0, rows], 0) for x in (r, k, v, a, b))  # (S, longest, H, N)
        y, S = _chunked(r, torch.where(filled, decay[0, rows], 1), k, v, a, b, state)
        return y[inside][None].to(dtype), S


def _chunked(r: Tensor, decay: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """Write sa_t for S_{t-1} a_t, so that a step is S_t = S_{t-1} diag(decay_t) + sa_t b_t^T + v_t k_t^T. Inside a chunk,
    with the steps as rows, everything that is read of the state S at the chunk's start and of earlier steps is

        sa = a_in S^T + ab sa + ak v        y = r_in S^T + rb sa + rk v        S' = S diag(whole) + sa^T b_out + v^T k_out

    `a_in` and `r_in` are a and r times the decay since the chunk's start, `b_out` and `k_out` b and k times the decay to
    its end; ab, ak, rb, rk (chunk, chunk) hold the products of two steps times the decay between them. ab is strictly
    lower triangular, so sa = inverse(1 - ab) (a_in S^T + ak v): the WY form of a product of such steps.

    All of it is grown from blocks of 1 step by joining blocks in pairs. Decays only multiply and are never divided by,
    so that each factor is at most 1 and a decay of exactly 0 is exact; a plain quotient of running products would
    overflow for raw w above about 1.
    """
    T = r.shape[1]
    chunk = min(CHUNK, 1 << (T - 1).bit_length())
    missing = (0, 0, 0, 0, 0, -T % chunk)
    r, k, v, a, b = (pad(x, missing) for x in (r, k, v, a, b))
    decay = pad(decay, missing, value=1)
    r, decay, k, v, a, b = (
        x.unflatten(1, (-1, chunk)).permute(0, 3, 1, 2, 4).unsqueeze(4) for x in (r, decay, k, v, a, b)
    )  # (B, H, chunks, blocks, block, N), for now with as many blocks as steps
    a_in, r_in, b_out, k_out, whole = a, r * decay, b, k, decay
    ab, ak = torch.zeros_like(a[..., :1]), torch.zeros_like(a[..., :1])  # (B, H, chunks, blocks, block, block)
    rb, rk = (r * b).sum(-1, keepdim=True), (r * k).sum(-1, keepdim=True)
    inverse = torch.ones_like(ab)
    while whole.shape[3] > 1:
        (_, a_late), (_, r_late), (b_early, _), (k_early, _) = map(_pairs, (a_in, r_in, b_out, k_out))
        (w_early, w_late), (inverse_early, inverse_late) = _pairs(whole), _pairs(inverse)
        ab_new, ak_new, rb_new, rk_new = _products(a_late, r_late, b_early, k_early)
        inverse = _join(inverse, inverse_late @ ab_new @ inverse_early)
        ak, rb, rk = _join(ak, ak_new), _join(rb, rb_new), _join(rk, rk_new)
        a_in, r_in = (torch.cat((early, late * w_early), -2) for early, late in map(_pairs, (a_in, r_in)))
        b_out, k_out = (torch.cat((early * w_late, late), -2) for early, late in map(_pairs, (b_out, k_out)))
        whole = w_early * w_late
    v, a_in, r_in, b_out, k_out, whole, ak, rb, rk, inverse = (
        x.flatten(3, 4) for x in (v, a_in, r_in, b_out, k_out, whole, ak, rb, rk, inverse)
    )  # (B, H, chunks, chunk, N or chunk)
    sa_state, sa_own = inverse @ a_in, inverse @ (ak @ v)  # sa = sa_state S^T + sa_own
    moved = torch.diag_embed(whole.squeeze(3)) + sa_state.mT @ b_out  # (B, H, chunks, N_key, N_key)
    gained = sa_own.mT @ b_out + v.mT @ k_out  # (B, H, chunks, N_value, N_key)
    starts = []
    for moved_c, gained_c in zip(moved.unbind(2), gained.unbind(2), strict=True):
        starts.append(S)
        S = gained_c + S @ moved_c
    y = (r_in + rb @ sa_state) @ torch.stack(starts, 2).mT + (rb @ sa_own + rk @ v)
    return y.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :T], S  # (B, T, H, N)


def _pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    """The earlier and the later blocks (…, pairs, block, columns) of x (…, blocks, block, columns)."""
    return x[..., ::2, :, :], x[..., 1::2, :, :]


def _products(a: Tensor, r: Tensor, b: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    """a b^T, a k^T, r b^T, r k^T, each (…, block, block), of blocks (…, block, N)."""
    if a.shape[-2] == 1:  # a matrix product of single rows costs more than its arithmetic
        return tuple((x * y).sum(-1, keepdim=True) for x in (a, r) for y in (b, k))
    of_a, of_r = (torch.cat((a, r), -2) @ torch.cat((b, k), -2).mT).chunk(2, -2)
    return *of_a.chunk(2, -1), *of_r.chunk(2, -1)


def _join(x: Tensor, new: Tensor) -> Tensor:
    """Lower triangular matrices of twice the block: x's in pairs on the diagonal, `new` (later, earlier) below it."""
    early, late = _pairs(x)
    return torch.cat((torch.cat((early, torch.zeros_like(new)), -1), torch.cat((new, late), -1)), -2)


# The compiled form ---------------------------------------------------------------------------------------------------


def _compiled_takes(device: torch.device, N: int) -> bool:
    """Whether a library computes this. N is the head size."""
    if device.type == "cuda":
        return N % 16 == 0 and N <= 128 and library.has_cuda()
    return device.type == "cpu" and N % 16 == 0 and library.COMPILED


def wkv7_compiled(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence in C++ or CUDA, for N a multiple of 16 (CUDA: up to 128); shapes as in `wkv7`."""
    inputs = [r, w, k, v, a, b]
    if not all(x.dtype is torch.bfloat16 for x in inputs):
        inputs = [x.float() for x in inputs]
    state = zero_state(r, cu_seqlens) if state is None else state
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, state))
    y, S, _ = torch.ops.visualrwkv.wkv7_forward(*inputs, state, cu_seqlens, keep)
    return y.to(v.dtype), S


# `keep`: whether a backward pass follows. `states` is what the forward pass saves for it: nothing on the CPU.
torch.library.define(
    "visualrwkv::wkv7_forward",
    "(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, Tensor state, Tensor? cu_seqlens, bool keep)"
    " -> (Tensor y, Tensor S, Tensor states)",
)
torch.library.define(
    "visualrwkv::wkv7_backward",
    "(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, Tensor state, Tensor? cu_seqlens, Tensor states,"
    " Tensor dy, Tensor? dS) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("visualrwkv::wkv7_forward")
def _(r, w, k, v, a, b, state, cu_seqlens, keep):
    return v.new_empty(v.shape), state.new_empty(state.shape), new_states(state, r, keep and r.device.type == "cuda")


@torch.library.register_fake("visualrwkv::wkv7_backward")
def _(r, w, k, v, a, b, state, cu_seqlens, states, dy, dS):
    return tuple(x.new_empty(x.shape) for x in (r, w, k, v, a, b, state))


@torch.library.impl("visualrwkv::wkv7_forward", "CPU")
def _(r, w, k, v, a, b, state, cu_seqlens, keep):
    inputs = [x.contiguous() for x in (r, w, k, v, a, b, state)]
    y, S = torch.empty_like(inputs[3]), torch.empty_like(inputs[6])
    call_cpu("visualrwkv_wkv7_forward", cu_seqlens, *inputs, y, S)
    return y, S, new_states(state, r, False)


@torch.library.impl("visualrwkv::wkv7_backward", "CPU")
def _(r, w, k, v, a, b, state, cu_seqlens, states, dy, dS):
    dS = torch.zeros_like(state) if dS is None else dS
    inputs = [x.contiguous() for x in (r, w, k, v, a, b, state, dy.to(r.dtype), dS)]
    gradients = [torch.empty_like(x) for x in inputs[:7]]
    call_cpu("visualrwkv_wkv7_backward", cu_seqlens, *inputs, *gradients)
    return tuple(gradients)


def _backward(ctx, dy, dS, _):
    saved = ctx.saved_tensors  # read once: activation checkpointing gives them a single time
    if dy is None:
        dy = torch.zeros_like(saved[3])
    return *torch.ops.visualrwkv.wkv7_backward(*saved, dy, dS), None, None


torch.library.register_autograd("visualrwkv::wkv7_forward", _backward, setup_context=save_for_backward)


# On CUDA, as on the CPU, the inputs but the state, y and their gradients are all bf16 or all fp32 -----------------------


def _forward_cuda(r, w, k, v, a, b, state, cu_seqlens, keep):
    inputs = [aligned(x) for x in (r, w, k, v, a, b, state)]
    y, S, states = v.new_empty(v.shape), state.new_empty(state.shape), new_states(state, r, keep)
    launch_cuda("wkv7_forward", _splits(r, state), state, cu_seqlens, *inputs, y, S, states if keep else None)
    return y, S, states


def _backward_cuda(r, w, k, v, a, b, state, cu_seqlens, states, dy, dS):
    if states.numel() == 0:
        raise RuntimeError("wkv7_backward needs the states of a wkv7_forward with keep=True")
    inputs = [aligned(x) for x in (r, w, k, v, a, b, states, dy)]
    splits = _splits(r, state, least=1 if WHOLE_HEAD[r.dtype] <= _shared_memory(r.device) else 2)
    # Every split makes its own part of the gradients that sum over values, to be added in one order.
    parts = r.new_empty((5, splits, *r.shape), dtype=r.dtype if splits == 1 else torch.float32)
    dr, dw, dk, da, db = parts
    dv, dstate = v.new_empty(v.shape), state.new_empty(state.shape)
    dS = None if dS is None else aligned(dS)
    launch_cuda("wkv7_backward", splits, state, cu_seqlens, *inputs, dS, dr, dw, dk, dv, da, db, dstate)
    dr, dw, dk, da, db = parts[:, 0] if splits == 1 else parts.sum(1).to(r.dtype)
    return dr, dw, dk, dv, da, db, dstate


torch.library.impl("visualrwkv::wkv7_forward", "CUDA", _forward_cuda)
torch.library.impl("visualrwkv::wkv7_backward", "CUDA", _backward_cuda)


def _splits(r: Tensor, state: Tensor, least: int = 1) -> int:
    """How many blocks share a head, so that each multiprocessor has one; `least` is what the shared memory asks for."""
    sequences, H, N, _ = state.shape
    wanted = max(least, library.multiprocessors(r.device) / (sequences * H))
    return next((n for n in (1, 2) if n >= wanted), 4) if N == 64 else 1


def _shared_memory(device: torch.device) -> int:
    """Bytes that a block may have; the emulator has enough."""
    if device.type != "cuda":
        return max(WHOLE_HEAD.values())
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor - 1024  # 1 KiB is the system's
