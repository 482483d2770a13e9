"""WKV-6, the recurrence of RWKV-6 ("Finch", arXiv 2404.05892, section 4.2), per head with a matrix-valued state S:

    y_t = r_t^T (S_{t-1} + diag(u) k_t v_t^T)        S_t = diag(exp(-exp(w_t))) S_{t-1} + k_t v_t^T

B batch, T time, H heads, N head size, S sequences in a packed row; a state is (B or S, H, N_key, N_value).
Three forms: compiled (cuda/wkv6.cpp), torch (chunks of matrix products), and the reference (one step at a time).
"""

from ctypes import c_int64, c_void_p
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from visualrwkv.ops import library

CHUNK = 64  # steps the torch form joins by matrix products before it moves the state on
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def wkv6(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run the WKV-6 recurrence and return its output and final state.

    r, k, v, w (B, T, H, N), u (H, N), state (B, H, N_key, N_value) fp32 or None for zeros → y (B, T, H, N) in v's
    dtype, final state like `state`. w is raw: the decay is exp(-exp(w)). T ≥ 1. Inputs are fp32, bf16 or fp16, computed
    in fp32 (fp64 in fp64). Gradients reach every input, the initial state included, also through the final state.

    cu_seqlens (S + 1,) int32 or int64, rising from 0 to T: the row (B = 1) holds S sequences one after another, the
    recurrence restarts at each, and the states are (S, H, N, N).

    Raises ValueError for shapes, dtypes, devices or cu_seqlens that do not fit together.
    """
    _check(r, k, v, w, u, state, cu_seqlens)
    if library.COMPILED and r.is_cpu and r.shape[3] % 16 == 0 and not _has_float64(r, k, v, w, u, state):
        return wkv6_compiled(r, k, v, w, u, state, cu_seqlens)
    return wkv6_torch(r, k, v, w, u, state, cu_seqlens)


def wkv6_reference(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The equations, one step after another; shapes as in `wkv6`. For tests."""
    dtype = v.dtype
    r, k, v, w, u, state = _compute_dtype(r, k, v, w, u, state, cu_seqlens)
    if cu_seqlens is not None:
        starts = _sequence_starts(cu_seqlens, r.shape[1])
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
        r, k, v, w, u, state = _compute_dtype(r, k, v, w, u, state, cu_seqlens)
        # The clamp changes no decay (above 5 it is 0) but keeps 0 * infinity out of the gradient.
        decay = torch.exp(-torch.exp(w.clamp(max=20)))
        if cu_seqlens is None:
            y, S = _chunked(r, k, v, decay, u, state)
            return y.to(dtype), S
        starts = torch.tensor(_sequence_starts(cu_seqlens, r.shape[1]), device=r.device)
        steps = torch.arange(int((starts[1:] - starts[:-1]).max()), device=r.device)
        rows = starts[:-1, None] + steps  # (S, longest)
        inside = rows < starts[1:, None]
        rows = rows.clamp(max=r.shape[1] - 1)
        r, k, v = (torch.where(inside[..., None, None], x[0, rows], 0) for x in (r, k, v))  # (S, longest, H, N)
        y, S = _chunked(r, k, v, torch.where(inside[..., None, None], decay[0, rows], 1), u, state)
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


def wkv6_compiled(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence in C++, on the CPU, for N a multiple of 16; shapes as in `wkv6`."""
    dtype = v.dtype
    r, k, v, w, u = r.float(), k.float(), v.float(), w.float(), u.float()  # fp32: the library's only dtype
    if state is None:
        sequences = r.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        state = r.new_zeros((sequences, r.shape[2], r.shape[3], r.shape[3]))
    y, S = torch.ops.visualrwkv.wkv6_forward(r, k, v, w, u, state, cu_seqlens)
    return y.to(dtype), S


torch.library.define(
    "visualrwkv::wkv6_forward",
    "(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor state, Tensor? cu_seqlens) -> (Tensor, Tensor)",
)
torch.library.define(
    "visualrwkv::wkv6_backward",
    "(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor state, Tensor? cu_seqlens, Tensor dy, Tensor dS)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("visualrwkv::wkv6_forward")
def _(r, k, v, w, u, state, cu_seqlens):
    return v.new_empty(v.shape), state.new_empty(state.shape)


@torch.library.register_fake("visualrwkv::wkv6_backward")
def _(r, k, v, w, u, state, cu_seqlens, dy, dS):
    return tuple(x.new_empty(x.shape) for x in (r, k, v, w, u, state))


@torch.library.impl("visualrwkv::wkv6_forward", "CPU")
def _(r, k, v, w, u, state, cu_seqlens):
    B, T, H, N = r.shape
    r, k, v, w, u, state = (x.contiguous() for x in (r, k, v, w, u, state))
    sequences, offsets = _offsets(cu_seqlens, B, T)
    y, S = torch.empty_like(v), torch.empty_like(state)
    c_forward = library.function("visualrwkv_wkv6_forward", *_sizes_and(8))
    c_forward(
        *(sequences, T, None if offsets is None else offsets.data_ptr(), H, N),
        *(r.data_ptr(), k.data_ptr(), v.data_ptr(), w.data_ptr(), u.data_ptr(), state.data_ptr()),
        *(y.data_ptr(), S.data_ptr()),
    )
    return y, S


@torch.library.impl("visualrwkv::wkv6_backward", "CPU")
def _(r, k, v, w, u, state, cu_seqlens, dy, dS):
    B, T, H, N = r.shape
    inputs = [x.contiguous() for x in (r, k, v, w, u, state, dy, dS)]
    sequences, offsets = _offsets(cu_seqlens, B, T)
    dr, dk, dv, dw = (torch.empty_like(x) for x in inputs[:4])
    du_parts, dstate = u.new_empty((sequences, H, N)), torch.empty_like(inputs[5])
    c_backward = library.function("visualrwkv_wkv6_backward", *_sizes_and(14))
    c_backward(
        *(sequences, T, None if offsets is None else offsets.data_ptr(), H, N),
        *(x.data_ptr() for x in (*inputs, dr, dk, dv, dw, du_parts, dstate)),
    )
    return dr, dk, dv, dw, du_parts.sum(0), dstate


def _sizes_and(tensors: int) -> tuple[type, ...]:
    """The C functions' argument types: sequences, length, offsets, heads, head size, and then the tensors."""
    return (c_int64, c_int64, c_void_p, c_int64, c_int64, *(c_void_p,) * tensors)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy, dS):
    return *torch.ops.visualrwkv.wkv6_backward(*ctx.saved_tensors, dy, dS), None


torch.library.register_autograd("visualrwkv::wkv6_forward", _backward, setup_context=_setup_context)


# Inputs --------------------------------------------------------------------------------------------------------------


def _check(r, k, v, w, u, state, cu_seqlens) -> None:
    shape = r.shape
    if len(shape) != 4 or k.shape != shape or v.shape != shape or w.shape != shape or 0 in shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (r, k, v, w))
        raise ValueError(f"r, k, v, w must share one shape (B, T, H, N) without a zero, not {shapes}")
    B, _, H, N = shape
    if u.shape != (H, N):
        raise ValueError(f"u must be (H, N) = {(H, N)}, not {tuple(u.shape)}")
    sequences = B
    if cu_seqlens is not None:
        if B != 1 or cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                "cu_seqlens must be one row of int32 or int64 beside inputs with B = 1, "
                f"not {tuple(cu_seqlens.shape)} {cu_seqlens.dtype} beside B = {B}"
            )
        sequences = cu_seqlens.shape[0] - 1
    if state is not None and state.shape != (sequences, H, N, N):
        raise ValueError(f"state must be {(sequences, H, N, N)} (sequences, H, N, N), not {tuple(state.shape)}")
    for name, x in (("r", r), ("k", k), ("v", v), ("w", w), ("u", u), ("state", state), ("cu_seqlens", cu_seqlens)):
        if x is None:
            continue
        if x.device != r.device:
            raise ValueError(f"all inputs must be on one device, but r is on {r.device} and {name} on {x.device}")
        if name != "cu_seqlens" and x.dtype not in DTYPES:
            raise ValueError(f"{name} must be one of {DTYPES}, not {x.dtype}")
    if state is not None and state.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"state must be torch.float32 (fp64 with fp64 inputs), not {state.dtype}")


