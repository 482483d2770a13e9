"""What the versions of RWKV share: blocks one after the other, and the orders in which they read a row.

T tokens of all sequences in one packed row, S sequences, C channels, H heads, N head size.
A row needs no padding: token shift and recurrence restart where a sequence starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from visualrwkv.config import RWKVConfig
from visualrwkv.ops.elementwise import reorder
from visualrwkv.rwkv.state import State


@dataclass(frozen=True)
class Order:
    """The order in which a block reads the row: `read` (T,) gathers, `back` (T,) is its inverse."""

    read: Tensor
    back: Tensor


class Block(nn.Module):
    """x += time-mix(ln1(x)); x += channel-mix(ln2(x)). Block 0 first normalises the embeddings, of pictures too."""

    def __init__(self, config: RWKVConfig, layer: int, att: nn.Module, ffn: nn.Module):
        super().__init__()
        C = config.n_embd
        if layer == 0:
            self.ln0 = nn.LayerNorm(C)
        self.ln1 = nn.LayerNorm(C)
        self.ln2 = nn.LayerNorm(C)
        self.att = att
        self.ffn = ffn
        self.layer = layer

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor,
        state: tuple[Tensor, Tensor, Tensor] | None,
        v_first: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], Tensor | None]:
        """x (T, C), this layer's part of the state, v_first (T, C) -> x (T, C), its part of the new state, v_first."""
        att_last, ffn_last, wkv = state if state is not None else (None, None, None)
        ends = cu_seqlens[1:] - 1
        if self.layer == 0:
            x = self.ln0(x)
        h = self.ln1(x)
        out, wkv, v_first = self.att(h, cu_seqlens, att_last, wkv, v_first)
        x = x + out
        h2 = self.ln2(x)
        x = x + self.ffn(h2, cu_seqlens, ffn_last)
        return x, (h[ends].float(), h2[ends].float(), wkv), v_first  # fp32: a state outlives the dtype it was made in


class RWKV(nn.Module):
    """The language model: embeddings in, hidden states and the new state out; `emb` and `head` are the caller's doors.

    A version brings its two mixers. `time_mix(config, layer)` maps x (T, C), cu_seqlens, last (S, C), wkv (S, H, N, N),
    v_first (T, C) to out (T, C), wkv, v_first: the first layer's values, which only RWKV-7 hands on to later layers.
    `channel_mix(config, layer)` maps x, cu_seqlens, last to out.
    """

    time_mix: ClassVar[type[nn.Module]]
    channel_mix: ClassVar[type[nn.Module]]
    step_dtype: str = "bfloat16"
    """Of the weights of single tokens' steps on a CPU, where the module's own are bf16: bfloat16, int8 or int4."""

    def __init__(self, config: RWKVConfig):
        super().__init__()
        self.config = config
        self.emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(
            Block(config, i, self.time_mix(config, i), self.channel_mix(config, i)) for i in range(config.n_layer)
        )
        self.ln_out = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        nn.init.uniform_(self.emb.weight, -1e-4, 1e-4)  # tiny: ln0 scales it up
        nn.init.zeros_(self.head.weight)  # a new model says nothing; training/loss.py wakes the rows that it needs

    def forward(
        self, x: Tensor, cu_seqlens: Tensor, state: State | None = None, orders: list[Order | None] | None = None
    ) -> tuple[Tensor, State]:
        """Read a packed row.

        x (T, C) embeddings of S sequences one after the other, cu_seqlens (S+1,) int64 their bounds, state of S rows or
        None; `orders`: block i reads the row in orders[i mod len] (None: as it stands). Returns hidden (T, C) after
        `ln_out`, and the State of S rows after the last token of each sequence.
        """
        parts, v_first = [], None
        for i, block in enumerate(self.blocks):
            order = orders[i % len(orders)] if orders else None
            before = None if state is None else (state.att_shift[i], state.ffn_shift[i], state.wkv[i])
            if order is None:
                x, after, v_first = block(x, cu_seqlens, before, v_first)
            else:
                values = None if v_first is None else reorder(v_first, order.read, order.back)
                x, after, values = block(reorder(x, order.read, order.back), cu_seqlens, before, values)
                x = reorder(x, order.back, order.read)
                if v_first is None and values is not None:  # each token's values follow it into every block's order
                    v_first = reorder(values, order.back, order.read)
            parts.append(after)
        return self.ln_out(x), State(*(torch.stack(p) for p in zip(*parts)))
