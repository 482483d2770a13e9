"""How well things were found: COCO's average precision of boxes and masks, and the intersection over union of classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

THRESHOLDS = tuple(round(0.5 + 0.05 * n, 2) for n in range(10))
"""The overlaps, as intersection over union, from which a thing counts as found."""
RECALLS = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class Found:
    """What was found in one picture beside what is there: n finds, m things.

    scores (n,); classes (n,) and true_classes (m,); overlaps (n, m): the intersection over union of each pair.
    """

    scores: np.ndarray
    classes: np.ndarray
    true_classes: np.ndarray
    overlaps: np.ndarray


def box_overlaps(boxes: Tensor, others: Tensor) -> np.ndarray:
    """Boxes (n, 4) and (m, 4) as left, top, right, bottom -> intersection over union (n, m)."""
    least, most = torch.minimum, torch.maximum
    sides = least(boxes[:, None, 2:], others[:, 2:]) - most(boxes[:, None, :2], others[:, :2])
    both = sides.clamp(min=0).prod(-1)
    areas, other_areas = ((b[:, 2:] - b[:, :2]).prod(-1) for b in (boxes, others))
    return (both / (areas[:, None] + other_areas - both).clamp(min=1e-9)).numpy()


def mask_overlaps(masks: Tensor, others: Tensor) -> np.ndarray:
    """Masks (n, H, W) and (m, H, W), bool -> intersection over union (n, m)."""
    a, b = masks.flatten(1).float(), others.flatten(1).float()
    both = a @ b.T
    return (both / (a.sum(1)[:, None] + b.sum(1) - both).clamp(min=1)).numpy()


def precision_of_class(pictures: Sequence[Found], number: int, threshold: float) -> float:
    """The average precision of one class at one threshold; nan where it occurs in no picture.

    A find takes the free thing that it overlaps most, finds of higher scores first. Precision is read at 101 recalls, at each
    the best that is reached there or further on.
    """
    scores, hits, things = [], [], 0
    for picture in pictures:
        mine = np.flatnonzero(picture.classes == number)
        mine = mine[np.argsort(-picture.scores[mine], kind="stable")]
        overlaps = picture.overlaps[mine][:, picture.true_classes == number].copy()
        things += overlaps.shape[1]
        for find, row in zip(mine, overlaps):
            best = int(row.argmax()) if row.size else -1
            hit = best >= 0 and row[best] >= threshold
            if hit:
                overlaps[:, best] = -1.0  # taken
            scores.append(picture.scores[find])
            hits.append(hit)
    if not things:
        return float("nan")
    right = np.array(hits, bool)[np.argsort(-np.array(scores), kind="stable")].cumsum()
    precision = right / np.arange(1, len(right) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]  # the best at this recall or a higher one
    reached = np.searchsorted(right / things, RECALLS)
    return float(np.append(precision, 0.0)[np.minimum(reached, len(precision))].mean())


def average_precision(pictures: Sequence[Found], classes: int) -> dict[str, float]:
    """Means over the classes 1 to `classes` that occur: `AP50`, at an overlap of 0.5, and `AP`, over 0.5 to 0.95."""
    table = np.array([[precision_of_class(pictures, n, t) for t in THRESHOLDS] for n in range(1, classes + 1)])
    occurs = table[~np.isnan(table[:, 0])]
    return {"AP50": float(occurs[:, 0].mean()), "AP": float(occurs.mean())}


def class_overlaps(confusion: Tensor) -> list[float]:
    """How many pixels of each class (rows) were said to be of each (columns) -> intersection over union of each class; nan
    where a class neither occurs nor is said."""
    right = confusion.diagonal().double()
    return (right / (confusion.sum(0) + confusion.sum(1) - right)).tolist()
