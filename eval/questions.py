"""What every bench hands out and takes back: questions, rows of answers, and the files that they are read from."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]
"""One line of an answers file: question_id, prompt, text, and whatever else."""


@dataclass(frozen=True)
class Question:
    """One question of a split; `fields` go into its row of the answers file beside question_id, prompt and text."""

    id: str  # unique within the split
    text: str  # the complete user text, suffix included, without <image>
    pictures: tuple[Path | bytes, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)


# Files ---------------------------------------------------------------------------------------------------------------


def read_json(file: Path, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """What a JSON file holds; `pairs` makes something smaller than a dict of each object. ValueError says where it is broken."""
    try:
        return json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=pairs)
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: there is no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON ({error})") from error


def read_object(file: Path, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> dict[str, Any]:
    """`read_json` of a file that is one object; ValueError for another."""
    found = read_json(file, pairs)
    if not isinstance(found, dict):
        raise ValueError(f"{file}: a {type(found).__name__} stands where an object should")
    return found


def read_objects(file: Path) -> list[dict[str, Any]]:
    """`read_json` of a file that is a list of objects; ValueError for another."""
    found = read_json(file)
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise ValueError(f"{file} is not a list of objects")
    return found


def read_jsonl(file: Path) -> list[Row]:
    """The objects of a JSONL file, one a line. Only "\\n" ends a line: U+2028 and its like may stand inside strings."""
    rows = []
    try:
        with open(file, encoding="utf-8", newline="\n") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"{file}, line {number}: a {type(row).__name__} stands where an object should")
                rows.append(row)
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: there is no such file") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}, line {number}: this is not valid JSON ({error})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error})") from error
    return rows


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """`with whole(file) as part:` write to `part`; the file gets its name only once it is complete.

    Several processes may write the same file at once: each has a part of its own.
    """
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield part
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def write_json(file: Path, value: Any) -> Path:
    """Write a JSON file whole."""
    with whole(file) as part:
        part.write_text(json.dumps(value), encoding="utf-8")
    return file


# Answers and the questions they belong to --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Matched:
    """The answers to a split's questions, and what does not fit."""

    answers: dict[str, str]  # id -> text, in the order of the questions; of a doubled id the last
    count: int  # questions of the split
    missing: list[str]  # questions without an answer
    doubled: list[str]  # ids with several answers
    foreign: list[str]  # ids that the split does not have

    def amiss(self) -> str:
        """What does not fit, with counts and an example of each; empty where all fits."""
        kinds = {
            f"of {self.count} questions have no answer": self.missing,
            "ids have several answers": self.doubled,
            "answers are to no question of this split": self.foreign,
        }
        return ", ".join(f"{len(ids)} {what} (as {ids[0]})" for what, ids in kinds.items() if ids)


def match(rows: Iterable[Row], ids: Iterable[Any]) -> Matched:
    """Give each question id its answer; an id is the same as a number and as a string."""
    given: dict[str, str] = {}
    doubled: dict[str, None] = {}
    for row in rows:
        name = str(row["question_id"])
        if name in given:
            doubled[name] = None
        given[name] = row["text"]
    wanted = dict.fromkeys(map(str, ids))
    return Matched(
        {name: given[name] for name in wanted if name in given},
        len(wanted),
        [name for name in wanted if name not in given],
        list(doubled),
        [name for name in given if name not in wanted],
    )


def fitted(bench: str, rows: Sequence[Row], ids: Iterable[Any], otherwise: str) -> Matched:
    """`match`, and a note of what does not fit and what comes of it. ValueError where no answer fits at all."""
    found = match(rows, ids)
    if rows and not found.answers:
        raise ValueError(
            f"{bench}: none of the {len(rows)} answers is to one of the {found.count} questions (as {found.foreign[0]}); "
            "are they of another split?"
        )
    if found.amiss():
        note(f"{bench}: {found.amiss()}; {otherwise}")
    return found


NOTES: list[str] = []
"""What `note` said in this process."""


def note(sentence: str) -> None:
    """Say once what the reader of a score must know; stdout belongs to the scores."""
    if sentence not in NOTES:
        NOTES.append(sentence)
        print(f"note: {sentence}", file=sys.stderr)
