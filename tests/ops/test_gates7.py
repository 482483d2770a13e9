"""What surrounds wkv7: the torch form against numpy, the compiled form against it in float64."""

import shutil

import numpy as np
import pytest
import torch

from visualrwkv.ops import gates7, library
from visualrwkv.ops.build import build

EPS = 64e-5
STEPS = {  # rows, weights, and the step in torch
    "mix_values": (3, 1, lambda x, heads: (gates7.mix_values_torch(*x),)),
    "before_wkv7": (3, 4, lambda x, heads: gates7.before_wkv7_torch(*x, heads)),
    "after_wkv7": (5, 3, lambda x, heads: (gates7.after_wkv7_torch(*x, heads, EPS),)),
}


@pytest.fixture(scope="module")
def compiled():
    """A step in the library, built on first need."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to build the kernels with")
    if not library.library_path().exists():
        build()

    def run(name, x, heads):
        rows = STEPS[name][0]
        return gates7._run(name, x[:rows], x[rows:], heads, EPS)

    return run


@pytest.fixture(params=STEPS)
def name(request):
    return request.param


def make(name, T, heads, N, dtype=torch.float32, scale=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    rows, weights, _ = STEPS[name]
    wide = [scale * torch.randn(T, heads * N, generator=g) for _ in range(rows)]
    return [x.to(dtype) for x in wide] + [torch.randn(heads * N, generator=g) for _ in range(weights)]


def outputs_and_gradients(step, inputs, dtype=None):
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    found = step(leaves)
    g = torch.Generator().manual_seed(1)
    slopes = [torch.randn(y.shape, generator=g).to(inputs[0].dtype).to(y) for y in found]
    return [y.detach() for y in found] + list(torch.autograd.grad(found, leaves, slopes))


def assert_close(found, wanted, limit):
    assert len(found) == len(wanted)
    for i, (have, want) in enumerate(zip(found, wanted)):
        error = (have.double() - want.double()).norm()
        assert have.shape == want.shape
        assert error <= limit * want.double().norm() + 1e-12, f"{i}: {error / want.double().norm():.1e}"


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_torch_form_is_the_equations():
    T, heads, N = 5, 2, 3
    v, share, first, share0 = (x.double().numpy() for x in make("mix_values", T, heads, N))
    found = gates7.mix_values_torch(*map(torch.tensor, (v, share, first, share0)))
    np.testing.assert_allclose(found, v + (first - v) * sigmoid(share + share0), rtol=1e-12)

    k, decay, rate, decay0, rate0, removal, replacement = inputs = [
        x.double().numpy() for x in make("before_wkv7", T, heads, N)
    ]
    w, key, a, b = gates7.before_wkv7_torch(*map(torch.tensor, inputs), heads)
    np.testing.assert_allclose(np.exp(-np.exp(w)), np.exp(-np.exp(-0.5) * sigmoid(decay + decay0)), rtol=1e-12)
    learned = sigmoid(rate + rate0)
    np.testing.assert_allclose(key, k * (1 + (learned - 1) * replacement), rtol=1e-12)
    kk = (k * removal).reshape(T, heads, N)
    kk = (kk / np.linalg.norm(kk, axis=-1, keepdims=True)).reshape(T, -1)
    np.testing.assert_allclose(a, -kk, rtol=1e-12)
    np.testing.assert_allclose(b, kk * learned, rtol=1e-12)

    y, r, key, value, gate, bonus, scale, shift = inputs = [x.double().numpy() for x in make("after_wkv7", T, heads, N)]
    out = gates7.after_wkv7_torch(*map(torch.tensor, inputs), heads, EPS)
    for t, h in np.ndindex(T, heads):
        c = slice(h * N, (h + 1) * N)
        normal = (y[t, c] - y[t, c].mean()) / np.sqrt(y[t, c].var() + EPS)
        own = (r[t, c] * key[t, c] * bonus[c]).sum() * value[t, c]
        np.testing.assert_allclose(out[t, c], (normal * scale[c] + shift[c] + own) * gate[t, c], rtol=1e-11)


@pytest.mark.parametrize(("T", "heads", "N"), [(1, 1, 16), (63, 3, 32), (64, 2, 64), (65, 1, 128), (400, 4, 48)])
def test_every_value_and_gradient(compiled, name, T, heads, N):
    inputs = make(name, T, heads, N)
    wanted = outputs_and_gradients(lambda x: STEPS[name][2](x, heads), inputs, torch.float64)
    assert_close(outputs_and_gradients(lambda x: compiled(name, x, heads), inputs), wanted, 1e-6)


@pytest.mark.parametrize("scale", [0.0, 1e-4, 30.0])
def test_zeros_small_and_large_values(compiled, name, scale):
    inputs = make(name, 70, 2, 32, scale=scale)
    if name == "before_wkv7":
        inputs[0][3:5] = 0  # keys of length 0
        inputs[0][6] = 3e-14
    wanted = outputs_and_gradients(lambda x: STEPS[name][2](x, 2), inputs, torch.float64)
    found = outputs_and_gradients(lambda x: compiled(name, x, 2), inputs)
    assert all(x.isfinite().all() for x in found)
    if name == "before_wkv7":  # at a key of length 0 the slope is 1e12 times another's; PyTorch's is as arbitrary
        keep = [t for t in range(70) if scale and t not in (3, 4, 6)]
        found[4], wanted[4] = found[4][keep], wanted[4][keep]
        found[9], wanted[9] = found[9] * 0, wanted[9] * 0
    assert_close(found, wanted, 4e-6)


def test_bf16_is_rounded_once(compiled, name):
    inputs = make(name, 130, 2, 64, torch.bfloat16)
    found = outputs_and_gradients(lambda x: compiled(name, x, 2), inputs)
    assert {x.dtype for x in found[: -STEPS[name][1]]} == {torch.bfloat16}
    wanted = outputs_and_gradients(lambda x: STEPS[name][2](x, 2), inputs, torch.float64)
    assert_close(found, wanted, 3e-3)


def test_slices_and_mixed_dtypes(compiled, name):
    inputs = make(name, 20, 2, 16)
    wanted = outputs_and_gradients(lambda x: STEPS[name][2](x, 2), inputs, torch.float64)
    wide = [torch.stack((x, torch.full_like(x, 9)), -1)[..., 0] for x in inputs]
    assert not any(x.is_contiguous() for x in wide)
    assert_close(outputs_and_gradients(lambda x: compiled(name, x, 2), wide), wanted, 1e-6)
    rows = STEPS[name][0]
    mixed = [x.bfloat16() if i == 1 else x for i, x in enumerate(inputs)]
    exact = [x.float() for x in mixed]
    wanted = STEPS[name][2](exact, 2)
    assert_close(gates7._run(name, tuple(mixed[:rows]), tuple(mixed[rows:]), 2, EPS), wanted, 1e-6)


def test_the_same_on_any_number_of_threads(compiled, name):
    inputs = make(name, 700, 2, 32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = outputs_and_gradients(lambda x: compiled(name, x, 2), inputs)
    finally:
        torch.set_num_threads(before)
    again = outputs_and_gradients(lambda x: compiled(name, x, 2), inputs)
    assert all(torch.equal(x, y) for x, y in zip(one, again))


def test_a_broken_number_stays_in_its_row(compiled, name):
    inputs = make(name, 9, 2, 16)
    for row in range(STEPS[name][0]):
        broken = [x.clone() for x in inputs]
        broken[row][4, 20] = torch.nan
        reached = torch.stack([x.isnan() for x in compiled(name, broken, 2)]).any(0)
        assert reached.any(1).nonzero()[:, 0].tolist() == [4]
        assert not reached[:, :16].any()  # nor its head


def test_registered_as_pytorch_wants(compiled, name):
    rows, _, _ = STEPS[name]
    inputs = [x.requires_grad_() for x in make(name, 9, 2, 16)]
    op = getattr(torch.ops.visualrwkv, name).default
    torch.library.opcheck(op, (*inputs[:rows], torch.stack(inputs[rows:]).detach().requires_grad_(), 2, EPS))


def test_doors_choose_the_form(monkeypatch, compiled):
    """The library where it can, torch for float64, heads of other sizes, and without a library."""
    chosen = []
    monkeypatch.setattr(gates7, "_run", lambda name, *_: chosen.append(name) or (None,))

    def all_doors(dtype=torch.float32, N=16):
        doors = {"mix_values": gates7.mix_values, "before_wkv7": gates7.before_wkv7, "after_wkv7": gates7.after_wkv7}
        for name, door in doors.items():
            door(*(x.to(dtype) for x in make(name, 3, 2, N)), 2, *([EPS] if name == "after_wkv7" else []))

    monkeypatch.setattr(library, "COMPILED", True)
    all_doors()
    assert chosen == list(STEPS)
    all_doors(dtype=torch.float64)
    all_doors(N=8)
    monkeypatch.setattr(library, "COMPILED", False)
    all_doors()
    assert chosen == list(STEPS)
