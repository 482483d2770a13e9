"""The CUDA kernels of WKV-7, emulated on the CPU, against the reference in float64."""

from ctypes import c_int64

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.ops.recurrences import BOTH, WKV7, assert_close
from visualrwkv.ops import library
from visualrwkv.ops.sequences import KEPT
from visualrwkv.ops.wkv7 import _backward_cuda, _compiled_takes, _forward_cuda, _splits


@pytest.fixture
def plain(emulated):
    """Run the plain kernels, for a head size that has both."""
    emulated.visualrwkv_cuda_wkv7_plain(c_int64(1))
    yield
    emulated.visualrwkv_cuda_wkv7_plain(c_int64(0))


@pytest.fixture(params=["tiled", "plain"])
def way(request, emulated):
    """Both ways of the kernels."""
    if request.param == "plain":
        request.getfixturevalue("plain")
    return request.param


@BOTH
@pytest.mark.parametrize("T", [1, 15, 16, 17, 31, 33, 63, 64, 65, 196])
def test_every_value_and_gradient(emulated, dtype, T):
    inputs = WKV7.make(1, T, 1, 64, dtype)
    assert_close(WKV7.run(inputs), WKV7.true(inputs), limits=WKV7.limits[dtype])


@BOTH
@pytest.mark.parametrize(
    ("B", "T", "H", "N", "splits"),
    [
        *[(2, 33, 2, 64, 1), (1, 66, 2, 64, 2), (2, 66, 1, 64, 4)],
        *[(2, 130, 2, 16, 1), (1, 65, 2, 32, 1), (1, 66, 2, 48, 1), (1, 9, 1, 80, 1), (1, 65, 1, 96, 1)],  # plain
        *[(1, 9, 1, 112, 1), (1, 65, 1, 128, 1)],
    ],
)
def test_splits_and_head_sizes(emulated, split, dtype, B, T, H, N, splits):
    split(splits, B, H)
    inputs = WKV7.make(B, T, H, N, dtype)
    assert_close(WKV7.run(inputs), WKV7.true(inputs), limits=WKV7.limits[dtype])


@BOTH
@pytest.mark.parametrize("splits", [1, 2])
def test_plain_kernels(plain, split, dtype, splits):
    split(splits, 2, 1)
    inputs = WKV7.make(2, 70, 1, 64, dtype)
    exact = dict.fromkeys(WKV7.limits[dtype], 1e-5 if dtype is torch.float32 else 2.0**-8)  # rounded once, at the end
    assert_close(WKV7.run(inputs), WKV7.true(inputs), limits=exact)


@BOTH
def test_longer_kk(way, dtype):
    """a and b that the model does not make: the state grows where it would shrink."""
    inputs = WKV7.make(1, 50, 1, 64, dtype, length=1.5)
    assert_close(WKV7.run(inputs), WKV7.true(inputs), limits=WKV7.limits[dtype])


@BOTH
@pytest.mark.parametrize("raw", [-20.0, -5.0, 0.0, 1.0, 2.0, 8.0, "per step", "per channel"])
def test_extreme_decays(way, dtype, raw):
    inputs = WKV7.make(1, 40, 1, 64, dtype)
    generator = torch.Generator().manual_seed(1)
    rows = {"per step": 40, "per channel": 1}.get(raw, 1)
    chosen = torch.empty(1, rows, 1, 64).uniform_(-20, 8, generator=generator) if isinstance(raw, str) else raw
    inputs[1] = torch.zeros_like(inputs[1]) + torch.as_tensor(chosen).to(dtype)
    found, wanted = WKV7.run(inputs), WKV7.true(inputs)
    # Where every decay is almost 0, dw is too: its terms are of the size of k dk times exp(raw w), and so is the error of
    # leaving out decays under exp(-9), or of fp32's rounding.
    terms = inputs[1].double().exp().clamp(max=17) * inputs[2].double() * wanted["dk"]
    error, true_dw = (found.pop("dw").double() - wanted["dw"]).norm(), wanted.pop("dw").norm()
    assert error <= WKV7.limits[dtype]["dw"] * true_dw + 2e-6 * terms.norm() + 1e-6
    # What of dstate came through such a decay is lost in the same way.
    error = (found.pop("dstate").double() - wanted["dstate"]).norm()
    missed = 1.3e-4 * inputs[7].double().norm() * inputs[0].double().norm() if way == "tiled" else 0.0
    assert error <= WKV7.limits[dtype]["dstate"] * wanted.pop("dstate").norm() + missed
    assert_close(found, wanted, limits=WKV7.limits[dtype])


