"""Reading memory: all of it, whoever reads which part."""

import pytest
import torch

from visualrwkv.ops import library
from visualrwkv.ops.bandwidth import read


@pytest.mark.skipif(not library.COMPILED, reason="no compiled kernels here")
def test_everything_is_read():
    data = torch.zeros(3 * 256, dtype=torch.int32)
    assert read(data, prefetch=False) == read(data, prefetch=True) == 0
    for at in (0, 255, 256, 767):
        one = data.clone()
        one[at] = 5
        assert read(one, prefetch=False) == read(one, prefetch=True) == 5


def test_wrong_sizes():
    with pytest.raises(ValueError, match="a multiple of 1,024 bytes; it has 12"):
        read(torch.zeros(3), prefetch=True)
