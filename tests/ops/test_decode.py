"""The kernels of a single token, emulated on the CPU, against their references in float64."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from visualrwkv.ops import decode, library
from visualrwkv.ops.decode import Product, gemv_step, mix_step, norm_mix_step, wkv6_step, wkv7_step
from visualrwkv.ops.mix import token_mix_torch
from visualrwkv.ops.wkv6 import wkv6_reference

DTYPES = {torch.float32: 2e-6, torch.bfloat16: 3e-3}  # what an output's one rounding costs
BOTH = pytest.mark.parametrize("dtype", DTYPES, ids=("fp32", "bf16"))
EPS = 64e-5


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def heads(B, H, N, dtype, raw=-2.0):
    """What both recurrences read; w raw."""
    C = H * N
    rows = {n: normal(B, C, seed=i, dtype=dtype) for i, n in enumerate(("r", "k", "v", "w", "g", "a", "b"))}
    rows["w"] = (rows["w"].float() + raw).to(dtype)
    rows["a"], rows["b"] = (F.normalize(rows[n].float(), dim=-1).to(dtype) for n in ("a", "b"))
    of_head, state = normal(H, N, seed=8), normal(B, H, N, N, seed=9)
    return SimpleNamespace(**rows, of_head=of_head, state=state, weight=normal(C, seed=10) + 1, bias=normal(C, seed=11))


def arguments(name, p):
    """Of wkv6_step or wkv7_step, but for out."""
    if name == "wkv6":
        return [p.r, p.k, p.v, p.w, p.of_head, p.state, p.weight, p.bias, EPS, p.g]
    return [p.r, p.w, p.k, p.v, p.a, p.b, p.of_head, p.state, p.weight, p.bias, EPS, p.g]


def doubles(tensors):
    return [x.double() if isinstance(x, torch.Tensor) else x for x in tensors]


FORMS = {"wkv6": (decode._wkv6_cuda, wkv6_step), "wkv7": (decode._wkv7_cuda, wkv7_step)}


def step(name, p):
    """The emulated kernel: output and new state."""
    state = p.state.clone()
    given = [state if x is p.state else x for x in arguments(name, p)]
    return FORMS[name][0](*given, torch.full_like(p.r, torch.nan)), state


def true_step(name, p):
    given = doubles(arguments(name, p))
    out = FORMS[name][1](*given)
    return out, next(x for x in given if isinstance(x, torch.Tensor) and x.dim() == 4)


def assert_close(found, want, limit, name=""):
    error = (found.double() - want.double()).norm()
    assert found.shape == want.shape
    assert error <= limit * want.double().norm() + 1e-9, f"{name}: {error / want.double().norm():.1e}"


# The recurrences -----------------------------------------------------------------------------------------------------


def test_wkv6_reference_is_the_op_the_norm_and_the_gate():
    p = heads(2, 3, 16, torch.float64)
    rows = [x.view(2, 1, 3, 16) for x in (p.r, p.k, p.v, p.w)]
    y, S = wkv6_reference(*rows, p.of_head.double(), p.state.double())
    want = F.group_norm(y.view(2, 48), 3, p.weight.double(), p.bias.double(), EPS) * F.silu(p.g)
    out, state = true_step("wkv6", p)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(state, S)


def test_wkv7_reference_is_the_equation():
    """Head by head, with matrices: S' = S (diag(d) + a bᵀ) + v kᵀ, y = S' r."""
    p = heads(2, 2, 16, torch.float64)
    out, state = true_step("wkv7", p)
    for b in range(2):
        for h in range(2):
            at = slice(h * 16, h * 16 + 16)
            r, w, k, v, a, b_, g = (x[b, at] for x in (p.r, p.w, p.k, p.v, p.a, p.b, p.g))
            S = p.state[b, h].double() @ (torch.diag(torch.exp(-torch.exp(w))) + torch.outer(a, b_)) + torch.outer(v, k)
            torch.testing.assert_close(state[b, h], S)
            y = S @ r
            y = (y - y.mean()) / (y.var(unbiased=False) + EPS).sqrt() * p.weight[at] + p.bias[at]
            torch.testing.assert_close(out[b, at], (y + (r * k * p.of_head[h]).sum() * v) * g)


@BOTH
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(("B", "H", "N"), [(1, 2, 64), (3, 1, 64), (2, 3, 32), (1, 1, 128), (2, 2, 16)])
def test_steps(emulated, name, dtype, B, H, N):
    p = heads(B, H, N, dtype)
    (out, state), (want, S) = step(name, p), true_step(name, p)
    assert_close(out, want, DTYPES[dtype], "out")
    assert_close(state, S, 1e-6, "state")


@BOTH
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("raw", [-20.0, 8.0])
def test_extreme_decays(emulated, name, dtype, raw):
    p = heads(1, 2, 64, dtype, raw)
    (out, state), (want, S) = step(name, p), true_step(name, p)
    assert_close(out, want, DTYPES[dtype], "out")
    assert_close(state, S, 1e-6, "state")


@pytest.mark.parametrize("name", FORMS)
def test_zeros_and_large_values(emulated, name):
    for scale in (0.0, 1e4):
        p = heads(1, 1, 64, torch.float32)
        p = SimpleNamespace(**{n: x if n == "w" else x * scale for n, x in vars(p).items()})
        (out, state), (want, S) = step(name, p), true_step(name, p)
        assert out.isfinite().all()
        assert_close(out, want, 1e-5)
        assert_close(state, S, 1e-6)


@pytest.mark.parametrize("name", FORMS)
def test_a_broken_number_stays_in_its_head(emulated, name):
    p = heads(2, 2, 32, torch.float32)
    clean, clean_state = step(name, p)
    p.v[1, 40] = torch.nan
    out, state = step(name, p)
    for b in range(2):
        for h in range(2):
            same = torch.equal(out[b, h * 32 : h * 32 + 32], clean[b, h * 32 : h * 32 + 32])
            assert (same and torch.equal(state[b, h], clean_state[b, h])) == ((b, h) != (1, 1))


@BOTH
@pytest.mark.parametrize("name", FORMS)
def test_bytes_of_a_step(emulated, name, dtype):
    p = heads(2, 2, 64, dtype)
    emulated.bytes()
    step(name, p)
    rows = (5 if name == "wkv6" else 7) + 1
    wanted = 2 * p.state.numel() * 4 + rows * p.r.numel() * p.r.element_size() + 3 * p.r.numel() * 4
    assert emulated.bytes() <= 1.05 * wanted


def test_order_of_warps_changes_nothing(emulated):
    x, W = normal(5, 2056, dtype=torch.bfloat16), normal(21, 2056, seed=1, dtype=torch.bfloat16)
    p = heads(2, 2, 64, torch.bfloat16)

    def everything():
        y = gemv([Product(W, x, "tanh")])
        out, shift = norm_mix(normal(2, 1028), 3)[:2]
        return [*y, out, shift, *step("wkv6", p), *step("wkv7", p)]

    first = everything()
    for order in (1, 2):
        emulated.schedule(order)
        for found, want in zip(everything(), first, strict=True):
            assert torch.equal(found, want)


# Layer norm, shift, mix ----------------------------------------------------------------------------------------------


def norm_mix(x, M):
    """The emulated kernel: output, shift, and what it was given."""
    B, C = x.shape
    weight, bias, shift, mix = normal(C, seed=1), normal(C, seed=2), normal(2, B, C, seed=3), normal(M, C, seed=4)
    given = [x, weight, bias, 1e-5, shift.clone(), mix]
    out = decode._norm_mix_cuda(*given, torch.full((M, B, C), torch.nan, dtype=x.dtype))
    return out, given[4], [x, weight, bias, 1e-5, shift, mix]


@BOTH
@pytest.mark.parametrize(("B", "C", "M"), [(1, 4, 1), (2, 36, 6), (3, 1024, 2), (1, 2052, 5)])
def test_norm_mix(emulated, dtype, B, C, M):
    x = (normal(B, C) * 3 + 100).to(dtype)  # a mean that a sum of squares would drown in
    out, shift, given = norm_mix(x, M)
    given = doubles(given)
    want = norm_mix_step(*given)
    assert_close(out, want, max(DTYPES[dtype], 1e-5))
    assert_close(shift, given[4], 1e-5)
    now = F.layer_norm(x.double(), (C,), given[1], given[2], 1e-5)
    same = torch.stack(token_mix_torch(now[:, None], given[4][1], given[5]))[:, :, 0]  # what a whole sequence's op says
    torch.testing.assert_close(want, same)


@BOTH
@pytest.mark.parametrize(("B", "C", "M"), [(1, 4, 1), (2, 36, 5), (1, 2052, 5)])
def test_mix_by_the_data(emulated, dtype, B, C, M):
    shift, mix, delta = normal(2, B, C), normal(M, C, seed=1), normal(M, B, C, seed=2, dtype=dtype)
    out = decode._mix_cuda(shift, mix, delta, torch.full_like(delta, torch.nan))
    want = mix_step(*doubles((shift, mix, delta)))
    assert_close(out, want, DTYPES[dtype])
    now, before = shift[0].double()[:, None], shift[1].double()
    whole = token_mix_torch(now, before, mix.double(), delta.double()[:, :, None])
    torch.testing.assert_close(want, torch.stack(whole)[:, :, 0])


def test_bytes_of_norm_mix(emulated):
    B, C, M = 2, 2048, 6
    emulated.bytes()
    norm_mix(normal(B, C, dtype=torch.bfloat16), M)
    blocks = C // 1024  # each of which reads all of x
    wanted = B * C * (2 * blocks + 3 * 4 + 2 * M) + B * (2 + M) * C * 4  # a sequence reads the parameters for itself
    assert emulated.bytes() <= 1.05 * wanted


# Matrices times vectors ----------------------------------------------------------------------------------------------


def gemv(products):
    """The emulated kernel."""
    out = torch.full((sum(len(p.weight) * len(p.x) for p in products),), torch.nan, dtype=products[0].x.dtype)
    return decode._gemv_cuda(products, out)


def true_gemv(p):
    y = decode.ACTIVATIONS[p.activation](p.x.double() @ p.weight.double().T)
    y = y if p.times is None else y * p.times.double()
    return y if p.plus is None else y + p.plus.double()


def matrices(B, sizes, dtype):
    """Products with every activation, with and without the factor and the sum."""
    products = []
    for i, (O, C) in enumerate(sizes):
        weight, x = normal(O, C, seed=i, dtype=torch.bfloat16) / C**0.5, normal(B, C, seed=i + 9, dtype=dtype)
        times = normal(B, O, seed=i + 20, dtype=dtype) if i % 2 else None
        plus = normal(B, O, seed=i + 30, dtype=dtype) if i % 3 == 1 else None
        products.append(Product(weight.bfloat16(), x, list(decode.ACTIVATIONS)[i % 5], times, plus))
    return products


@BOTH
@pytest.mark.parametrize("B", range(1, 9))
def test_gemv(emulated, dtype, B):
    sizes = [(33, 64), (1, 8), (16, 1024), (17, 1032), (5, 2056), (64, 520), (2, 16), (40, 72)]
    products = matrices(B, sizes, dtype)
    for p, y in zip(products, gemv(products), strict=True):
        assert y.is_contiguous()
        assert_close(y, true_gemv(p), DTYPES[dtype], p.activation)
    alone = gemv(products[:1])[0]
    assert torch.equal(alone, gemv(products)[0])


def test_a_broken_number_reaches_its_row_or_vector_alone(emulated):
    (p,) = matrices(3, [(20, 64)], torch.float32)
    p.weight[7, 5] = torch.nan
    broken = gemv([p])[0].isnan()
    assert broken[:, 7].all()
    assert broken.sum() == 3
    (p,) = matrices(3, [(20, 64)], torch.float32)
    p.x[1, 5] = torch.nan
    broken = gemv([p])[0].isnan()
    assert broken[1].all()
    assert broken.sum() == 20
    for activation in decode.ACTIVATIONS:
        assert gemv([Product(p.weight, p.x, activation)])[0][1].isnan().all()


@BOTH
@pytest.mark.parametrize("B", [1, 8])
def test_bytes_of_gemv(emulated, dtype, B):
    """Weights are read once; a block reads its vectors for 16 rows (32 with B > 4)."""
    O, C = 256, 2048
    products = matrices(B, [(O, C), (O, C)], dtype)
    emulated.bytes()
    gemv(products)
    rows, size = 32 if B > 4 else 16, products[0].x.element_size()
    wanted = 2 * O * C * 2 + 2 * O // rows * B * C * size + 4 * B * O * size
    assert emulated.bytes() <= 1.05 * wanted


# The public functions ------------------------------------------------------------------------------------------------


def test_public_functions_run_without_a_kernel():
    p = heads(1, 2, 24, torch.bfloat16)  # a head size of no kernel
    out = wkv6_step(*arguments("wkv6", p))
    assert (out.dtype, out.shape) == (torch.bfloat16, (1, 48))
    into = torch.empty_like(out)
    assert wkv7_step(*arguments("wkv7", p), out=into) is into
    x = normal(2, 7)
    assert norm_mix_step(x, x[0], x[1], 1e-5, normal(2, 2, 7), normal(3, 7)).shape == (3, 2, 7)
    a, b = gemv_step(matrices(2, [(3, 8), (5, 16)], torch.bfloat16))
    assert (a.shape, b.shape, b.dtype) == ((2, 3), (2, 5), torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda p: setattr(p, "k", p.k[:, :20]), r"k must be \(1, 32\) and contiguous, not \(1, 20\)"),
        (lambda p: setattr(p, "state", p.state.mT), r"state must be .* contiguous"),
        (lambda p: setattr(p, "state", p.state.bfloat16()), r"parameters and state must be fp32"),
        (lambda p: setattr(p, "g", p.g.bfloat16()), r"r, k, v, w, g must be of one dtype"),
        (lambda p: setattr(p, "weight", p.weight.to("meta")), r"one device.*weight on meta"),
    ],
)
def test_bad_input_is_named(change, sentence):
    p = heads(1, 2, 16, torch.float32)
    change(p)
    with pytest.raises(ValueError, match=sentence):
        wkv6_step(*arguments("wkv6", p))


def test_bad_products_are_named():
    (p,) = matrices(2, [(3, 8)], torch.float32)
    for bad, sentence in (
        ([Product(p.weight, p.x, "gelu")], "activation must be one of none, .* not 'gelu'"),
        ([Product(p.weight[:, :4].contiguous(), p.x)], "multiple of 8 columns"),
        ([Product(p.weight.float(), p.x)], "weights must be bf16"),
        ([Product(p.weight, p.x, plus=p.x)], r"plus must be \(2, 3\)"),
        ([p] * 9, "must be 1 to 8, not 9"),
    ):
        with pytest.raises(ValueError, match=sentence):
            gemv_step(bad)
    with pytest.raises(ValueError, match=r"out must be \(6,\)"):
        gemv_step([p], torch.empty(5))


def test_sizes_of_no_kernel_are_refused(emulated):
    p = heads(1, 2, 24, torch.float32)
    with pytest.raises(RuntimeError, match="invalid argument"):
        step("wkv6", p)
    with pytest.raises(RuntimeError, match="invalid argument"):
        step("wkv7", p)
    with pytest.raises(RuntimeError, match="invalid argument"):
        norm_mix(normal(1, 6), 2)
    with pytest.raises(RuntimeError, match="invalid argument"):
        library.launch("gemv_step", 0, 9, 1, 0, p.r)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@BOTH
def test_on_a_gpu(dtype):
    for name in FORMS:
        p = heads(2, 4, 64, dtype)
        want, S = true_step(name, p)
        moved = SimpleNamespace(**{n: x.cuda() for n, x in vars(p).items()})
        out = FORMS[name][1](*arguments(name, moved))
        assert_close(out.cpu(), want, DTYPES[dtype])
        assert_close(moved.state.cpu(), S, 1e-6)
    products = matrices(4, [(33, 64), (16, 1024)], dtype)
    on_gpu = [
        Product(**{n: t.cuda() if isinstance(t, torch.Tensor) else t for n, t in vars(p).items()}) for p in products
    ]
    for p, y in zip(products, gemv_step(on_gpu), strict=True):
        assert_close(y.cpu(), true_gemv(p), DTYPES[dtype])
