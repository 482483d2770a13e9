"""`scienceqa`: ScienceQA, scored as LLaVA's eval_science_qa.py: the letter must stand alone, before ". ", or in "The answer is X."."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any

from llava import LETTER, find, folder, need
from questions import Question, Row, fitted, note, read_object, read_objects

TREE = """\
DATA/
  problems.json
  pid_splits.json
  images/test/11/image.png
  llava_test_CQM-A.json         LLaVA's question file, taken where it lies there"""
MAX_NEW_TOKENS = 1024
SPLITS = ("test", "val", "minitest", "minival", "train", "trainval", "minitrain")
LETTERS = "ABCDE"


def splits(data: Path) -> list[str]:
    """All that pid_splits.json has questions for, test first."""
    file = find(data, "pid_splits.json")
    if file is None or not (data / "problems.json").is_file():
        raise FileNotFoundError(f"{data} does not hold problems.json and pid_splits.json\n{TREE}")
    ids = read_object(file)
    found = [split for split in SPLITS if ids.get(split)]
    if not found:
        raise ValueError(f"{file} has no problem in any of {', '.join(SPLITS)}")
    return found


def problems(data: Path, split: str) -> dict[str, dict[str, Any]]:
    """The split's problems by id, in its order."""
    every = read_object(need(data, TREE, "problems.json"))
    return {name: every[name] for name in read_object(need(data, TREE, "pid_splits.json"))[split]}


def text_of(problem: dict[str, Any]) -> str:
    """A problem as LLaVA writes it: context, question, lettered choices."""
    context = f"Context: {problem['hint']}\n" if problem["hint"] else ""
    choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, problem["choices"]))
    return f"{context}{problem['question']}\n{choices}".replace("  ", " ").strip()


def load(data: Path, split: str) -> list[Question]:
    pictures = folder(data, f"images/{split}", split, "images")
    asked: list[tuple[str, str, str | None]]
    if file := find(data, f"llava_{split}_CQM-A.json"):
        asked = [(str(e["id"]), e["conversations"][0]["value"], e.get("image")) for e in read_objects(file)]
    else:
        asked = [
            (name, text_of(problem), f"{name}/{problem['image']}" if problem["image"] else None)
            for name, problem in problems(data, split).items()
        ]
    return [
        Question(
            name,
            text.replace("<image>", "").strip() + LETTER,
            (pictures / image,) if image else (),
            {"image": image} if image else {},
        )
        for name, text, image in asked
    ]


def letter(text: str) -> str:
    """The letter that an answer gives, or FAILED."""
    if text in list(LETTERS):
        return text
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    found = re.findall(r"The answer is ([A-Z]).", text)  # the last dot stands for any character, but there must be one
    return found[0] if len(found) == 1 else "FAILED"


def right(text: str, problem: dict[str, Any]) -> bool:
    """Whether the letter is the right one; one beyond the choices is wrong."""
    given = letter(text)
    return given in LETTERS[: len(problem["choices"])] and LETTERS.index(given) == problem["answer"]


def judged(
    data: Path, split: str, rows: list[Row], only: Collection[str] | None
) -> tuple[dict[str, dict[str, Any]], dict[str, bool]]:
    """The problems, and whether each one's answer is right."""
    asked = {k: p for k, p in problems(data, split).items() if only is None or k in only}
    otherwise = "the official code counts a missing one as wrong and takes the last of several"
    found = fitted(f"scienceqa {split}", rows, asked, otherwise)
    hits = {k: k in found.answers and right(found.answers[k], problem) for k, problem in asked.items()}
    return asked, hits


def per_question(data: Path, split: str, rows: list[Row], only: Collection[str] | None = None) -> dict[str, float]:
    return {name: float(hit) for name, hit in judged(data, split, rows, only)[1].items()}


def score(data: Path, split: str, rows: list[Row], only: Collection[str] | None = None) -> dict[str, Any]:
    """Accuracy over all problems, and over the answers whose prompt held a picture, in percent."""
    asked, hits = judged(data, split, rows, only)
    shown = {str(row["question_id"]): seen(row, asked) for row in rows}
    pictured = [hits[name] for name in asked if shown.get(name)]
    if not pictured:
        note(f"scienceqa {split}: no prompt held a picture; the official code divides by zero, 0 is given")
    return {
        "total": len(asked),
        "correct": sum(hits.values()),
        "accuracy": sum(hits.values()) / len(asked) * 100,
        "img_accuracy": sum(pictured) / len(pictured) * 100 if pictured else 0.0,
        "img_total": len(pictured),
        "img_correct": sum(pictured),
    }


def seen(row: Row, asked: dict[str, dict[str, Any]]) -> bool:
    """Whether a row was asked with a picture: its prompt has the tag, as LLaVA writes it, or it names one, as we do."""
    if row.get("prompt") is None:
        return bool(asked.get(str(row["question_id"]), {}).get("image"))
    return "<image>" in row["prompt"] or bool(row.get("image"))


def more(data: Path, split: str, rows: list[Row], only: Collection[str] | None = None) -> dict[str, Any]:
    """The columns of the data set's own table: subjects, what the problem shows, grades; missing answers are wrong."""
    asked, hits = judged(data, split, rows, only)
    columned: dict[str, list[bool]] = defaultdict(list)
    subjects = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
    for name, problem in asked.items():
        grade = int(problem["grade"].removeprefix("grade"))
        columns = [subjects.get(problem["subject"], problem["subject"]), "G1-6" if grade <= 6 else "G7-12"]
        columns += ["TXT"] * bool(problem["hint"]) + ["IMG"] * bool(problem["image"])
        columns += [] if problem["hint"] or problem["image"] else ["NO"]
        for column in columns:
            columned[column].append(hits[name])
    return {column: sum(part) / len(part) * 100 for column, part in sorted(columned.items())}
