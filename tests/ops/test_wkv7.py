"""WKV-7: the reference against numpy, the torch and compiled forms against the reference in float64."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from tests.ops.recurrences import assert_close
from visualrwkv.ops import wkv7, wkv7_step
from visualrwkv.ops.wkv7 import wkv7_compiled, wkv7_reference, wkv7_torch

NAMES = ("r", "w", "k", "v", "a", "b", "state")


@pytest.fixture(scope="module")
def compiled(cpu_library):
    """The compiled form, built on first need."""
    return wkv7_compiled


@pytest.fixture(params=["torch", "compiled"])
def form(request):
    if request.param == "compiled":
        return request.getfixturevalue("compiled")
    return wkv7_torch


def make(B, T, H, N, sequences=None, seed=0):
    """float64 values that fp32 holds exactly, so that both precisions see the same problem. As in the model a is -kk
    and b is kk times a rate in (0, 1), with kk of length 1.
    """
    g = torch.Generator().manual_seed(seed)
    r, w, k, v, kk, rate = (torch.randn(B, T, H, N, generator=g) for _ in range(6))
    kk = torch.nn.functional.normalize(kk, dim=-1)
    state = torch.randn(sequences or B, H, N, N, generator=g)
    return [x.double() for x in (r, 1.5 * w - 2, k, v, -kk, kk * torch.sigmoid(rate), state)]


def run(form, inputs, cu_seqlens=None, dtype=torch.float64, seed=1):
    """Output, final state, and the gradient of every input through both."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    y, S = form(*leaves, cu_seqlens)
    g = torch.Generator().manual_seed(seed)
    dy, dS = torch.randn(y.shape, generator=g), torch.randn(S.shape, generator=g)
    gradients = torch.autograd.grad((y, S), leaves, (dy.to(y.dtype), dS.to(S.dtype)))
    return {"y": y.detach(), "S": S.detach(), **{f"d{n}": x for n, x in zip(NAMES, gradients, strict=True)}}


def numpy_wkv7(r, w, k, v, a, b, state):
    """S = S (diag(exp(-exp(w_t))) + a_t b_t^T) + v_t k_t^T, then y_t = S r_t."""
    B, T, H, N = r.shape
    y, S = np.zeros((B, T, H, N)), state.copy()
    for n, t, h in np.ndindex(B, T, H):
        transition = np.diag(np.exp(-np.exp(w[n, t, h]))) + np.outer(a[n, t, h], b[n, t, h])
        S[n, h] = S[n, h] @ transition + np.outer(v[n, t, h], k[n, t, h])
        y[n, t, h] = S[n, h] @ r[n, t, h]
    return y, S


