"""The CUDA kernels of WKV-7, emulated on the CPU, against the reference in float64."""

from ctypes import c_int64
from itertools import pairwise

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import logsigmoid, normalize

from visualrwkv.ops import library
from visualrwkv.ops.sequences import KEPT
from visualrwkv.ops.wkv7 import _backward_cuda, _compiled_takes, _forward_cuda, _splits, wkv7_reference

NAMES = ("r", "w", "k", "v", "a", "b", "state")
ROWS = ("y", "dr", "dw", "dk", "dv", "da", "db")
GRADIENTS = (*ROWS[1:], "dstate")
LIMITS = {  # relative L2 error
    torch.float32: dict.fromkeys(("y", "S", *GRADIENTS), 5e-4),
    torch.bfloat16: {**dict.fromkeys(("y", "S", "dr", "dk", "dv", "dstate"), 5e-3), "da": 7e-3, "db": 7e-3, "dw": 1e-2},
}
BOTH = pytest.mark.parametrize("dtype", LIMITS, ids=("fp32", "bf16"))


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


@pytest.fixture
def split(monkeypatch):
    """Make the op split each head of `sequences` times `heads` n times."""

    def make_splits(n, sequences=1, heads=1):
        monkeypatch.setattr(library, "multiprocessors", lambda device: n * sequences * heads)

    return make_splits


def make(B, T, H, N, dtype, sequences=None, length=1.0, seed=0):
    """r, w, k, v, a, b in `dtype`, state, and the gradients dy, dS that come in; decays and a, b as in the model, with kk
    of `length`.
    """
    g = torch.Generator().manual_seed(seed)
    r, w, k, v, kk, rate, dy = (torch.randn(B, T, H, N, generator=g) for _ in range(7))
    state, dS = (torch.randn(sequences or B, H, N, N, generator=g) for _ in range(2))
    kk, raw = length * normalize(kk, dim=-1), logsigmoid(2 * w) - 0.5  # decays from 0.545 to 1
    rows = (r / N**0.5, raw, k, v, -kk, kk * torch.sigmoid(rate + 1))
    return [*(x.to(dtype) for x in rows), state, dy.to(dtype), dS]


def run(inputs, cu_seqlens=None):
    *values, dy, dS = inputs
    y, S, states = _forward_cuda(*values, cu_seqlens, True)
    gradients = _backward_cuda(*values, cu_seqlens, states, dy, dS)
    return {"y": y, "S": S, **dict(zip(GRADIENTS, gradients, strict=True))}


def true(inputs, cu_seqlens=None):
    *values, dy, dS = (x.double() for x in inputs)
    leaves = [x.requires_grad_() for x in values]
    y, S = wkv7_reference(*leaves, cu_seqlens)
    gradients = torch.autograd.grad((y, S), leaves, (dy, dS))
    return {"y": y.detach(), "S": S.detach(), **dict(zip(GRADIENTS, gradients, strict=True))}


def assert_close(found, wanted, limits, floor=1e-7):
    """`floor` per element where the true value vanishes."""
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        error = (found[name].double() - want).norm()
        assert found[name].shape == want.shape
        assert error <= limits[name] * want.norm() + floor * want.numel() ** 0.5, f"{name}: {error / want.norm():.1e}"


def assert_same(found, wanted):
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@BOTH
@pytest.mark.parametrize("T", [1, 15, 16, 17, 31, 33, 63, 64, 65, 196])
def test_every_value_and_gradient(emulated, dtype, T):
    inputs = make(1, T, 1, 64, dtype)
    assert_close(run(inputs), true(inputs), LIMITS[dtype])


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
    inputs = make(B, T, H, N, dtype)
    assert_close(run(inputs), true(inputs), LIMITS[dtype])


@BOTH
@pytest.mark.parametrize("splits", [1, 2])
def test_plain_kernels(plain, split, dtype, splits):
    split(splits, 2, 1)
    inputs = make(2, 70, 1, 64, dtype)
    exact = dict.fromkeys(LIMITS[dtype], 1e-5 if dtype is torch.float32 else 2.0**-8)  # rounded once, at the end
    assert_close(run(inputs), true(inputs), exact)


@BOTH
def test_longer_kk(way, dtype):
    """a and b that the model does not make: the state grows where it would shrink."""
    inputs = make(1, 50, 1, 64, dtype, length=1.5)
    assert_close(run(inputs), true(inputs), LIMITS[dtype])


