"""WKV-6: the reference against numpy, the torch and compiled forms against the reference in float64."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from tests.ops.recurrences import assert_close
from visualrwkv.ops import wkv6, wkv6_step
from visualrwkv.ops.wkv6 import bidirectional_wkv6, wkv6_compiled, wkv6_reference, wkv6_torch

NAMES = ("r", "k", "v", "w", "u", "state")
FORMS = {"torch": wkv6_torch, "compiled": wkv6_compiled}


@pytest.fixture(scope="module")
def compiled(cpu_library):
    """The compiled form, built on first need."""
    return wkv6_compiled


@pytest.fixture(params=["torch", "compiled"])
def form(request):
    if request.param == "compiled":
        return request.getfixturevalue("compiled")
    return wkv6_torch


def make(B, T, H, N, sequences=None, seed=0):
    """float64 values that fp32 holds exactly, so that both precisions see the same problem."""
    g = torch.Generator().manual_seed(seed)
    r, k, v, w = (torch.randn(B, T, H, N, generator=g) for _ in range(4))
    u, state = torch.randn(H, N, generator=g), torch.randn(sequences or B, H, N, N, generator=g)
    return [x.double() for x in (r, k, v, 1.5 * w - 2, u, state)]


def run(form, inputs, cu_seqlens=None, dtype=torch.float64, seed=1):
    """Output, final state, and the gradient of every input through both."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    y, S = form(*leaves, cu_seqlens)
    g = torch.Generator().manual_seed(seed)
    dy, dS = torch.randn(y.shape, generator=g), torch.randn(S.shape, generator=g)
    gradients = torch.autograd.grad((y, S), leaves, (dy.to(y.dtype), dS.to(S.dtype)))
    return {"y": y.detach(), "S": S.detach(), **{f"d{n}": x for n, x in zip(NAMES, gradients, strict=True)}}


def numpy_wkv6(r, k, v, w, u, state):
    """y_t[j] = sum_i r_t[i] (S[i, j] + u[i] k_t[i] v_t[j]); S[i, j] = exp(-exp(w_t[i])) S[i, j] + k_t[i] v_t[j]."""
    B, T, H, N = r.shape
    y, S = np.zeros((B, T, H, N)), state.copy()
    for b, t, h in np.ndindex(B, T, H):
        kv = np.outer(k[b, t, h], v[b, t, h])
        y[b, t, h] = r[b, t, h] @ (S[b, h] + np.diag(u[h]) @ kv)
        S[b, h] = np.diag(np.exp(-np.exp(w[b, t, h]))) @ S[b, h] + kv
    return y, S


