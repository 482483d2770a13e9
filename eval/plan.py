"""Which benches are asked for, where their files lie (in DATA, or fetched from the Hub), and which of their splits are taken."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from asking import Rank
from online import fetched, offered
from questions import note

from visualrwkv.config import choose

BENCHES = tuple(sorted(p.stem for p in (Path(__file__).parent / "benches").glob("*.py")))


@dataclass(frozen=True)
class Bench:
    """A bench, its files, and which of its splits are asked."""

    name: str  # as it was asked for
    code: ModuleType
    data: Path
    splits: tuple[str, ...]
    source: Mapping[str, Any] = field(default_factory=dict)  # of fetched files: where from, and where they lie

    @property
    def stem(self) -> str:
        """What its files in OUT begin with."""
        return self.name.replace("-", "_")


def planned(bench: str, data: Path | None, split: str | None) -> list[Bench]:
    """The benches that are asked for, their files fetched where no DATA is given; FileNotFoundError with the trees of their
    files where these are missing."""
    names = bench.split(",")
    for name in names:
        choose("bench", name.replace("-", "_"), BENCHES)
    codes = {name: importlib.import_module(f"benches.{name.replace('-', '_')}") for name in names}
    if data is None:
        try:
            for name in names:
                offered(name, split)  # all of them, before the first is fetched
            return [from_hub(code, name, split) for name, code in codes.items()]
        except FileNotFoundError as error:
            trees = "\n".join(code.TREE for code in codes.values())
            raise FileNotFoundError(f"{error}\n{trees}") from error
    benches = []
    for name, code in codes.items():
        place = placed(code, name, data)
        found = code.splits(place)
        if split:
            choose("split", split, tuple(found))
            taken = [split]
        elif getattr(code, "EVERY_SPLIT", False):
            taken = found
        else:
            taken = found[:1]
            if len(found) > 1 and Rank.here().number == 0:
                note(f"{name}: split {found[0]} is taken; there are also the files of {', '.join(found[1:])} (--split)")
        benches.append(Bench(name, code, place, tuple(taken)))
    return benches


def from_hub(code: ModuleType, name: str, split: str | None) -> Bench:
    """A bench of the Hub's rows; what is different in them is said."""
    files = fetched(name, split)
    if files.split not in code.splits(files.place):
        raise FileNotFoundError(
            f"{files.place} does not hold split {files.split} of {name}; delete it to fetch it again"
        )
    if Rank.here().number == 0:
        words = (
            f"{name}: split {files.split} is taken from {files.source['repository']}, whose files lie in {files.place}"
        )
        words += f"; {files.differs}" if files.differs else ""
        note(words + (f"; there are also {', '.join(files.others)} (--split)" if files.others and not split else ""))
    source = {name: files.source[name] for name in ("repository", "revision")} | {"data": str(files.place)}
    return Bench(name, code, files.place, (files.split,), source)


def placed(code: ModuleType, name: str, data: Path) -> Path:
    """DATA, or the folder of it that has the bench's name, as where several benches lie side by side."""
    for place in (data / name, data / name.replace("-", "_")):
        try:
            if place.is_dir() and code.splits(place):
                return place
        except FileNotFoundError:
            continue
    return data


def arranged(bench: Bench, by_split: dict[str, Any]) -> Any:
    """The scores of one split stand for themselves, but where a bench is about its splits."""
    return by_split if getattr(bench.code, "EVERY_SPLIT", False) else next(iter(by_split.values()))


@contextmanager
def published(bench: Bench) -> Iterator[None]:
    """A field that a file of DATA lacks is the file's fault, and said so."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{bench.name}: a file in {bench.data} is not as it is published, it lacks {error}") from error
