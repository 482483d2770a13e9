"""`mmbench_cn`: MMBench-CN: MMBench's questions in Chinese; the one score is circular, as in English."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import circular
from places import missing
from questions import Question, Row

TREE = """\
DATA/                              or DATA/mmbench_cn/
  mmbench_dev_cn_20231003.tsv      with answers; pictures are in the table
  mmbench_test_cn_20231003.tsv     without: its Excel file goes to the server"""
SUFFIX = "请直接回答选项字母。"
MAX_NEW_TOKENS = 1024


def tables(data: Path) -> dict[str, Path]:
    found = circular.files(data, "mmbench_cn", chinese=True)
    if not found:
        raise missing("mmbench_cn", data, TREE)
    return found


def splits(data: Path) -> list[str]:
    return list(tables(data))


def load(data: Path, split: str) -> list[Question]:
    """Every row of the table, that is every rotation of every question."""
    return circular.load(tables(data)[split], SUFFIX)


def score(data: Path, split: str, rows: list[Row]) -> dict[str, Any]:
    """As VLMEvalKit without a language model: `circular`, and plain accuracies beside it."""
    return circular.score(tables(data)[split], rows, "mmbench_cn")


def per_question(data: Path, split: str, rows: list[Row]) -> dict[str, float]:
    return circular.per_question(tables(data)[split], rows, "mmbench_cn")


def submit(data: Path, split: str, rows: list[Row], out: Path) -> Path:
    """The Excel file for MMBench's server."""
    return circular.submit(tables(data)[split], rows, out, "mmbench_cn")