def test_reference_is_the_equation():
    inputs = make(2, 7, 3, 5)
    y, S = wkv7_reference(*inputs)
    y_numpy, S_numpy = numpy_wkv7(*(x.numpy() for x in inputs))
    np.testing.assert_allclose(y, y_numpy, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(S, S_numpy, rtol=1e-12, atol=1e-12)


def test_reference_gradients_are_the_slopes():
    leaves = [x.requires_grad_() for x in make(1, 3, 1, 2)]
    assert torch.autograd.gradcheck(wkv7_reference, leaves)


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
    assert_close(run(form, inputs, dtype=torch.float32), run(wkv7_reference, inputs))


def test_torch_form_is_exact_in_float64():
    inputs = make(2, 77, 2, 6)  # any head size
    assert_close(run(wkv7_torch, inputs), run(wkv7_reference, inputs), 1e-13, 1e-13, 1e-13)


def test_no_state_is_a_state_of_zeros(form):
    inputs = [x.float() for x in make(2, 5, 2, 16)]
    inputs[6].zero_()
    for found, want in zip(form(*inputs[:6]), form(*inputs), strict=True):
        assert torch.equal(found, want)
    assert form(*(x[:1] for x in inputs[:6]), None, torch.tensor([0, 2, 5]))[1].shape == (2, 2, 16, 16)


def test_sliced_inputs(form):
    """Rows, heads and channels that do not lie side by side in memory, and an expanded incoming gradient."""
    inputs = make(2, 9, 3, 32)
    leaves = [x.float().requires_grad_() for x in inputs]
    wide = [torch.stack((x, torch.full_like(x, 9)), -1).transpose(0, 1)[..., 0].transpose(0, 1) for x in leaves]
    assert not any(x.is_contiguous() for x in wide)
    y, S = form(*wide)
    gradients = torch.autograd.grad(y.sum() + S.sum(), leaves)
    doubles = [x.requires_grad_() for x in inputs]
    y_true, S_true = wkv7_reference(*doubles)
    wanted = torch.autograd.grad(y_true.sum() + S_true.sum(), doubles)
    assert_close(
        {"y": y, "S": S, **{f"d{n}": x for n, x in zip(NAMES, gradients, strict=True)}},
        {"y": y_true, "S": S_true, **{f"d{n}": x for n, x in zip(NAMES, wanted, strict=True)}},
    )


def test_gradient_through_one_output(form):
    """The output alone, or the final state alone: the other one's gradient is then not zeros but absent."""
    inputs = make(2, 20, 2, 16)
    for output in (0, 1):
        gradients = []
        for dtype, function in ((torch.float32, form), (torch.float64, wkv7_reference)):
            leaves = [x.to(dtype).requires_grad_() for x in inputs]
            loss = function(*leaves)[output].square().sum()
            gradients.append(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))
        for name, found, want in zip(NAMES, *gradients, strict=True):
            assert_close({f"d{name}": found}, {f"d{name}": want})


@pytest.mark.parametrize("cut", [1, 40, 99])
def test_two_halves_are_the_whole(form, cut):
    inputs = make(2, 100, 2, 16)

    def halves(*leaves):
        *rows, state, _ = leaves
        first, state = form(*(x[:, :cut] for x in rows), state)
        second, state = form(*(x[:, cut:] for x in rows), state)
        return torch.cat((first, second), 1), state

    assert_close(run(halves, inputs, dtype=torch.float32), run(wkv7_reference, inputs))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_sequences_stand_alone(form, dtype):
    lengths = (1, 16, 70, 3, 33)
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=dtype)
    inputs = make(1, sum(lengths), 2, 32, sequences=len(lengths))

    def apart(*leaves):
        *rows, state, cu_seqlens = leaves
        parts = [
            wkv7_reference(*(x[:, start:end] for x in rows), state=state[i : i + 1])
            for i, (start, end) in enumerate(pairwise(cu_seqlens.tolist()))
        ]
        return torch.cat([y for y, _ in parts], 1), torch.cat([S for _, S in parts])

    wanted = run(apart, inputs, cu_seqlens)
    assert_close(run(form, inputs, cu_seqlens, torch.float32), wanted)
    assert_close(run(wkv7_reference, inputs, cu_seqlens), wanted, 1e-14, 1e-14)


@pytest.mark.parametrize("raw", [-20.0, -5.0, 2.0, 3.0, 8.0, None])
def test_extreme_decays(form, raw):
    inputs = make(1, 80, 1, 32)
    inputs[1] = inputs[1].uniform_(-20, 8).float().double() if raw is None else torch.full_like(inputs[1], raw)
    # Far out dw has no size of its own to compare with: at raw 3 it is a billionth of the other gradients.
    assert_close(run(form, inputs, dtype=torch.float32), run(wkv7_reference, inputs), floor=0 if raw != 8 else 1e-30)


def test_raw_decays_far_out_stay_finite(form):
    inputs = make(1, 20, 1, 16)
    inputs[1][:, ::2] = 100.0  # exp(100) is infinite in fp32, the decay exactly 0
    inputs[1][:, 1::2] = -200.0  # the decay is exactly 1
    found = run(form, inputs, dtype=torch.float32)
    assert all(x.isfinite().all() for x in found.values())
    y, S = wkv7_reference(*inputs)
    assert_close({"y": found["y"], "S": found["S"]}, {"y": y, "S": S})


