"""The CUDA kernels of bi-WKV, emulated on the CPU, against the reference in float64."""

import pytest
import torch

from tests.ops.recurrences import BOTH, assert_close
from visualrwkv.ops import library
from visualrwkv.ops.biwkv import _backward_cuda, _forward_cuda, bi_wkv_reference

NAMES = ("w", "u", "k", "v")
LIMITS = {  # relative L2 error
    torch.float32: dict.fromkeys(("y", "dw", "du", "dk", "dv"), 5e-4),
    torch.bfloat16: {"y": 5e-3, "dk": 5e-3, "dv": 5e-3, "dw": 1e-2, "du": 1e-2},
}


def make(B, T, C, dtype, decay=(-2.0, 6.0), spread=1.5, offset=0.0, seed=0):
    """w, u, k, v, dy; `decay` is w T, over the whole picture."""
    g = torch.Generator().manual_seed(seed)
    w = torch.empty(C).uniform_(*decay, generator=g) / T
    u = torch.randn(C, generator=g)
    k, v, dy = (torch.randn(B, T, C, generator=g) for _ in range(3))
    return w, u, (spread * k + offset).to(dtype), v.to(dtype), dy.to(dtype)


def run(w, u, k, v, dy):
    y = _forward_cuda(w, u, k, v)
    return {"y": y, **dict(zip((f"d{n}" for n in NAMES), _backward_cuda(w, u, k, v, dy), strict=True))}


def true(w, u, k, v, dy):
    leaves = [x.double().requires_grad_() for x in (w, u, k, v)]
    y = bi_wkv_reference(*leaves)
    gradients = torch.autograd.grad(y, leaves, dy.double())
    return {"y": y.detach(), **dict(zip((f"d{n}" for n in NAMES), gradients, strict=True))}


@BOTH
@pytest.mark.parametrize(
    ("B", "T", "C"),
    [*[(2, T, 5) for T in (1, 2, 7, 8, 9, 15, 17, 31, 33, 63, 64, 65)], (1, 196, 40), (2, 130, 33), (1, 577, 3)],
)
def test_every_value_and_gradient(emulated, dtype, B, T, C):
    inputs = make(B, T, C, dtype)
    assert_close(run(*inputs), true(*inputs), limits=LIMITS[dtype])


def test_errors_do_not_build_up_over_time(emulated):
    inputs = make(1, 2500, 3, torch.float32, decay=(-4.0, 30.0))
    assert_close(run(*inputs), true(*inputs), limits=dict.fromkeys(LIMITS[torch.float32], 2e-5))


@BOTH
@pytest.mark.parametrize(
    ("T", "decay", "spread"),
    [
        (150, (-300.0, -200.0), 1.0),
        (150, (200.0, 300.0), 1.0),
        (150, (-400.0, 400.0), 40.0),
        (12, (-300.0, 300.0), 40.0),  # e^25 between neighbours
        (150, (-200.0, 200.0), 30.0),  # almost the largest decays whose terms share an exponent
        (500, (-300.0, 300.0), 40.0),
        (150, (-3.0, 3.0), 60.0),
        (100, (90.0, 100.0), 15.0),
    ],
)
def test_extremes(emulated, dtype, T, decay, spread):
    """Decays and weights far beyond the range of fp32."""
    inputs = make(2, T, 6, dtype, decay, spread)
    found, wanted = run(*inputs), true(*inputs)
    assert all(x.isfinite().all() for x in found.values())
    assert_close(found, wanted, limits=LIMITS[dtype])


@BOTH
@pytest.mark.parametrize("offset", [-700.0, 710.0])
def test_only_differences_of_k_count(emulated, dtype, offset):
    inputs = make(1, 70, 3, dtype, offset=offset)
    assert_close(run(*inputs), true(*inputs), limits={name: max(limit, 2e-3) for name, limit in LIMITS[dtype].items()})


@pytest.mark.parametrize("value", [0.0, 1e4])
def test_constant_and_large_values(emulated, value):
    """All tokens say the same: so does the output, and neither weights nor decays matter."""
    w, u, k, v, dy = make(2, 90, 4, torch.float32)
    found = run(w, u, k, torch.full_like(v, value), dy)
    torch.testing.assert_close(found["y"], torch.full_like(v, value), rtol=1e-6, atol=0)
    for name in ("dw", "du", "dk"):  # rounding, of which dw collects more: distances up to T
        assert found[name].abs().max() <= (1e-3 if name == "dw" else 1e-4) * value