def _sequence_starts(cu_seqlens: Tensor, T: int) -> list[int]:
    """cu_seqlens as a list, after a look at the values: in a wrong one the library would read past the rows."""
    starts = cu_seqlens.tolist()
    if len(starts) < 2 or starts[0] != 0 or starts[-1] != T or starts != sorted(set(starts)):
        raise ValueError(f"cu_seqlens must rise from 0 to T = {T}, not {starts}")
    return starts


def _offsets(cu_seqlens: Tensor | None, B: int, T: int) -> tuple[int, Tensor | None]:
    """The number of sequences and their checked int64 offsets: what the library wants to know of cu_seqlens."""
    if cu_seqlens is None:
        return B, None
    return len(_sequence_starts(cu_seqlens, T)) - 1, cu_seqlens.long().contiguous()


def _has_float64(*tensors: Tensor | None) -> bool:
    return any(x is not None and x.dtype is torch.float64 for x in tensors)


def _compute_dtype(r, k, v, w, u, state, cu_seqlens) -> tuple[Tensor, ...]:
    """The inputs in fp32 (fp64 if one of them is), with a state of zeros where there is none."""
    dtype = torch.float64 if _has_float64(r, k, v, w, u, state) else torch.float32
    if state is None:
        sequences = r.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        state = r.new_zeros((sequences, r.shape[2], r.shape[3], r.shape[3]), dtype=dtype)
    return tuple(x.to(dtype) for x in (r, k, v, w, u, state))
