"""Training from a stream: which records make which step where nobody knows what will come, and how to go on in the middle."""

from __future__ import annotations

import hashlib
import json
import random
from bisect import insort
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, IterableDataset

from visualrwkv.config import ModelConfig
from visualrwkv.training.checkpoints import put
from visualrwkv.training.data import Batch, Reader
from visualrwkv.training.packing import Share, take
from visualrwkv.training.rows import Row, StreamedRows

OPENING = 64  # records that are looked at before the first step
EVERY = 64  # rows between two places from which the stream can be gone on with


@dataclass(frozen=True)
class Rows:
    """A batch of a stream: its records by their numbers; what was left out before it, told to one rank; and, at the end of a
    step, the place to go on from."""

    records: dict[int, Row]
    skipped: tuple[str, ...] = ()
    place: dict[str, Any] | None = None


class Streamed(Reader):
    """The records of a stream, of which those are at hand that come with a batch; arguments and errors are `Reader`'s."""

    source: StreamedRows
    memory = "stream.json"

    def __init__(self, path: Path, images: Path, model: ModelConfig, *how: Any, **more: Any):
        super().__init__(StreamedRows(path, images), model, *how, **more)
        self.opening = ""

    def prepare(self, kept: Path | None = None) -> None:
        """Look at the first records, for a stream of which nothing can be learned; errors as those of `Conversations`."""
        if self.opening:
            return
        lengths, problems, seen = [], [], hashlib.sha256()
        with closing(self.source.rows(0, self.seed)) as rows:
            for index, (row, _) in enumerate(islice(rows, OPENING)):
                try:
                    ids = self.look(index, row)
                except (ValueError, OSError) as error:
                    if self.bad == "error":
                        raise
                    problems.append(str(error))
                    continue
                lengths.append(len(ids))
                seen.update(np.array(ids).tobytes())
        if not lengths:
            first = f"; the first: {problems[0]}" if problems else ""
            raise ValueError(f"{self.path} has no record to learn from among its first {len(problems)}{first}")
        self.opening = (
            f"a stream of {self.source.stream.num_shards} files, the first {len(lengths)} records of "
            f"{sum(lengths) / len(lengths):,.0f} tokens"
        )
        self.seen = seen.hexdigest()

    def look(self, index: int, row: Row) -> list[int]:
        """The ids of a record that has come; errors as those of `measure`."""
        self.source.held = {index: row}
        return self.measure(index)[0]

    def kept(self, file: Path) -> bool:
        """Whether the file was left for the same stream, read in this way."""
        return file.read_text() == json.dumps(self.mark())

    def keep(self, file: Path) -> None:
        """Leave word of which stream this is."""
        put(file, json.dumps(self.mark()))

    def digest(self) -> str:
        """What all machines must have alike."""
        return f"{self.opening}, {self.seen}"

    def ids(self) -> tuple[set[int], set[int]] | None:
        """Nobody knows which ids will occur."""
        return None

    def __getitem__(self, rows: Rows | Exception) -> Batch | Exception:  # type: ignore[override]
        if isinstance(rows, Exception):
            return rows
        self.source.held = rows.records
        batch = super().__getitem__(tuple(rows.records))
        if isinstance(batch, Exception):
            return batch
        return replace(batch, skipped=rows.skipped + batch.skipped, place=rows.place)