@BOTH
@pytest.mark.parametrize("raw", [-20.0, -5.0, 0.0, 1.0, 2.0, 8.0, "per step", "per channel"])
def test_extreme_decays(way, dtype, raw):
    inputs = make(1, 40, 1, 64, dtype)
    generator = torch.Generator().manual_seed(1)
    rows = {"per step": 40, "per channel": 1}.get(raw, 1)
    chosen = torch.empty(1, rows, 1, 64).uniform_(-20, 8, generator=generator) if isinstance(raw, str) else raw
    inputs[1] = torch.zeros_like(inputs[1]) + torch.as_tensor(chosen).to(dtype)
    found, wanted = run(inputs), true(inputs)
    # Where every decay is almost 0, dw is too: its terms are of the size of k dk times exp(raw w), and so is the error of
    # leaving out decays under exp(-9), or of fp32's rounding.
    terms = inputs[1].double().exp().clamp(max=17) * inputs[2].double() * wanted["dk"]
    error, true_dw = (found.pop("dw").double() - wanted["dw"]).norm(), wanted.pop("dw").norm()
    assert error <= LIMITS[dtype]["dw"] * true_dw + 2e-6 * terms.norm() + 1e-6
    # What of dstate came through such a decay is lost in the same way.
    error = (found.pop("dstate").double() - wanted["dstate"]).norm()
    missed = 1.3e-4 * inputs[7].double().norm() * inputs[0].double().norm() if way == "tiled" else 0.0
    assert error <= LIMITS[dtype]["dstate"] * wanted.pop("dstate").norm() + missed
    assert_close(found, wanted, LIMITS[dtype])


@BOTH
def test_zeros(way, dtype):
    inputs = make(1, 20, 1, 64, dtype)
    zeros = [torch.zeros_like(x) for x in inputs[:7]]
    found = run([*zeros, *inputs[7:]])
    assert_close(found, true([*zeros, *inputs[7:]]), LIMITS[dtype])
    assert all((found[name] == 0).all() for name in ("y", "S", "dr", "dw", "dk", "dv", "da", "db"))


@BOTH
@pytest.mark.parametrize(("raw", "scale"), [(None, 2.0**10), (None, 2.0**-20), (2.0, 2.0**10), (8.0, 2.0**4)])
def test_large_and_small_values(way, dtype, raw, scale):
    """y, S and the gradients are linear in v and the state, and in dy and dS, or nearly so in the others."""
    inputs = make(1, 40, 1, 64, dtype)
    if raw is not None:
        inputs[1].fill_(raw)
    scaled = [x * scale if i in (0, 2, 3, 6, 7, 8) else x for i, x in enumerate(inputs)]
    scaled[6] *= scale  # a state is a product of v and k
    found, wanted = run(scaled), true(scaled)
    if raw is not None:
        assert found.pop("dw").norm() <= 2e-2 * (scaled[2].double() * wanted["dk"]).norm()
        wanted.pop("dw")
    if raw == 8.0:
        found.pop("dstate"), wanted.pop("dstate")  # see test_extreme_decays
    assert all(x.isfinite().all() for x in found.values())
    assert_close(found, wanted, LIMITS[dtype], floor=0.0)


@BOTH
def test_packed_sequences_stand_alone(way, dtype):
    lengths = (1, 16, 65, 3)
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    inputs = make(1, sum(lengths), 2, 64, dtype, sequences=len(lengths))
    found = run(inputs, torch.tensor(starts, dtype=torch.int32))
    assert_close(found, true(inputs, torch.tensor(starts)), LIMITS[dtype])
    *rows, states, dy, dS = inputs
    for i, (a, b) in enumerate(pairwise(starts)):
        alone = run([*(x[:, a:b] for x in rows), states[i : i + 1], dy[:, a:b], dS[i : i + 1]])
        assert_same({n: x[:, a:b] if n in ROWS else x[i : i + 1] for n, x in found.items()}, alone)


@BOTH
@pytest.mark.parametrize("cut", [1, 40, 64])
def test_two_halves_are_the_whole(way, dtype, cut):
    inputs = make(1, 70, 1, 64, dtype)
    *rows, state, dy, dS = inputs
    first, second = [x[:, :cut] for x in rows], [x[:, cut:] for x in rows]
    y_first, middle, states_first = _forward_cuda(*first, state, None, True)
    y_second, S, states_second = _forward_cuda(*second, middle, None, True)
    late = _backward_cuda(*second, middle, None, states_second, dy[:, cut:], dS)
    early = _backward_cuda(*first, state, None, states_first, dy[:, :cut], late[6])
    found = {"y": torch.cat((y_first, y_second), 1), "S": S, "dstate": early[6]}
    found.update({name: torch.cat((early[i], late[i]), 1) for i, name in enumerate(GRADIENTS[:6])})
    assert_close(found, true(inputs), LIMITS[dtype])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", [*NAMES, "dy"])
