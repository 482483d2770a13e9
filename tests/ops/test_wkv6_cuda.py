"""The CUDA kernels of WKV-6, emulated on the CPU, against the reference in float64."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.ops.recurrences import BOTH, WKV6, assert_close
from visualrwkv.ops import library, wkv6
from visualrwkv.ops.sequences import KEPT
from visualrwkv.ops.wkv6 import _backward_cuda, _compiled_takes, _forward_cuda, _splits


@pytest.fixture(params=["tiles", "plain"])
def way(request, emulated):
    """Both ways of the kernels, for head sizes that have both."""
    emulated.visualrwkv_cuda_wkv6_plain(request.param == "plain")
    yield request.param
    emulated.visualrwkv_cuda_wkv6_plain(0)


@BOTH
@pytest.mark.parametrize("T", [1, 15, 16, 17, 31, 33, 63, 64, 65, 196])
def test_every_value_and_gradient(emulated, dtype, T):
    inputs = WKV6.make(1, T, 2, 64, dtype)
    assert_close(WKV6.run(inputs), WKV6.true(inputs), limits=WKV6.limits[dtype])


@BOTH
@pytest.mark.parametrize(
    ("B", "T", "H", "N", "splits"),
    [
        *[(1, 130, 1, 64, 2), (2, 17, 2, 64, 2), (1, 81, 1, 64, 4), (2, 130, 2, 32, 1), (1, 70, 1, 32, 2)],
        *[(2, 70, 1, 16, 1), (1, 66, 2, 48, 1), (1, 9, 1, 80, 1), (1, 65, 1, 128, 1), (1, 8, 1, 256, 1)],  # plain
    ],
)
def test_splits_and_head_sizes(emulated, split, dtype, B, T, H, N, splits):
    split(splits, B, H)
    inputs = WKV6.make(B, T, H, N, dtype)
    assert_close(WKV6.run(inputs), WKV6.true(inputs), limits=WKV6.limits[dtype])


@BOTH
@pytest.mark.parametrize("splits", [1, 2])
def test_plain_kernels_at_every_head_size(emulated, split, dtype, splits):
    split(splits, 1, 1)
    emulated.visualrwkv_cuda_wkv6_plain(1)
    inputs = WKV6.make(1, 70, 1, 64, dtype)
    found = WKV6.run(inputs)
    emulated.visualrwkv_cuda_wkv6_plain(0)
    exact = dict.fromkeys(WKV6.limits[dtype], 1e-5 if dtype is torch.float32 else 2.0**-8)  # rounded once, at the end
    assert_close(found, WKV6.true(inputs), limits=exact)


@BOTH
@pytest.mark.parametrize("raw", [-20.0, -5.0, 0.0, 1.0, 2.0, 8.0, None])
def test_extreme_decays(way, dtype, raw):
    inputs = WKV6.make(1, 80, 1, 64, dtype)
    generator = torch.Generator().manual_seed(1)
    inputs[3] = inputs[3].uniform_(-20, 8, generator=generator) if raw is None else torch.full_like(inputs[3], raw)
    found, wanted = WKV6.run(inputs), WKV6.true(inputs)
    # Where every decay is almost 0, dw is too: its terms are of the size of k dk times exp(raw w), and so is the error of
    # leaving out decays under exp(-10), or of fp32's rounding.
    terms = inputs[3].double().exp().clamp(max=17) * inputs[1].double() * wanted["dk"]
    error, true_dw = (found.pop("dw").double() - wanted["dw"]).norm(), wanted.pop("dw").norm()
    assert error <= WKV6.limits[dtype]["dw"] * true_dw + 2e-6 * terms.norm() + 1e-6
    assert_close(found, wanted, limits=WKV6.limits[dtype])


@BOTH
def test_zeros(way, dtype):
    inputs = WKV6.make(1, 40, 1, 64, dtype)
    zeros = [torch.zeros_like(x) for x in inputs[:6]]
    found = WKV6.run([*zeros, *inputs[6:]])
    assert_close(found, WKV6.true([*zeros, *inputs[6:]]), limits=WKV6.limits[dtype])
    assert all((found[name] == 0).all() for name in ("y", "S", "dr", "dk", "dv", "dw", "du"))


@BOTH
@pytest.mark.parametrize("raw", [None, 8.0])
def test_large_and_small_values(way, dtype, raw):
    """Every value is a product of inputs: scaled ones give the same relative error, also where decays are strongest."""
    inputs = WKV6.make(1, 40, 1, 64, dtype)
    if raw is not None:
        inputs[3].fill_(raw)
    for scale in (2.0**10, 2.0**-20):
        scaled = [x if i in (3, 4) else x * scale for i, x in enumerate(inputs)]
        scaled[5] = scaled[5] * scale  # a state is a product of two of them
        found, wanted = WKV6.run(scaled), WKV6.true(scaled)
        if raw is not None:
            assert found.pop("dw").norm() <= 1e-2 * (inputs[1].double() * wanted["dk"] * scale).norm()
            wanted.pop("dw")
        assert_close(found, wanted, limits=WKV6.limits[dtype], floor=0.0)


@BOTH
def test_each_byte_moves_once(emulated, dtype):
    B, T, H, N = 1, 256, 1, 64
    *values, dy, dS = WKV6.make(B, T, H, N, dtype)
    row, state = B * T * H * N * dtype.itemsize, B * H * N * N * 4
    _forward_cuda(*values, None, False)
    assert emulated.bytes() <= 1.05 * (5 * row + 2 * state + 4 * H * N)
    _, _, states = _forward_cuda(*values, None, True)
    kept = T // KEPT * state
    assert emulated.bytes() <= 1.05 * (5 * row + 2 * state + kept + 4 * H * N)
    _backward_cuda(*values, None, states, dy, dS)
    minimum = 9 * row + 2 * state + kept
    if dtype is torch.bfloat16:
        assert emulated.bytes() <= 1.05 * minimum
    else:  # two splits: dr, dk, dw in two parts, r, k, w read by both
        assert emulated.bytes() <= 1.05 * (minimum + 6 * row)


@pytest.mark.parametrize("starts", [(0, 500, 20), (-40, 7, 20), (0, 15, 3), (5, 5, 5), (2**40, -(2**40), 20)])
def test_wrong_offsets_stay_inside(way, starts):
    """Not looked at on the host: nothing outside the rows may be read or written."""
    T, H, N, guard = 20, 1, 32, 100
    inputs = WKV6.make(1, T, H, N, torch.float32, sequences=2)
    *rows, u, state, dy, dS = inputs

    def framed(x=None):
        frame = torch.full((T + 2 * guard, H, N), torch.nan)
        if x is not None:
            frame[guard:-guard] = x[0]
        return frame, frame[guard:-guard]

    outputs = [framed() for _ in range(5)]
    y, dr, dk, dv, dw = (inner for _, inner in outputs)
    rows = [framed(x)[1] for x in rows]
    S, dstate, du = torch.empty_like(state), torch.empty_like(state), torch.empty(1, 2, H, N)
    states = torch.zeros(T // KEPT + 2, H, N, N)
    sizes = (0, 1, 2, T, torch.tensor(starts), H, N)
    library.launch("wkv6_forward", *sizes, *rows, u, state, y, S, states)
    library.launch("wkv6_backward", *sizes, *rows, u, states, framed(dy)[1], dS, dr, dk, dv, dw, du, dstate)
    assert all(x.isfinite().all() for x in (S, dstate, du))
    for frame, _ in outputs:
        assert frame[:guard].isnan().all()
        assert frame[-guard:].isnan().all()


@pytest.mark.parametrize(("N", "dtype"), [(24, 0), (272, 0), (0, 0), (64, 2)])
def test_what_no_kernel_takes_is_refused(emulated, N, dtype):
    x = torch.zeros(4)
    with pytest.raises(RuntimeError, match="invalid argument"):
        library.launch("wkv6_forward", dtype, 1, 1, 1, None, 1, N, *(x,) * 8, None)


def test_splits_fill_the_gpu(monkeypatch):
    monkeypatch.setattr(library, "multiprocessors", lambda device: 132)
    r = torch.empty(1, 1, 1, 64)

    def splits(sequences, H, N, **least):
        return _splits(r, torch.empty(sequences, H, N, N), **least)

    assert [splits(1, H, 64) for H in (12, 32, 64, 66, 131, 132, 256)] == [4, 4, 4, 2, 2, 1, 1]
    assert splits(8, 32, 64, least=2) == 2
    assert [splits(1, 8, N) for N in (16, 32, 128)] == [1, 2, 1]


def test_the_op_takes_cuda_tensors(monkeypatch):
    monkeypatch.setattr(library, "has_cuda", lambda: True)
    cuda = torch.device("cuda")
    assert [_compiled_takes(cuda, N) for N in (8, 16, 64, 256, 272)] == [False, True, True, True, False]
    monkeypatch.setattr(library, "has_cuda", lambda: False)
    assert not _compiled_takes(cuda, 64)


@BOTH
def test_shapes_on_a_gpu(monkeypatch, dtype):
    """Traced without one: the public op calls the kernels, and saves states where a gradient may follow."""
    monkeypatch.setattr(library, "has_cuda", lambda: True)
    with FakeTensorMode():
        inputs = [torch.empty(1, 130, 2, 64, device="cuda", dtype=dtype, requires_grad=True) for _ in range(4)]
        u, cu_seqlens = torch.empty(2, 64, device="cuda"), torch.empty(4, device="cuda", dtype=torch.int32)
        y, S = wkv6(*inputs, u, None, cu_seqlens)
        assert (y.shape, y.dtype, S.shape, S.dtype) == ((1, 130, 2, 64), dtype, (3, 2, 64, 64), torch.float32)
        *rows, state = [x.detach() for x in (*inputs, S)]
        for keep, shape in ((True, (5, 2, 64, 64)), (False, (0,))):
            y, S, states = torch.ops.visualrwkv.wkv6_forward(*rows, u, state, cu_seqlens, keep)
            assert states.shape == shape
        gradients = torch.ops.visualrwkv.wkv6_backward(*rows, u, state, cu_seqlens, states, y, None)
        assert [(x.shape, x.dtype) for x in gradients] == [(x.shape, x.dtype) for x in (*rows, u, state)]
