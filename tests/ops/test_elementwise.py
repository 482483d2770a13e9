"""Against PyTorch's own gradients."""

import pytest
import torch

from visualrwkv.ops import library
from visualrwkv.ops.elementwise import relu_squared, reorder


@pytest.fixture(params=["torch", "compiled"])
def form(request, monkeypatch):
    if request.param == "compiled":
        request.getfixturevalue("cpu_library")
    monkeypatch.setattr(library, "COMPILED", request.param == "compiled")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 7), (3, 64), (300, 131)])
def test_relu_squared(form, dtype, shape):
    """Bit for bit what PyTorch gives."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, :3] = torch.tensor([0.0, -0.0, torch.nan])
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    slope = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    y, want = relu_squared(ours), torch.relu(theirs).square()
    y.backward(slope)
    want.backward(slope)
    exact = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(y, want, **exact)
    torch.testing.assert_close(ours.grad, theirs.grad, **exact)
    torch.testing.assert_close(relu_squared(x), want.detach(), **exact)
    torch.testing.assert_close(relu_squared(x.T), want.detach().T, **exact)  # not contiguous
    assert x[0, 2].isnan()  # as it was: nothing is written over the argument


def test_relu_squared_is_registered_as_pytorch_wants(form):
    if library.COMPILED:
        torch.library.opcheck(torch.ops.visualrwkv.relu_squared, (torch.randn(3, 5, requires_grad=True),))
        torch.library.opcheck(torch.ops.visualrwkv.relu_squared_backward, (torch.randn(3, 5), torch.randn(3, 5)))


def test_reorder():
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    read = torch.tensor([4, 0, 5, 1, 3, 2])
    back = read.argsort()
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, want = reorder(ours, read, back), theirs.index_select(0, read)
    slope = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    y.backward(slope)
    want.backward(slope)
    assert torch.equal(y, want)
    assert torch.equal(ours.grad, theirs.grad)
    assert torch.equal(reorder(y, back, read), x)
