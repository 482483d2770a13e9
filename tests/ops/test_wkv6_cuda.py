"""The CUDA kernels of WKV-6, emulated on the CPU, against the reference in float64."""

from itertools import pairwise

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from visualrwkv.ops import library, wkv6
from visualrwkv.ops.sequences import KEPT
from visualrwkv.ops.wkv6 import _backward_cuda, _compiled_takes, _forward_cuda, _splits, wkv6_reference

NAMES = ("r", "k", "v", "w", "u", "state")
GRADIENTS = ("dr", "dk", "dv", "dw", "du", "dstate")
LIMITS = {  # relative L2 error
    torch.float32: dict.fromkeys(("y", "S", *GRADIENTS), 5e-4),
    torch.bfloat16: {**dict.fromkeys(("y", "S", "dr", "dk", "dv", "dstate"), 5e-3), "dw": 1e-2, "du": 1e-2},
}
BOTH = pytest.mark.parametrize("dtype", LIMITS, ids=("fp32", "bf16"))


@pytest.fixture(params=["tiles", "plain"])
def way(request, emulated):
    """Both ways of the kernels, for head sizes that have both."""
    emulated.visualrwkv_cuda_wkv6_plain(request.param == "plain")
    yield request.param
    emulated.visualrwkv_cuda_wkv6_plain(0)


@pytest.fixture
def split(monkeypatch):
    """Make the op split each head of `sequences` times `heads` n times."""

    def make_splits(n, sequences, heads):
        monkeypatch.setattr(library, "multiprocessors", lambda device: n * sequences * heads)

    return make_splits


def make(B, T, H, N, dtype, sequences=None, seed=0):
    """r, k, v, w in `dtype`, u, state, and the gradients dy, dS that come in."""
    g = torch.Generator().manual_seed(seed)
    r, k, v, w, dy = (torch.randn(B, T, H, N, generator=g) for _ in range(5))
    u = torch.randn(H, N, generator=g)
    state, dS = (torch.randn(sequences or B, H, N, N, generator=g) for _ in range(2))
    return [*(x.to(dtype) for x in (r, k, v, 1.5 * w - 2)), u, state, dy.to(dtype), dS]


def run(inputs, cu_seqlens=None):
    *values, dy, dS = inputs
    y, S, states = _forward_cuda(*values, cu_seqlens, True)
    gradients = _backward_cuda(*values, cu_seqlens, states, dy, dS)
    return {"y": y, "S": S, **dict(zip(GRADIENTS, gradients, strict=True))}


def true(inputs, cu_seqlens=None):
    *values, dy, dS = (x.double() for x in inputs)
    leaves = [x.requires_grad_() for x in values]
    y, S = wkv6_reference(*leaves, cu_seqlens)
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
    inputs = make(1, T, 2, 64, dtype)
    assert_close(run(inputs), true(inputs), LIMITS[dtype])


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
    inputs = make(B, T, H, N, dtype)
    assert_close(run(inputs), true(inputs), LIMITS[dtype])


@BOTH
@pytest.mark.parametrize("splits", [1, 2])
def test_plain_kernels_at_every_head_size(emulated, split, dtype, splits):
    split(splits, 1, 1)
    emulated.visualrwkv_cuda_wkv6_plain(1)
    inputs = make(1, 70, 1, 64, dtype)
    found = run(inputs)
    emulated.visualrwkv_cuda_wkv6_plain(0)
    exact = dict.fromkeys(LIMITS[dtype], 1e-5 if dtype is torch.float32 else 2.0**-8)  # rounded once, at the end
    assert_close(found, true(inputs), exact)


@BOTH
@pytest.mark.parametrize("raw", [-20.0, -5.0, 0.0, 1.0, 2.0, 8.0, None])
def test_extreme_decays(way, dtype, raw):
    inputs = make(1, 80, 1, 64, dtype)
    generator = torch.Generator().manual_seed(1)
    inputs[3] = inputs[3].uniform_(-20, 8, generator=generator) if raw is None else torch.full_like(inputs[3], raw)
    found, wanted = run(inputs), true(inputs)
    # Where every decay is almost 0, dw is too: its terms are of the size of k dk times exp(raw w), and so is the error of
    # leaving out decays under exp(-10), or of fp32's rounding.
    terms = inputs[3].double().exp().clamp(max=17) * inputs[1].double() * wanted["dk"]
    error, true_dw = (found.pop("dw").double() - wanted["dw"]).norm(), wanted.pop("dw").norm()
    assert error <= LIMITS[dtype]["dw"] * true_dw + 2e-6 * terms.norm() + 1e-6
    assert_close(found, wanted, LIMITS[dtype])


@BOTH
def test_zeros(way, dtype):
    inputs = make(1, 40, 1, 64, dtype)
    zeros = [torch.zeros_like(x) for x in inputs[:6]]
    found = run([*zeros, *inputs[6:]])
    assert_close(found, true([*zeros, *inputs[6:]]), LIMITS[dtype])
    assert all((found[name] == 0).all() for name in ("y", "S", "dr", "dk", "dv", "dw", "du"))


@BOTH
@pytest.mark.parametrize("raw", [None, 8.0])
def test_large_and_small_values(way, dtype, raw):
    """Every value is a product of inputs: scaled ones give the same relative error, also where decays are strongest."""
    inputs = make(1, 40, 1, 64, dtype)
    if raw is not None:
        inputs[3].fill_(raw)
    for scale in (2.0**10, 2.0**-20):
        scaled = [x if i in (3, 4) else x * scale for i, x in enumerate(inputs)]
        scaled[5] = scaled[5] * scale  # a state is a product of two of them
        found, wanted = run(scaled), true(scaled)
        if raw is not None:
            assert found.pop("dw").norm() <= 1e-2 * (inputs[1].double() * wanted["dk"] * scale).norm()
            wanted.pop("dw")
        assert_close(found, wanted, LIMITS[dtype], floor=0.0)