@BOTH
def test_zeros(way, dtype):
    inputs = WKV7.make(1, 20, 1, 64, dtype)
    zeros = [torch.zeros_like(x) for x in inputs[:7]]
    found = WKV7.run([*zeros, *inputs[7:]])
    assert_close(found, WKV7.true([*zeros, *inputs[7:]]), limits=WKV7.limits[dtype])
    assert all((found[name] == 0).all() for name in ("y", "S", "dr", "dw", "dk", "dv", "da", "db"))


@BOTH
@pytest.mark.parametrize(("raw", "scale"), [(None, 2.0**10), (None, 2.0**-20), (2.0, 2.0**10), (8.0, 2.0**4)])
def test_large_and_small_values(way, dtype, raw, scale):
    """y, S and the gradients are linear in v and the state, and in dy and dS, or nearly so in the others."""
    inputs = WKV7.make(1, 40, 1, 64, dtype)
    if raw is not None:
        inputs[1].fill_(raw)
    scaled = [x * scale if i in (0, 2, 3, 6, 7, 8) else x for i, x in enumerate(inputs)]
    scaled[6] *= scale  # a state is a product of v and k
    found, wanted = WKV7.run(scaled), WKV7.true(scaled)
    if raw is not None:
        assert found.pop("dw").norm() <= 2e-2 * (scaled[2].double() * wanted["dk"]).norm()
        wanted.pop("dw")
    if raw == 8.0:
        found.pop("dstate"), wanted.pop("dstate")  # see test_extreme_decays
    assert all(x.isfinite().all() for x in found.values())
    assert_close(found, wanted, limits=WKV7.limits[dtype], floor=0.0)


@BOTH
def test_each_byte_moves_once(emulated, dtype):
    B, T, H, N = 1, 256, 1, 64
    *values, dy, dS = WKV7.make(B, T, H, N, dtype)
    row, state = B * T * H * N * dtype.itemsize, B * H * N * N * 4
    _forward_cuda(*values, None, False)
    assert emulated.bytes() <= 1.05 * (7 * row + 2 * state)
    _, _, states = _forward_cuda(*values, None, True)
    kept = T // KEPT * state
    assert emulated.bytes() <= 1.05 * (7 * row + 2 * state + kept)
    _backward_cuda(*values, None, states, dy, dS)
    assert emulated.bytes() <= 1.1 * (13 * row + 2 * state + kept)  # w is read twice


@pytest.mark.parametrize("N", [8, 24, 144])
def test_head_sizes_without_a_kernel(emulated, monkeypatch, N):
    monkeypatch.setattr(library, "has_cuda", lambda: True)
    assert not _compiled_takes(torch.device("cuda"), N)
    with pytest.raises(RuntimeError, match="invalid argument"):
        WKV7.run(WKV7.make(1, 3, 1, N, torch.float32))


def test_which_form_runs(monkeypatch):
    monkeypatch.setattr(library, "has_cuda", lambda: True)
    assert all(_compiled_takes(torch.device("cuda"), N) for N in (16, 64, 128))
    monkeypatch.setattr(library, "has_cuda", lambda: False)
    assert not _compiled_takes(torch.device("cuda"), 64)


def test_splits_fill_the_multiprocessors(monkeypatch):
    monkeypatch.setattr(library, "multiprocessors", lambda device: 132)
    for sequences, H, N, least, wanted in (
        *((8, 32, 64, 1, 1), (4, 32, 64, 1, 2), (1, 32, 64, 1, 4), (1, 1, 64, 1, 4), (8, 32, 64, 2, 2)),
        (1, 1, 48, 2, 1),
    ):
        state = torch.empty(sequences, H, N, N, device="meta")
        assert _splits(torch.empty(1, 1, H, N, device="meta"), state, least) == wanted


@BOTH
@pytest.mark.parametrize("keep", [True, False])
def test_shapes_are_known_without_running(emulated, dtype, keep):
    """torch.compile asks for them."""
    *values, _dy, _dS = WKV7.make(2, 70, 1, 64, dtype)
    real = _forward_cuda(*values, None, keep)
    with FakeTensorMode():
        fakes = [torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in values]
        found = torch.ops.visualrwkv.wkv7_forward(*fakes, None, keep)
        assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in real]
        if keep:
            gradients = torch.ops.visualrwkv.wkv7_backward(*fakes, None, found[2], found[0], None)
            assert [(x.shape, x.dtype) for x in gradients] == [(x.shape, x.dtype) for x in values]
