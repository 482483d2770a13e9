"""A scan is a permutation: the orders in which successive blocks read the image tokens.

T tokens of a packed row, I pictures, M image tokens each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from visualrwkv.config import SCANS, Scan, choose


def scan_orders(kind: Scan, side: int, extra: int = 0) -> list[Tensor | None]:
    """The orders of a scan over a side × side grid; block i reads in order i mod their number (None: row by row).

    `uni` rows; `bi` rows, reversed rows; `multi` rows, reversed rows, columns, reversed columns. Each order is (M,),
    M = side² + extra: the extra tokens after the grid, such as a class token, stay where they are.
    """
    choose("scan", kind, SCANS)
    rows = torch.arange(side * side, device="cpu")  # data, even while a model is laid out on the meta device
    columns = rows.view(side, side).T.flatten()
    last = torch.arange(side * side, side * side + extra, device="cpu")
    turned = [torch.cat((order, last)) for order in (rows.flip(0), columns, columns.flip(0))]
    every: list[Tensor | None] = [None, *turned]
    return every[: {"uni": 1, "bi": 2, "multi": 4}[kind]]


def read_order(is_image: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Where a block reads: is_image (T,) bool, order (M,) -> (gather index (T,), its inverse (T,)).

    Text stays where it is; each picture's M tokens, anywhere in the row, are read in `order`.
    """
    read = torch.arange(len(is_image), device=is_image.device)
    places = read[is_image].view(-1, len(order))
    read[is_image] = places[:, order.to(is_image.device)].flatten()
    back = torch.empty_like(read)
    back[read] = torch.arange(len(read), device=read.device)
    return read, back
