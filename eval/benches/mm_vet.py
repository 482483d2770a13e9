"""`mm-vet`: open questions that GPT-4 grades. Answers are written for its server; grades that it gave are summed up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grades import judge, summarise
from places import matching, missing, picture
from questions import Question, Row, match, note, read_jsonl, read_object, whole

TREE = """\
DATA/                              or DATA/mm-vet/
  mm-vet.json                      218 questions
  images/
  llava-mm-vet.jsonl               LLaVA's question file; enough to answer them
  *-grade-1runs.json               the official evaluator's grades, to be summed up; optional"""
MAX_NEW_TOKENS = 1024
SERVER = "https://huggingface.co/spaces/whyu/MM-Vet_Evaluator"


def file(data: Path, pattern: str) -> Path | None:
    return next(iter(matching(data, ("mm-vet", "mm_vet"), pattern)), None)


def splits(data: Path) -> list[str]:
    if not file(data, r"mm-vet\.json|llava-mm-vet\.jsonl"):
        raise missing("mm-vet", data, TREE)
    return ["test"]


def official(name: Any) -> str:
    """LLaVA numbers the questions; their own names are v1_0, v1_1, …"""
    return str(name) if str(name).startswith("v1_") else f"v1_{name}"


def load(data: Path, split: str) -> list[Question]:
    """The bare questions: a model answers freely."""
    if place := file(data, r"mm-vet\.json"):
        entries = {name: (entry["question"], entry["imagename"]) for name, entry in read_object(place).items()}
    elif place := file(data, r"llava-mm-vet\.jsonl"):
        entries = {official(row["question_id"]): (row["text"], row["image"]) for row in read_jsonl(place)}
    else:
        raise missing("mm-vet", data, TREE)
    return [
        Question(name, text, (picture(place.parent, image, "images"),), {"image": image})
        for name, (text, image) in entries.items()
    ]


def answered(data: Path, rows: list[Row]) -> dict[str, str]:
    """The answers by the official ids. ValueError unless every question has one."""
    found = match([row | {"question_id": official(row["question_id"])} for row in rows], (q.id for q in load(data, "")))
    if found.missing:
        raise ValueError(f"mm-vet: {found.amiss()}; the official evaluator stops there with a KeyError")
    if found.amiss():
        note(f"mm-vet: {found.amiss()}; the official conversion takes the last of several, and others are not graded")
    return found.answers


def graded(data: Path, rows: list[Row]) -> dict[str, list[float]]:
    """Each question's grades, one a run: from the evaluator's own file, or from a judge's replies written down."""
    if (place := file(data, r"judge_script\.json")) and (questions := file(data, r"mm-vet\.json")):
        script = read_object(place)
        texts = {name: entry["question"] for name, entry in read_object(questions).items()}
        answered(data, rows)
        if silent := [text for text in texts.values() if not script["replies"].get(text)]:
            raise ValueError(f"{place}: {len(silent)} of {len(texts)} questions have no reply (as {silent[0]!r})")
        return judge(texts, script["replies"], script.get("num_run", 1))
    if place := file(data, r".*-grade-\d+runs\.json|grades\.json"):
        return {name: entry["score"] for name, entry in read_object(place).items()}
    raise ValueError(
        f"mm-vet is graded by GPT-4: upload the file of `submit` to {SERVER}, "
        "and put the grade file that comes back into DATA to have it summed up"
    )


def score(data: Path, split: str, rows: list[Row]) -> dict[str, Any]:
    """Mean grades in per cent of each capability and each set of them. ValueError where nobody has graded yet."""
    grades = graded(data, rows)
    place = file(data, r"mm-vet\.json")
    if place is None:
        raise missing("mm-vet", data, TREE)
    capabilities = {name: entry["capability"] for name, entry in read_object(place).items()}
    runs = {len(given) for given in grades.values()}
    if set(grades) != set(capabilities) or len(runs) != 1 or 0 in runs:
        raise ValueError(
            f"{len(set(capabilities) & set(grades))} of {len(capabilities)} questions are graded, {sorted(runs)} times; "
            "the official evaluator grades the rest before it sums up"
        )
    return summarise(capabilities, grades)


def per_question(data: Path, split: str, rows: list[Row]) -> dict[str, float]:
    return {name: sum(given) / len(given) for name, given in graded(data, rows).items()}


def submit(data: Path, split: str, rows: list[Row], out: Path) -> Path:
    """{"v1_0": answer, …}, what the server and the official evaluator take."""
    target = out / "mm-vet.json"
    with whole(target) as part:
        part.write_text(json.dumps(answered(data, rows), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return target
