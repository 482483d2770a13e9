"""Labelled pictures: a directory for each class, or a Hugging Face data set; a part to train on and a part to check with.

What is wrong with a picture is said when it is opened, in one sentence that names it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from visualrwkv.training.sources import on_hub
from visualrwkv.vision.processor import open_picture

TRAIN, CHECK = "train", ("val", "valid", "validation", "test")
"""Names of the parts: as directories, and as the splits of a data set; of several to check with the first there is."""
SHOWN, LABELS = ("image", "img", "picture"), ("label", "labels", "class", "fine_label")
"""Names of columns that a data set is searched for, in this order."""
KINDS = (".parquet", ".arrow")

Labels = npt.NDArray[np.int64]


class Labelled(Protocol):
    """Pictures by index, each of one of the classes."""

    classes: list[str]
    labels: Labels

    def open(self, index: int) -> Image.Image:
        """The picture in RGB; ValueError or FileNotFoundError names it."""

    def name(self, index: int) -> str:
        """How to point a person at it."""


@dataclass(frozen=True)
class Part:
    """Some of the pictures: rows of `source`, and each one's class as the training part counts them."""

    source: Labelled
    rows: Labels
    labels: Labels

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Pictures:
    """What is trained on, what it is checked with, and the names of the classes."""

    train: Part
    check: Part
    classes: list[str]


def open_pictures(path: Path, held_out: float = 0.1, columns: tuple[str, str] = ("", "")) -> Pictures:
    """A directory with a directory of pictures for each class, or `train` and `val` with such ones; or a data set.

    A data set is what `datasets` reads of a directory of parquet or arrow files or of "owner/name" on the Hub; columns: of
    its picture and its label, where they are not found by their names. Without a part to check with, `held_out` of each
    class is kept for it, always the same. ValueError or FileNotFoundError names what is missing.
    """
    parts = _folders(path) if path.is_dir() and not _is_table(path) else _tables(path, columns)
    whole = next(iter(parts.values()))
    _check_classes(path, whole)
    every = np.arange(len(whole.labels))
    if len(parts) == 1:
        kept = _held_out(whole.labels, held_out)
        rows = every[~kept], every[kept]
        train, check = (Part(whole, part, whole.labels[part]) for part in rows)
        return Pictures(train, check, whole.classes)
    other = list(parts.values())[1]
    if unknown := [name for name in other.classes if name not in whole.classes]:
        raise ValueError(f"{path}: there are pictures of the class {unknown[0]!r} to check with, but none to train on")
    if not len(other.labels):
        raise ValueError(f"{path}: there is no picture to check with in {list(parts)[1]}")
    places = np.array([whole.classes.index(name) for name in other.classes])
    return Pictures(
        Part(whole, every, whole.labels),
        Part(other, np.arange(len(other.labels)), places[other.labels]),
        whole.classes,
    )


def _check_classes(path: Path, source: Labelled) -> None:
    """ValueError unless there are two classes at least, and two pictures of each."""
    if len(source.classes) < 2:
        raise ValueError(f"{path} has a single class, {source.classes[0]!r}; there must be at least two to tell apart")
    counts = np.bincount(source.labels, minlength=len(source.classes))
    for count, said in ((0, "no picture"), (1, "a single picture")):
        if few := [name for name, n in zip(source.classes, counts) if n == count]:
            also = f" (and {len(few) - 1} more classes)" if len(few) > 1 else ""
            raise ValueError(
                f"{path}: the class {few[0]!r} has {said}{also}; each needs two at least, one to train on and one to check with"
            )


def _held_out(labels: Labels, share: float) -> npt.NDArray[np.bool_]:
    """Which pictures are kept to check with: so much of each class, at least one and never all."""
    chance = np.random.default_rng(0)  # not the run's seed: runs are compared on the same pictures
    kept = np.zeros(len(labels), bool)
    for label in range(int(labels.max()) + 1):
        mine = np.flatnonzero(labels == label)
        count = min(max(round(share * len(mine)), 1), len(mine) - 1)
        kept[chance.permutation(mine)[:count]] = True
    return kept


# Directories ---------------------------------------------------------------------------------------------------------


