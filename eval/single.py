"""VLMEvalKit's tables of plain multiple choice: every question is asked once, answers are matched as in MMBench."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from choices import DIRECTLY, listed
from places import matching, missing
from questions import Question, Row, fitted
from tables import Cells, accuracies, decode_pictures, options_of, read_table, right


def table(data: Path, bench: str, tree: str) -> Path:
    found = matching(data, (bench,), rf"{bench}.*\.tsv")
    if not found:
        raise missing(bench, data, tree)
    return found[0]


def load(file: Path) -> list[Question]:
    """LLaVA's prompt: hint, question, options where the table has them, and to answer with the letter."""
    rows = read_table(file, pictures=True)
    questions = []
    for row, picture in zip(rows, decode_pictures(file, rows)):
        lines = [text for name in ("hint", "question") if (text := row.get(name))]
        options = options_of(row)
        text = "\n".join(lines) + listed(options.values()) + (f"\n{DIRECTLY}" if options else "")
        index = row["index"] or ""
        questions.append(Question(index, text, (picture,), {"image": index, "answer": row["answer"]}))
    return questions


def hits(
    file: Path, rows: list[Row], bench: str, only: Collection[str] | None = None
) -> tuple[list[Cells], list[bool]]:
    asked = [row for row in read_table(file) if only is None or row["index"] in only]
    otherwise = "of several the last is taken; a missing answer is read as 'nan' and scored as that"
    found = fitted(bench, rows, [row["index"] for row in asked], otherwise)
    return asked, [right(row, found.answers.get(row["index"] or "")) for row in asked]


def score(file: Path, rows: list[Row], bench: str, only: Collection[str] | None = None) -> dict[str, Any]:
    """Accuracy, 0 to 1: overall and of each category."""
    return accuracies(*hits(file, rows, bench, only))


def per_question(file: Path, rows: list[Row], bench: str, only: Collection[str] | None = None) -> dict[str, float]:
    return {row["index"] or "": float(hit) for row, hit in zip(*hits(file, rows, bench, only))}