def test_zeros(emulated):
    inputs = [torch.zeros_like(x) for x in make(1, 70, 4, torch.float32)]
    found = run(*inputs)
    assert all((x == 0).all() for x in found.values())


def test_a_token_of_no_weight(emulated):
    """k of minus infinity hides a token."""
    w, u, k, v, dy = make(1, 70, 4, torch.float32)
    k[:, 20] = -torch.inf
    far = k.clone()
    far[:, 20] = -1e4
    dy[:, 20] = 0  # what the hidden token itself reads still has the others' sums
    found, wanted = run(w, u, k, v, dy), true(w, u, far, v, dy)
    assert_close(found, wanted, limits=LIMITS[torch.float32])
    assert (found["dv"][:, 20] == 0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_number_stays_in_its_channel_and_picture(emulated, value):
    w, u, k, v, dy = make(2, 70, 4, torch.float32)
    clean = run(w, u, k, v, dy)
    k[0, 30, 2] = value
    found = run(w, u, k, v, dy)
    touched = torch.zeros(2, 4, dtype=torch.bool)
    touched[0, 2] = True
    for name in ("y", "dk", "dv"):
        assert (found[name].isfinite().all(1) == ~touched).all()
        for b, c in (~touched).nonzero().tolist():
            assert torch.equal(found[name][b, :, c], clean[name][b, :, c])
    for name in ("dw", "du"):
        assert found[name].isfinite().tolist() == [True, True, False, True]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_broken_decay_stays_in_its_channel(emulated, value):
    inputs = make(1, 70, 4, torch.float32)
    clean = run(*inputs)
    inputs[0][1] = value
    found = run(*inputs)
    for name, want in clean.items():
        assert torch.equal(found[name][..., [0, 2, 3]], want[..., [0, 2, 3]])


@BOTH
def test_sliced_inputs(emulated, dtype):
    w, u, *rows = make(2, 70, 12, dtype)
    wide = [torch.stack((x, torch.full_like(x, 9)), -1)[..., 0] for x in (w, u)]
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in rows]
    assert not any(x.is_contiguous() for x in (*wide, *turned))
    straight, found = run(w, u, *rows), run(*wide, *turned)
    assert all(torch.equal(found[name], straight[name]) for name in straight)


@BOTH
def test_order_of_warps_and_repetition_change_nothing(emulated, dtype):
    inputs = make(2, 150, 35, dtype)
    first = run(*inputs)
    for order in (1, 2, 0):
        emulated.schedule(order)
        again = run(*inputs)
        assert all(torch.equal(first[name], again[name]) for name in first), order


@BOTH
def test_bytes(emulated, dtype):
    """k and v are read twice, for the gradient three times and dy twice; every sum between chunks of 64 tokens is
    written and read, and what is left over is w, u and the scan.
    """
    B, T, C = 2, 320, 64
    inputs = make(B, T, C, dtype)
    tensor, sums = B * T * C * inputs[2].element_size(), 6 * B * (T // 64) * C * 4
    emulated.bytes()
    _forward_cuda(*inputs[:4])
    assert emulated.bytes() <= 1.25 * (5 * tensor + 2 * sums)
    _backward_cuda(*inputs)
    assert emulated.bytes() <= 1.25 * (10 * tensor + 4 * sums)
    emulated.bytes()
    _forward_cuda(*(x[:, :64] if x.dim() == 3 else x for x in inputs[:4]))
    assert emulated.bytes() <= 1.25 * 3 * tensor * 64 / T, "a single chunk is read once"


def test_sizes_that_no_grid_holds_are_refused(emulated):
    w, u, k, v, _ = make(1, 1, 1, torch.float32)
    with pytest.raises(RuntimeError, match="invalid argument"):
        library.launch("biwkv_forward", 0, 2**40, 1, 1, w, u, k, v, v, None)
    with pytest.raises(RuntimeError, match="invalid argument"):
        library.launch("biwkv_forward", 7, 1, 1, 1, w, u, k, v, v, None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@BOTH
@pytest.mark.parametrize("T", [1, 64, 196, 1024])
def test_on_a_gpu(dtype, T):
    inputs = [x.cuda() for x in make(2, T, 40, dtype)]
    found = {name: x.cpu() for name, x in run(*inputs).items()}
    assert_close(found, true(*(x.cpu() for x in inputs)), limits=LIMITS[dtype])
