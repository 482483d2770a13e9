"""WKV-6, the recurrence of RWKV-6 ("Finch", arXiv 2404.05892, section 4.2), per head with a matrix-valued state S:

    y_t = r_t^T (S_{t-1} + diag(u) k_t v_t^T)        S_t = diag(exp(-exp(w_t))) S_{t-1} + k_t v_t^T

B batch, T time, H heads, N head size, S sequences in a packed row; a state is (B or S, H, N_key, N_value).
Three forms: compiled (cuda/wkv6.cpp, cuda/wkv6.cu), torch (chunks of matrix products), and the reference (one step at a
time).
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

CHUNK = 64  # steps the torch form joins by matrix products before it moves the state on


def wkv6(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run the WKV-6 recurrence and return its output and final state.

    r, k, v, w (B, T, H, N), u (H, N), state (B, H, N_key, N_value) fp32 or None for zeros → y (B, T, H, N) in v's
    dtype, final state like `state`. w is raw: the decay is exp(-exp(w)). T ≥ 1. Inputs are fp32, bf16 or fp16, computed
    in fp32 (fp64 in fp64). Gradients reach every input, the initial state included, also through the final state.

    cu_seqlens (S + 1,) int32 or int64, rising from 0 to T: the row (B = 1) holds S sequences one after another, the
    recurrence restarts at each, and the states are (S, H, N, N).

    On CUDA products are taken in bf16 (summed in fp32) if r, k, v, w are all bf16, else with about 16 bits. The kernel
    there does not wait for the GPU to look at cu_seqlens: wrong ones never reach memory outside the rows, but rows in no
    sequence are left as they are, unfilled.

    Raises ValueError for shapes, dtypes, devices or (but see above) cu_seqlens that do not fit together.
    """
    check({"r": r, "k": k, "v": v, "w": w}, state, cu_seqlens, {"u": u})
    if u.shape != r.shape[2:]:
        raise ValueError(f"u must be (H, N) = {tuple(r.shape[2:])}, not {tuple(u.shape)}")
    if _compiled_takes(r.device, r.shape[3]) and not has_float64(r, k, v, w, u, state):
        return wkv6_compiled(r, k, v, w, u, state, cu_seqlens)
    return wkv6_torch(r, k, v, w, u, state, cu_seqlens)