@pytest.mark.parametrize("N", [16, 64])
def test_any_a_and_b(form, N):
    """Neither of length 1 nor opposite, so that the state grows (here to thousands of times its size)."""
    inputs = make(1, 70, 2, N)
    g = torch.Generator().manual_seed(2)
    for i in (4, 5):
        inputs[i] = (torch.randn(inputs[i].shape, generator=g) * (0.8 / N) ** 0.25).double()
    wanted = run(wkv7_reference, inputs)
    assert wanted["S"].norm() > 1e3 * inputs[6].norm()
    assert_close(run(form, inputs, dtype=torch.float32), wanted, floor=0)


def test_large_values(form):
    inputs = make(1, 70, 1, 32)
    for i in (0, 2, 3, 6):
        inputs[i] = inputs[i] * 2.0**20
    assert_close(run(form, inputs, dtype=torch.float32), run(wkv7_reference, inputs))


def test_zeros(form):
    inputs = [torch.zeros_like(x) for x in make(1, 70, 1, 16)]
    found = run(form, inputs, dtype=torch.float32)
    assert_close(found, run(wkv7_reference, inputs), floor=1e-12)
    assert all((x == 0).all() for name, x in found.items() if name != "dstate")  # the state decays, and is all there is


def test_nan_is_not_hidden_and_stays_in_its_head(form):
    r, *rest = (x.float() for x in make(2, 40, 3, 16))
    r[1, 20, 2, 5] = torch.nan
    found = run(form, [r, *rest], dtype=torch.float32)
    assert found["y"][1, 20, 2].isnan().all()
    assert found["y"][1, :, 2].isnan().any(-1).sum() == 1, "r is only read at its own step"
    rest[3][1, 20, 2] = torch.nan  # a: everything later
    found = run(form, [r, *rest], dtype=torch.float32)
    assert found["y"][1, 20:, 2].isnan().all()
    for name, x in found.items():
        rows = x.transpose(1, 2) if x.shape[1] == 40 else x  # heads second
        assert rows[0].isfinite().all(), name
        assert rows[1, :2].isfinite().all(), name


def test_bf16_in_and_out(form):
    inputs = [x.bfloat16() for x in make(2, 40, 2, 16)[:6]]
    leaves = [x.clone().requires_grad_() for x in inputs]
    y, S = form(*leaves)
    assert (y.dtype, S.dtype) == (torch.bfloat16, torch.float32)
    gradients = torch.autograd.grad(y.float().sum() + S.sum(), leaves)
    assert {x.dtype for x in gradients} == {torch.bfloat16}
    doubles = [x.double().requires_grad_() for x in inputs]
    y_true, S_true = wkv7_reference(*doubles)
    wanted = torch.autograd.grad(y_true.sum() + S_true.sum(), doubles)
    rounding = 2.0**-8
    torch.testing.assert_close(y.double(), y_true, rtol=rounding, atol=1e-5)  # rounded once, at the end
    torch.testing.assert_close(S.double(), S_true, rtol=1e-5, atol=1e-5)
    for found, want in zip(gradients, wanted, strict=True):
        assert (found.double() - want).norm() <= rounding * want.norm()


