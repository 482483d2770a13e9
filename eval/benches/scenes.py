"""`scenes`: the embedded data set. Every human turn of a split is asked alone; an answer is right if it is the word itself."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from questions import Question

SPLITS = ("test", "test_unseen")


def load(data: Path, split: str) -> list[Question]:
    """The questions of DATA/<split>.json, pictures relative to DATA."""
    file = data / f"{split}.json"
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{file}: there is no such file; DATA is a directory written by the quickstart"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON ({error})") from error
    questions = []
    for record in records:
        turns = record["conversations"]
        for i, kind in enumerate(record["types"]):
            text = turns[2 * i]["value"].replace("<image>\n", "")
            picture = data / record["image"]
            questions.append(Question(f"{record['id']}-{i}", picture, text, kind, turns[2 * i + 1]["value"]))
    return questions


def normalise(answer: str) -> str:
    """Case, surrounding space and a closing full stop do not matter."""
    return answer.strip().rstrip(".").strip().lower()


def right(question: Question, answer: str) -> bool:
    return normalise(answer) == normalise(question.answer)


def score(questions: list[Question], answers: dict[str, str]) -> dict[str, float]:
    """Accuracy, 0 to 1: of all questions and of each type. A question without an answer is wrong."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for question in questions:
        hit = right(question, answers.get(question.id, ""))
        hits["accuracy"].append(hit)
        hits[question.kind].append(hit)
    return {name: sum(h) / len(h) for name, h in sorted(hits.items())}
