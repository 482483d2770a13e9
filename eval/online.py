"""A bench's files from the Hub, fetched once and kept in its cache: the second run needs no network."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from folder import Folder
from hub import ELSEWHERE, RECIPES, Part, Recipe
from questions import read_object

from visualrwkv.config import choose

SOURCE = "source.json"
"""Beside the files: where they came from. It is written last, so files without it are not whole."""
PATIENCE = 10.0
"""Seconds that the Hub has for its first answer."""


@dataclass(frozen=True)
class Fetched:
    """A split's files, and which other splits could be had."""

    place: Path
    split: str
    others: tuple[str, ...]
    source: Mapping[str, Any]  # repository, revision
    differs: str


def offered(name: str, split: str | None) -> Recipe:
    """Where a bench comes from. FileNotFoundError where the Hub does not have it, ValueError for a split that it has not."""
    stem = name.replace("-", "_")
    if stem not in RECIPES:
        raise FileNotFoundError(f"{name}: {ELSEWHERE[stem]}; give its files with --data")
    if split:
        choose("split", split, tuple(RECIPES[stem].parts))
    return RECIPES[stem]


def fetched(name: str, split: str | None) -> Fetched:
    """The files of one split of a bench, the first where none is named. FileNotFoundError says why there are none.

    Of several processes one fetches and the others wait for its lock. If it fails or is killed, the next one tries.
    """
    from filelock import FileLock
    from huggingface_hub import constants

    stem, recipe = name.replace("-", "_"), offered(name, split)
    names = tuple(recipe.parts)
    split = split or names[0]
    place = Path(constants.HF_HOME) / "visualrwkv" / "benches" / stem / split
    if not (place / SOURCE).is_file():
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(place.parent / f".{split}.lock"):
            if not (place / SOURCE).is_file():
                fetch(recipe, name, split, place)
    others = tuple(other for other in names if other != split)
    return Fetched(place, split, others, read_object(place / SOURCE), recipe.differs)


def fetch(recipe: Recipe, name: str, split: str, place: Path) -> None:
    """Write a split's files beside their place, and move them there once they are whole."""
    part = place.with_name(f".{split}.part")
    shutil.rmtree(part, ignore_errors=True)  # what a killed process left; nobody else writes now
    try:
        folder = Folder(part)
        tables, revision = opened(name, recipe.repository, recipe.parts[split])
        print(f"{name}: fetching {split} of {recipe.repository} into {place}", file=sys.stderr, flush=True)
        counts: list[int] = []
        rows = [told(name, f"{name} {split}", recipe.repository, table, counts) for table in tables]
        try:
            recipe.write(folder, split, *rows)
        except KeyError as error:
            raise unlike(name, recipe.repository, f"a row lacks {error}") from error
        except (ValueError, TypeError) as error:
            raise unlike(name, recipe.repository, str(error)) from error
        parts = [{"config": config, "split": theirs} for config, theirs in recipe.parts[split]]
        folder.json(SOURCE, {"repository": recipe.repository, "revision": revision, "parts": parts, "rows": counts})
        shutil.rmtree(place, ignore_errors=True)
        part.replace(place)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def unlike(name: str, repository: str, why: str) -> FileNotFoundError:
    return FileNotFoundError(f"{name}: {repository} is not laid out as it was ({why}); give its files with --data")


def unreachable(name: str, repository: str, error: Exception) -> FileNotFoundError:
    words = " ".join(str(error).split())[:160] or type(error).__name__
    if isinstance(error, ModuleNotFoundError):
        return FileNotFoundError(f"{name}: {words}, which reads the Hub; pip install '.[eval]', or give --data")
    return FileNotFoundError(f"{name}: {repository} cannot be reached ({words}); give its files with --data")


def opened(name: str, repository: str, parts: tuple[Part, ...]) -> tuple[list[Any], str]:
    """The tables of a data set, their pictures not decoded, and the data set's revision."""
    try:
        return load(repository, parts)
    except Exception as error:  # a network, a Hub and a library's readers: anything
        raise unreachable(name, repository, error) from error


def load(repository: str, parts: tuple[Part, ...]) -> tuple[list[Any], str]:
    """`datasets.load_dataset` of each part, and the revision.

    Rows come over the network as they are asked for: else the library would fetch every split and store each picture once a row.
    """
    from huggingface_hub import HfApi

    revision = HfApi().dataset_info(repository, timeout=PATIENCE).sha or "main"  # fails at once where there is no Hub
    import datasets

    datasets.disable_progress_bars()
    return [
        datasets.load_dataset(repository, config, split=split, revision=revision, streaming=True)
        for config, split in parts
    ], revision


def told(name: str, title: str, repository: str, table: Any, counts: list[int]) -> Iterator[Mapping[str, Any]]:
    """The rows of a table with a bar; how many there were goes into `counts`."""
    from visualrwkv.training.progress import Bar

    splits = table.info.splits or {}
    total = splits[str(table.split)].num_examples if str(table.split) in splits else 0
    rows = iter(undecoded(table))
    counts.append(0)
    at = len(counts) - 1
    with Bar(title, total, shown=bool(total)) as bar:
        while True:
            try:
                row = next(rows)
            except StopIteration:
                break
            except Exception as error:  # as above, in the middle of a data set
                raise unreachable(name, repository, error) from error
            counts[at] += 1
            yield row
            bar.advance()
    if not counts[at]:
        raise unlike(name, repository, "it has no rows")


def undecoded(table: Any) -> Any:
    """The table with its pictures as they were published."""
    import datasets

    raw = datasets.Image(decode=False)
    for column, feature in (table.features or {}).items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(column, raw)
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            table = table.cast_column(column, datasets.Sequence(raw))
    return table
