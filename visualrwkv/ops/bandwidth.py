"""How fast memory is read here: what a step by one token, which must read every weight, is measured against."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from visualrwkv.ops import library

AHEAD = 4096  # bytes from a load to the prefetch beside it, as in cuda/packed.h


def read(data: Tensor, prefetch: bool) -> int:
    """Read a tensor of the CPU once with all threads, in order; needs the compiled library. Returns a sum of its bits."""
    size = data.numel() * data.element_size()
    if size % 1024 or not data.is_contiguous() or data.device.type != "cpu":
        raise ValueError(f"the tensor must be contiguous, on the cpu, and a multiple of 1,024 bytes; it has {size}")
    found = ctypes.c_int64()
    call = library.function("visualrwkv_read", ctypes.c_void_p, *(ctypes.c_int64,) * 3, ctypes.POINTER(ctypes.c_int64))
    call(data.data_ptr(), size, AHEAD if prefetch else 0, torch.get_num_threads(), ctypes.byref(found))
    return found.value
