"""From the encoder's width to the language model's. Parameter names are the public checkpoints'."""

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


class OutputGatedProjector(nn.Module):
    """y = O(h · σ(G h)) with h = P x: the projector of the HD releases. UHD has y = O(relu(h)), and G in its files."""

    def __init__(self, width: int, n_embd: int, relu: bool = False):
        super().__init__()
        self.proj = nn.Linear(width, n_embd, bias=False)
        self.gate = nn.Linear(n_embd, n_embd, bias=False)
        self.o_proj = nn.Linear(n_embd, n_embd, bias=False)
        self.relu = relu
        self.gate.requires_grad_(not relu)  # nothing reads it there

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., C)."""
        h = self.proj(x)
        return self.o_proj(torch.relu(h) if self.relu else h * torch.sigmoid(self.gate(h)))


class MlpProjector(nn.Module):
    """y = h + LN(h) with h = B relu(A x), with biases, four times wider inside: the adapter of WorldRWKV."""

    def __init__(self, width: int, n_embd: int):
        super().__init__()
        self.pre_norm = nn.LayerNorm(n_embd)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * n_embd), nn.ReLU(), nn.Linear(4 * n_embd, n_embd))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., C)."""
        h = self.mlp(x)
        return h + self.pre_norm(h)


def make_projector(kind: ProjectorKind, width: int, n_embd: int) -> nn.Module:
    """The projector of that kind: (..., width) -> (..., n_embd)."""
    if kind == "gated":
        return GatedProjector(width, n_embd)
    if kind == "mlp":
        return MlpProjector(width, n_embd)
    if kind == "linear":
        return nn.Linear(width, n_embd, bias=False)
    return OutputGatedProjector(width, n_embd, relu=kind == "relu")
