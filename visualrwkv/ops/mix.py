"""Token shift and mix, what RWKV computes before its products: each token meets the one before it, in M mixtures,

    out[m]_t = x_t + (x_{t-1} - x_t) (mix[m] + delta[m]_t)

B batch, T time, C channels, M mixtures, S sequences in a packed row. delta, the part that depends on the data, is
RWKV-6's (arXiv 2404.05892, equations 14 to 16, "ddlerp"); RWKV-7 has mix alone.
Two forms: compiled (cuda/mix.cpp, cuda/mix.cu) in one pass over memory, and torch, which is also the reference.
"""

from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from visualrwkv.ops import library, sequences

PIECE = {"cpu": 128, "cuda": 64}  # rows with a partial sum of their own: PIECE in cuda/mix.cpp and cuda/mix.cu
MOST_ON_CUDA = 8  # mixtures: MOST in cuda/mix.cu


def token_mix(
    x: Tensor, last: Tensor | None, mix: Tensor, delta: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Mix every token with its predecessor: x (B, T, C), mix (M, C), delta (M, B, T, C) → M tensors (B, T, C) in x's dtype.

    last (B, C) is what came before each sequence, or None for zeros. cu_seqlens (S + 1,) int32 or int64, rising from 0
    to T: the row (B = 1) holds S sequences one after another, the shift restarts at each, and last is (S, C). Inputs
    are fp32, bf16 or fp16 (fp64 stays fp64). Gradients reach every input. Under the CPU's autocast to bf16 the result of
    fp32 is bf16, as the products that follow would round it.

    Raises ValueError for shapes, dtypes, devices or cu_seqlens that do not fit together (values of cu_seqlens on a GPU
    are not looked at, which would make it wait).
    """
    _check(x, last, mix, delta, cu_seqlens)
    compiled = library.has_cuda() and mix.shape[0] <= MOST_ON_CUDA if x.is_cuda else library.COMPILED and x.is_cpu
    narrow = x.is_cpu and x.dtype is torch.float32 and torch.is_autocast_enabled("cpu")
    narrow = narrow and torch.get_autocast_dtype("cpu") is torch.bfloat16
    if compiled and not sequences.has_float64(x, last, mix, delta):
        return token_mix_compiled(x, last, mix, delta, cu_seqlens, narrow)
    out = token_mix_torch(x, last, mix, delta, cu_seqlens)
    return tuple(y.to(torch.bfloat16) for y in out) if narrow else out


def token_shift(x: Tensor, last: Tensor | None, cu_seqlens: Tensor | None = None) -> Tensor:
    """Each token's predecessor: x (B, T, C) → (B, T, C); last and cu_seqlens as in `token_mix`."""
    fill = _last(x, last, cu_seqlens).to(x.dtype)
    if cu_seqlens is None:
        return torch.cat((fill[:, None], x[:, :-1]), 1)
    before = torch.cat((torch.zeros_like(x[0, :1]), x[0, :-1]))
    return before.index_copy(0, cu_seqlens[:-1].long(), fill)[None]


def token_mix_torch(
    x: Tensor, last: Tensor | None, mix: Tensor, delta: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The equation, in plain torch on any device; shapes as in `token_mix`."""
    weights = mix[:, None, None] if delta is None else mix[:, None, None] + delta  # (M, B or 1, T or 1, C)
    return torch.addcmul(x, token_shift(x, last, cu_seqlens) - x, weights).to(x.dtype).unbind(0)


# The compiled form ---------------------------------------------------------------------------------------------------


def token_mix_compiled(
    x: Tensor,
    last: Tensor | None,
    mix: Tensor,
    delta: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    narrow: bool = False,
) -> tuple[Tensor, ...]:
    """One pass in C++ or CUDA, computed in fp32; shapes as in `token_mix`. narrow: of x in fp32 the result is bf16 (CPU)."""
    dtype = x.dtype if x.dtype in (library.DTYPE_CODES if x.is_cuda else library.ON_CPU) else torch.float32
    delta = None if delta is None else delta.to(torch.bfloat16 if narrow else dtype)
    arguments = (x.to(dtype), _last(x, last, cu_seqlens).float(), mix.float(), delta, cu_seqlens, narrow)
    out = torch.ops.visualrwkv.token_mix_forward(*arguments)
    return tuple(y if narrow else y.to(x.dtype) for y in out)


torch.library.define(
    "visualrwkv::token_mix_forward",
    "(Tensor x, Tensor last, Tensor mix, Tensor? delta, Tensor? cu_seqlens, bool narrow) -> Tensor[]",
)
torch.library.define(
    "visualrwkv::token_mix_backward",
    "(Tensor x, Tensor last, Tensor mix, Tensor? delta, Tensor? cu_seqlens, Tensor[] dout)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("visualrwkv::token_mix_forward")
def _(x, last, mix, delta, cu_seqlens, narrow):
    return _mixtures(x, mix, narrow)


@torch.library.register_fake("visualrwkv::token_mix_backward")
def _(x, last, mix, delta, cu_seqlens, dout):
    ddelta = mix.new_empty(0) if delta is None else delta.new_empty(delta.shape)  # without delta nobody asks for it
    return x.new_empty(x.shape), last.new_empty(last.shape), mix.new_empty(mix.shape), ddelta


@torch.library.impl("visualrwkv::token_mix_forward", "CPU")
def _(x, last, mix, delta, cu_seqlens, narrow):
    x, last, mix, delta = (None if t is None else t.contiguous() for t in (x, last, mix, delta))
    count, offsets = sequences.offsets(cu_seqlens, *x.shape[:2])
    out = _mixtures(x, mix, narrow)
    c_forward = library.function(f"visualrwkv_mix_forward{_ending(x, out[0])}", *_sizes_and(5))
    tensors = (_at(t) for t in (x, last, mix, delta))
    c_forward(count, x.shape[1], _at(offsets), *mix.shape, *tensors, library.pointers(out))
    return out


@torch.library.impl("visualrwkv::token_mix_backward", "CPU")
def _(x, last, mix, delta, cu_seqlens, dout):
    x, last, mix, delta = (None if t is None else t.contiguous() for t in (x, last, mix, delta))
    dout = [g.to(x.dtype if x.dtype is torch.bfloat16 else g.dtype).contiguous() for g in dout]
    count, offsets = sequences.offsets(cu_seqlens, *x.shape[:2])
    dx, dlast, dmix_parts, ddelta = _gradients(x, last, mix, delta, PIECE["cpu"])
    c_backward = library.function(f"visualrwkv_mix_backward{_ending(x, dout[0])}", *_sizes_and(9))
    inputs = (_at(t) for t in (x, last, mix, delta))
    gradients = (_at(t) for t in (dx, dlast, dmix_parts, None if delta is None else ddelta))
    c_backward(count, x.shape[1], _at(offsets), *mix.shape, *inputs, library.pointers(dout), *gradients)
    return dx, dlast, dmix_parts.sum(0), ddelta


def _forward_cuda(x, last, mix, delta, cu_seqlens, narrow=False):
    x, last, mix, delta = (None if t is None else t.contiguous() for t in (x, last, mix, delta))
    out = _mixtures(x, mix, False)
    library.launch("mix_forward", *_sizes_on_cuda(x, last, mix, cu_seqlens), x, last, mix, delta, out)
    return out


def _backward_cuda(x, last, mix, delta, cu_seqlens, dout):
    x, last, mix, delta = (None if t is None else t.contiguous() for t in (x, last, mix, delta))
    dout = [g.contiguous() for g in dout]
    dx, dlast, dmix_parts, ddelta = _gradients(x, last, mix, delta, PIECE["cuda"])
    tensors = (x, last, mix, delta, dout, dx, dlast, dmix_parts, None if delta is None else ddelta)
    library.launch("mix_backward", *_sizes_on_cuda(x, last, mix, cu_seqlens), *tensors)
    return dx, dlast, dmix_parts.sum(0), ddelta


torch.library.impl("visualrwkv::token_mix_forward", "CUDA", _forward_cuda)
torch.library.impl("visualrwkv::token_mix_backward", "CUDA", _backward_cuda)


def _mixtures(x: Tensor, mix: Tensor, narrow: bool) -> list[Tensor]:
    """Room for what comes out."""
    return [x.new_empty(x.shape, dtype=torch.bfloat16 if narrow else x.dtype) for _ in range(mix.shape[0])]


def _gradients(x: Tensor, last: Tensor, mix: Tensor, delta: Tensor | None, piece: int) -> tuple[Tensor, ...]:
    """Room for dx, dlast, the partial sums of dmix (pieces, M, C), and ddelta."""
    pieces = -(-x.shape[0] * x.shape[1] // piece)
    ddelta = mix.new_empty(0) if delta is None else torch.empty_like(delta)
    return torch.empty_like(x), torch.zeros_like(last), mix.new_empty((pieces, *mix.shape)), ddelta


def _ending(x: Tensor, out: Tensor) -> str:
    """Of the C functions' names, by the dtypes of x and of what is made of it."""
    if x.dtype is out.dtype:
        return library.ON_CPU[x.dtype]
    assert (x.dtype, out.dtype) == (torch.float32, torch.bfloat16), (x.dtype, out.dtype)
    return "_narrow"


def _sizes_and(tensors: int) -> tuple[type, ...]:
    """The C functions' argument types: sequences, length, offsets, mixtures, channels, and then the tensors."""
    return (c_int64, c_int64, c_void_p, c_int64, c_int64, *(c_void_p,) * tensors)


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _sizes_on_cuda(x: Tensor, last: Tensor, mix: Tensor, cu_seqlens: Tensor | None) -> tuple[int | Tensor | None, ...]:
    B, T, _ = x.shape
    offsets = None if cu_seqlens is None else cu_seqlens.long().contiguous()
    return library.DTYPE_CODES[x.dtype], last.shape[0], T, offsets, B * T, *mix.shape


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])
    ctx.dtype = output[0].dtype