def test_reference_is_the_equation():
    inputs = make(2, 7, 3, 5)
    y, S = wkv6_reference(*inputs)
    y_numpy, S_numpy = numpy_wkv6(*(x.numpy() for x in inputs))
    np.testing.assert_allclose(y, y_numpy, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(S, S_numpy, rtol=1e-12, atol=1e-12)


def test_reference_gradients_are_the_slopes():
    leaves = [x.requires_grad_() for x in make(1, 3, 1, 2)]
    assert torch.autograd.gradcheck(wkv6_reference, leaves)


@pytest.mark.parametrize(
    ("B", "T", "H", "N"),
    [
        *[(1, T, 2, 32) for T in (1, 15, 16, 17, 31, 33, 64, 65)],
        (1, 196, 2, 16),
        (2, 33, 3, 64),
        (1, 66, 2, 48),  # no size of its own in the library
        (1, 65, 1, 128),
    ],
)
def test_every_value_and_gradient(form, B, T, H, N):
    inputs = make(B, T, H, N)
    assert_close(run(form, inputs, dtype=torch.float32), run(wkv6_reference, inputs))


def test_torch_form_is_exact_in_float64():
    inputs = make(2, 77, 2, 6)  # any head size
    assert_close(run(wkv6_torch, inputs), run(wkv6_reference, inputs), 1e-13, 1e-13, 1e-13)


def test_no_state_is_a_state_of_zeros(form):
    inputs = [x.float() for x in make(2, 5, 2, 16)]
    inputs[5].zero_()
    for found, want in zip(form(*inputs[:5]), form(*inputs), strict=True):
        assert torch.equal(found, want)
    packed = [x[:1] for x in inputs[:4]] + inputs[4:5]
    assert form(*packed, None, torch.tensor([0, 2, 5]))[1].shape == (2, 2, 16, 16)


def test_sliced_inputs(form):
    """Rows, heads and channels that do not lie side by side in memory, and an expanded incoming gradient."""
    inputs = make(2, 9, 3, 32)
    leaves = [x.float().requires_grad_() for x in inputs]
    wide = [torch.stack((x, torch.full_like(x, 9)), -1).transpose(0, 1)[..., 0].transpose(0, 1) for x in leaves]
    assert not any(x.is_contiguous() for x in wide)
    y, S = form(*wide)
    gradients = torch.autograd.grad(y.sum() + S.sum(), leaves)
    doubles = [x.requires_grad_() for x in inputs]
    y_true, S_true = wkv6_reference(*doubles)
    wanted = torch.autograd.grad(y_true.sum() + S_true.sum(), doubles)
    assert_close(
        {"y": y, "S": S, **dict(zip(("dr", "dk", "dv", "dw", "du", "dstate"), gradients, strict=True))},
        {"y": y_true, "S": S_true, **dict(zip(("dr", "dk", "dv", "dw", "du", "dstate"), wanted, strict=True))},
    )


@pytest.mark.parametrize("cut", [1, 40, 99])
def test_two_halves_are_the_whole(form, cut):
    *rows, u, state = make(2, 100, 2, 16)

    def halves(*leaves):
        *rows, u, state, _ = leaves
        first, state = form(*(x[:, :cut] for x in rows), u, state)
        second, state = form(*(x[:, cut:] for x in rows), u, state)
        return torch.cat((first, second), 1), state

    inputs = [*rows, u, state]
    assert_close(run(halves, inputs, dtype=torch.float32), run(wkv6_reference, inputs))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_sequences_stand_alone(form, dtype):
    lengths = (1, 16, 70, 3, 33)
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=dtype)
    inputs = make(1, sum(lengths), 2, 32, sequences=len(lengths))

    def apart(r, k, v, w, u, state, cu_seqlens):
        starts = cu_seqlens.tolist()
        parts = [
            wkv6_reference(r[:, a:b], k[:, a:b], v[:, a:b], w[:, a:b], u, state[i : i + 1])
            for i, (a, b) in enumerate(pairwise(starts))
        ]
        return torch.cat([y for y, _ in parts], 1), torch.cat([S for _, S in parts])

    wanted = run(apart, inputs, cu_seqlens)
    assert_close(run(form, inputs, cu_seqlens, torch.float32), wanted)
    assert_close(run(wkv6_reference, inputs, cu_seqlens), wanted, 1e-14, 1e-14)


@pytest.mark.parametrize("raw", [-20.0, -5.0, 2.0, 3.0, 8.0, None])
def test_extreme_decays(form, raw):
    inputs = make(1, 80, 1, 32)
    inputs[3] = inputs[3].uniform_(-20, 8).float().double() if raw is None else torch.full_like(inputs[3], raw)
    found, wanted = run(form, inputs, dtype=torch.float32), run(wkv6_reference, inputs)
    if form is wkv6_compiled:
        # The telescoped gradient of w is a difference of terms like g k dk, g = -exp(w), and carries their rounding
        # error: where the decay is almost 0 the difference is too. Past g = -17 the library says 0.
        terms = inputs[3].exp().clamp(max=17) * inputs[1] * wanted["dk"]
        true = wanted.pop("dw")
        assert (found.pop("dw").double() - true).norm() <= 1e-5 * true.norm() + 1e-6 * terms.norm()
    assert_close(found, wanted)


def test_raw_decays_far_out_stay_finite(form):
    inputs = make(1, 20, 1, 16)
    inputs[3][:, ::2] = 100.0  # exp(100) is infinite in fp32, the decay exactly 0
    inputs[3][:, 1::2] = -200.0  # the decay is exactly 1
    found = run(form, inputs, dtype=torch.float32)
    assert all(x.isfinite().all() for x in found.values())
    y, S = wkv6_reference(*inputs)
    assert_close({"y": found["y"], "S": found["S"]}, {"y": y, "S": S})


def test_zeros(form):
    inputs = [torch.zeros_like(x) for x in make(1, 70, 1, 16)]
    found = run(form, inputs, dtype=torch.float32)
    assert_close(found, run(wkv6_reference, inputs), floor=1e-12)
    assert all((x == 0).all() for name, x in found.items() if name != "dstate")  # the state decays, and is all there is


