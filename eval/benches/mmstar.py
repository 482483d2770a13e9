"""`mmstar`: multiple choice that cannot be answered without the picture; matched as VLMEvalKit does without a language model."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import single
from questions import Question, Row

TREE = """\
DATA/                              or DATA/mmstar/
  MMStar.tsv                       1,500 questions as VLMEvalKit distributes them; pictures are in the table"""


def table(data: Path) -> Path:
    return single.table(data, "mmstar", TREE)


def splits(data: Path) -> list[str]:
    table(data)  # an error where it is missing
    return ["test"]


def load(data: Path, split: str) -> list[Question]:
    return single.load(table(data))


def score(data: Path, split: str, rows: list[Row], only: Collection[str] | None = None) -> dict[str, Any]:
    """Accuracy, 0 to 1. Every question is asked once: nothing is circular."""
    return single.score(table(data), rows, "mmstar", only)


def per_question(data: Path, split: str, rows: list[Row], only: Collection[str] | None = None) -> dict[str, float]:
    return single.per_question(table(data), rows, "mmstar", only)
