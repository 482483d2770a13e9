"""LLaVA records to packed batches: ragged, never padded, planned so that a run can be resumed at any step.

A batch is one row of T tokens from S samples; I pictures.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from visualrwkv.config import ImagePosition, ModelConfig
from visualrwkv.text.prompt import IGNORE, IMAGE_TAG, encode_conversation
from visualrwkv.vision.processor import make_processor


@dataclass(frozen=True)
class Batch:
    """One packed row: ids, labels (T,), cu_seqlens (S+1,), and which pictures stand in it, by their paths.

    `images` are those of the pictures that the encoder still has to read, each once, or None: pixels (I, 3, H, W), in
    the order of `unread`.
    """

    ids: Tensor
    labels: Tensor
    cu_seqlens: Tensor
    images: Tensor | None
    pictures: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()

    @property
    def samples(self) -> int:
        return len(self.cu_seqlens) - 1

    def to(self, device: torch.device) -> Batch:
        images = None if self.images is None else self.images.to(device, non_blocking=True)
        ids, labels, cu_seqlens = (x.to(device) for x in (self.ids, self.labels, self.cu_seqlens))
        return replace(self, ids=ids, labels=labels, cu_seqlens=cu_seqlens, images=images)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a LLaVA JSON file; one sentence where it is none."""
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such data file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path} must hold a list of records, it holds {json.dumps(records)[:40]}")
    return records


class Conversations(Dataset):
    """The records of a LLaVA file, checked at once, so that no run stops half-way at a bad one.

    A record: {"id", "image": path or list of paths under `images` (absent: text only), "conversations": [...]}, with as
    many <image> tags as pictures. ValueError or FileNotFoundError names file, record and value. strict False: a record is
    checked when it is asked for, and there are no lengths.
    """

    def __init__(
        self,
        path: Path,
        images: Path,
        model: ModelConfig,
        image_position: ImagePosition = "middle",
        strict: bool = True,
    ):
        self.path, self.images = path, images
        self.image_tokens, self.image_position, self.template = model.image_tokens, image_position, model.template
        self.processor = make_processor(model.vision) if model.vision else None
        self.records = read_records(path)
        self.lengths: list[int] = []
        self.words: set[int] = set()  # every id that occurs
        self.answers: set[int] = set()  # every id that some answer holds
        self.read: Container[str] = ()  # pictures that need not be opened again
        for index in range(len(self.records) if strict else 0):
            ids, labels = self.encode(index)
            self.lengths.append(len(ids))
            self.words.update(ids)
            self.answers.update(labels)
        self.answers.discard(IGNORE)

    def __len__(self) -> int:
        return len(self.records)

    def name(self, index: int) -> str:
        """How to point a person at a record."""
        record = self.records[index]
        mark = record.get("id") if isinstance(record, dict) else None
        return f"{self.path}, record {index}" + (f" (id {mark})" if mark is not None else "")

    def pictures(self, index: int) -> list[Path]:
        """The picture files of a record."""
        image = self.records[index].get("image")
        names = [] if image is None else image if isinstance(image, list) else [image]
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"{self.name(index)} has an image that is no path or list of paths: {image!r:.80}")
        return [self.images / name for name in names]

    def encode(self, index: int) -> tuple[list[int], list[int]]:
        """Ids and labels of a record; errors as above."""
        record = self.records[index]
        turns = record.get("conversations") if isinstance(record, dict) else None
        if not isinstance(turns, list) or not turns:
            raise ValueError(f"{self.name(index)} has no conversations")
        for turn in turns:
            if not isinstance(turn, dict) or not all(isinstance(turn.get(k), str) for k in ("from", "value")):
                raise ValueError(f"{self.name(index)} has a turn without the texts 'from' and 'value': {turn!r:.80}")
        pictures = self.pictures(index)
        tags = sum(t["value"].count(IMAGE_TAG) for t in turns if t["from"].lower() == "human")
        if tags != len(pictures):
            raise ValueError(f"{self.name(index)} has {tags} {IMAGE_TAG} tags for {len(pictures)} pictures")
        if pictures and self.processor is None:
            raise ValueError(f"{self.name(index)} has a picture, but the model has no vision encoder")
        for picture in pictures:
            if not picture.is_file():
                raise FileNotFoundError(f"{self.name(index)}: there is no picture {picture}")
        try:
            ids, labels = encode_conversation(turns, self.template, self.image_position, self.image_tokens)
        except ValueError as error:
            raise ValueError(f"{self.name(index)}: {error}") from error
        if all(label == IGNORE for label in labels):
            raise ValueError(f"{self.name(index)} has no answer to learn from")
        return ids, labels

    def pack(self, indices: Sequence[int]) -> Batch:
        """These records side by side in one row."""
        ids: list[int] = []
        labels: list[int] = []
        bounds, pictures = [0], []
        pixels: dict[str, Tensor] = {}
        for index in indices:
            new_ids, new_labels = self.encode(index)
            ids += new_ids
            labels += new_labels
            bounds.append(len(ids))
            for picture in self.pictures(index):
                pictures.append(key := str(picture))
                try:
                    if key not in pixels and key not in self.read:
                        pixels[key] = self.processor(picture)  # type: ignore[misc]  # checked in encode
                except ValueError as error:
                    raise ValueError(f"{self.name(index)}: {error}") from error
        images = torch.stack(list(pixels.values())) if pixels else None
        rows = (torch.tensor(ids), torch.tensor(labels), torch.tensor(bounds))
        return Batch(*rows, images, tuple(pictures), tuple(pixels))

    def __getitem__(self, indices: tuple[int, ...]) -> Batch | Exception:  # type: ignore[override]
        """Pack records; what is wrong with them is returned, for it would lose its words on the way out of a worker."""
        try:
            return self.pack(indices)
        except (ValueError, OSError) as error:
            return error