def test_packed_in_bf16(compiled):
    """Single steps, whole tiles and what is one longer, each as by itself."""
    lengths = (1, 64, 65, 130, 1)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    inputs = [x.bfloat16() for x in make(1, sum(lengths), 2, 16, len(lengths))[:6]]
    leaves, doubles = ([x.to(t).requires_grad_() for x in inputs] for t in (torch.bfloat16, torch.float64))
    y, S = compiled(*leaves, None, cu_seqlens)
    y_true, S_true = wkv7_reference(*doubles, None, cu_seqlens)
    torch.testing.assert_close(y.double(), y_true, rtol=2.0**-8, atol=1e-5)
    torch.testing.assert_close(S.double(), S_true, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(y.float().sum() + S.sum(), leaves)
    wanted = torch.autograd.grad(y_true.sum() + S_true.sum(), doubles)
    for found, want in zip(gradients, wanted, strict=True):
        assert (found.double() - want).norm() <= 2.0**-8 * want.norm()


def test_autocast_does_not_lower_the_precision(form):
    inputs = make(1, 40, 1, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, S = form(*(x.float() for x in inputs))
    y_true, S_true = wkv7_reference(*inputs)
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
    torch.library.opcheck(torch.ops.visualrwkv.wkv7_forward, (*inputs, torch.tensor([0, 2, 5]), keep))
    torch.library.opcheck(torch.ops.visualrwkv.wkv7_forward, (*inputs[:6], inputs[6][:1], None, keep))
    values = [x.detach() for x in inputs]
    dy, dS, states = torch.randn_like(values[0]), torch.randn_like(values[6]), values[6].new_empty(0)
    for dS_or_none in (dS, None):
        arguments = (*values, torch.tensor([0, 2, 5]), states, dy, dS_or_none)
        torch.library.opcheck(torch.ops.visualrwkv.wkv7_backward, arguments)


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


def test_public_op_takes_float64_and_any_head_size():
    inputs = make(1, 6, 1, 5)
    y, S = wkv7(*inputs)
    assert (y.dtype, S.dtype) == (torch.float64, torch.float64)
    torch.testing.assert_close(y, wkv7_reference(*inputs)[0])
    y, _ = wkv7(*(x.float() for x in inputs))
    torch.testing.assert_close(y.double(), wkv7_reference(*inputs)[0], rtol=1e-5, atol=1e-5)


def test_step_is_the_op_at_one_step():
    *rows, state = (x.float() for x in make(2, 3, 2, 16))
    y, S = wkv7(*rows, state)
    before = state.clone()
    for t in range(3):
        y_t, new = wkv7_step(*(x[:, t] for x in rows), state)
        assert torch.equal(state, before), "the old state is left as it was"
        torch.testing.assert_close(y_t, y[:, t])
        state, before = new, new.clone()
    torch.testing.assert_close(state, S)
    with pytest.raises(ValueError, match=r"\(B, H, N\)"):
        wkv7_step(*rows, state)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda a: a.update(k=a["k"][:, :3]), r"share one shape.*\(1, 3, 2, 16\)"),
        (lambda a: a.update({n: a[n][0] for n in NAMES[:6]}), r"\(B, T, H, N\)"),
        (lambda a: a.update({n: a[n][:, :0] for n in NAMES[:6]}), r"without a zero.*\(1, 0, 2, 16\)"),
        (lambda a: a.update(state=a["state"][:, :1]), r"state must be \(1, 2, 16, 16\).*not \(1, 1, 16, 16\)"),
        (lambda a: a.update(state=a["state"].bfloat16()), r"state must be torch.float32.*bfloat16"),
        (lambda a: a.update(v=a["v"].long()), r"v must be one of .*not torch.int64"),
        (lambda a: a.update(b=a["b"].to("meta")), r"one device.*b on meta"),
        (lambda a: a.update(cu_seqlens=torch.tensor([1, 6])), r"rise from 0 to T = 6, not \[1, 6\]"),
        (lambda a: a.update(cu_seqlens=torch.tensor([0, 5])), r"rise from 0 to T = 6, not \[0, 5\]"),
        (lambda a: a.update(cu_seqlens=torch.tensor([0, 4, 2, 6]), state=None), r"not \[0, 4, 2, 6\]"),
        (lambda a: a.update(cu_seqlens=torch.tensor([0, 3, 3, 6]), state=None), r"not \[0, 3, 3, 6\]"),
        (lambda a: a.update(cu_seqlens=torch.tensor([0.0, 6.0])), r"int32 or int64.*float32"),
        (lambda a: a.update(cu_seqlens=torch.tensor([0, 2, 6])), r"state must be \(2, 2, 16, 16\)"),
        (
            lambda a: a.update({n: a[n].repeat(2, 1, 1, 1) for n in NAMES[:6]}, cu_seqlens=torch.tensor([0, 6])),
            r"beside B = 2",
        ),
    ],
)
def test_bad_input_is_named(change, sentence):
    arguments = dict(zip(NAMES, (x.float() for x in make(1, 6, 2, 16)), strict=True))
    change(arguments)
    with pytest.raises(ValueError, match=sentence):
        wkv7(**arguments)
