"""`vizwiz`: VizWiz-VQA, scored as its Python API does on val: what people answered as it stands, min(n / 3, 1) over all ten.

The test split has no public answers, and what exactly the server computes is not public either.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any

import answers
from llava import SHORT_ANSWER, find, folder, need, question_rows
from questions import Matched, Question, Row, match, note, read_objects, write_json

TREE = """\
DATA/
  Annotations/val.json            or train, test; beside DATA's pictures will do; val and train have the answers
  val/VizWiz_val_00000000.jpg
  llava_val.jsonl                 LLaVA's question file (llava_test.jsonl for test), taken where it lies there"""
SPLITS = ("val", "test", "train")
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


def official(split: str) -> tuple[str, str]:
    return f"Annotations/{split}.json", f"{split}.json"


def splits(data: Path) -> list[str]:
    found = [s for s in SPLITS if find(data, *official(s), f"llava_{s}.jsonl")]
    if not found:
        raise FileNotFoundError(f"{data} holds none of the files of vizwiz\n{TREE}")
    return found


def asked(data: Path, split: str) -> list[tuple[str, str, str]]:
    """(id, text, picture) of every question; an id is the row's number, as in LLaVA's file."""
    if file := find(data, f"llava_{split}.jsonl"):
        return [(str(row["question_id"]), row["text"], row["image"]) for row in question_rows(file)]
    return [
        (str(number), record["question"].capitalize() + UNANSWERABLE + SHORT_ANSWER, record["image"])
        for number, record in enumerate(read_objects(need(data, TREE, *official(split))))
    ]


def load(data: Path, split: str) -> list[Question]:
    pictures = folder(data, split, f"images/{split}", "images")
    return [Question(name, text, (pictures / image,), {"image": image}) for name, text, image in asked(data, split)]


def matched(
    data: Path, split: str, rows: list[Row], only: Collection[str] | None = None
) -> tuple[Matched, dict[str, str]]:
    """The answers by id, and each picture's id; ValueError where LLaVA's conversion stops, which wants all rows."""
    names = {image: name for name, _, image in asked(data, split) if only is None or name in only}
    known = ({**row, "question_id": names.get(row["question_id"], row["question_id"])} for row in rows)  # or by picture
    found = match(known, names.values())
    if found.missing:
        raise ValueError(
            f"vizwiz {split}: {found.amiss()}; the official code stops, as it wants an answer to each question"
        )
    if found.amiss():
        note(f"vizwiz {split}: {found.amiss()}; of a doubled one the last counts, others are left out")
    return found, names


def accuracy(text: str, given: list[str]) -> float:
    """One question's score, 0 to 1. The API means to leave one annotator out each time, but leaves out none."""
    share = min(1.0, given.count(text) / 3)
    return answers.total([share] * len(given)) / len(given)


def judged(data: Path, split: str, given: dict[str, str], names: dict[str, str]) -> dict[str, tuple[float, str]]:
    """The score and the answer type of each question by id; `given`: the answers by id."""
    found = {}
    for record in {record["image"]: record for record in read_objects(need(data, TREE, *official(split)))}.values():
        if "answers" not in record:
            raise ValueError(
                f"the answers of {split} are not public: submit the file for it to EvalAI's challenge 2185, which scores it"
            )
        if name := names.get(record["image"]):
            people = [answer["answer"] for answer in record["answers"]]
            found[name] = accuracy(answers.vizwiz(given[name]), people), record["answer_type"]
    told = f"vizwiz {split}: of {len(names)} questions {len(found)} are among the annotated ones"
    if not found:
        raise ValueError(f"{told}, so there is nothing to score")
    if len(found) < len(names):
        note(f"{told}, and the score is of these")
    return found


def summary(hits: dict[str, tuple[float, str]]) -> dict[str, Any]:
    """Percentages with two decimals, overall and by answer type."""
    by_type: dict[str, list[float]] = defaultdict(list)
    for hit, kind in hits.values():
        by_type[kind].append(hit)
    overall = mean([hit for hit, _ in hits.values()])
    return {"overall": overall, "perAnswerType": {kind: mean(part) for kind, part in by_type.items()}}


def mean(values: list[float]) -> float:
    """As a percentage with two decimals."""
    return round(100 * answers.total(values) / len(values), 2)


def score(data: Path, split: str, rows: list[Row], only: Collection[str] | None = None) -> dict[str, Any]:
    found, names = matched(data, split, rows, only)
    return summary(judged(data, split, found.answers, names))


def per_question(data: Path, split: str, rows: list[Row], only: Collection[str] | None = None) -> dict[str, float]:
    found, names = matched(data, split, rows, only)
    return {name: hit for name, (hit, _) in judged(data, split, found.answers, names).items()}


def more(data: Path, split: str, rows: list[Row], only: Collection[str] | None = None) -> dict[str, Any]:
    """The score of what LLaVA submits."""
    found, names = matched(data, split, rows, only)
    submitted = {name: answers.m4c(text) for name, text in found.answers.items()}
    return {"llava_submission": summary(judged(data, split, submitted, names))}


def submit(data: Path, split: str, rows: list[Row], out: Path) -> Path:
    """EvalAI's file, as LLaVA writes it."""
    found, names = matched(data, split, rows)
    answered = [{"image": image, "answer": answers.m4c(found.answers[name])} for image, name in names.items()]
    return write_json(out / f"vizwiz-{split}-submission.json", answered)
