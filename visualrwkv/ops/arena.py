"""Memory that is used again: fresh pages of a large state cost more time than reading the weights does."""

from __future__ import annotations

import ctypes
import weakref
from collections import defaultdict

import torch
from torch import Tensor

KEPT = 4  # pieces of one size that wait for their next use


class Arena:
    """Gives out fp32 tensors of the CPU, and takes their memory back when no tensor or view of it is left."""

    def __init__(self) -> None:
        self._free: dict[int, list[Tensor]] = defaultdict(list)

    def take(self, *shape: int) -> Tensor:
        """A tensor of that shape; what is in it is undefined."""
        count = torch.Size(shape).numel()
        waiting = self._free[count]
        memory = waiting.pop() if waiting else torch.empty(count)
        lent = (ctypes.c_float * count).from_address(memory.data_ptr())
        weakref.finalize(lent, self._give_back, memory).atexit = False  # lives as long as a storage made of it
        return torch.frombuffer(lent, dtype=torch.float32).view(shape)

    def _give_back(self, memory: Tensor) -> None:
        waiting = self._free[memory.numel()]
        if len(waiting) < KEPT:
            waiting.append(memory)
