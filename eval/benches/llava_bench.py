"""`llava-bench`: LLaVA-Bench in the wild. GPT-4 rates our answer and its own side by side; ratings that it gave are summed up."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from places import matching, missing, picture
from questions import Question, Row, match, note, read_jsonl, whole

TREE = """\
DATA/                              or DATA/llava-bench-in-the-wild/
  questions.jsonl                  60 questions
  images/                          24 pictures"""
MAX_NEW_TOKENS = 1024
TAKES_REVIEWS = True
"""--predictions may be a file of reviews, whose lines have no text."""
JUDGE = "llava/eval/eval_gpt_review_bench.py of LLaVA (with context.jsonl, answers_gpt4.jsonl and its rules)"


def splits(data: Path) -> list[str]:
    return ["in-the-wild"]  # reviews are summed up without any file of the bench


def load(data: Path, split: str) -> list[Question]:
    """The bare questions: a model answers freely."""
    found = matching(data, ("llava-bench-in-the-wild", "llava-bench"), r"questions\.jsonl")
    if not found:
        raise missing("llava-bench", data, TREE)
    return [
        Question(
            str(row["question_id"]),
            row["text"],
            (picture(found[0].parent, row["image"], "images"),),
            {"image": row["image"], "category": f"llava_bench_{row['category']}"},
        )
        for row in read_jsonl(found[0])
    ]


def read_ratings(review: str) -> list[float]:
    """GPT-4's two ratings: a review's first line must be two numbers with one space or comma between; else both are -1."""
    parts = review.split("\n")[0].replace(",", " ").split(" ")
    try:
        first, second = map(float, parts)
    except ValueError:
        return [-1, -1]
    return [first, second]


def ratings(row: Row) -> list[float]:
    """Of a line of a review file: those that were read when it was written, else out of the review itself."""
    for name in ("tuple", "score"):
        if name in row:
            given = row[name]
            if not isinstance(given, list) or len(given) != 2 or not all(isinstance(x, (int, float)) for x in given):
                raise ValueError(f"llava-bench: the ratings of a review are {given!r} instead of two numbers")
            return given
    return read_ratings(row["content"]) if isinstance(row["content"], str) else [-1, -1]


def score(data: Path, split: str, rows: list[Row]) -> dict[str, Any]:
    """Our mean rating in per cent of GPT-4's, and both times ten, of all questions and of each category.

    rows are reviews, one a line. An unreadable review counts as -1 against -1, as in LLaVA's summary.
    """
    if any(not {"tuple", "score", "content"} & set(row) for row in rows):
        raise ValueError(
            f"llava-bench is rated by GPT-4: review the file of `submit` with {JUDGE}, "
            "and give its review file as --predictions to have it summed up"
        )
    parts: dict[str, list[list[float]]] = {}
    for row in rows:
        for name in ("all", str(row["category"])) if "category" in row else ("all",):
            parts.setdefault(name, []).append(ratings(row))
    figures = {}
    for name, pairs in sorted(parts.items()):
        gpt4, model = (round(x, 3) for x in np.asarray(pairs, dtype=float).mean(0).tolist())
        if gpt4 == 0:
            note(f"llava-bench {name}: GPT-4's own mean rating is 0; LLaVA's summary divides by it and stops")
        relative = round(model / gpt4 * 100, 1) if gpt4 else None
        figures[name] = {"relative": relative, "gpt4_x10": round(gpt4 * 10, 1), "model_x10": round(model * 10, 1)}
    return figures


def submit(data: Path, split: str, rows: list[Row], out: Path) -> Path:
    """An answers file that LLaVA's review reads next to answers_gpt4.jsonl: one line a question, in their order."""
    questions = load(data, split)
    found = match(rows, (q.id for q in questions))
    if found.missing:
        raise ValueError(f"llava-bench: {found.amiss()}; the review pairs answers with questions by their order")
    lines = []
    for question in questions:
        text = found.answers[question.id]
        mark = hashlib.sha1(f"{question.id} {text}".encode(), usedforsecurity=False).hexdigest()[:22]
        name: int | str = int(question.id) if question.id.isdigit() else question.id
        row = {"question_id": name, "prompt": question.text, "text": text, "answer_id": mark}
        lines.append(json.dumps(row | {"model_id": "visualrwkv", "metadata": {}}, ensure_ascii=False) + "\n")
    target = out / "llava-bench.jsonl"
    with whole(target) as part:
        part.write_text("".join(lines), encoding="utf-8")
    return target
