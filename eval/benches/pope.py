"""`pope`: POPE on COCO, parsed and scored as the official code and LLaVA's copy do: all that does not say no says yes.

There are two versions of the files: 2,910 rows of `random` (May 2023, which LLaVA-1.5 reports) or 3,000. Answers are paired
with labels by their place, so that an answers file for the other version would score, silently and far too low.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from llava import SHORT_ANSWER, find, folder, question_rows
from questions import Question, Row, note, read_jsonl

TREE = """\
DATA/
  coco/coco_pope_adversarial.json          and popular, random; they are JSONL
  val2014/COCO_val2014_000000310196.jpg
  llava_pope_test.jsonl                    LLaVA's question file, taken where it lies there"""
CATEGORIES = ("adversarial", "random", "popular")  # in the order of their ids: 1, 10,000,001, 20,000,001 and on
APART = 10_000_000
MEASURES = ("n", "TP", "FP", "TN", "FN", "accuracy", "precision", "recall", "f1", "yes_ratio")


def label_files(data: Path) -> dict[str, Path]:
    """The official file of each category that there is."""
    found = {c: find(data, f"coco/coco_pope_{c}.json", f"coco_pope_{c}.json") for c in CATEGORIES}
    return {category: file for category, file in found.items() if file}


def splits(data: Path) -> list[str]:
    if not label_files(data) and not find(data, "llava_pope_test.jsonl"):
        raise FileNotFoundError(f"{data} holds none of the files of pope\n{TREE}")
    return ["test"]


def asked(data: Path) -> list[tuple[str, str, str, str]]:
    """(id, text, picture, category) of every question."""
    if file := find(data, "llava_pope_test.jsonl"):
        keys = ("question_id", "image", "text", "category")
        return [(str(r["question_id"]), r["text"], r["image"], r["category"]) for r in question_rows(file, keys)]
    return [
        (
            str(CATEGORIES.index(category) * APART + int(r["question_id"])),
            r["text"] + SHORT_ANSWER,
            r["image"],
            category,
        )
        for category, file in label_files(data).items()
        for r in read_jsonl(file)
    ]


def load(data: Path, split: str) -> list[Question]:
    pictures = folder(data, "val2014", "images/val2014", "images")
    return [
        Question(name, text, (pictures / image,), {"image": image, "category": category})
        for name, text, image, category in asked(data)
    ]


def says_no(text: str) -> bool:
    """Whether the first sentence has one of the words No, no, not between single spaces, commas left out."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"}.isdisjoint(words)


def ratio(part: float, of: float) -> float:
    return part / of if of else 0.0


def measures(answers: list[str], labels: list[str]) -> dict[str, Any]:
    """One category's figures; yes is positive. Where the official code divides by zero, 0."""
    yes = [not says_no(text) for text in answers]
    true = [label != "no" for label in labels]
    pairs = list(zip(yes, true))
    tp, fp, tn, fn = (pairs.count(pair) for pair in ((True, True), (True, False), (False, False), (False, True)))
    precision, recall = ratio(tp, tp + fp), ratio(tp, tp + fn)
    f1 = ratio(2 * precision * recall, precision + recall)
    figures = (len(yes), tp, fp, tn, fn, ratio(tp + tn, len(pairs)), precision, recall, f1, ratio(sum(yes), len(yes)))
    return dict(zip(MEASURES, figures))


def paired(data: Path, rows: list[Row], only: Collection[str] | None = None) -> dict[str, list[tuple[str, str, str]]]:
    """By category, each answer with its label: (id, text, label). ValueError where that cannot be told."""
    files = label_files(data)
    if not files:
        raise FileNotFoundError(f"{data} holds no labels of pope\n{TREE}")
    questions = asked(data)
    category_of = {name: category for name, _, _, category in questions}
    foreign = [str(row["question_id"]) for row in rows if str(row["question_id"]) not in category_of]
    if foreign:
        raise ValueError(
            f"pope: {len(foreign)} of {len(rows)} answers are to no question here (as {foreign[0]}); the official code stops "
            "at the first; are they of the other version of the files?"
        )
    if unlabelled := sorted({*category_of.values()} - files.keys()):
        note(
            f"pope: there is no label file of {', '.join(unlabelled)}, so scores and means are of {', '.join(sorted(files))}"
        )
    pairs = {}
    for category, file in sorted(files.items()):
        wanted = [name for name, _, _, c in questions if c == category]
        labels = [row["label"] for row in read_jsonl(file)]
        if len(wanted) != len(labels):
            raise ValueError(
                f"pope: {file} has {len(labels)} labels for {len(wanted)} questions of {category}, so these are two versions "
                "of the files; the official code pairs them by their place, and its score says nothing"
            )
        if only is not None:
            labels = [label for name, label in zip(wanted, labels) if name in only]
            wanted = [name for name in wanted if name in only]
        given = [row for row in rows if category_of[str(row["question_id"])] == category]
        names = [str(row["question_id"]) for row in given]
        check(category, names, wanted)
        if names:
            pairs[category] = [(name, row["text"], label) for name, row, label in zip(names, given, labels)]
    return pairs


def check(category: str, given: list[str], wanted: list[str]) -> None:
    """ValueError unless there is an answer for each label; a note where they stand in another order."""
    if len(given) != len(wanted) or len(set(given)) != len(given):
        missing, doubled = len({*wanted} - {*given}), len(given) - len({*given})
        raise ValueError(
            f"pope: {len(given)} answers for {len(wanted)} labels of {category} ({missing} missing, {doubled} doubled); the "
            "official code pairs them by their place, and from the first that does not fit its score says nothing"
        )
    if given != wanted:
        note(
            f"pope: the answers of {category} stand in another order than its labels, and the official code pairs them by "
            "their place; sort them as the questions to get the model's score"
        )


def score(data: Path, split: str, rows: list[Row], only: Collection[str] | None = None) -> dict[str, Any]:
    """Each category's figures and their means; the mean F1 is what LLaVA reports."""
    pairs = paired(data, rows, only)
    scores = {c: measures([text for _, text, _ in part], [label for _, _, label in part]) for c, part in pairs.items()}
    means = {f"mean_{name}": sum(part[name] for part in scores.values()) / len(scores) for name in ("f1", "accuracy")}
    return {**scores, **means}


def per_question(data: Path, split: str, rows: list[Row], only: Collection[str] | None = None) -> dict[str, float]:
    pairs = [pair for part in paired(data, rows, only).values() for pair in part]
    return {name: float(says_no(text) == (label == "no")) for name, text, label in pairs}
