"""Where a bench's files lie: in DATA itself, or in the folder below it that they are published in."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path


def matching(data: Path, folders: Iterable[str], pattern: str) -> list[Path]:
    """The files whose whole name matches, in any case, in DATA or else in the first folder below it that has some."""
    for place in (data, *(data / folder for folder in folders)):
        if place.is_dir():
            found = [p for p in place.iterdir() if re.fullmatch(pattern, p.name, re.IGNORECASE) and p.is_file()]
            if found:
                return sorted(found)
    return []


def missing(bench: str, data: Path, tree: str) -> FileNotFoundError:
    """The error of a bench whose files are not there; `tree` shows them."""
    return FileNotFoundError(f"{data} holds none of the files of {bench}\n{tree}")


def picture(base: Path, name: str, *folders: str) -> Path:
    """A picture by its name, in `base` or a folder of it; where none has it, the likeliest place."""
    places = [base / name, *(base / folder / name for folder in folders)]
    return next((p for p in places if p.exists()), places[0 if "/" in name else -1])
