"""From the encoder's width to the language model's. No biases; parameter names are the public checkpoints'."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visualrwkv.config import ProjectorKind


class GatedProjector(nn.Module):
    """y = LN(O(x · σ(G x))): the gated projector of the v7.00 releases."""

    def __init__(self, width: int, n_embd: int):
        super().__init__()
        self.gate = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, n_embd, bias=False)
        self.ln_v = nn.LayerNorm(n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., C)."""
        return self.ln_v(self.o_proj(x * torch.sigmoid(self.gate(x))))


def make_projector(kind: ProjectorKind, width: int, n_embd: int) -> nn.Module:
    """The projector of that kind: (..., width) -> (..., n_embd)."""
    return GatedProjector(width, n_embd) if kind == "gated" else nn.Linear(width, n_embd, bias=False)
