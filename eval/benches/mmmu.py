"""`mmmu`: college questions of thirty subjects, mostly multiple choice, scored as in MMMU's own evaluator."""

from __future__ import annotations

import ast
import json
import random
import re
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any

from choices import DIRECTLY, LETTERS
from parsing import SEED, fits, read_letter, read_open
from places import matching, missing, picture
from questions import Question, Row, match, note, read_jsonl, read_object, whole

TREE = """\
DATA/                              or DATA/mmmu/
  mmmu_val.jsonl                   MMMU's rows, one a line: id, question, options, answer, question_type, image_1
  mmmu_test.jsonl                  the same without answers
  images/                          the files that image_1 names
  answer_dict_val.json             MMMU's own answers; optional, they come before those of the rows"""
SERVER = "https://eval.ai/web/challenges/challenge-page/2179"
SHORT = "Answer the question using a single word or phrase."
DISCIPLINES = {
    "Art and Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health and Medicine": (
        "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy Public_Health"
    ),
    "Humanities and Social Science": "History Literature Sociology Psychology",
    "Tech and Engineering": (
        "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power Materials "
        "Mechanical_Engineering"
    ),
}
SUBJECTS = {subject for names in DISCIPLINES.values() for subject in names.split()}


def files(data: Path) -> dict[str, Path]:
    """The splits' files; those with public answers come first."""
    found = {}
    for file in matching(data, ("mmmu", "MMMU"), r"mmmu_(val|validation|dev|test)\.jsonl"):
        found[re.sub("^mmmu_", "", file.stem.lower())] = file
    if not found:
        raise missing("mmmu", data, TREE)
    return dict(sorted(found.items(), key=lambda item: (not item[0].startswith("val"), item[0])))


def splits(data: Path) -> list[str]:
    return list(files(data))


def options_of(row: Row) -> dict[str, str]:
    """The options by their letters; the published rows hold them as a Python list in a string."""
    options = row.get("options") or []
    if isinstance(options, str):
        try:
            options = ast.literal_eval(options)
        except (ValueError, SyntaxError):
            raise ValueError(f"mmmu: the options of {row['id']} are no list: {options[:60]!r}") from None
    return dict(zip(LETTERS, map(str, options)))


def load(data: Path, split: str) -> list[Question]:
    """LLaVA-1.5's prompts, and the first picture; none where options are pictures of their own."""
    file = files(data)[split]
    questions = []
    for row in read_jsonl(file):
        if row["question_type"] == "multiple-choice":
            options = "".join(f"({letter}) {text}\n" for letter, text in options_of(row).items())
            text = f"{row['question']}\n{options}\n{DIRECTLY}"
        else:
            text = f"{row['question']}\n{SHORT}"
        shown = sum(len(re.findall(r"<(?:img=|image )", option)) for option in options_of(row).values())
        name = row.get("image_1") if shown < 2 else None
        pictures = (picture(file.parent, name, "images"),) if name else ()
        questions.append(Question(row["id"], text, pictures, {"image": name or row["id"]}))
    return questions


def subject_of(name: str) -> str:
    """validation_Art_Theory_1 -> Art_Theory"""
    return "_".join(name.split("_")[1:-1])


def hits(data: Path, split: str, rows: list[Row], only: Collection[str] | None = None) -> dict[str, bool]:
    """Whether each answer is right, in the order of the questions. The official evaluator looks at answers, not questions."""
    file = files(data)[split]
    asked = [row for row in read_jsonl(file) if only is None or row["id"] in only]
    keys = matching(file.parent, (), r"answer_dict_val\.json") if split.startswith("val") else []
    given = read_object(keys[0]) if keys else {}
    found = match(rows, (row["id"] for row in asked))
    if found.foreign:
        raise ValueError(f"mmmu {split}: {found.amiss()}; the official evaluator stops there with a KeyError")
    if found.amiss():
        note(
            f"mmmu {split}: {found.amiss()}; the official evaluator takes the last of several, and averages over the "
            "answers that are there"
        )
    lot = random.Random(SEED)
    right = {}
    for row in asked:
        name = row["id"]
        if name not in found.answers:
            continue
        answer = given.get(name, {}).get("ground_truth", row.get("answer"))
        if answer in (None, "?"):
            raise ValueError(f"mmmu {split} has no public answers; the file of `submit` goes to {SERVER}")
        answers = list(map(str, answer)) if isinstance(answer, list) else [str(answer)]
        if row["question_type"] == "multiple-choice":
            right[name] = read_letter(found.answers[name], options_of(row), lot) in answers
        else:
            right[name] = fits(read_open(found.answers[name]), answers)
    return right


def score(data: Path, split: str, rows: list[Row], only: Collection[str] | None = None) -> dict[str, Any]:
    """Accuracy, 0 to 1: of all answers, of each subject and of each discipline."""
    subjects: dict[str, list[bool]] = defaultdict(list)
    disciplines: dict[str, list[bool]] = {name: [] for name in DISCIPLINES}
    right = hits(data, split, rows, only)
    for name, hit in right.items():
        subject = subject_of(name)
        if subject not in SUBJECTS:
            note(f"mmmu: {name} is of no subject that MMMU has; it is left out, as the official evaluator does")
            continue
        subjects[subject].append(hit)
        disciplines[next(d for d, names in DISCIPLINES.items() if subject in names.split())].append(hit)
    counted = [hit for those in subjects.values() for hit in those]
    if not counted:
        raise ValueError(f"mmmu {split}: none of the questions has an answer")
    return {
        "overall": sum(counted) / len(counted),
        "per_subject": {name: sum(h) / len(h) for name, h in subjects.items()},
        "per_discipline": {name: sum(h) / len(h) for name, h in disciplines.items() if h},
    }


def per_question(data: Path, split: str, rows: list[Row], only: Collection[str] | None = None) -> dict[str, float]:
    return {name: float(hit) for name, hit in hits(data, split, rows, only).items()}


def submit(data: Path, split: str, rows: list[Row], out: Path) -> Path:
    """{id: letter or answer}, what MMMU's evaluator and its server take."""
    asked = read_jsonl(files(data)[split])
    found = match(rows, (row["id"] for row in asked))
    if found.amiss():
        note(f"mmmu {split}: {found.amiss()}")
    lot = random.Random(SEED)
    chosen = {}
    for row in asked:
        text = found.answers.get(row["id"])
        if text is not None:
            open_ended = row["question_type"] != "multiple-choice"
            chosen[row["id"]] = text if open_ended else read_letter(text, options_of(row), lot)
    target = out / f"mmmu-{split}.json"
    with whole(target) as part:
        part.write_text(json.dumps(chosen, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return target
