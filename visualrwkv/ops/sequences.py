"""What the recurrences over time have in common: checks of their inputs, packed rows, the dtype they compute in, and how
`wkv6` and `wkv7` call the library.

B batch, T time, H heads, N head size, S sequences in a packed row. With cu_seqlens (S + 1,) a row (B = 1) holds S
sequences one after another; without, every row is a sequence.
"""

from collections.abc import Sequence
from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from visualrwkv.ops import library

KEPT = (
    64  # steps between the states that the CUDA kernels keep for a backward pass: CHUNK in cuda/wkv6.cu, cuda/wkv7.cu
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check(
    rows: dict[str, Tensor], state: Tensor | None, cu_seqlens: Tensor | None, others: dict[str, Tensor] | None = None
) -> None:
    """ValueError unless `rows` share one shape (B, T, H, N), `state` is (B or S, H, N, N) and the dtypes and devices of
    all, `others` included, fit together. The values of cu_seqlens are looked at by `sequence_starts`.
    """
    shapes = [tuple(x.shape) for x in rows.values()]
    if len(shapes[0]) != 4 or set(shapes) != {shapes[0]} or 0 in shapes[0]:
        raise ValueError(
            f"{', '.join(rows)} must share one shape (B, T, H, N) without a zero, not {', '.join(map(str, shapes))}"
        )
    B, _, H, N = shapes[0]
    if cu_seqlens is not None and (
        B != 1 or cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(
            "cu_seqlens must be one row of int32 or int64 beside inputs with B = 1, "
            f"not {tuple(cu_seqlens.shape)} {cu_seqlens.dtype} beside B = {B}"
        )
    wanted = (sequence_count(B, cu_seqlens), H, N, N)
    if state is not None and state.shape != wanted:
        raise ValueError(f"state must be {wanted} (sequences, H, N, N), not {tuple(state.shape)}")
    check_together({**rows, **(others or {})}, state, cu_seqlens)


def check_together(tensors: dict[str, Tensor], state: Tensor | None, cu_seqlens: Tensor | None = None) -> None:
    """ValueError unless all are on one device and have a dtype that the ops take; a state is fp32 (or fp64)."""
    first, device = next((name, x.device) for name, x in tensors.items())
    for name, x in (*tensors.items(), ("state", state), ("cu_seqlens", cu_seqlens)):
        if x is None:
            continue
        if x.device != device:
            raise ValueError(f"all inputs must be on one device, but {first} is on {device} and {name} on {x.device}")
        if name != "cu_seqlens" and x.dtype not in DTYPES:
            raise ValueError(f"{name} must be one of {DTYPES}, not {x.dtype}")
    if state is not None and state.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"state must be torch.float32 (fp64 with fp64 inputs), not {state.dtype}")


def has_float64(*tensors: Tensor | None) -> bool:
    return any(x is not None and x.dtype is torch.float64 for x in tensors)


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp32, or fp64 if one of the tensors has it."""
    return torch.float64 if has_float64(*tensors) else torch.float32


def in_compute_dtype(rows: Sequence[Tensor], state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, ...]:
    """The rows and then the state in the dtype of the computation; without a state, zeros."""
    dtype = compute_dtype(*rows, state)
    state = zero_state(rows[0], cu_seqlens) if state is None else state
    return tuple(x.to(dtype) for x in (*rows, state))


def sequence_count(B: int, cu_seqlens: Tensor | None) -> int:
    return B if cu_seqlens is None else cu_seqlens.shape[0] - 1


def zero_state(r: Tensor, cu_seqlens: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """The state before the first token of every sequence of r (B, T, H, N): (B or S, H, N, N)."""
    B, _, H, N = r.shape
    return r.new_zeros((sequence_count(B, cu_seqlens), H, N, N), dtype=dtype)


def sequence_starts(cu_seqlens: Tensor, T: int) -> list[int]:
    """cu_seqlens as a list, after a look at the values: in a wrong one the library would read past the rows."""
    starts = cu_seqlens.tolist()
    if len(starts) < 2 or starts[0] != 0 or starts[-1] != T or starts != sorted(set(starts)):
        raise ValueError(f"cu_seqlens must rise from 0 to T = {T}, not {starts}")
    return starts


def offsets(cu_seqlens: Tensor | None, B: int, T: int) -> tuple[int, Tensor | None]:
    """The number of sequences and their checked int64 offsets: what the library wants to know of cu_seqlens."""
    if cu_seqlens is None:
        return B, None
    return len(sequence_starts(cu_seqlens, T)) - 1, cu_seqlens.long().contiguous()


def padded_rows(cu_seqlens: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """How to read a packed row as a padded batch: row numbers (S, longest), and which of them are no padding."""
    starts = torch.tensor(sequence_starts(cu_seqlens, T), device=cu_seqlens.device)
    steps = torch.arange(int((starts[1:] - starts[:-1]).max()), device=cu_seqlens.device)
    rows = starts[:-1, None] + steps
    return rows.clamp(max=T - 1), rows < starts[1:, None]


# How wkv6 and wkv7 call the library -----------------------------------------------------------------------------------


def call_cpu(name: str, cu_seqlens: Tensor | None, r: Tensor, *tensors: Tensor) -> None:
    """Call a C function: sequences, length, offsets, heads and head size come before the tensors."""
    B, T, H, N = r.shape
    sequences, starts = offsets(cu_seqlens, B, T)
    call = library.function(
        name + library.ON_CPU[r.dtype], c_int64, c_int64, c_void_p, c_int64, c_int64, *(c_void_p,) * (1 + len(tensors))
    )
    call(
        *(sequences, T, None if starts is None else starts.data_ptr(), H, N),
        *(x.data_ptr() for x in (r, *tensors)),
    )


def launch_cuda(
    name: str, splits: int, state: Tensor, cu_seqlens: Tensor | None, r: Tensor, *tensors: Tensor | None
) -> None:
    """Start a CUDA function: dtype, splits, sequences, length, offsets, heads and head size come before the tensors."""
    _, T, H, N = r.shape
    starts = None if cu_seqlens is None else cu_seqlens.long().contiguous()
    library.launch(name, library.DTYPE_CODES[r.dtype], splits, state.shape[0], T, starts, H, N, r, *tensors)


def aligned(x: Tensor) -> Tensor:
    """Contiguous, and where 16 bytes can be read at once."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def new_states(state: Tensor, r: Tensor, kept: bool) -> Tensor:
    """Room for the state at the start of every KEPT steps of every sequence: (slots, H, N, N), or nothing."""
    B, T = r.shape[:2]
    return state.new_empty((B * T // KEPT + state.shape[0], *state.shape[1:]) if kept else 0)


def save_for_backward(ctx, inputs, output) -> None:
    """What the backward pass of a forward op (…, cu_seqlens, keep) → (y, S, states) needs: its tensors and `states`."""
    *tensors, _ = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[2])
