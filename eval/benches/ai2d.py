"""`ai2d`: four options about a diagram. No official scorer for generated answers: the score is lmms-eval's."""

from __future__ import annotations

import re
import string
from collections.abc import Collection
from pathlib import Path
from typing import Any

from choices import DIRECTLY, LETTERS, infer, listed
from places import matching, missing, picture
from questions import Question, Row, fitted, read_jsonl

TREE = """\
DATA/                              or DATA/ai2d/
  ai2d_test.jsonl                  3,088 rows: question_id, image, question, options (a list), answer (an index)
  images/                          diagrams; whether their labels are masked moves the score by many points"""
OPENING = re.compile(r"\s*([A-Z])\.")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def table(data: Path) -> Path:
    found = matching(data, ("ai2d", "AI2D"), r"ai2d.*\.jsonl")
    if not found:
        raise missing("ai2d", data, TREE)
    return found[0]


def splits(data: Path) -> list[str]:
    table(data)  # an error where it is missing
    return ["test"]


def load(data: Path, split: str) -> list[Question]:
    """lmms-eval's prompt: question, options, and to answer with the letter."""
    file = table(data)
    return [
        Question(
            str(row["question_id"]),
            f"{row['question']}{listed(row['options'])}\n{DIRECTLY}",
            (picture(file.parent, row["image"], "images"),),
            {"image": row["image"]},
        )
        for row in read_jsonl(file)
    ]


def reduced(text: str) -> str:
    """Case and punctuation do not matter; space does."""
    return text.lower().translate(NO_PUNCTUATION)


def opening(answer: str) -> str:
    """The letter that an answer opens with if a full stop follows; else the whole answer."""
    found = OPENING.match(answer)
    return found[1] if found else answer


def answered(data: Path, rows: list[Row], only: Collection[str] | None = None) -> list[tuple[Row, str, str]]:
    """(question, its right letter, its answer)."""
    asked = [row for row in read_jsonl(table(data)) if only is None or str(row["question_id"]) in only]
    otherwise = "of several the last is taken, and a missing answer counts as wrong; lmms-eval asks every question once"
    found = fitted("ai2d", rows, [row["question_id"] for row in asked], otherwise)
    return [(row, LETTERS[int(row["answer"])], found.answers.get(str(row["question_id"]), "")) for row in asked]


def score(data: Path, split: str, rows: list[Row], only: Collection[str] | None = None) -> dict[str, float]:
    """Accuracy in per cent: exact match, without case and punctuation, of the opening letter or the whole answer."""
    hits = per_question(data, split, rows, only)
    return {"accuracy": sum(hits.values()) / len(hits) * 100, "n": len(hits)}


def more(data: Path, split: str, rows: list[Row], only: Collection[str] | None = None) -> dict[str, Any]:
    """What VLMEvalKit would report with its exact matching."""
    hits = [
        infer(text, dict(zip(LETTERS, row["options"]))) == letter for row, letter, text in answered(data, rows, only)
    ]
    return {"vlmevalkit_exact_matching": sum(hits) / len(hits) * 100}


def per_question(data: Path, split: str, rows: list[Row], only: Collection[str] | None = None) -> dict[str, float]:
    return {
        str(row["question_id"]): float(reduced(opening(text)) == reduced(letter))
        for row, letter, text in answered(data, rows, only)
    }
