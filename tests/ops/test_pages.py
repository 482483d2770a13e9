"""Copies that lie one after another."""

import torch

from visualrwkv.ops import pages
from visualrwkv.ops.pages import Pages


def test_copies_are_whole_and_apart(monkeypatch):
    monkeypatch.setattr(pages, "CHUNK", 1 << 21)
    given = [
        torch.randn(3, 5),
        torch.randn(700, 1000),
        torch.arange(7, dtype=torch.uint8),
        torch.randn(1, 9).bfloat16(),
    ]
    memory = Pages()
    kept = [memory.keep(x) for x in given]
    del memory
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(given, kept, strict=True))
    assert all(x.data_ptr() % 64 == 0 for x in kept)
    kept[0].zero_()
    assert torch.equal(kept[1], given[1])
