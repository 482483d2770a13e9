"""`ocrbench`: OCRBench v1, a thousand questions about text in pictures. Right is an answer that holds the right text."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from places import matching, missing, picture
from questions import Question, Row, fitted, read_objects

TREE = """\
DATA/                              or DATA/ocrbench/ or DATA/OCRBench/
  OCRBench.json                    1,000 questions
  OCRBench_Images/                 the folders that image_path names"""
SUFFIX = "Answer the question using a single word or phrase."
FORMULAS = "HME100k"
"""Of this source case matters and space does not: its answers are LaTeX."""
RECOGNITION = (
    "Regular Text Recognition",
    "Irregular Text Recognition",
    "Artistic Text Recognition",
    "Handwriting Recognition",
    "Digit String Recognition",
    "Non-Semantic Text Recognition",
)
TYPES = (
    *RECOGNITION,
    "Scene Text-centric VQA",
    "Doc-oriented VQA",
    "Key Information Extraction",
    "Handwritten Mathematical Expression Recognition",
)


def table(data: Path) -> Path:
    found = matching(data, ("ocrbench", "OCRBench"), r"OCRBench\.json")
    if not found:
        raise missing("ocrbench", data, TREE)
    return found[0]


def splits(data: Path) -> list[str]:
    table(data)  # an error where it is missing
    return ["test"]


def load(data: Path, split: str) -> list[Question]:
    """LLaVA's prompt. The ids are the places in the file: those that it gives occur twice."""
    file = table(data)
    return [
        Question(
            str(at),
            f"{entry['question']}\n{SUFFIX}",
            (picture(file.parent, entry["image_path"], "OCRBench_Images"),),
            {"image": entry["image_path"]},
        )
        for at, entry in enumerate(read_objects(file))
    ]


def holds(text: str, answers: str | Sequence[str], source: str) -> bool:
    """Whether an answer holds one of the right texts."""

    def even(piece: str) -> str:
        piece = (piece if source == FORMULAS else piece.lower()).strip().replace("\n", " ")
        return piece.replace(" ", "") if source == FORMULAS else piece

    return any(even(right) in even(text) for right in ([answers] if isinstance(answers, str) else answers))


def hits(data: Path, rows: list[Row], only: Collection[str] | None = None) -> dict[str, tuple[dict[str, Any], bool]]:
    every = {str(at): entry for at, entry in enumerate(read_objects(table(data)))}
    asked = {name: entry for name, entry in every.items() if only is None or name in only}
    otherwise = "of several the last is taken; the official script leaves questions without an answer out of its sums"
    found = fitted("ocrbench", rows, asked, otherwise)
    return {
        name: (entry, name in found.answers and holds(found.answers[name], entry["answers"], entry["dataset_name"]))
        for name, entry in asked.items()
    }


def score(data: Path, split: str, rows: list[Row], only: Collection[str] | None = None) -> dict[str, Any]:
    """How many are right, of how many, and both of each of the ten types. With all 1,000 the sum is the final score."""
    pairs = list(hits(data, rows, only).values())
    by_type: dict[str, list[int]] = {kind: [0, 0] for kind in TYPES}
    for entry, hit in pairs:
        if entry["type"] not in by_type:
            raise ValueError(f"{table(data)}: {entry['type']!r} is none of OCRBench's types {', '.join(TYPES)}")
        by_type[entry["type"]][0] += hit
        by_type[entry["type"]][1] += 1
    return {
        "sum_correct": sum(hit for _, hit in pairs),
        "n": len(pairs),
        "by_type": {kind: counts for kind, counts in by_type.items() if counts[1]},
    }


def more(data: Path, split: str, rows: list[Row], only: Collection[str] | None = None) -> dict[str, Any]:
    """The official script's sum over the six types of recognition, and right answers of each source."""
    pairs = list(hits(data, rows, only).values())
    sources: dict[str, list[int]] = {}
    for entry, hit in pairs:
        counts = sources.setdefault(entry["dataset_name"], [0, 0])
        counts[0] += hit
        counts[1] += 1
    recognised = [hit for entry, hit in pairs if entry["type"] in RECOGNITION]
    return {"text_recognition": [sum(recognised), len(recognised)], "by_dataset": sources}


def per_question(data: Path, split: str, rows: list[Row], only: Collection[str] | None = None) -> dict[str, float]:
    return {name: float(hit) for name, (_, hit) in hits(data, rows, only).items()}