def wkv6_step(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token: r, k, v, w (B, H, N), u (H, N), state (B, H, N_key, N_value) → y (B, H, N) and a new state; as `wkv6`."""
    if r.dim() != 3:
        raise ValueError(f"a step takes one token, r (B, H, N), not {tuple(r.shape)}")
    r, k, v, w = (x.unsqueeze(1) for x in (r, k, v, w))
    y, S = wkv6(r, k, v, w, u, state)
    return y.squeeze(1), S


def bidirectional_wkv6(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """Every token reads the earlier ones, itself through u, and the later ones; shapes and dtypes as in `wkv6` → y.

        y_t = sum over i < t of (r_t exp(-exp(w_{i+1}) - … - exp(w_{t-1})) k_i) v_i + (r_t u k_t) v_t
            + sum over i > t of (r_t exp(-exp(w_{t+1}) - … - exp(w_{i-1})) k_i) v_i

    That is `wkv6` plus, reversed in time, `wkv6` without u: the mixer of VRWKV6 (arXiv 2403.02308, released code). Both
    run at once, as twice the heads.
    """
    r, k, v, w = (torch.cat((x, x.flip(1)), 2) for x in (r, k, v, w))  # (B, T, 2 H, N)
    y, _ = wkv6(r, k, v, w, torch.cat((u, torch.zeros_like(u))))
    forwards, backwards = y.chunk(2, 2)
    return forwards + backwards.flip(1)


def wkv6_reference(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The equations, one step after another; shapes as in `wkv6`. For tests."""
    dtype = v.dtype
    r, k, v, w, u, state = in_compute_dtype((r, k, v, w, u), state, cu_seqlens)
    if cu_seqlens is not None:
        starts = sequence_starts(cu_seqlens, r.shape[1])
        rows = [slice(a, b) for a, b in pairwise(starts)]
        parts = [
            wkv6_reference(r[:, s], k[:, s], v[:, s], w[:, s], u, state[i : i + 1])  # each sequence on its own
            for i, s in enumerate(rows)
        ]
        return torch.cat([y for y, _ in parts], 1).to(dtype), torch.cat([S for _, S in parts])
    S, ys = state, []
    for r_t, k_t, v_t, w_t in zip(r.unbind(1), k.unbind(1), v.unbind(1), w.unbind(1), strict=True):  # each (B, H, N)
        kv = k_t[..., :, None] * v_t[..., None, :]  # (B, H, N_key, N_value)
        ys.append(torch.einsum("bhi,bhij->bhj", r_t, S + u[..., None] * kv))
        S = torch.exp(-torch.exp(w_t))[..., None] * S + kv
    return torch.stack(ys, 1).to(dtype), S


# The torch form ------------------------------------------------------------------------------------------------------


def wkv6_torch(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence as matrix products over chunks, in plain torch on any device; shapes as in `wkv6`.

    A packed row is computed as a padded batch, with a padding that leaves the states as they are.
    """
    dtype = v.dtype
    with torch.autocast(r.device.type, enabled=False):  # fp32: a product in bf16 would lose the state
        r, k, v, w, u, state = in_compute_dtype((r, k, v, w, u), state, cu_seqlens)
        # The clamp changes no decay (above 5 it is 0) but keeps 0 * infinity out of the gradient.
        decay = torch.exp(-torch.exp(w.clamp(max=20)))
        if cu_seqlens is None:
            y, S = _chunked(r, k, v, decay, u, state)
            return y.to(dtype), S
        rows, inside = padded_rows(cu_seqlens, r.shape[1])
        filled = inside[..., None, None]
        r, k, v = (torch.where(filled, x[0, rows], 0) for x in (r, k, v))  # (S, longest, H, N)
        y, S = _chunked(r, k, v, torch.where(filled, decay[0, rows], 1), u, state)
        return y[inside][None].to(dtype), S


def _chunked(r: Tensor, k: Tensor, v: Tensor, decay: Tensor, u: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """Within a chunk, blocks of 1, 2, 4 … steps are joined in pairs: the later half of a pair reads the earlier half
    through one product of matrices. `r_in` is r times the decay since its block's start, `k_out` k times the decay to
    its block's end; both grow by products of decays, never a quotient, so every factor is at most 1 and a decay of
    exactly 0 is exact.
    """
    T = r.shape[1]
    chunk = min(CHUNK, 1 << (T - 1).bit_length())
    missing = (0, 0, 0, 0, 0, -T % chunk)
    r, k, v, decay = pad(r, missing), pad(k, missing), pad(v, missing), pad(decay, missing, value=1)
    r, k, v, decay = (x.unflatten(1, (-1, chunk)).permute(0, 3, 1, 2, 4).contiguous() for x in (r, k, v, decay))
    # r, k, v, decay are (B, H, chunks, chunk, N)
    y = (r * u[:, None, None] * k).sum(-1, keepdim=True) * v  # the current token, through u alone
    r_in, k_out, whole, block = r, k, decay, 1
    while block < chunk:
        # each (B, H, chunks, pairs, block, N), the decay of a whole block (B, H, chunks, pairs, 1, N)
        r_early, r_late = r_in.unflatten(3, (-1, 2, block)).unbind(4)
        k_early, k_late = k_out.unflatten(3, (-1, 2, block)).unbind(4)
        w_early, w_late = whole.unflatten(3, (-1, 2, 1)).unbind(4)
        v_early = v.unflatten(3, (-1, 2, block))[..., 0, :, :]
        y.unflatten(3, (-1, 2, block))[..., 1, :, :].add_(_read(r_late, k_early, v_early))
        r_in = torch.stack((r_early, r_late * w_early), 4).flatten(3, 5)
        k_out = torch.stack((k_early * w_late, k_late), 4).flatten(3, 5)
        whole = (w_early * w_late).squeeze(4)
        block *= 2
    gained = k_out.mT @ v  # (B, H, chunks, N_key, N_value)
    starts = []
    for gained_c, whole_c in zip(gained.unbind(2), whole.squeeze(3).unbind(2), strict=True):
        starts.append(S)
        S = torch.addcmul(gained_c, whole_c[..., None], S)
    y = y + r_in @ torch.stack(starts, 2)
    return y.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :T], S  # (B, T, H, N)


def _read(r: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What each step of r (…, block, N) reads of all steps of k and v."""
    if r.shape[-2] == 1:  # a matrix product of single rows costs more than its arithmetic
        return (r * k).sum(-1, keepdim=True) * v
    return (r @ k.mT) @ v


# The compiled form ---------------------------------------------------------------------------------------------------


def _compiled_takes(device: torch.device, N: int) -> bool:
    """Whether a library computes this. N is the head size."""
    if device.type == "cuda":
        return N % 16 == 0 and N <= 256 and library.has_cuda()
    return device.type == "cpu" and N % 16 == 0 and library.COMPILED


def wkv6_compiled(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence in C++ or CUDA, for N a multiple of 16 (CUDA: up to 256); shapes as in `wkv6`."""
    bf16 = all(x.dtype is torch.bfloat16 for x in (r, k, v, w))
    rows, u = [x.to(torch.bfloat16 if bf16 else torch.float32) for x in (r, k, v, w)], u.float()
    state = zero_state(r, cu_seqlens) if state is None else state
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (*rows, u, state))
    y, S, _ = torch.ops.visualrwkv.wkv6_forward(*rows, u, state, cu_seqlens, keep)
    return y.to(v.dtype), S


# `keep`: whether a backward pass follows. `states` is what the forward pass saves for it: nothing on the CPU.
torch.library.define(
    "visualrwkv::wkv6_forward",
    "(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor state, Tensor? cu_seqlens, bool keep)"
    " -> (Tensor y, Tensor S, Tensor states)",
)
torch.library.define(
    "visualrwkv::wkv6_backward",
    "(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor state, Tensor? cu_seqlens, Tensor states, Tensor dy,"
    " Tensor? dS) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("visualrwkv::wkv6_forward")
def _(r, k, v, w, u, state, cu_seqlens, keep):
    return v.new_empty(v.shape), state.new_empty(state.shape), new_states(state, r, keep and r.device.type == "cuda")


@torch.library.register_fake("visualrwkv::wkv6_backward")
def _(r, k, v, w, u, state, cu_seqlens, states, dy, dS):
    return tuple(x.new_empty(x.shape) for x in (r, k, v, w, u, state))


@torch.library.impl("visualrwkv::wkv6_forward", "CPU")
def _(r, k, v, w, u, state, cu_seqlens, keep):
    inputs = [x.contiguous() for x in (r, k, v, w, u, state)]
    y, S = torch.empty_like(inputs[2]), torch.empty_like(inputs[5])
    call_cpu("visualrwkv_wkv6_forward", cu_seqlens, *inputs, y, S)
    return y, S, new_states(state, r, False)


@torch.library.impl("visualrwkv::wkv6_backward", "CPU")
def _(r, k, v, w, u, state, cu_seqlens, states, dy, dS):
    dS = torch.zeros_like(state) if dS is None else dS
    inputs = [x.contiguous() for x in (r, k, v, w, u, state, dy.to(r.dtype), dS)]
    dr, dk, dv, dw = (torch.empty_like(x) for x in inputs[:4])
    du_parts, dstate = u.new_empty((state.shape[0], *u.shape)), torch.empty_like(inputs[5])
    call_cpu("visualrwkv_wkv6_backward", cu_seqlens, *inputs, dr, dk, dv, dw, du_parts, dstate)
    return dr, dk, dv, dw, du_parts.sum(0), dstate


def _backward(ctx, dy, dS, _):
    saved = ctx.saved_tensors  # read once: activation checkpointing gives them a single time
    if dy is None:
        dy = torch.zeros_like(saved[2])
    return *torch.ops.visualrwkv.wkv6_backward(*saved, dy, dS), None, None


torch.library.register_autograd("visualrwkv::wkv6_forward", _backward, setup_context=save_for_backward)


# On CUDA, as on the CPU, r, k, v, w, y and their gradients are all bf16 or all fp32; the rest is fp32 ------------------


def _forward_cuda(r, k, v, w, u, state, cu_seqlens, keep):
    r, k, v, w, u, state = map(aligned, (r, k, v, w, u, state))
    y, S, states = torch.empty_like(v), torch.empty_like(state), new_states(state, r, keep)
    launch_cuda(
        "wkv6_forward", _splits(r, state), state, cu_seqlens, r, k, v, w, u, state, y, S, states if keep else None
    )
    return y, S, states


def _backward_cuda(r, k, v, w, u, state, cu_seqlens, states, dy, dS):
    if states.numel() == 0:
        raise RuntimeError("wkv6_backward needs the states of a wkv6_forward with keep=True")
    inputs = [aligned(x) for x in (r, k, v, w, u, states, dy)]
    dS = None if dS is None else aligned(dS)
    splits = _splits(r, state, least=1 if r.dtype is torch.bfloat16 else 2)
    # Every split makes its own part of the gradients that sum over values, to be added in one order.
    parts = r.new_empty((3, splits, *r.shape), dtype=r.dtype if splits == 1 else torch.float32)
    dv, dstate = v.new_empty(v.shape), state.new_empty(state.shape)
    du = u.new_empty((splits, state.shape[0], *u.shape))
    launch_cuda("wkv6_backward", splits, state, cu_seqlens, *inputs, dS, parts[0], parts[1], dv, parts[2], du, dstate)
    dr, dk, dw = parts[:, 0] if splits == 1 else parts.sum(1).to(r.dtype)
    return dr, dk, dv, dw, du.sum((0, 1)), dstate


torch.library.impl("visualrwkv::wkv6_forward", "CUDA", _forward_cuda)
torch.library.impl("visualrwkv::wkv6_backward", "CUDA", _backward_cuda)


def _splits(r: Tensor, state: Tensor, least: int = 1) -> int:
    """How many blocks share a head, so that each multiprocessor has one; `least` is what the shared memory asks for."""
    sequences, H, N, _ = state.shape
    allowed = {32: (1, 2), 64: (1, 2, 4)}.get(N, (1,))
    wanted = max(least, library.multiprocessors(r.device) / (sequences * H))
    return next((n for n in allowed if n >= wanted), allowed[-1])