class Folder:
    """A directory for each class: the pictures in it and below it, by the endings that torchvision knows."""

    def __init__(self, path: Path):
        from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

        self.classes = _inside(path)
        places = {name: place for place, name in enumerate(self.classes)}
        self.samples = make_dataset(str(path), places, IMG_EXTENSIONS, allow_empty=True) if places else []
        self.labels = np.array([label for _, label in self.samples], np.int64)

    def open(self, index: int) -> Image.Image:
        return open_picture(self.samples[index][0])

    def name(self, index: int) -> str:
        return str(self.samples[index][0])


def _inside(path: Path) -> list[str]:
    """The directories in it that are not hidden."""
    return sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _folders(path: Path) -> dict[str, Labelled]:
    """The parts of a directory: `train` and one to check with, or one that has the classes in it."""
    inside = _inside(path)
    split = TRAIN in inside and set(inside) <= {TRAIN, *CHECK}
    names = [TRAIN, *(name for name in CHECK if name in inside)][:2] if split else ["."]
    for name in names:
        if not _inside(path / name):
            raise ValueError(
                f"{path / name} has no classes: it must hold a directory of pictures for each class, or the directories train "
                "and val with such ones"
            )
    return {name: Folder(path / name) for name in names}


# Data sets -----------------------------------------------------------------------------------------------------------


class Table:
    """The rows of a Hugging Face data set with a column of pictures and one of labels."""

    def __init__(self, path: Path, part: str, table: Any, columns: tuple[str, str]):
        import datasets

        self.path, self.part = path, part
        shown, labels = (
            _column(path, table.column_names, *found) for found in zip(columns, (SHOWN, LABELS), ("pictures", "labels"))
        )
        self.column = shown
        if isinstance(table.features[shown], datasets.Image):
            table = table.cast_column(shown, datasets.Image(decode=False))  # we open it, and can say which one it was
        self.table = table
        values = table.select_columns([labels])[:][labels]
        if missing := [i for i, value in enumerate(values) if value is None or value == -1]:
            raise ValueError(f"{self.name(missing[0])} has no label in column {labels}")
        there = sorted(set(values))  # of the names that a data set has for its labels, those that occur
        names = getattr(table.features[labels], "names", None)
        self.classes = [names[value] if names else str(value) for value in there]
        self.labels = np.searchsorted(there, values).astype(np.int64)

    def open(self, index: int) -> Image.Image:
        value = self.table[index][self.column]
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if value is None:
            raise ValueError(f"{self.name(index)} has no picture in column {self.column}")
        try:
            return open_picture(value)
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"{self.name(index)}: {error}") from error

    def name(self, index: int) -> str:
        return f"{self.path}, {self.part}, row {index}"


def _column(path: Path, there: Sequence[str], asked: str, usual: Sequence[str], what: str) -> str:
    found = [name for name in ([asked] if asked else usual) if name in there]
    if not found:
        option = "--image-column" if what == "pictures" else "--label-column"
        wanted = f"{asked!r}" if asked else " or ".join(usual)
        raise ValueError(f"{path} has no column {wanted} of {what}; name one of {', '.join(there)} with {option}")
    return found[0]


def _is_table(path: Path) -> bool:
    """Whether a directory holds a data set rather than pictures."""
    if any((path / name).exists() for name in ("dataset_dict.json", "state.json")):
        return True
    return any(next(path.glob(place + kind), None) for kind in KINDS for place in ("*", "*/*"))


def _tables(path: Path, columns: tuple[str, str]) -> dict[str, Labelled]:
    import datasets

    datasets.disable_progress_bars()
    if not path.exists() and not on_hub(path):
        raise FileNotFoundError(f"{path}: there is no such directory of pictures, and it is no name of a data set")
    try:
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            found = datasets.load_from_disk(str(path))
        elif path.is_file() and path.suffix in KINDS:
            found = datasets.load_dataset(path.suffix[1:], data_files=str(path))
        else:
            found = datasets.load_dataset(str(path))
    except Exception as error:  # a network, a Hub and a library's readers: anything
        words = " ".join(str(error).split())[:160]
        raise ValueError(f"{path} cannot be read as a data set ({words})") from error
    splits = found if isinstance(found, dict) else {TRAIN: found}
    if TRAIN not in splits:
        raise ValueError(f"{path} has the splits {', '.join(splits)}; one of them must be {TRAIN}")
    names = [TRAIN, *(name for name in CHECK if name in splits)][:2]
    return {name: Table(path, name, splits[name], columns) for name in names}
