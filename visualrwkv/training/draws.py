"""Labelled pictures to batches: in which order, how altered, and always the same for the same seed.

What is drawn for a picture follows from the seed, the epoch and the picture, whoever loads it: an interrupted run goes on
with exactly what would have come. B pictures.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from visualrwkv.training.classify_recipes import ClassifyRecipe
from visualrwkv.training.labelled import Part

ORDER, PICTURE, STEP = range(3)
"""What is drawn: none of them shares its numbers with another."""

Key = tuple[int, int]
"""An epoch and a place in the part."""


def word(*words: int) -> int:
    """A seed that follows from these numbers."""
    return int(np.random.SeedSequence(words).generate_state(1)[0])


def seed_all(*words: int) -> None:
    """Python's, numpy's and torch's random numbers follow from these numbers from now on."""
    one = word(*words)
    random.seed(one)
    np.random.seed(one)
    torch.manual_seed(one)


def order(count: int, batch: int, seed: int, start: int, stop: int) -> Iterator[list[Key]]:
    """The pictures of each step: one shuffled epoch after the other, cut into batches wherever that falls."""
    known, places = -1, torch.empty(0)
    for step in range(start, stop):
        keys = []
        for drawn in range(step * batch, (step + 1) * batch):
            epoch, place = divmod(drawn, count)
            if epoch != known:
                draw = torch.Generator().manual_seed(word(seed, ORDER, epoch))
                known, places = epoch, torch.randperm(count, generator=draw)
            keys.append((epoch, int(places[place])))
        yield keys


def in_turn(count: int, batch: int) -> Iterator[list[Key]]:
    """All pictures once, as they lie there."""
    for first in range(0, count, batch):
        yield [(0, place) for place in range(first, min(first + batch, count))]


class Drawn(Dataset):
    """The pictures of a part, each altered as the seed, the epoch and its place say; without a seed nothing is drawn."""

    def __init__(self, part: Part, transform: Callable[[Any], Tensor], seed: int | None = None):
        self.part, self.transform, self.seed = part, transform, seed

    def __getitem__(self, key: Key) -> tuple[Tensor, int] | Exception:
        """A picture and its class; what is wrong with it is returned, for it would lose its words on the way out of a worker."""
        epoch, place = key
        try:
            picture = self.part.source.open(int(self.part.rows[place]))
        except (ValueError, OSError) as error:
            return error
        if self.seed is not None:
            seed_all(self.seed, PICTURE, epoch, place)
        return self.transform(picture), int(self.part.labels[place])


def together(items: list[Any]) -> tuple[Tensor, Tensor] | Exception:
    """Pixels (B, 3, H, W) and classes (B,), or the first thing that was wrong."""
    wrong = next((item for item in items if isinstance(item, Exception)), None)
    if wrong is not None:
        return wrong
    return torch.stack([pixels for pixels, _ in items]), torch.tensor([label for _, label in items])


class Keys:
    """An iterator as DataLoader wants one."""

    def __init__(self, batches: Iterable[list[Key]]):
        self.batches = batches

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self.batches)


def load(drawn: Drawn, batches: Iterable[list[Key]], workers: int, pin: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches in order, loaded ahead by `workers` processes; what is wrong with a picture is raised in its turn."""
    for batch in DataLoader(
        drawn, batch_sampler=Keys(batches), num_workers=workers, collate_fn=together, pin_memory=pin
    ):
        if isinstance(batch, Exception):
            raise batch
        yield batch


def alterations(recipe: ClassifyRecipe, preparation: dict[str, Any]) -> Callable[[Any], Tensor]:
    """What a picture to train on goes through: crop, flip, RandAugment, random erasing."""
    from timm.data import create_transform

    shared = {k: v for k, v in preparation.items() if k not in ("crop_pct", "crop_mode")}
    altered: dict[str, Any] = {
        "scale": recipe.scale,
        "hflip": recipe.flip,
        "re_prob": recipe.erase,
        "re_mode": "pixel",
        "color_jitter": 0.0,
    }
    try:
        return create_transform(**shared, **altered, is_training=True, auto_augment=recipe.randaugment or None)
    except (AssertionError, KeyError, ValueError, IndexError) as error:
        raise ValueError(
            f"randaugment is {recipe.randaugment!r}, which timm cannot read ({error}); it is written like rand-m9-mstd0.5-inc1"
        ) from error


def plain(preparation: dict[str, Any]) -> Callable[[Any], Tensor]:
    """What a picture to check with goes through."""
    from timm.data import create_transform

    return create_transform(**preparation, is_training=False)