@BOTH
def test_packed_sequences_stand_alone(way, dtype):
    lengths = (1, 16, 67, 3)
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    inputs = make(1, sum(lengths), 2, 32, dtype, sequences=len(lengths))
    found = run(inputs, torch.tensor(starts, dtype=torch.int32))
    assert_close(found, true(inputs, torch.tensor(starts)), LIMITS[dtype])
    *rows, u, states, dy, dS = inputs
    for i, (a, b) in enumerate(pairwise(starts)):
        alone = run([*(x[:, a:b] for x in rows), u, states[i : i + 1], dy[:, a:b], dS[i : i + 1]])
        alone.pop("du")
        part = {n: x[:, a:b] if n in ("y", "dr", "dk", "dv", "dw") else x[i : i + 1] for n, x in found.items()}
        assert_same(part, alone)


@BOTH
@pytest.mark.parametrize("cut", [1, 40, 64])
def test_two_halves_are_the_whole(way, dtype, cut):
    inputs = make(2, 100, 1, 32, dtype)
    *rows, u, state, dy, dS = inputs
    first, second = [x[:, :cut] for x in rows], [x[:, cut:] for x in rows]
    y_first, middle, states_first = _forward_cuda(*first, u, state, None, True)
    y_second, S, states_second = _forward_cuda(*second, u, middle, None, True)
    late = _backward_cuda(*second, u, middle, None, states_second, dy[:, cut:], dS)
    early = _backward_cuda(*first, u, state, None, states_first, dy[:, :cut], late[5])
    found = {"y": torch.cat((y_first, y_second), 1), "S": S, "du": early[4] + late[4], "dstate": early[5]}
    found.update({name: torch.cat((early[i], late[i]), 1) for i, name in enumerate(GRADIENTS[:4])})
    assert_close(found, true(inputs), LIMITS[dtype])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["r", "k", "v", "w", "state", "dy"])
def test_a_value_that_is_not_finite_stays_in_its_head(emulated, name, value):
    inputs = make(2, 40, 2, 32, torch.bfloat16)
    clean = run(inputs)
    at = [*NAMES, "dy", "dS"].index(name)
    inputs[at] = inputs[at].clone()
    if name == "state":
        inputs[at][0, 1, 3, 5] = value
    else:
        inputs[at][0, 20, 1, 5] = value
    found = run(inputs)
    for n in clean:
        if n != "du":  # a sum over sequences
            assert torch.equal(found[n][1], clean[n][1]), n
    for n in ("y", "dr", "dk", "dv", "dw"):
        assert torch.equal(found[n][0, :, 0], clean[n][0, :, 0]), n
    if name != "w":  # an infinite raw w is a decay of 0 or 1
        assert not all(x.isfinite().all() for x in found.values())


@BOTH
@pytest.mark.parametrize(("N", "splits", "T"), [(64, 1, 100), (64, 2, 20), (64, 4, 20), (48, 1, 20)])
def test_any_order_of_warps_gives_the_same(emulated, split, dtype, N, splits, T):
    split(splits, 1, 1)
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


def test_states_are_kept_only_on_demand(way):
    inputs = make(1, 130, 1, 32, torch.float32)
    *values, dy, dS = inputs
    y, S, states = _forward_cuda(*values, None, False)
    assert states.numel() == 0
    y_kept, S_kept, states = _forward_cuda(*values, None, True)
    assert torch.equal(y, y_kept)
    assert torch.equal(S, S_kept)
    assert torch.equal(states[0], values[5][0])
    for chunk in (1, 2):
        rows = [x[:, : chunk * KEPT].double() for x in values[:4]]
        _, wanted = wkv6_reference(*rows, values[4].double(), values[5].double())
        torch.testing.assert_close(states[chunk].double(), wanted[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="keep=True"):
        _backward_cuda(*values, None, values[5].new_empty(0), dy, dS)


def test_absent_states_are_zeros(way):
    inputs = make(2, 20, 1, 32, torch.float32)
    *values, dy, dS = inputs
    values[5].zero_()
    y, S, states = _forward_cuda(*values, None, True)
    y_null, S_null = torch.empty_like(y), torch.empty_like(S)
    library.launch("wkv6_forward", 0, 1, 2, 20, None, 1, 32, *values[:5], None, y_null, S_null, None)
    assert torch.equal(y, y_null)
    assert torch.equal(S, S_null)
    with_zeros = _backward_cuda(*values, None, states, dy, torch.zeros_like(dS))
    without = _backward_cuda(*values, None, states, dy, None)
    assert all(torch.equal(a, b) for a, b in zip(with_zeros, without, strict=True))


def test_sliced_and_unaligned_inputs(way):
    inputs = make(2, 20, 2, 32, torch.bfloat16)
    wanted = run(inputs)
    sliced = [torch.stack((x, torch.full_like(x, 9)), -1)[..., 0] for x in inputs]
    unaligned = [torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape) for x in inputs]
    assert any(x.data_ptr() % 16 for x in unaligned)
    assert_same(run(sliced), wanted)
    assert_same(run(unaligned), wanted)


@pytest.mark.parametrize("starts", [(0, 500, 20), (-40, 7, 20), (0, 15, 3), (5, 5, 5), (2**40, -(2**40), 20)])
def test_wrong_offsets_stay_inside(way, starts):
    """Not looked at on the host: nothing outside the rows may be read or written."""
    T, H, N, guard = 20, 1, 32, 100
    inputs = make(1, T, H, N, torch.float32, sequences=2)
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
