"""`infographicvqa`: short answers about infographics; scored as in the competition."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import documents
from questions import Question, Row

TREE = """\
DATA/                              or DATA/infographicvqa/
  infographicsVQA_val_v1.0_withQT.json   2,801 questions and of what kind they are
  infographicsVQA_test_v1.0.json         without answers: its file goes to the server
  infographicsvqa_images/"""


def files(data: Path) -> dict[str, Path]:
    patterns = (r"infographicsVQA_(train|val|test)_v1\.0.*\.json", r"(train|val|test)_v1\.0.*\.json")
    return documents.files(data, "infographicvqa", patterns, TREE)


def splits(data: Path) -> list[str]:
    return list(files(data))


def load(data: Path, split: str) -> list[Question]:
    return documents.load(files(data)[split], "infographicsvqa_images")


def score(data: Path, split: str, rows: list[Row], only: Collection[str] | None = None) -> dict[str, float]:
    """ANLS, 0 to 100. ValueError unless every question has exactly one answer."""
    return documents.score(files(data)[split], split, rows, "infographicvqa", only)


def more(data: Path, split: str, rows: list[Row], only: Collection[str] | None = None) -> dict[str, Any]:
    return documents.more(files(data)[split], split, rows, "infographicvqa", only)


def per_question(data: Path, split: str, rows: list[Row], only: Collection[str] | None = None) -> dict[str, float]:
    return documents.per_question(files(data)[split], split, rows, "infographicvqa", only)


def submit(data: Path, split: str, rows: list[Row], out: Path) -> Path:
    return documents.submit(files(data)[split], split, rows, out, "infographicvqa")
