"""Which records make which step: a plan from lengths, budget and seed alone, so that any rank can go on at any step."""

from __future__ import annotations

import bisect
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any


def pack(order: Sequence[int], lengths: Sequence[int], budget: int, look_ahead: int = 1) -> list[tuple[int, ...]]:
    """Batches of at most `budget` tokens, from the records in this order.

    A batch begins with the record that has waited longest and takes the longest that still fits of the next `look_ahead`,
    until none does; so a record waits for look_ahead batches at most. With 1 the records keep their order. A record
    longer than the budget makes a batch of its own.
    """
    batches: list[tuple[int, ...]] = []
    if look_ahead == 1:
        batch: list[int] = []
        room = budget
        for index in order:
            if batch and lengths[index] > room:
                batches.append(tuple(batch))
                batch, room = [], budget
            batch.append(index)
            room -= lengths[index]
        return [*batches, tuple(batch)] if batch else batches
    window: list[tuple[int, ...]] = []  # (length, −place in the order), rising: of equal ones the oldest is last
    came, oldest, count = 0, 0, len(order)
    taken = bytearray(count)
    while came < count or window:
        while len(window) < look_ahead and came < count:
            bisect.insort(window, (lengths[order[came]], -came))
            came += 1
        while taken[oldest]:
            oldest += 1
        places = [-place for _, place in take(window, (lengths[order[oldest]], -oldest), budget)]
        for place in places:
            taken[place] = True
        batches.append(tuple(order[place] for place in places))
    return batches


def take(window: list[tuple[int, ...]], first: tuple[int, ...], budget: int) -> list[tuple[int, ...]]:
    """Take `first` out of the window and the longest that still fit, until none does; items begin with a length and rise."""
    chosen, room, taken = bisect.bisect_left(window, first), budget, []
    while chosen >= 0:
        taken.append(window.pop(chosen))
        room -= taken[-1][0]
        chosen = bisect.bisect_left(window, (room + 1, -math.inf)) - 1
    return taken


def plan_epoch(
    lengths: Sequence[int], budget: int, seed: int, epoch: int, look_ahead: int = 1, order: Sequence[int] | None = None
) -> list[tuple[int, ...]]:
    """One epoch's batches: the records (default: all; a length of 0 is left out) shuffled by seed and epoch, then packed."""
    order = [i for i in (range(len(lengths)) if order is None else order) if lengths[i]]
    random.Random(f"{seed} {epoch}").shuffle(order)
    return pack(order, lengths, budget, look_ahead)


@dataclass(frozen=True)
class Share:
    """A rank's part of one optimiser step: its batches, and how many samples the step has over all ranks."""

    batches: tuple[Any, ...]  # of indices, as tuples; of a stream, as `stream.Rows`
    samples: int


class Plan:
    """The steps of a run; every rank makes the same plan and takes its share, however many load its pictures.

    `order(epoch)` gives the records of an epoch, unshuffled; default: all of them.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        budget: int,
        seed: int,
        world: int = 1,
        accumulate: int = 1,
        look_ahead: int = 1,
        order: Callable[[int], Sequence[int]] | None = None,
    ):
        self.lengths, self.budget, self.seed, self.look_ahead = lengths, budget, seed, look_ahead
        self.world, self.accumulate, self.order = world, accumulate, order
        self._kept: tuple[int, list[tuple[int, ...]]] | None = None

    def epoch(self, epoch: int) -> list[tuple[int, ...]]:
        """The batches of an epoch."""
        if self._kept is None or self._kept[0] != epoch:
            order = self.order(epoch) if self.order else None
            self._kept = epoch, plan_epoch(self.lengths, self.budget, self.seed, epoch, self.look_ahead, order)
        return self._kept[1]

    def steps(self, epochs: float) -> int:
        """Optimiser steps for so many epochs."""
        return max(1, math.ceil(len(self.epoch(0)) * epochs / (self.world * self.accumulate)))

    def shares(self, rank: int, start: int, stop: int, place: Any = None) -> Iterator[Share]:
        """This rank's shares of the steps start … stop − 1; epochs follow one another without a gap.

        place: only a stream needs more than the number of a step to go on from.
        """
        size = self.world * self.accumulate
        skip, waiting, step = start * size, [], start
        epoch = 0
        while step < stop:
            batches = self.epoch(epoch)
            epoch += 1
            if skip >= len(batches):
                skip -= len(batches)
                continue
            waiting += batches[skip:]
            skip = 0
            while len(waiting) >= size and step < stop:
                group, waiting = waiting[:size], waiting[size:]
                yield Share(tuple(group[rank :: self.world]), sum(len(b) for b in group))
                step += 1
