"""`scenes`: the embedded data set. Every human turn of a split is asked alone; an answer is right if it is the word itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any

from questions import Question, Row, match, note, read_objects

TREE = """\
DATA/                      what scripts/quickstart.sh writes to runs/quickstart/data
  test.json
  test_unseen.json         shapes and colours that training never showed together
  images/"""
MAX_NEW_TOKENS = 32
EVERY_SPLIT = True
"""Without --split all are asked: they are measured against each other."""


def splits(data: Path) -> list[str]:
    found = [name for name in ("test", "test_unseen") if (data / f"{name}.json").exists()]
    if not found:
        raise FileNotFoundError(f"{data} holds none of the files of scenes\n{TREE}")
    return found


def turns(data: Path, split: str) -> list[tuple[str, dict[str, Any], int]]:
    """(id, record, which of its questions) of every question."""
    records = read_objects(data / f"{split}.json")
    return [(f"{record['id']}-{i}", record, i) for record in records for i in range(len(record["types"]))]


def load(data: Path, split: str) -> list[Question]:
    """The questions of DATA/<split>.json, pictures relative to DATA."""
    questions = []
    for name, record, i in turns(data, split):
        text, answer = (record["conversations"][2 * i + k]["value"] for k in (0, 1))
        picture = data / record["image"]
        fields = {"answer": answer, "kind": record["types"][i], "image": str(picture)}
        questions.append(Question(name, text.replace("<image>\n", ""), (picture,), fields))
    return questions


def normalise(answer: str) -> str:
    """Case, surrounding space and a closing full stop do not matter."""
    return answer.strip().rstrip(".").strip().lower()


def per_question(data: Path, split: str, rows: list[Row], only: Collection[str] | None = None) -> dict[str, float]:
    """1 for each right answer, 0 for a wrong or missing one."""
    asked = {
        name: record["conversations"][2 * i + 1]["value"]
        for name, record, i in turns(data, split)
        if only is None or name in only
    }
    found = match(rows, asked)
    if found.amiss():
        note(f"scenes {split}: {found.amiss()}; a question without an answer counts as wrong")
    return {name: float(normalise(found.answers.get(name, "")) == normalise(right)) for name, right in asked.items()}


def score(data: Path, split: str, rows: list[Row], only: Collection[str] | None = None) -> dict[str, float]:
    """Accuracy, 0 to 1: of all questions and of each type."""
    kinds = {name: record["types"][i] for name, record, i in turns(data, split)}
    hits: dict[str, list[float]] = defaultdict(list)
    for name, hit in per_question(data, split, rows, only).items():
        hits["accuracy"].append(hit)
        hits[kinds[name]].append(hit)
    return {name: sum(h) / len(h) for name, h in sorted(hits.items())}