def test_nan_is_not_hidden(form):
    r, *rest = (x.float() for x in make(1, 3, 1, 16))
    r[0, 1, 0, 5] = torch.nan
    y, _ = form(r, *rest)
    assert y[0, 1].isnan().all()
    assert y[0, [0, 2]].isfinite().all()


def test_bf16_in_and_out(form):
    inputs = [x.bfloat16() for x in make(2, 140, 2, 16)[:5]]  # several tiles
    leaves = [x.clone().requires_grad_() for x in inputs]
    y, S = form(*leaves)
    assert (y.dtype, S.dtype) == (torch.bfloat16, torch.float32)
    gradients = torch.autograd.grad(y.float().sum() + S.sum(), leaves)
    assert {x.dtype for x in gradients} == {torch.bfloat16}
    doubles = [x.double().requires_grad_() for x in inputs]
    y_true, S_true = wkv6_reference(*doubles)
    wanted = torch.autograd.grad(y_true.sum() + S_true.sum(), doubles)
    rounding = 2.0**-8
    torch.testing.assert_close(y.double(), y_true, rtol=rounding, atol=1e-5)  # rounded once, at the end
    torch.testing.assert_close(S.double(), S_true, rtol=1e-5, atol=1e-5)
    for found, want in zip(gradients, wanted, strict=True):
        assert (found.double() - want).norm() <= rounding * want.norm()


def test_autocast_does_not_lower_the_precision(form):
    inputs = make(1, 40, 1, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, S = form(*(x.float() for x in inputs))
    y_true, S_true = wkv6_reference(*inputs)
    assert_close({"y": y, "S": S}, {"y": y_true, "S": S_true})


def test_compiled_gradients_are_the_same_every_time(compiled):
    inputs = make(1, 300, 2, 32, sequences=3)
    cu_seqlens = torch.tensor([0, 100, 180, 300])
    first = run(compiled, inputs, cu_seqlens, torch.float32)
    for _ in range(3):
        again = run(compiled, inputs, cu_seqlens, torch.float32)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("keep", [False, True])
def test_opcheck(compiled, keep):
    inputs = [x.float().requires_grad_() for x in make(1, 5, 2, 16, sequences=2)]
    torch.library.opcheck(torch.ops.visualrwkv.wkv6_forward, (*inputs, torch.tensor([0, 2, 5]), keep))
    torch.library.opcheck(torch.ops.visualrwkv.wkv6_forward, (*inputs[:5], inputs[5][:1], None, keep))
    values = [x.detach() for x in inputs]
    dy, dS, states = torch.randn_like(values[0]), torch.randn_like(values[5]), values[5].new_empty(0)
    for dS_or_none in (dS, None):
        arguments = (*values, torch.tensor([0, 2, 5]), states, dy, dS_or_none)
        torch.library.opcheck(torch.ops.visualrwkv.wkv6_backward, arguments)


def test_gradient_through_one_output(form):
    """The output alone, or the final state alone: the other one's gradient is then not zeros but absent."""
    inputs = make(2, 20, 2, 16)
    for output in (0, 1):
        gradients = []
        for dtype, function in ((torch.float32, form), (torch.float64, wkv6_reference)):
            leaves = [x.to(dtype).requires_grad_() for x in inputs]
            loss = function(*leaves)[output].square().sum()
            gradients.append(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))
        for name, found, want in zip(NAMES, *gradients, strict=True):
            assert_close({f"d{name}": found}, {f"d{name}": want})


def test_torch_compile(compiled):
    inputs = make(1, 12, 2, 16, sequences=2)
    cu_seqlens = torch.tensor([0, 5, 12])
    wanted = {name: x.double() for name, x in run(compiled, inputs, cu_seqlens, torch.float32).items()}
    graph = torch.compile(lambda *x: compiled(*x), fullgraph=True, backend="aot_eager")
    assert_close(run(graph, inputs, cu_seqlens, torch.float32), wanted, 1e-6, 1e-6)
    values = [x.float() for x in inputs]
    inductor = torch.compile(lambda *x: compiled(*x), fullgraph=True)
    with torch.no_grad():
        y, S = inductor(*values, cu_seqlens)
        assert_close({"y": y, "S": S}, {"y": wanted["y"], "S": wanted["S"]}, 1e-6)
        with pytest.raises(ValueError, match="rise from 0"):  # the values are read when the graph runs
            inductor(*values, torch.tensor([0, 7, 11]))


