"""bi-WKV: the reference against numpy, the torch and compiled forms against the reference in float64."""

import numpy as np
import pytest
import torch

from tests.ops.recurrences import assert_close
from visualrwkv.ops import bi_wkv
from visualrwkv.ops.biwkv import bi_wkv_compiled, bi_wkv_reference, bi_wkv_torch

NAMES = ("w", "u", "k", "v")


@pytest.fixture(scope="module")
def compiled(cpu_library):
    """The compiled form, built on first need."""
    return bi_wkv_compiled


@pytest.fixture(params=["torch", "compiled"])
def form(request):
    if request.param == "compiled":
        return request.getfixturevalue("compiled")
    return bi_wkv_torch


def make(B, T, C, decay=(-2.0, 6.0), spread=1.5, seed=0):
    """float64 values that fp32 holds exactly; `decay` is |w| T, over the whole picture."""
    g = torch.Generator().manual_seed(seed)
    w = torch.empty(C).uniform_(*decay, generator=g) / T
    u = torch.randn(C, generator=g)
    k, v = spread * torch.randn(B, T, C, generator=g), torch.randn(B, T, C, generator=g)
    return [x.double() for x in (w, u, k, v)]


def run(form, inputs, dtype=torch.float64):
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    y = form(*leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(y, leaves, dy.to(y.dtype))
    return {"y": y.detach(), **{f"d{n}": x for n, x in zip(NAMES, gradients, strict=True)}}


def test_reference_is_the_equation():
    w, u, k, v = (x.numpy() for x in make(2, 6, 3))
    B, T, C = k.shape
    wanted = np.zeros_like(v)
    for b, t, c in np.ndindex(B, T, C):
        numerator = np.exp(u[c] + k[b, t, c]) * v[b, t, c]
        denominator = np.exp(u[c] + k[b, t, c])
        for i in range(T):
            if i != t:
                weight = np.exp(-(abs(t - i) - 1) * w[c] + k[b, i, c])
                numerator += weight * v[b, i, c]
                denominator += weight
        wanted[b, t, c] = numerator / denominator
    np.testing.assert_allclose(bi_wkv_reference(*map(torch.tensor, (w, u, k, v))), wanted, rtol=1e-12, atol=1e-12)


def test_reference_gradients_are_the_slopes():
    assert torch.autograd.gradcheck(bi_wkv_reference, [x.requires_grad_() for x in make(1, 4, 2)])


@pytest.mark.parametrize(
    ("B", "T", "C"),
    [*[(2, T, 11) for T in (1, 2, 15, 16, 17, 31, 33)], (1, 196, 24), (3, 40, 8), (1, 9, 1), (2, 64, 33)],
)
def test_every_value_and_gradient(form, B, T, C):
    inputs = make(B, T, C)
    assert_close(run(form, inputs, torch.float32), run(bi_wkv_reference, inputs))


def test_bands_of_channels(form):
    """Several bands of several groups, some of whose channels are beyond fp32's range, and one that has a broken number."""
    w, u, k, v = make(2, 50, 300)
    k[0, :, 70] *= 32
    k[1, :, 200:202] *= 32
    found, wanted = run(form, (w, u, k, v), torch.float32), run(bi_wkv_reference, (w, u, k, v))
    assert_close(found, wanted)
    k[0, 49, 100] = torch.nan
    y = form(*(x.float() for x in (w, u, k, v)))
    assert y[0, :, 100].isnan().all()
    others = torch.arange(300) != 100
    torch.testing.assert_close(y[0][:, others], found["y"][0][:, others].to(y), rtol=1e-5, atol=1e-5)


def test_torch_form_is_exact_in_float64():
    inputs = make(2, 50, 5)
    assert_close(run(bi_wkv_torch, inputs), run(bi_wkv_reference, inputs), 1e-13, 1e-12, 1e-13)


def test_a_thousand_tokens(form):
    """Rounding of the decay, raised to long distances, must not show."""
    inputs = make(1, 1000, 4)
    assert_close(run(form, inputs, torch.float32), run(bi_wkv_reference, inputs))


@pytest.mark.parametrize(("decay", "spread"), [((-60, -40), 1.0), ((40, 60), 1.0), ((-3, 3), 40.0), ((90, 100), 15.0)])
def test_extremes(form, decay, spread):
    """Decays of e^60 over the picture and weights far below fp32's range."""
    inputs = make(1, 100, 8, decay, spread)
    assert_close(run(form, inputs, torch.float32), run(bi_wkv_reference, inputs))


def test_shifting_k_changes_nothing(form):
    """710 is where e^k leaves the range of double."""
    w, u, k, v = (x.float() for x in make(1, 20, 8))
    torch.testing.assert_close(form(w, u, k.round() + 710, v), form(w, u, k.round(), v), rtol=1e-6, atol=1e-6)


def test_sliced_inputs(form):
    inputs = make(2, 20, 12)
    leaves = [x.float().requires_grad_() for x in inputs]
    wide = [torch.stack((x, torch.full_like(x, 9)), -1)[..., 0] for x in leaves]
    assert not any(x.is_contiguous() for x in wide)
    gradients = torch.autograd.grad(form(*wide).sum(), leaves)
    doubles = [x.requires_grad_() for x in inputs]
    wanted = torch.autograd.grad(bi_wkv_reference(*doubles).sum(), doubles)
    assert_close(
        dict(zip(("dw", "du", "dk", "dv"), gradients, strict=True)),
        dict(zip(("dw", "du", "dk", "dv"), wanted, strict=True)),
        floor=1e-6,
    )
    torch.testing.assert_close(form(*wide), form(*leaves), rtol=0, atol=0)


def test_pictures_do_not_meet(form):
    w, u, k, v = (x.float() for x in make(3, 20, 12))
    alone = torch.cat([form(w, u, k[b : b + 1], v[b : b + 1]) for b in range(3)])
    torch.testing.assert_close(form(w, u, k, v), alone, rtol=1e-6, atol=1e-6)


def test_nan_is_not_hidden(form):
    w, u, k, v = (x.float() for x in make(1, 5, 9))
    k[0, 2, 3] = torch.nan
    broken = form(w, u, k, v).isnan().any(1)[0]
    assert broken.tolist() == [c == 3 for c in range(9)]


def test_bf16_in_and_out(form):
    inputs = [x.bfloat16() for x in make(2, 30, 10)]
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = form(*leaves)
    assert y.dtype == torch.bfloat16
    gradients = torch.autograd.grad(y.float().square().sum(), leaves)
    assert {x.dtype for x in gradients} == {torch.bfloat16}
    doubles = [x.double().requires_grad_() for x in inputs]
    y_true = bi_wkv_reference(*doubles)
    torch.testing.assert_close(y.double(), y_true, rtol=2.0**-8, atol=1e-6)  # rounded once, at the end
    wanted = torch.autograd.grad(y_true, doubles, 2 * y.double().detach())
    for found, want in zip(gradients, wanted, strict=True):
        assert (found.double() - want).norm() <= 2.0**-7 * want.norm()


def test_compiled_gradients_are_the_same_every_time(compiled):
    inputs = make(4, 200, 40)
    first = run(compiled, inputs, torch.float32)
    for _ in range(3):
        again = run(compiled, inputs, torch.float32)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_opcheck(compiled):
    inputs = [x.float().requires_grad_() for x in make(2, 5, 9)]
    torch.library.opcheck(torch.ops.visualrwkv.bi_wkv_forward, tuple(inputs))
    values = [x.detach() for x in inputs]
    torch.library.opcheck(torch.ops.visualrwkv.bi_wkv_backward, (*values, torch.randn(2, 5, 9)))


def test_torch_compile(compiled):
    def layer(*inputs):
        return compiled(*inputs) * 2

    inputs = make(2, 12, 9)
    fast = torch.compile(layer, fullgraph=True, backend="aot_eager")  # inductor: in test_wkv6
    found, wanted = (run(f, inputs, torch.float32) for f in (fast, layer))
    assert_close(found, {name: x.double() for name, x in wanted.items()}, 1e-6, 1e-6)


def test_public_op_takes_float64():
    inputs = make(1, 6, 5)
    y = bi_wkv(*inputs)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, bi_wkv_reference(*inputs))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda a: a.update(k=a["k"][:, :3]), r"share one shape.*\(2, 3, 8\), \(2, 6, 8\)"),
        (lambda a: a.update(k=a["k"][0], v=a["v"][0]), r"\(B, T, C\).*\(6, 8\)"),
        (lambda a: a.update(k=a["k"][:, :0], v=a["v"][:, :0]), r"without a zero.*\(2, 0, 8\)"),
        (lambda a: a.update(w=a["w"][:7]), r"w, u must be \(C,\) = \(8,\), not \(7,\), \(8,\)"),
        (lambda a: a.update(u=a["u"][:, None]), r"w, u must be \(C,\) = \(8,\), not \(8,\), \(8, 1\)"),
        (lambda a: a.update(u=a["u"].to("meta")), r"one device.*u on meta"),
        (lambda a: a.update(v=a["v"].long()), r"v must be one of .*not torch.int64"),
    ],
)
def test_bad_input_is_named(change, sentence):
    arguments = dict(zip(NAMES, (x.float() for x in make(2, 6, 8)), strict=True))
    change(arguments)
    with pytest.raises(ValueError, match=sentence):
        bi_wkv(**arguments)
