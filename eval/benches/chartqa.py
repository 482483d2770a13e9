"""`chartqa`: short answers about charts. Numbers may be off by a twentieth; words must be exact but for their case."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from places import matching, missing, picture
from questions import Question, Row, fitted, match, read_objects

TREE = """\
DATA/                              or DATA/chartqa/, or the published "ChartQA Dataset"/test/
  test_human.json                  1,250 questions that people wrote
  test_augmented.json              1,250 that a model wrote
  png/"""
SUFFIX = "Answer the question with a single word."
TOLERANCE = 0.05
PARTS = ("human", "augmented")


def files(data: Path) -> dict[str, Path]:
    places = ("chartqa", "test", "ChartQA Dataset/test", "chartqa/test")
    found = matching(data, places, r"test_(human|augmented)\.json")
    if not found:
        raise missing("chartqa", data, TREE)
    return {part: file for part in PARTS for file in found if part in file.name.lower()}


def splits(data: Path) -> list[str]:
    files(data)  # an error where it is missing
    return ["test"]


def entries(data: Path, only: Collection[str] | None = None) -> dict[str, tuple[Path, dict[str, Any]]]:
    """(directory, question) by ids human/0, human/1, …, augmented/0, …: the files number nothing."""
    return {
        f"{part}/{at}": (file.parent, entry)
        for part, file in files(data).items()
        for at, entry in enumerate(read_objects(file))
        if only is None or f"{part}/{at}" in only
    }


def load(data: Path, split: str) -> list[Question]:
    """lmms-eval's prompt."""
    return [
        Question(
            name,
            f"{entry['query']}\n{SUFFIX}",
            (picture(place, entry["imgname"], "png"),),
            {"image": entry["imgname"], "answer": entry["label"]},
        )
        for name, (place, entry) in entries(data).items()
    ]


def number(text: str) -> float | None:
    """A number, or a percentage as a share; None for other text, such as 1,000."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def fits(answer: str, label: str) -> bool:
    """pix2struct's relaxed match. A label of 0 is compared as text: a share of it says nothing."""
    given, right = number(answer), number(label)
    if given is not None and right:
        return abs(given - right) / abs(right) <= TOLERANCE
    return answer.lower() == label.lower()


def per_question(data: Path, split: str, rows: list[Row], only: Collection[str] | None = None) -> dict[str, float]:
    asked = entries(data, only)
    otherwise = "of several the last is taken, and a missing answer counts as wrong"
    found = fitted("chartqa", rows, asked, otherwise)
    return {
        name: float(name in found.answers and fits(found.answers[name], str(entry["label"])))
        for name, (_, entry) in asked.items()
    }


def score(data: Path, split: str, rows: list[Row], only: Collection[str] | None = None) -> dict[str, float]:
    """Relaxed accuracy in per cent: of each part, of all questions, and the mean of the parts, the same at equal sizes."""
    hits = per_question(data, split, rows, only)
    parts = {part: [hit for name, hit in hits.items() if name.startswith(part)] for part in files(data)}
    figures = {f"relaxed_{part}": sum(h) / len(h) * 100 for part, h in parts.items() if h}
    mean = sum(figures.values()) / len(figures)
    return figures | {"relaxed_overall": sum(hits.values()) / len(hits) * 100, "mean_of_splits": mean}


def more(data: Path, split: str, rows: list[Row], only: Collection[str] | None = None) -> dict[str, float]:
    """VisualRWKV's own measure, which its published numbers are of: the exact word."""
    asked = entries(data, only)
    given = match(rows, asked).answers
    hits = [exact(given.get(name, "")) == exact(str(entry["label"])) for name, (_, entry) in asked.items()]
    return {"visualrwkv_exact": sum(hits) / len(hits) * 100}


def exact(text: str) -> str:
    return text.strip().lower().strip(".")