def _backward(ctx, dout):
    inputs = ctx.saved_tensors  # read once: activation checkpointing gives them a single time
    dout = [torch.zeros_like(inputs[0], dtype=ctx.dtype) if g is None else g for g in dout]
    dx, dlast, dmix, ddelta = torch.ops.visualrwkv.token_mix_backward(*inputs, dout)
    return dx, dlast, dmix, None if inputs[3] is None else ddelta, None, None


torch.library.register_autograd("visualrwkv::token_mix_forward", _backward, setup_context=_setup_context)


# Inputs --------------------------------------------------------------------------------------------------------------


def _last(x: Tensor, last: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """What came before each sequence, zeros where nothing was given."""
    if last is not None:
        return last
    return x.new_zeros((sequences.sequence_count(x.shape[0], cu_seqlens), x.shape[2]))


def _check(x, last, mix, delta, cu_seqlens) -> None:
    if x.dim() != 3 or 0 in x.shape:
        raise ValueError(f"x must be (B, T, C) without a zero, not {tuple(x.shape)}")
    B, _, C = x.shape
    if mix.dim() != 2 or mix.shape[0] == 0 or mix.shape[1] != C:
        raise ValueError(f"mix must be (M, {C}) with M > 0, not {tuple(mix.shape)}")
    if delta is not None and delta.shape != (mix.shape[0], *x.shape):
        raise ValueError(f"delta must be {(mix.shape[0], *x.shape)} (M, B, T, C), not {tuple(delta.shape)}")
    if cu_seqlens is not None and (
        B != 1 or cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64) or len(cu_seqlens) < 2
    ):
        raise ValueError(
            "cu_seqlens must be one row of int32 or int64 beside x with B = 1, "
            f"not {tuple(cu_seqlens.shape)} {cu_seqlens.dtype} beside B = {B}"
        )
    wanted = (sequences.sequence_count(B, cu_seqlens), C)
    if last is not None and last.shape != wanted:
        raise ValueError(f"last must be {wanted} (sequences, C), not {tuple(last.shape)}")
    others = {name: t for name, t in (("last", last), ("mix", mix), ("delta", delta)) if t is not None}
    sequences.check_together({"x": x, **others}, None, cu_seqlens)