def test_bidirectional():
    """Against the sum over all pairs of tokens."""
    r, k, v, w, u, _ = make(2, 9, 2, 5)
    B, T, H, N = r.shape
    wanted = torch.zeros(B, T, H, N, dtype=torch.float64)
    for t, i in np.ndindex(T, T):
        between = slice(min(t, i) + 1, max(t, i))
        decay = torch.exp(-torch.exp(w[:, between]).sum(1)) if i != t else u
        wanted[:, t] += (r[:, t] * decay * k[:, i]).sum(-1, keepdim=True) * v[:, i]
    torch.testing.assert_close(bidirectional_wkv6(r, k, v, w, u), wanted, rtol=1e-12, atol=1e-12)


def test_public_op_takes_float64_and_any_head_size():
    inputs = make(1, 6, 1, 5)
    y, S = wkv6(*inputs)
    assert (y.dtype, S.dtype) == (torch.float64, torch.float64)
    torch.testing.assert_close(y, wkv6_reference(*inputs)[0])
    y, _ = wkv6(*(x.float() for x in inputs))
    torch.testing.assert_close(y.double(), wkv6_reference(*inputs)[0], rtol=1e-5, atol=1e-5)


def test_step_is_the_op_at_one_step():
    *rows, u, state = (x.float() for x in make(2, 3, 2, 16))
    y, S = wkv6(*rows, u, state)
    before = state.clone()
    for t in range(3):
        y_t, new = wkv6_step(*(x[:, t] for x in rows), u, state)
        assert torch.equal(state, before), "the old state is left as it was"
        torch.testing.assert_close(y_t, y[:, t])
        state, before = new, new.clone()
    torch.testing.assert_close(state, S)
    with pytest.raises(ValueError, match=r"\(B, H, N\)"):
        wkv6_step(*rows, u, state)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda a: a.update(k=a["k"][:, :3]), r"share one shape.*\(1, 3, 2, 16\)"),
        (lambda a: a.update({n: a[n][0] for n in "rkvw"}), r"\(B, T, H, N\)"),
        (lambda a: a.update({n: a[n][:, :0] for n in "rkvw"}), r"without a zero.*\(1, 0, 2, 16\)"),
        (lambda a: a.update(u=a["u"][:1]), r"u must be .*\(2, 16\), not \(1, 16\)"),
        (lambda a: a.update(state=a["state"][:, :1]), r"state must be \(1, 2, 16, 16\).*not \(1, 1, 16, 16\)"),
        (lambda a: a.update(state=a["state"].bfloat16()), r"state must be torch.float32.*bfloat16"),
        (lambda a: a.update(v=a["v"].long()), r"v must be one of .*not torch.int64"),
        (lambda a: a.update(u=a["u"].to("meta")), r"one device.*u on meta"),
        (lambda a: a.update(cu_seqlens=torch.tensor([1, 6])), r"rise from 0 to T = 6, not \[1, 6\]"),
        (lambda a: a.update(cu_seqlens=torch.tensor([0, 5])), r"rise from 0 to T = 6, not \[0, 5\]"),
        (lambda a: a.update(cu_seqlens=torch.tensor([0, 4, 2, 6]), state=None), r"not \[0, 4, 2, 6\]"),
        (lambda a: a.update(cu_seqlens=torch.tensor([0, 3, 3, 6]), state=None), r"not \[0, 3, 3, 6\]"),
        (lambda a: a.update(cu_seqlens=torch.tensor([0.0, 6.0])), r"int32 or int64.*float32"),
        (lambda a: a.update(cu_seqlens=torch.tensor([0, 2, 6])), r"state must be \(2, 2, 16, 16\)"),
        (
            lambda a: a.update({n: a[n].repeat(2, 1, 1, 1) for n in "rkvw"}, cu_seqlens=torch.tensor([0, 6])),
            r"beside B = 2",
        ),
    ],
)
def test_bad_input_is_named(change, sentence):
    arguments = dict(zip(NAMES, (x.float() for x in make(1, 6, 2, 16)), strict=True))
    change(arguments)
    with pytest.raises(ValueError, match=sentence):
        wkv6(**arguments)
