"""The recurrences. Each op returns its output and, where it has one, its final state."""

from visualrwkv.ops.biwkv import bi_wkv
from visualrwkv.ops.wkv6 import wkv6

__all__ = ["bi_wkv", "wkv6"]
