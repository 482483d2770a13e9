"""Memory for weights in large pages where the system gives them: with small ones a tenth of a read is spent on finding them."""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

CHUNK, LINE = 1 << 26, 64


class Pages:
    """Gives out memory piece after piece; a chunk lives as long as a tensor in it."""

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def keep(self, x: Tensor) -> Tensor:
        """A copy of x, contiguous, at the start of a cache line."""
        return self.empty(x.numel(), x.dtype).view(x.shape).copy_(x)

    def empty(self, count: int, dtype: torch.dtype) -> Tensor:
        """A row of numbers at the start of a cache line."""
        size = count * dtype.itemsize
        if self._used + size > len(self._chunk):
            whole = -(-max(size, CHUNK) // (1 << 21)) * (1 << 21)  # of 2 MiB, as large pages are
            memory = mmap.mmap(-1, whole)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with contextlib.suppress(OSError):  # a kernel without them
                    memory.madvise(mmap.MADV_HUGEPAGE)
            self._chunk, self._used = torch.frombuffer(memory, dtype=torch.uint8), 0
        row = self._chunk[self._used : self._used + size].view(dtype)
        self._used += -(-size // LINE) * LINE
        return row
