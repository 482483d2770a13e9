"""Records to packed batches: ragged, never padded, checked before a run begins.

A batch is one row of T tokens from S samples; I pictures.
"""

from __future__ import annotations

import random
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from visualrwkv.config import ModelConfig, choose
from visualrwkv.text.prompt import IGNORE, PLACEHOLDER, encode_conversation
from visualrwkv.training.index import Index, make_index
from visualrwkv.training.packing import Share
from visualrwkv.training.recipes import POSITIONS, Policy, Position
from visualrwkv.training.records import Record, Stored, read_record
from visualrwkv.training.sources import Readable, Source, open_source
from visualrwkv.training.tables import Cell
from visualrwkv.vision.processor import make_processor


@dataclass(frozen=True)
class Batch:
    """One packed row: ids, labels (T,), cu_seqlens (S+1,), and which pictures stand in it, by their names.

    `images` are those of the pictures that the encoder still has to read, each once, or None: pixels (I, 3, H, W), in
    the order of `unread`. `records` are those in the row, `skipped` those that should be and could not be read; `place` is
    where a stream goes on after the step that this batch ends.
    """

    ids: Tensor
    labels: Tensor
    cu_seqlens: Tensor
    images: Tensor | None
    pictures: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    records: tuple[int, ...] = ()
    skipped: tuple[str, ...] = ()
    place: dict[str, Any] | None = None

    @property
    def samples(self) -> int:
        return len(self.cu_seqlens) - 1

    def to(self, device: torch.device) -> Batch:
        images = None if self.images is None else self.images.to(device, non_blocking=True)
        ids, labels, cu_seqlens = (x.to(device) for x in (self.ids, self.labels, self.cu_seqlens))
        return replace(self, ids=ids, labels=labels, cu_seqlens=cu_seqlens, images=images)


class Reader(Dataset):
    """Records as the model reads them.

    ValueError or FileNotFoundError names file, record and value. longest: a record of more tokens is cut after its last
    answer that fits (0: none is cut); bad: what to do about a record that fails; frames: of a video.
    """

    def __init__(
        self,
        source: Readable,
        model: ModelConfig,
        image_position: Position = "middle",
        longest: int = 0,
        bad: Policy = "error",
        frames: int = 8,
        seed: int = 0,
    ):
        choose("image_position", image_position, POSITIONS)
        choose("bad", bad, ("error", "skip"))
        self.source, self.path = source, source.path
        self.image_tokens, self.image_position, self.template = model.image_tokens, image_position, model.template
        self.longest, self.bad, self.frames, self.seed = longest, bad, frames, seed
        self.processor = make_processor(model.vision) if model.vision else None
        self.read: Container[str] = ()  # pictures that need not be opened again

    def mark(self) -> list[Any]:
        """What is known of the records depends on this."""
        seed = self.seed if self.image_position == "mixed" else 0
        how = [self.image_tokens, self.image_position, self.template, self.longest, self.bad, self.frames, seed]
        return [self.source.mark(), *how, self.processor is not None]

    def name(self, index: int) -> str:
        """How to point a person at a record."""
        return self.source.name(index)

    def position(self, index: int) -> Any:
        """Where a record's pictures stand."""
        if self.image_position != "mixed":
            return self.image_position
        return random.Random(f"{self.seed} {index}").choice(("first", "middle"))

    def encode(self, index: int) -> tuple[list[int], list[int], tuple[Stored, ...], bool]:
        """Ids and labels of a record, its pictures, and whether it was cut; errors as above."""
        record = read_record(self.source, index, self.frames)
        if record.pictures and self.processor is None:
            raise ValueError(f"{self.name(index)} has a picture, but the model has no vision encoder")
        try:
            ids, labels = encode_conversation(record.turns, self.template, self.position(index), self.image_tokens)
        except ValueError as error:
            raise ValueError(f"{self.name(index)}: {error}") from error
        if max(labels, default=IGNORE) == IGNORE:
            raise ValueError(f"{self.name(index)} has no answer to learn from")
        if self.longest and len(ids) > self.longest:
            return *self.cut(index, ids, labels, record), True
        return ids, labels, record.pictures, False

    def cut(
        self, index: int, ids: list[int], labels: list[int], record: Record
    ) -> tuple[list[int], list[int], tuple[Stored, ...]]:
        """A record up to the last answer that ends within `longest` tokens."""
        learned = np.array([*labels, IGNORE]) != IGNORE
        ends = np.flatnonzero(learned[:-1] & ~learned[1:]) + 1
        end = int(ends[ends <= self.longest].max(initial=0))
        if not end:
            raise ValueError(
                f"{self.name(index)} needs {ends[0]} tokens up to the end of its first answer, more than the budget of "
                f"{self.longest}"
            )
        pictures = ids[:end].count(PLACEHOLDER[self.template]) // self.image_tokens
        return ids[:end], labels[:end], record.pictures[:pictures]

    def measure(self, index: int) -> tuple[list[int], list[int], bool]:
        """As `encode`, and that the pictures are there."""
        ids, labels, pictures, cut = self.encode(index)
        for picture in pictures:
            if isinstance(picture, Path) and not picture.is_file():
                raise FileNotFoundError(f"{self.name(index)}: there is no picture {picture}")
        return ids, labels, cut

    def pack(self, indices: Sequence[int]) -> Batch:
        """These records side by side in one row."""
        ids: list[int] = []
        labels: list[int] = []
        bounds, pictures, records, skipped = [0], [], [], []
        pixels: dict[str, Tensor] = {}
        for index in indices:
            try:
                new_ids, new_labels, shown, _ = self.encode(index)
                new = {str(p): self.pixels(index, p) for p in shown if not (str(p) in pixels or str(p) in self.read)}
            except (ValueError, OSError) as error:
                if self.bad == "error":
                    raise
                skipped.append(str(error))
                continue
            pixels |= new
            ids += new_ids
            labels += new_labels
            bounds.append(len(ids))
            pictures += [str(picture) for picture in shown]
            records.append(index)
        if not records:
            raise ValueError(f"none of the records of a batch can be read; the first: {skipped[0]}")
        images = torch.stack(list(pixels.values())) if pixels else None
        rows = (torch.tensor(ids), torch.tensor(labels), torch.tensor(bounds))
        return Batch(*rows, images, tuple(pictures), tuple(pixels), tuple(records), tuple(skipped))

    def pixels(self, index: int, picture: Stored) -> Tensor:
        """A picture as the encoder sees it (3, H, W)."""
        try:
            return self.processor(picture.read() if isinstance(picture, Cell) else picture)  # type: ignore[misc]
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"{self.name(index)}: {error}") from error

    def __getitem__(self, indices: tuple[int, ...]) -> Batch | Exception:  # type: ignore[override]
        """Pack records; what is wrong with them is returned, for it would lose its words on the way out of a worker."""
        try:
            return self.pack(indices)
        except (ValueError, OSError) as error:
            return error