def test_a_value_that_is_not_finite_stays_in_its_head(emulated, name, value):
    inputs = make(2, 20, 2, 64, torch.bfloat16)
    clean = run(inputs)
    at = [*NAMES, "dy"].index(name)
    inputs[at] = inputs[at].clone()
    if name == "state":
        inputs[at][0, 1, 3, 5] = value
    else:
        inputs[at][0, 10, 1, 5] = value
    found = run(inputs)
    for n in clean:
        assert torch.equal(found[n][1], clean[n][1]), n
    for n in ROWS:
        assert torch.equal(found[n][0, :, 0], clean[n][0, :, 0]), n
    if name != "w":  # an infinite raw w is a decay of 0 or 1
        assert not all(x.isfinite().all() for x in found.values())


@BOTH
@pytest.mark.parametrize(("N", "splits", "T"), [(64, 1, 90), (64, 2, 33), (64, 4, 33), (48, 1, 20)])
def test_any_order_of_warps_gives_the_same(emulated, split, dtype, N, splits, T):
    split(splits)
    inputs = make(1, T, 1, N, dtype)
    first = run(inputs)
    for order in (1, 2):
        emulated.schedule(order)
        assert_same(run(inputs), first)


@BOTH
def test_each_byte_moves_once(emulated, dtype):
    B, T, H, N = 1, 256, 1, 64
    *values, dy, dS = make(B, T, H, N, dtype)
    row, state = B * T * H * N * dtype.itemsize, B * H * N * N * 4
    _forward_cuda(*values, None, False)
    assert emulated.bytes() <= 1.05 * (7 * row + 2 * state)
    _, _, states = _forward_cuda(*values, None, True)
    kept = T // KEPT * state
    assert emulated.bytes() <= 1.05 * (7 * row + 2 * state + kept)
    _backward_cuda(*values, None, states, dy, dS)
    assert emulated.bytes() <= 1.1 * (13 * row + 2 * state + kept)  # w is read twice


def test_states_are_kept_only_on_demand(way):
    inputs = make(1, 130, 1, 64, torch.float32)
    *values, dy, dS = inputs
    y, S, states = _forward_cuda(*values, None, False)
    assert states.numel() == 0
    y_kept, S_kept, states = _forward_cuda(*values, None, True)
    assert torch.equal(y, y_kept)
    assert torch.equal(S, S_kept)
    assert torch.equal(states[0], values[6][0])
    for chunk in (1, 2):
        _, wanted = wkv7_reference(*(x[:, : chunk * KEPT].double() for x in values[:6]), values[6].double())
        torch.testing.assert_close(states[chunk].double(), wanted[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="keep=True"):
        _backward_cuda(*values, None, values[6].new_empty(0), dy, dS)


def test_absent_states_are_zeros(way):
    *values, dy, dS = make(2, 20, 1, 64, torch.float32)
    values[6].zero_()
    y, S, states = _forward_cuda(*values, None, True)
    y_null, S_null = torch.empty_like(y), torch.empty_like(S)
    library.launch("wkv7_forward", 0, 1, 2, 20, None, 1, 64, *values[:6], None, y_null, S_null, None)
    assert torch.equal(y, y_null)
    assert torch.equal(S, S_null)
    with_zeros = _backward_cuda(*values, None, states, dy, torch.zeros_like(dS))
    without = _backward_cuda(*values, None, states, dy, None)
    assert all(torch.equal(a, b) for a, b in zip(with_zeros, without, strict=True))


def test_any_memory_layout(emulated):
    """Rows that do not lie side by side, and ones that begin between two 16-byte addresses."""
    inputs = make(1, 20, 2, 64, torch.bfloat16)
    wide = [torch.stack((x, torch.full_like(x, 9)), -1)[..., 0] for x in inputs]
    shifted = [torch.cat((torch.zeros(1, dtype=x.dtype), x.flatten()))[1:].view(x.shape) for x in inputs]
    assert_same(run(wide), run(inputs))
    assert_same(run(shifted), run(inputs))


@pytest.mark.parametrize("N", [8, 24, 144])
def test_head_sizes_without_a_kernel(emulated, monkeypatch, N):
    monkeypatch.setattr(library, "has_cuda", lambda: True)
    assert not _compiled_takes(torch.device("cuda"), N)
    with pytest.raises(RuntimeError, match="invalid argument"):
        run(make(1, 3, 1, N, torch.float32))


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
    *values, _dy, _dS = make(2, 70, 1, 64, dtype)
    real = _forward_cuda(*values, None, keep)
    with FakeTensorMode():
        fakes = [torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in values]
        found = torch.ops.visualrwkv.wkv7_forward(*fakes, None, keep)
        assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in real]
        if keep:
            gradients = torch.ops.visualrwkv.wkv7_backward(*fakes, None, found[2], found[0], None)
            assert [(x.shape, x.dtype) for x in gradients] == [(x.shape, x.dtype) for x in values]