def plan_epoch(lengths: Sequence[int], budget: int, seed: int, epoch: int) -> list[tuple[int, ...]]:
    """One epoch's batches: records in an order given by seed and epoch, each batch filled up to `budget` tokens.

    A record longer than the budget makes a batch of its own.
    """
    order = list(range(len(lengths)))
    random.Random(f"{seed} {epoch}").shuffle(order)
    batches: list[tuple[int, ...]] = []
    batch: list[int] = []
    room = budget
    for index in order:
        if batch and lengths[index] > room:
            batches.append(tuple(batch))
            batch, room = [], budget
        batch.append(index)
        room -= lengths[index]
    batches.append(tuple(batch))
    return batches


@dataclass(frozen=True)
class Share:
    """A rank's part of one optimiser step: its batches, and how many samples the step has over all ranks."""

    batches: tuple[tuple[int, ...], ...]
    samples: int


class Plan:
    """Which records make which step: a function of lengths, budget and seed alone, so any rank can go on at any step."""

    def __init__(self, lengths: Sequence[int], budget: int, seed: int, world: int = 1, accumulate: int = 1):
        self.lengths, self.budget, self.seed = lengths, budget, seed
        self.world, self.accumulate = world, accumulate

    def steps(self, epochs: float) -> int:
        """Optimiser steps for so many epochs."""
        batches = len(plan_epoch(self.lengths, self.budget, self.seed, 0))
        return max(1, math.ceil(batches * epochs / (self.world * self.accumulate)))

    def shares(self, rank: int, start: int, stop: int) -> Iterator[Share]:
        """This rank's shares of the steps start … stop − 1; epochs follow one another without a gap."""
        size = self.world * self.accumulate
        skip, waiting, step = start * size, [], start
        epoch = 0
        while step < stop:
            batches = plan_epoch(self.lengths, self.budget, self.seed, epoch)
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


def load_batches(data: Conversations, shares: Sequence[Share], workers: int) -> Iterator[Batch]:
    """The batches of these shares in order, loaded ahead by `workers` processes (0: in this one)."""
    keys: Any = [batch for share in shares for batch in share.batches]
    for batch in DataLoader(data, batch_size=None, sampler=keys, num_workers=workers):
        if isinstance(batch, Exception):
            raise batch
        yield batch