class Conversations(Reader):
    """The records of a data file or set, all at hand.

    `index` holds every record's length once `prepare` has looked at them, so that no run stops half-way at a bad one.
    """

    source: Source
    index: Index
    memory = "index.npz"

    def __init__(self, path: Path, images: Path, model: ModelConfig, *how: Any, **more: Any):
        super().__init__(open_source(path, images), model, *how, **more)

    def __len__(self) -> int:
        return len(self.source)

    def prepare(self, kept: Path | None = None, workers: int = 0) -> Index:
        """Look at all records, or at what an earlier look left in the file `kept`; nothing is written.

        ValueError names the first bad record, unless bad ones are to be skipped, and a set without anything to learn.
        """
        index = Index.load(kept, self.mark()) if kept else None
        if index is None:
            index = make_index(self.measure, len(self), workers)
            if self.bad == "error" and index.problems:
                more = len(index.problems) - 1
                also = f"; {more} more records fail, and --bad skip leaves them all out" if more else ""
                raise ValueError(index.problems[0][1] + also)
            if not index.answers.any():
                first = f"; the first of them: {index.problems[0][1]}" if index.problems else ""
                raise ValueError(f"{self.path} has no record with an answer to learn from{first}")
        self.index = index
        return index

    def kept(self, file: Path) -> bool:
        """Whether the file holds an index of these records, read in this way."""
        return Index.load(file, self.mark()) is not None

    def keep(self, file: Path) -> None:
        """Leave the index for `prepare`."""
        self.index.save(file, self.mark())

    def digest(self) -> str:
        """What all machines must have alike."""
        return f"{len(self):,} records, {self.index.mark()}"

    def ids(self) -> tuple[set[int], set[int]] | None:
        """Which ids occur in answers, and which at all; None where nobody knows."""
        answers, words = (set(seen.nonzero()[0].tolist()) for seen in (self.index.answers, self.index.words))
        return answers, words

    @property
    def lengths(self) -> list[int]:
        """Tokens of each record; 0 for one that is left out."""
        return self.index.lengths.tolist()


def load_batches(data: Reader, shares: Iterable[Share], workers: int) -> Iterator[Batch]:
    """The batches of these shares in order, loaded ahead by `workers` processes (0: in this one)."""
    keys: Any = (batch for share in shares for batch in share.batches)
    for batch in DataLoader(data, batch_size=None, sampler=keys, num_workers=workers):
        if isinstance(batch, Exception):
            raise batch
        yield batch
