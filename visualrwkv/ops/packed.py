"""Weights packed for products with few vectors, which cost what reading the weights costs: bf16, int8 or int4.

M rows, K columns, B vectors, G groups of 128 columns. A matrix of bf16 keeps every bit. One of int8 has a scale for each
row, one of int4 a scale for each group of a row; vectors that they meet are rounded to int8, with a scale for each group.
The layout is cuda/packed.h's; `reference` is the same product in plain torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

ROWS, LINE, GROUP = 16, 64, 128  # as in cuda/packed.h
KINDS = ("bfloat16", "int8", "int4")  # in the order in which cuda/packed.h numbers them
SHRINK = (1.0, 0.93, 0.86, 0.79)  # of the largest weight of a group: what int4's steps may be fitted to


@dataclass(frozen=True)
class Packed:
    """A matrix in cuda/packed.h's tiles: data uint8 or bf16, scales fp32 in the order in which they are read, or None."""

    data: Tensor
    scales: Tensor | None
    rows: int
    columns: int
    kind: str

    def nbytes(self) -> int:
        """What a product reads."""
        return sum(t.numel() * t.element_size() for t in (self.data, self.scales) if t is not None)


def pack(weight: Tensor, kind: str) -> Packed:
    """A matrix (M, K) as tiles, rounded to bf16 (which loses nothing of a bf16 one), int8 or int4."""
    M, K = weight.shape
    if kind == "bfloat16":
        return Packed(_tiles(weight.to(torch.bfloat16), 32), None, M, K, kind)
    q, scales = round_weights(weight, kind)
    if kind == "int8":
        return Packed(_tiles(q, LINE), _filled(scales, ROWS, 1)[:, 0].contiguous(), M, K, kind)
    nibbles = (q + 8).to(torch.uint8).view(M, -1, 2, LINE)  # (M, G, 2, 64)
    both = nibbles[:, :, 0] | nibbles[:, :, 1] << 4
    by_tile = _filled(scales, ROWS, 1).view(-1, ROWS, scales.shape[1]).transpose(1, 2)  # (tiles, G, 16)
    return Packed(_tiles(both.flatten(1), LINE), by_tile.contiguous(), M, K, kind)


def round_weights(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """A matrix (M, K) as integers: q (M, 128 G) int8 and scales, (M, 1) for int8 and (M, G) for int4."""
    w = _filled(weight.float(), 1, GROUP)  # fp32: scales are fitted to it
    if kind == "int8":
        scales = (w.abs().amax(1, keepdim=True) / 127).clamp_min(1e-30)
        return torch.round(w / scales).to(torch.int8), scales
    groups = w.view(len(w), -1, GROUP)
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    best, scales, least = torch.empty(0), torch.empty(0), torch.empty(0)
    for shrink in SHRINK:  # the largest becomes -8, or beyond it, if that brings the others closer
        s = shrink * largest / -8
        s = torch.where(s == 0, 1e-30, s)
        q = torch.round(groups / s).clamp_(-8, 7)
        error = (groups - q * s).square().sum(2, keepdim=True)
        if not len(least):
            best, scales, least = q, s, error
            continue
        better = error < least
        best, scales = torch.where(better, q, best), torch.where(better, s, scales)
        least = torch.where(better, error, least)
    return best.to(torch.int8).flatten(1), scales[..., 0]


def round_vectors(x: Tensor) -> Tensor:
    """Vectors (B, K) as products with integers see them: int8 steps of the largest of every 128 columns, in fp32."""
    groups = _filled(x.float(), 1, GROUP).view(len(x), -1, GROUP)
    largest = groups.abs().amax(2, keepdim=True)
    steps = torch.round(groups * torch.where(largest > 0, 127 / largest, 0))
    return (steps * (largest / 127)).flatten(1)[:, : x.shape[1]]


def rounded(weight: Tensor, kind: str) -> Tensor:
    """The matrix (M, K) that `pack` makes, fp32."""
    if kind == "bfloat16":
        return weight.to(torch.bfloat16).float()
    q, scales = round_weights(weight, kind)
    M, K = weight.shape
    return (q.view(M, scales.shape[1], -1) * scales[..., None]).flatten(1)[:, :K]


def _filled(x: Tensor, rows: int, columns: int) -> Tensor:
    """A matrix with zeros to whole multiples of rows and columns."""
    return pad(x, (0, -x.shape[1] % columns, 0, -x.shape[0] % rows))


def _tiles(x: Tensor, width: int) -> Tensor:
    """(M, K) → (tiles, blocks, 16, width) in one piece, with zeros in what a tile has too much."""
    x = _filled(x, ROWS, width)
    return x.view(-1, ROWS, x.shape[1] // width, width).transpose(1, 2).contiguous()
