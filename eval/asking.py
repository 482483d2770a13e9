"""Ask a bench's questions, in batches and over ranks, and keep the answers through crashes.

Of a split there lie in OUT: STEM.jsonl with all rows in the order of the questions, STEM.rank0.jsonl … while they are being
answered, and STEM.settings.json, which says under which settings, so that no two are mixed.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from questions import Question, Row, read_json, whole, write_json

WAIT = 0.2
"""Seconds between looks at what other ranks have answered."""


@dataclass(frozen=True)
class Rank:
    """Which of how many processes this is; `torchrun` and `deepspeed` say so in the environment."""

    number: int = 0
    count: int = 1

    @classmethod
    def here(cls) -> Rank:
        return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def batches(questions: Sequence[Question], size: int) -> list[list[Question]]:
    """Questions about one picture together, at most `size` in a batch.

    A batch depends on the questions alone, not on ranks or on what is answered: the same batch gives the same answers.
    """
    about: dict[tuple[Path | bytes, ...] | str, list[Question]] = {}
    for question in questions:
        about.setdefault(question.pictures or question.id, []).append(question)
    found: list[list[Question]] = [[]]
    for group in about.values():
        for start in range(0, len(group), size):
            part = group[start : start + size]
            if len(found[-1]) + len(part) > size:
                found.append([])
            found[-1] += part
    return [batch for batch in found if batch]


def digest(questions: Sequence[Question]) -> str:
    """Twelve hex digits that name a bench's questions, wherever their files lie."""
    found = hashlib.sha256()
    for question in questions:
        pictures = [p.name if isinstance(p, Path) else f"{zlib.crc32(p):08x}" for p in question.pictures]
        found.update(json.dumps([question.id, question.text, pictures]).encode())
    return found.hexdigest()[:12]


class Kept:
    """The rows that are in a split's files so far, whoever wrote them."""

    def __init__(self, out: Path, stem: str):
        self.out, self.stem = out, stem
        self.file, self.settings = out / f"{stem}.jsonl", out / f"{stem}.settings.json"
        self.rows: dict[str, Row] = {}
        self._read: dict[Path, int] = {}
        self.update()

    def parts(self) -> list[Path]:
        """The files that ranks append to."""
        return sorted(self.out.glob(f"{self.stem}.rank*.jsonl"))

    def update(self) -> None:
        """Read what was added since; a line that has no end yet does not count."""
        for file in [self.file, *self.parts()]:
            if not file.exists():
                continue
            with open(file, "rb") as lines:
                lines.seek(self._read.get(file, 0))
                new = lines.read()
            new = new[: new.rfind(b"\n") + 1]
            self._read[file] = self._read.get(file, 0) + len(new)
            for line in new.split(b"\n"):
                if row := parsed(line):
                    self.rows.setdefault(row["question_id"], row)

    def agree(self, settings: Mapping[str, Any]) -> None:
        """Note the settings, whichever rank comes first; ValueError where there are answers under others."""
        before = read_json(self.settings) if self.settings.exists() else {}
        if self.rows and before != settings:
            names = [name for name in settings if settings[name] != before.get(name)]
            told = ", ".join(f"{name} {before.get(name, 'unknown')} instead of {settings[name]}" for name in names)
            raise ValueError(
                f"{self.file} holds answers under other settings ({told}); give another --out, or delete {self.stem}.* there"
            )
        if before != settings:
            write_json(self.settings, settings)

    @contextmanager
    def adding(self, rank: Rank) -> Iterator[IO[str]]:
        """The rank's own file, to append to, without the line that a crash may have cut."""
        file = self.out / f"{self.stem}.rank{rank.number}.jsonl"
        if file.exists():
            content = file.read_bytes()
            os.truncate(file, content.rfind(b"\n") + 1)
        with open(file, "a", encoding="utf-8", newline="\n") as lines:
            yield lines

    def merge(self, questions: Sequence[Question]) -> None:
        """All rows into one file, in the order of the questions."""
        with whole(self.file) as part, open(part, "w", encoding="utf-8", newline="\n") as lines:
            lines.writelines(dumped(self.rows[q.id]) for q in questions if q.id in self.rows)
        for file in self.parts():
            file.unlink()


def parsed(line: bytes) -> Row | None:
    """A row, or None for a line that a crash left in pieces."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "question_id" in row and "text" in row else None


def dumped(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def ask(
    questions: Sequence[Question],
    limit: int,
    answer: Callable[[list[Question]], list[str]],
    size: int,
    out: Path,
    stem: str,
    settings: Mapping[str, Any],
    rank: Rank,
) -> list[Row]:
    """The rows of the first `limit` questions (0: all), answered where they are not yet; on ranks but the first, none.

    Ranks take turns at the batches and need no word from each other: the first one reads the others' files.
    """
    from visualrwkv.training.progress import Bar

    out.mkdir(parents=True, exist_ok=True)
    kept = Kept(out, stem)
    kept.agree(dict(settings) | {"questions": digest(questions)})
    wanted = {question.id for question in (questions[:limit] if limit else questions)}
    mine = [[q for q in batch if q.id in wanted] for batch in batches(questions, size)[rank.number :: rank.count]]
    left = sum(q.id not in kept.rows for batch in mine for q in batch)
    total = sum(map(len, mine))
    if left:
        with Bar(stem, total, total - left, shown=rank.number == 0) as bar, kept.adding(rank) as lines:
            for batch in mine:
                new = {q.id for q in batch if q.id not in kept.rows}
                if not new:
                    continue
                rows = [
                    {"question_id": q.id, "prompt": q.text, "text": text, **q.fields}
                    for q, text in zip(batch, answer(batch), strict=True)
                ]
                lines.write("".join(dumped(row) for row in rows if row["question_id"] in new))
                lines.flush()
                bar.advance(len(new))
    if rank.number:
        return []
    kept.update()
    if missing := len(wanted - kept.rows.keys()):
        print(f"{stem}: waiting for {missing} answers of the other ranks", file=sys.stderr, flush=True)
    while not wanted <= kept.rows.keys():
        time.sleep(WAIT)
        kept.update()
    if kept.parts():
        kept.merge(questions)
    return [kept.rows[question.id] for question in questions if question.id in wanted]
