"""Where training records come from: files and data sets, read by index and never held; workers share the mapped files."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from visualrwkv.files import read_json
from visualrwkv.training.places import SMALL, record_bounds
from visualrwkv.training.tables import TableRecords


class Readable(Protocol):
    """Records by index, as far as they are at hand."""

    path: Path

    def __getitem__(self, index: int) -> Any:
        """The record as it is stored; ValueError where that is not readable."""

    def images(self, index: int) -> Path:
        """What the record's picture paths are relative to."""

    def name(self, index: int) -> str:
        """How to point a person at the record."""

    def mark(self) -> list[Any]:
        """What changes when the records do."""


class Source(Readable, Protocol):
    """Records that are all at hand."""

    def __len__(self) -> int: ...

    def order(self, epoch: int) -> list[int]:
        """The records of an epoch, unshuffled."""


class JsonRecords:
    """The records of a LLaVA JSON or JSONL file, through a map of the file: only their places are held."""

    def __init__(self, path: Path, images: Path):
        self.path, self.folder = path, images
        self.bounds = record_bounds(path)
        self._open()

    def _open(self) -> None:
        with open(self.path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_map"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self.bounds)

    def __getitem__(self, index: int) -> Any:
        start, stop = self.bounds[index]
        try:
            return json.loads(self._map[int(start) : int(stop)])
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.path} is not valid JSON at record {index} ({error})") from error

    def images(self, index: int) -> Path:
        return self.folder

    def name(self, index: int) -> str:
        try:
            record = self[index]
        except ValueError:
            record = None
        mark = record.get("id") if isinstance(record, dict) else None
        return f"{self.path}, record {index}" + (f" (id {mark})" if mark is not None else "")

    def order(self, epoch: int) -> list[int]:
        return list(range(len(self)))

    def mark(self) -> list[Any]:
        about = os.stat(self.path)
        return [str(self.path), str(self.folder), about.st_size, about.st_mtime_ns]


class Mixture:
    """Several sources as one; a weight says how often an epoch goes over a source: 2 twice, 0.5 over half of it."""

    def __init__(self, path: Path, parts: Sequence[tuple[Source, float]]):
        self.path, self.parts = path, [source for source, _ in parts]
        self.weights = [weight for _, weight in parts]
        self.starts = np.cumsum([0, *map(len, self.parts)]).tolist()

    def __len__(self) -> int:
        return self.starts[-1]

    def _at(self, index: int) -> tuple[Source, int]:
        part = int(np.searchsorted(self.starts, index, "right")) - 1
        return self.parts[part], index - self.starts[part]

    def __getitem__(self, index: int) -> Any:
        source, place = self._at(index)
        return source[place]

    def images(self, index: int) -> Path:
        source, place = self._at(index)
        return source.images(place)

    def name(self, index: int) -> str:
        source, place = self._at(index)
        return source.name(place)

    def order(self, epoch: int) -> list[int]:
        """Each source as often as its weight says; a part of it goes on, from epoch to epoch, where the last one ended."""
        order: list[int] = []
        for start, source, weight in zip(self.starts, self.parts, self.weights):
            first, last = (round(len(source) * weight * e) for e in (epoch, epoch + 1))
            order += [start + place % len(source) for place in range(first, last)]
        return order

    def mark(self) -> list[Any]:
        return [[*source.mark(), weight] for source, weight in zip(self.parts, self.weights)]


def on_hub(path: Path) -> bool:
    """Whether this can only be the name of a data set on the Hub, "owner/name"."""
    return len(path.parts) == 2 and not path.suffix and not path.is_absolute() and not path.parent.exists()


def open_source(path: Path, images: Path) -> Source:
    """Records of a LLaVA .json or .jsonl file, a Hugging Face data set on disk or on the Hub, or a mixture.

    A mixture is a JSON object {"mixture": [{"data": path, "images": path, "weight": 1.0}, …]}, its paths relative to it.
    ValueError or FileNotFoundError names the file and what is wrong with it.
    """
    if path.is_dir() or on_hub(path) or (path.suffix in (".parquet", ".arrow") and path.exists()):
        return TableRecords(path, images)
    if path.suffix != ".jsonl" and path.exists() and path.stat().st_size < SMALL:
        with open(path, "rb") as file:
            start = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
        if start == b"{" and "mixture" in (whole := read_json(path)):
            return Mixture(path, [_part(path, item) for item in _items(path, whole["mixture"])])
    return JsonRecords(path, images)


def _items(path: Path, items: Any) -> list[Any]:
    if not isinstance(items, list) or not items:
        raise ValueError(f"{path} has no list of data sets under 'mixture'")
    return items


def _part(path: Path, item: Any) -> tuple[Source, float]:
    known = ("data", "images", "weight")
    if not isinstance(item, dict) or not isinstance(item.get("data"), str) or set(item) - set(known):
        raise ValueError(f"{path} has a part {item!r:.60}; a part has a path 'data' and may have 'images' and 'weight'")
    weight = item.get("weight", 1.0)
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 < weight < 1e6:
        raise ValueError(f"{path} gives {item['data']} the weight {weight!r}; it must be a number above 0")
    data = path.parent / item["data"]
    return open_source(data, path.parent / item["images"] if "images" in item else data.parent), float(weight)
