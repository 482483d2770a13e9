"""Token shift and mix: the torch form against numpy, the compiled and the CUDA form (emulated) against it in float64."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from visualrwkv.ops import library, mix
from visualrwkv.ops.mix import token_mix, token_mix_compiled, token_mix_torch, token_shift

NAMES = ("x", "last", "mix", "delta")


def make(B, T, C, M, delta=True, sequences=None, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, last = torch.randn(B, T, C, generator=g).to(dtype), torch.randn(sequences or B, C, generator=g)
    weights = torch.rand(M, C, generator=g)
    more = torch.randn(M, B, T, C, generator=g).to(dtype) if delta else None
    return x, last, weights, more


def on_cuda(x, last, mix_, delta, cu_seqlens):
    """The CUDA form as autograd would call it."""

    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            ctx.save_for_backward(*tensors)
            return tuple(mix._forward_cuda(*tensors, cu_seqlens))

        @staticmethod
        def backward(ctx, *dout):
            *gradients, ddelta = mix._backward_cuda(*ctx.saved_tensors, cu_seqlens, dout)
            return *gradients, None if ctx.saved_tensors[3] is None else ddelta

    return Op.apply(x, last, mix_, delta)


@pytest.fixture(scope="module")
def compiled(cpu_library):
    """The compiled form, built on first need."""
    return token_mix_compiled


@pytest.fixture(params=["torch", "compiled", "cuda"])
def form(request):
    if request.param == "torch":
        return token_mix_torch
    if request.param == "compiled":
        return request.getfixturevalue("compiled")
    request.getfixturevalue("emulated")
    return on_cuda


def run(form, inputs, cu_seqlens=None, dtype=None):
    """Output and every gradient; `dtype` None: as the inputs are."""
    leaves = [None if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    out = torch.stack(form(*leaves, cu_seqlens))
    given = [x for x in leaves if x is not None]
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(inputs[0].dtype).to(out)
    gradients = torch.autograd.grad(out, given, dout)
    return {"out": out.detach(), **{f"d{n}": x for n, x in zip(NAMES, gradients)}}


def assert_close(found, wanted, limit=1e-6):
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        error = (found[name].double() - want.double()).norm()
        assert found[name].shape == want.shape
        assert error <= limit * want.double().norm() + 1e-12, f"{name}: {error / want.double().norm():.1e}"


@pytest.mark.parametrize("starts", [None, (0, 1, 2, 5, 9)])
def test_torch_form_is_the_equation(starts):
    B, T, C, M = (1, 9, 3, 2) if starts else (2, 5, 3, 2)
    x, last, weights, delta = (t.double().numpy() for t in make(B, T, C, M, sequences=starts and len(starts) - 1))
    wanted = np.zeros((M, B, T, C))
    begins = starts or (0,)
    for m, b, t in np.ndindex(M, B, T):
        before = last[begins.index(t) if starts else b] if t in begins else x[b, t - 1]
        wanted[m, b, t] = x[b, t] + (before - x[b, t]) * (weights[m] + delta[m, b, t])
    cu_seqlens = torch.tensor(starts) if starts else None
    found = token_mix_torch(*map(torch.tensor, (x, last, weights, delta)), cu_seqlens)
    np.testing.assert_allclose(torch.stack(found), wanted, rtol=1e-13, atol=1e-13)


def test_torch_gradients_are_the_slopes():
    inputs = [x.double().requires_grad_() for x in make(1, 5, 2, 2, sequences=2)]
    assert torch.autograd.gradcheck(lambda *a: token_mix_torch(*a, torch.tensor([0, 2, 5])), inputs)


@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize(
    ("B", "T", "C", "M"),
    [
        *[(2, T, 8, 2) for T in (1, 7, 8, 9, 63, 64, 65)],
        (1, 130, 132, 5),
        (1, 257, 20, 6),
        (3, 17, 5, 1),
        (1, 33, 130, 8),
        (40, 2, 4, 2),
    ],
)
def test_every_value_and_gradient(form, B, T, C, M, delta):
    inputs = make(B, T, C, M, delta)
    assert_close(run(form, inputs), run(token_mix_torch, inputs, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("lengths", [(150,), (1, 1, 1), (7, 1, 8, 9, 63, 1, 129), (8, 8, 8), (64, 64), (128, 128, 1)])
def test_packed_sequences_stand_alone(form, lengths, dtype):
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=dtype)
    inputs = make(1, sum(lengths), 12, 3, sequences=len(lengths))

    def apart(x, last, weights, delta, _):
        rows = [slice(a, b) for a, b in pairwise(cu_seqlens)]
        parts = [token_mix_torch(x[:, s], last[i : i + 1], weights, delta[:, :, s]) for i, s in enumerate(rows)]
        return [torch.cat(part, 1) for part in zip(*parts)]

    wanted = run(apart, inputs, dtype=torch.float64)
    assert_close(run(form, inputs, cu_seqlens), wanted)
    assert_close(run(token_mix_torch, inputs, cu_seqlens, torch.float64), wanted, 1e-14)


@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("C", [8, 7])
def test_bf16_on_cuda(emulated, C, delta):
    inputs = make(1, 70, C, 3, delta, dtype=torch.bfloat16)
    found = run(on_cuda, inputs)
    assert found["out"].dtype == found["dx"].dtype == torch.bfloat16
    wanted = run(token_mix_torch, inputs, dtype=torch.float64)
    assert_close({n: found.pop(n) for n in ("dmix", "dlast")}, {n: wanted.pop(n) for n in ("dmix", "dlast")})
    assert_close(found, wanted, 3e-3)  # rounded once, at the end


def test_sliced_inputs(form):
    inputs = make(2, 9, 8, 2)
    wide = [torch.stack((x, torch.full_like(x, 9)), -1)[..., 0] for x in inputs]
    assert not any(x.is_contiguous() for x in wide)
    assert_close(run(form, wide), run(token_mix_torch, inputs, dtype=torch.float64))


def test_memory_that_packs_do_not_fit(emulated):
    """Contiguous rows whose first element is not at a multiple of 16 bytes."""
    inputs = make(1, 9, 8, 2)
    moved = [torch.cat((torch.zeros(1), x.flatten()))[1:].view(x.shape) for x in inputs]
    assert all(x.data_ptr() % 16 for x in moved)
    assert_close(run(on_cuda, moved), run(token_mix_torch, inputs, dtype=torch.float64))


def test_a_broken_number_reaches_its_own_and_the_next_token_alone(form):
    x, last, weights, delta = make(1, 20, 8, 2, sequences=2)
    cu_seqlens = torch.tensor([0, 6, 20])
    for t, reached in ((2, [2, 3]), (5, [5])):
        broken = x.clone()
        broken[0, t, 3] = torch.nan
        out = torch.stack(form(broken, last, weights, delta, cu_seqlens))
        assert out.isnan().any(3).any(0)[0].nonzero()[:, 0].tolist() == reached
        assert out[..., [0, 1, 2, 4, 5, 6, 7]].isfinite().all()


def test_what_came_before_is_zero_unless_given(compiled):
    x, _, weights, delta = make(2, 5, 8, 2)
    zeros = torch.zeros(2, 8)
    for form in (token_mix, token_mix_torch, compiled):
        assert all(map(torch.equal, form(x, None, weights, delta), form(x, zeros, weights, delta)))
    torch.testing.assert_close(token_shift(x, None), torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1])


@pytest.mark.parametrize("delta", [True, False])
def test_bf16_in_and_out_on_the_cpu(compiled, delta):
    cu_seqlens = torch.tensor([0, 1, 127, 128, 300])
    inputs = make(1, 300, 24, 2, delta, sequences=4, dtype=torch.bfloat16)
    found = run(compiled, inputs, cu_seqlens)
    wanted = run(token_mix_torch, inputs, cu_seqlens, torch.float64)
    assert {found[n].dtype for n in found.keys() - {"dlast", "dmix"}} == {torch.bfloat16}
    assert_close({n: found.pop(n) for n in ("dmix", "dlast")}, {n: wanted.pop(n) for n in ("dmix", "dlast")}, 3e-3)
    assert_close(found, wanted, 3e-3)


def test_rounding_to_bf16(compiled):
    x = torch.tensor([-1, 0x7FFFFFFF, 0x7F800001, 0x3F808000, 0x3F818000, 0x3F808001, 0x00008001, 0x7F7FFFFF])
    x = x.to(torch.int32).view(torch.float32)  # three that are no number, three halves and next to them, the largest
    out = compiled(torch.zeros(1, 1, 8).bfloat16(), x[None], torch.ones(1, 8), None)
    torch.testing.assert_close(out[0][0, 0], x.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("with_delta", [True, False])
@pytest.mark.parametrize("library_runs", [True, False])
def test_under_autocast_the_result_is_rounded_and_nothing_else(compiled, monkeypatch, with_delta, library_runs):
    """Bit for bit what fp32 gives where products round what they read, and their gradients."""
    monkeypatch.setattr(library, "COMPILED", library_runs)
    delta = make(1, 300, 24, 3)[3].bfloat16() if with_delta else None
    dout = torch.randn(3, 1, 300, 24, generator=torch.Generator().manual_seed(3)).bfloat16()
    wide = [t.requires_grad_() for t in make(1, 300, 24, 3)[:3]]
    wide.append(delta.clone().requires_grad_() if with_delta else None)
    narrow = [None if t is None else t.detach().clone().requires_grad_() for t in wide]
    want = torch.stack(token_mix(*wide[:3], wide[3].float() if with_delta else None)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = torch.stack(token_mix(*narrow))
    assert out.dtype is torch.bfloat16
    assert torch.equal(out, want)
    for leaves, y in ((wide, want), (narrow, out)):
        y.backward(dout)
        assert all(t.grad.dtype is t.dtype for t in leaves if t is not None)
    for mine, theirs in zip(narrow, wide, strict=True):
        assert mine is None or torch.equal(mine.grad, theirs.grad)


def test_the_same_every_time(compiled, emulated):
    inputs = make(1, 700, 40, 5, sequences=3)
    cu_seqlens = torch.tensor([0, 100, 180, 700])
    for form in (compiled, on_cuda):
        first = run(form, inputs, cu_seqlens)
        for order in (1, 2):
            emulated.schedule(order)
            again = run(form, inputs, cu_seqlens)
            assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("delta", [True, False])
def test_bytes(emulated, dtype, delta):
    """Every tensor is read or written once; what is left over is a token before and after each run of eight."""
    T, C, M = 512, 256, 5
    x, last, weights, more = make(1, T, C, M, delta, dtype=dtype)
    row = T * C * x.element_size()
    emulated.bytes()
    out = mix._forward_cuda(x, last, weights, more, None)
    assert emulated.bytes() <= 1.25 * row * (1 + M + (M if delta else 0))
    mix._backward_cuda(x, last, weights, more, None, out)
    assert emulated.bytes() <= 1.25 * (row * (2 + M + (2 * M if delta else 0)) + T // 64 * M * C * 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(compiled, dtype):
    x, last, weights, delta = make(1, 5, 9, 2, sequences=2, dtype=dtype)
    cu_seqlens = torch.tensor([0, 2, 5])
    leaves = [t.requires_grad_() for t in (x, last, weights, delta)]
    torch.library.opcheck(torch.ops.visualrwkv.token_mix_forward, (*leaves, cu_seqlens, False))
    torch.library.opcheck(
        torch.ops.visualrwkv.token_mix_forward, (leaves[0], leaves[1][:1], leaves[2], None, None, False)
    )
    values = [t.detach() for t in leaves]
    torch.library.opcheck(torch.ops.visualrwkv.token_mix_backward, (*values, cu_seqlens, list(torch.randn_like(delta))))
    if dtype is torch.float32:
        narrow = delta.detach().bfloat16()
        forward, backward = torch.ops.visualrwkv.token_mix_forward, torch.ops.visualrwkv.token_mix_backward
        torch.library.opcheck(forward, (*leaves[:3], narrow.requires_grad_(), cu_seqlens, True))
        torch.library.opcheck(forward, (*leaves[:3], None, cu_seqlens, True))
        for more in (narrow.detach(), None):
            torch.library.opcheck(backward, (*values[:3], more, cu_seqlens, list(torch.randn_like(narrow))))


def test_torch_compile(compiled):
    inputs, cu_seqlens = make(1, 12, 9, 2, sequences=2), torch.tensor([0, 5, 12])
    graph = torch.compile(lambda *a: [y * 2 for y in compiled(*a)], fullgraph=True, backend="aot_eager")
    assert_close(run(graph, inputs, cu_seqlens), run(lambda *a: [y * 2 for y in compiled(*a)], inputs, cu_seqlens))


def test_public_op_takes_float64():
    inputs = [x.double() for x in make(1, 6, 5, 2)]
    out = token_mix(*inputs)
    assert out[0].dtype == torch.float64
    torch.testing.assert_close(out, token_mix_torch(*inputs), rtol=0, atol=0)


def test_more_mixtures_than_the_kernel_has_are_refused(emulated):
    with pytest.raises(RuntimeError, match="invalid argument"):
        mix._forward_cuda(*make(1, 3, 4, 9), None)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda a: a.update(x=a["x"][0]), r"x must be \(B, T, C\).*\(6, 8\)"),
        (lambda a: a.update(x=a["x"][:, :0]), r"without a zero.*\(1, 0, 8\)"),
        (lambda a: a.update(mix=a["mix"][:, :7]), r"mix must be \(M, 8\).*\(2, 7\)"),
        (lambda a: a.update(delta=a["delta"][:1]), r"delta must be \(2, 1, 6, 8\).*\(1, 1, 6, 8\)"),
        (lambda a: a.update(last=a["last"][0]), r"last must be \(1, 8\).*\(8,\)"),
        (lambda a: a.update(last=a["last"].to("meta")), r"one device.*last on meta"),
        (lambda a: a.update(mix=a["mix"].long()), r"mix must be one of .*not torch.int64"),
        (lambda a: a.update(cu_seqlens=torch.tensor([0.0, 6.0])), r"int32 or int64.*float32"),
        (lambda a: a.update(cu_seqlens=torch.tensor([0, 2, 6])), r"last must be \(2, 8\)"),
        (lambda a: a.update(x=a["x"].repeat(2, 1, 1), delta=None, cu_seqlens=torch.tensor([0, 6])), "beside B = 2"),
    ],
)
def test_bad_input_is_named(change, sentence):
    arguments = dict(zip(NAMES, make(1, 6, 8, 2), strict=True))
    change(arguments)
    with pytest.raises(ValueError, match=sentence):
        token_mix(**arguments)


@pytest.mark.parametrize("starts", [[1, 6], [0, 5], [0, 3, 3, 6], [0, 4, 2, 6]])
def test_starts_that_do_not_rise_are_named(compiled, starts):
    x, _, weights, _ = make(1, 6, 8, 2)
    with pytest.raises(ValueError, match="rise from 0 to T = 6"):
        compiled(x, None, weights, None, torch.tensor(starts))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype):
    inputs, cu_seqlens = make(1, 300, 132, 5, sequences=3, dtype=dtype), torch.tensor([0, 1, 100, 300])
    found = run(token_mix, [x.cuda() for x in inputs], cu_seqlens.cuda())
    wanted = run(token_mix_torch, inputs, cu_seqlens, torch.float64)
    assert_close({name: x.cpu() for name, x in found.items()}, wanted, 1e-6 if dtype is torch.float32 else 3e-3)
