"""Patches to image tokens."""

import pytest
import torch

from visualrwkv.vision.pool import pool


def grid_of(h, w, D=5):
    return torch.randn(2, h * w, D, generator=torch.Generator().manual_seed(0))


def test_the_grid_itself_is_not_touched():
    x = grid_of(3, 3)
    assert torch.equal(pool(x, (3, 3), 3), x)


@pytest.mark.parametrize(("h", "w", "side"), [(4, 4, 2), (6, 4, 2), (6, 9, 3), (4, 8, 4), (5, 7, 1)])
def test_means_of_windows_in_row_major_order(h, w, side):
    x = grid_of(h, w)
    cells = x.view(2, h, w, 5)
    a, b = h // side, w // side
    wanted = [cells[:, i * a : (i + 1) * a, j * b : (j + 1) * b].mean((1, 2)) for i in range(side) for j in range(side)]
    torch.testing.assert_close(pool(x, (h, w), side), torch.stack(wanted, 1))


def test_sizes_that_do_not_divide_overlap():
    x = torch.tensor([1.0, 2.0, 4.0]).repeat(3).view(1, 9, 1)  # three rows alike
    torch.testing.assert_close(pool(x, (3, 3), 2), torch.tensor([1.5, 3.0, 1.5, 3.0]).view(1, 4, 1))
