"""LLaVA's conventions, which VisualRWKV shares: suffixes, question files, and where in DATA official files lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from questions import Row, read_jsonl

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def find(data: Path, *names: str) -> Path | None:
    """The first of these files that lies in DATA; names may go through folders."""
    return next((data / name for name in names if (data / name).is_file()), None)


def need(data: Path, tree: str, *names: str) -> Path:
    """`find`, or FileNotFoundError with the tree of files that the bench needs."""
    found = find(data, *names)
    if found is None:
        raise FileNotFoundError(f"{data} does not hold {names[0]}\n{tree}")
    return found


def folder(data: Path, *names: str) -> Path:
    """The first of these folders that there is; the first of all where there is none, for an error that names it."""
    return next((data / name for name in names if (data / name).is_dir()), data / names[0])


def question_rows(file: Path, keys: Sequence[str] = ("question_id", "image", "text")) -> list[Row]:
    """The rows of a LLaVA question file; ValueError for one that lacks a key."""
    rows = read_jsonl(file)
    for number, row in enumerate(rows, 1):
        for key in keys:
            if key not in row:
                raise ValueError(f"{file}, question {number} has no {key}")
    return rows