class Window:
    """The records that wait for their batch.

    A row's turn is its number and a random delay of less than `look_ahead`; a batch begins with the record whose turn is
    first and takes the longest that still fit. An epoch ends when all of its records have been taken.
    """

    def __init__(self, data: Streamed, look_ahead: int, place: dict[str, Any] | None):
        self.data, self.look_ahead = data, look_ahead
        self.waiting: dict[int, Row] = {}
        self.window: list[tuple[int, ...]] = []  # (length, −turn, number), rising
        self.left_out: list[str] = []
        place = place or {"epoch": 0, "first": 0, "state": None, "next": 0, "waiting": []}
        self.begin(place["epoch"], place["first"], place["state"])
        waiting = set(place["waiting"])
        while self.number < place["next"]:  # what was taken before is read once more, and not looked at
            self.admit(waiting)

    def begin(self, epoch: int, first: int, state: Any = None) -> None:
        """Read on in this epoch, from the row of that number."""
        self.epoch, self.number = epoch, first
        self.places = deque([(first, state)])
        self.rows = self.data.source.rows(epoch, self.data.seed, state)

    def admit(self, only: set[int] | None = None) -> bool:
        """Let a row in, or leave it out where it fails and may; False at the epoch's end."""
        if (found := next(self.rows, None)) is None:
            return False
        row, state = found
        index, self.number = self.number, self.number + 1
        if self.number - self.places[-1][0] >= EVERY:
            self.places.append((self.number, state))
        if only is not None and index not in only:
            return True
        try:
            length = len(self.data.look(index, row))
        except (ValueError, OSError) as error:
            if self.data.bad == "error":
                raise
            self.left_out.append(str(error))
            return True
        turn = index + random.Random(f"{self.data.seed} {index}").randrange(self.look_ahead)
        self.waiting[index] = row
        insort(self.window, (length, -turn, index))
        return True

    def fill(self) -> None:
        while len(self.window) < self.look_ahead and self.admit():
            pass

    def batch(self, budget: int) -> dict[int, Row]:
        """The next batch; ValueError where a whole epoch has nothing for it."""
        self.fill()
        if not self.window:
            self.begin(self.epoch + 1, self.number)
            self.fill()
            if not self.window:
                raise ValueError(f"{self.data.path} has no record to learn from in a whole epoch")
        taken = take(self.window, max(self.window, key=lambda item: item[1:]), budget)
        room = budget - sum(item[0] for item in taken)
        if self.look_ahead == 1:  # they keep their order
            self.fill()
            while self.window and self.window[0][0] <= room:
                taken.append(self.window.pop())
                room -= taken[-1][0]
                self.fill()
        return {index: self.waiting.pop(index) for *_, index in taken}

    def place(self) -> dict[str, Any]:
        """All that is needed to go on from here: the rows since the one that has waited longest are read again."""
        oldest = min(self.waiting, default=self.number)
        while len(self.places) > 1 and self.places[1][0] <= oldest:
            self.places.popleft()
        first, state = self.places[0]
        return {
            "epoch": self.epoch,
            "first": first,
            "state": state,
            "next": self.number,
            "waiting": sorted(self.waiting),
        }


class StreamPlan:
    """The steps of a run over a stream: every rank reads all of it, makes the same plan, and takes its share.

    ahead: a process of its own reads, so that a step does not wait for the network.
    """

    def __init__(
        self, data: Streamed, budget: int, world: int = 1, accumulate: int = 1, look_ahead: int = 1, ahead: bool = False
    ):
        self.data, self.budget, self.look_ahead = data, budget, look_ahead
        self.world, self.accumulate, self.ahead = world, accumulate, ahead

    def shares(self, rank: int, start: int, stop: int, place: dict[str, Any] | None = None) -> Iterator[Share]:
        """This rank's shares of the steps start … stop − 1; place: where the step before left the stream.

        What is wrong with a record comes as the last batch: it would lose its words on the way out of a process.
        """
        steps: Any = _Steps(self, rank, stop - start, place)
        more: dict[str, Any] = {"num_workers": 1, "prefetch_factor": 2} if self.ahead else {}
        yield from DataLoader(steps, batch_size=None, **more)


class _Steps(IterableDataset):
    def __init__(self, plan: StreamPlan, rank: int, count: int, place: dict[str, Any] | None):
        self.plan, self.rank, self.count, self.place = plan, rank, count, place

    def __iter__(self) -> Iterator[Share]:
        plan = self.plan
        try:
            window = Window(plan.data, plan.look_ahead, self.place)
            for _ in range(self.count):
                group = [window.batch(plan.budget) for _ in range(plan.world * plan.accumulate)]
                mine = [Rows(records) for records in group[self.rank :: plan.world]]
                skipped, window.left_out = tuple(window.left_out), []
                mine[-1] = Rows(mine[-1].records, () if self.rank else skipped, window.place())
                yield Share(tuple(mine), sum(map(len, group)))
        except (ValueError, OSError) as error:
            yield Share((error,), 0)
