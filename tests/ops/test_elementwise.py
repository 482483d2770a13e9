"""Against PyTorch's own gradients."""

import pytest
import torch

from visualrwkv.ops.elementwise import relu_squared, reorder


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_relu_squared(dtype):
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, :3] = torch.tensor([0.0, -0.0, torch.nan])
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    slope = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    y, want = relu_squared(ours), torch.relu(theirs).square()
    y.backward(slope)
    want.backward(slope)
    torch.testing.assert_close(y, want, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(relu_squared(x), want.detach(), rtol=0, atol=0, equal_nan=True)
    assert x[0, 2].isnan()  # as it was: nothing is written over the argument


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
