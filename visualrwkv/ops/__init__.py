"""The recurrences. Each op returns its output and, where it has one, its final state."""

from visualrwkv.ops.biwkv import bi_wkv
from visualrwkv.ops.mix import token_mix
from visualrwkv.ops.wkv6 import bidirectional_wkv6, wkv6, wkv6_step
from visualrwkv.ops.wkv7 import wkv7, wkv7_step

__all__ = ["bi_wkv", "bidirectional_wkv6", "token_mix", "wkv6", "wkv6_step", "wkv7", "wkv7_step"]
