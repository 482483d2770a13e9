"""What surrounds wkv7: the torch form against numpy, the compiled and the CUDA form (emulated) against it in float64."""

import numpy as np
import pytest
import torch

from visualrwkv.ops import gates7, library
from visualrwkv.ops.sequences import aligned

EPS = 64e-5
STEPS = {  # rows, weights, and the step in torch
    "mix_values": (3, 1, lambda x, heads: (gates7.mix_values_torch(*x),)),
    "before_wkv7": (3, 4, lambda x, heads: gates7.before_wkv7_torch(*x, heads)),
    "after_wkv7": (5, 3, lambda x, heads: (gates7.after_wkv7_torch(*x, heads, EPS),)),
}


@pytest.fixture(scope="module")
def compiled(cpu_library):
    """A step in the library, built on first need."""

    def run(name, x, heads):
        rows = STEPS[name][0]
        return gates7._run(name, x[:rows], x[rows:], heads, EPS)

    return run


@pytest.fixture(params=STEPS)
def name(request):
    return request.param


def on_cuda(name, x, heads):
    """A step of the CUDA library, as autograd would call it."""
    C = x[0].shape[1]

    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            ctx.save_for_backward(*inputs)
            found = tuple(torch.empty_like(inputs[0]) for _ in gates7.OUTPUTS[name].split())
            gates7._call_cuda(name, heads, EPS, *map(aligned, inputs), *found)
            return found

        @staticmethod
        def backward(ctx, *slopes):
            *rows, weights = map(aligned, ctx.saved_tensors)
            found = [torch.empty_like(x) for x in rows]
            parts = weights.new_empty(-(-len(rows[0]) // gates7.PIECE), *weights.shape)
            gates7._call_cuda(f"{name}_backward", heads, EPS, *rows, weights, *map(aligned, slopes), *found, parts)
            return *found, parts.sum(0)

    rows = STEPS[name][0]
    return Op.apply(*x[:rows], torch.stack([w.view(C) for w in x[rows:]]))


@pytest.fixture(params=["compiled", "cuda"])
def form(request):
    if request.param == "compiled":
        return request.getfixturevalue("compiled")
    request.getfixturevalue("emulated")
    return on_cuda


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


def check(form, name, T, heads, N):
    inputs = make(name, T, heads, N)
    wanted = outputs_and_gradients(lambda x: STEPS[name][2](x, heads), inputs, torch.float64)
    assert_close(outputs_and_gradients(lambda x: form(name, x, heads), inputs), wanted, 1e-6)


@pytest.mark.parametrize(("T", "heads", "N"), [(1, 1, 32), (63, 3, 32), (64, 2, 64), (65, 1, 128)])
def test_every_value_and_gradient(form, name, T, heads, N):
    check(form, name, T, heads, N)


@pytest.mark.parametrize(("T", "heads", "N"), [(1, 1, 16), (400, 4, 48)])
def test_other_head_sizes_on_the_cpu(compiled, name, T, heads, N):
    check(compiled, name, T, heads, N)


@pytest.mark.parametrize("scale", [0.0, 1e-4, 30.0])
def test_zeros_small_and_large_values(form, name, scale):
    inputs = make(name, 70, 2, 32, scale=scale)
    if name == "before_wkv7":
        inputs[0][3:5] = 0  # keys of length 0
        inputs[0][6] = 3e-14
    wanted = outputs_and_gradients(lambda x: STEPS[name][2](x, 2), inputs, torch.float64)
    found = outputs_and_gradients(lambda x: form(name, x, 2), inputs)
    assert all(x.isfinite().all() for x in found)
    if name == "before_wkv7":  # at a key of length 0 the slope is 1e12 times another's; PyTorch's is as arbitrary
        keep = [t for t in range(70) if scale and t not in (3, 4, 6)]
        found[4], wanted[4] = found[4][keep], wanted[4][keep]
        found[9], wanted[9] = found[9] * 0, wanted[9] * 0
    assert_close(found, wanted, 4e-6)


def test_bf16_is_rounded_once(form, name):
    inputs = make(name, 130, 2, 64, torch.bfloat16)
    found = outputs_and_gradients(lambda x: form(name, x, 2), inputs)
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


def test_the_same_in_every_order_of_warps(emulated, name):
    inputs = make(name, 70, 2, 32)
    found = []
    for order in (0, 1, 2):
        emulated.schedule(order)
        found.append(outputs_and_gradients(lambda x: on_cuda(name, x, 2), inputs))
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes(emulated, name, dtype):
    """Every tensor is read or written once."""
    T, heads, N = 128, 2, 64
    rows = STEPS[name][0]
    inputs = make(name, T, heads, N, dtype)
    stacked, row = torch.stack(inputs[rows:]), T * heads * N * inputs[0].element_size()
    results = [torch.empty_like(inputs[0]) for _ in gates7.OUTPUTS[name].split()]
    emulated.bytes()
    gates7._call_cuda(name, heads, EPS, *inputs[:rows], stacked, *results)
    read_weights = T // 64 * stacked.nbytes * 8  # by each of a block's warps
    assert emulated.bytes() <= row * (rows + len(results)) + read_weights
    gradients, parts = [torch.empty_like(x) for x in inputs[:rows]], torch.empty(T // 64, *stacked.shape)
    gates7._call_cuda(f"{name}_backward", heads, EPS, *inputs[:rows], stacked, *results, *gradients, parts)
    assert emulated.bytes() <= row * (2 * rows + len(results)) + read_weights + parts.nbytes


def test_a_broken_number_stays_in_its_row(form, name):
    inputs = make(name, 9, 2, 32)
    for row in range(STEPS[name][0]):
        broken = [x.clone() for x in inputs]
        broken[row][4, 40] = torch.nan
        reached = torch.stack([x.isnan() for x in form(name, broken, 2)]).any(0)
        assert reached.any(1).nonzero()[:, 0].tolist() == [4]
        assert not reached[:, :32].any()  # nor its head


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(name, dtype):
    inputs = make(name, 300, 4, 64, dtype)
    wanted = outputs_and_gradients(lambda x: STEPS[name][2](x, 4), inputs, torch.float64)
    rows = STEPS[name][0]
    on_gpu = [x.cuda() for x in inputs]
    found = outputs_and_gradients(lambda x: gates7._run(name, tuple(x[:rows]), tuple(x[rows:]), 4, EPS), on_gpu)
    assert_close([x.cpu() for x in found], wanted, 1e-6 if dtype is torch.float32 else 3e-3)
