"""The state: all that an RWKV remembers of what it has read, of constant size.

L layers, S sequences, C channels, H heads, N head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from visualrwkv.config import RWKVConfig


@dataclass(frozen=True)
class State:
    """A value: the model returns a new one and never changes the one it was given.

    att_shift, ffn_shift (L, S, C): the last input of each layer's time-mix and channel-mix; wkv (L, S, H, N, N): the
    recurrent matrices, fp32, [key, value] in RWKV-6 and [value, key] in RWKV-7.
    """

    att_shift: Tensor
    ffn_shift: Tensor
    wkv: Tensor

    @classmethod
    def zeros(cls, config: RWKVConfig, sequences: int = 1, device: torch.device | str = "cpu") -> State:
        """The state before anything was read."""
        L, C, H, N = config.n_layer, config.n_embd, config.n_head, config.head_size
        shift = torch.zeros(L, sequences, C, device=device)
        return cls(shift, shift.clone(), torch.zeros(L, sequences, H, N, N, device=device))

    @classmethod
    def starting(cls, wkv: Tensor, sequences: int = 1) -> State:
        """What so many sequences start from that have read nothing but remember these matrices (L, H, N, N)."""
        L, H, N, _ = wkv.shape
        shift = wkv.new_zeros(L, sequences, H * N)
        return cls(shift, shift, wkv[:, None].expand(-1, sequences, -1, -1, -1))

    @classmethod
    def cat(cls, states: Sequence[State]) -> State:
        """One state with the sequences of all, in order."""
        return cls(*(torch.cat(parts, 1) for parts in zip(*((s.att_shift, s.ffn_shift, s.wkv) for s in states))))

    def __len__(self) -> int:
        return self.wkv.shape[1]

    def select(self, rows: Sequence[int] | Tensor) -> State:
        """The state of some of the sequences; rows may repeat, which broadcasts a state."""
        index = torch.as_tensor(rows, device=self.wkv.device)
        return State(*(t.index_select(1, index) for t in (self.att_shift, self.ffn_shift, self.wkv)))

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.att_shift, self.ffn_shift, self.wkv))
