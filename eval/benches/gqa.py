"""`gqa`: GQA, scored as the official eval.py on predictions converted as LLaVA does: closing full stops off, lower case.

Validity and plausibility need {tier}_choices.json, which testdev does not have; the 0 there is what LLaVA's copy of the
scorer prints, and no result.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any

from llava import SHORT_ANSWER, find, folder, need, question_rows
from questions import Matched, Question, Row, match, note, read_object, write_json

TREE = """\
DATA/
  testdev_balanced_questions.json          or another tier: val_balanced, val_all, submission_all …
  images/n161313.jpg
  val_balanced_choices.json                validity and plausibility; there is none for testdev
  llava_gqa_testdev_balanced.jsonl         LLaVA's question file, taken where it lies there"""
FIRST = ("testdev_balanced", "testdev_all", "val_balanced", "val_all")

Questions = dict[str, dict[str, Any]]


def splits(data: Path) -> list[str]:
    found = {file.name.removesuffix("_questions.json") for file in data.glob("*_questions.json")}
    found = {tier for tier in found if not tier.startswith("v2_OpenEnded_")}  # those are VQAv2's
    found |= {file.stem.removeprefix("llava_gqa_") for file in data.glob("llava_gqa_*.jsonl")}
    if not found:
        raise FileNotFoundError(f"{data} holds none of the files of gqa\n{TREE}")
    return [s for s in FIRST if s in found] + sorted(found - {*FIRST})


def records(data: Path, split: str) -> Questions:
    return read_object(need(data, TREE, f"{split}_questions.json"))


def load(data: Path, split: str) -> list[Question]:
    pictures = folder(data, "images")
    if file := find(data, f"llava_gqa_{split}.jsonl"):
        rows = [(str(row["question_id"]), row["text"], row["image"]) for row in question_rows(file)]
    else:
        rows = [(k, q["question"] + SHORT_ANSWER, f"{q['imageId']}.jpg") for k, q in records(data, split).items()]
    return [Question(name, text, (pictures / image,), {"image": image}) for name, text, image in rows]


def convert(text: str) -> str:
    """An answer as LLaVA hands it to the scorer."""
    return text.rstrip(".").lower()


def submit(data: Path, split: str, rows: list[Row], out: Path) -> Path:
    """The file that the official scorer reads, and EvalAI's challenge 225."""
    converted = [{"questionId": str(row["question_id"]), "prediction": convert(row["text"])} for row in rows]
    return write_json(out / f"{split}_predictions.json", converted)


# Scores --------------------------------------------------------------------------------------------------------------


def average(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def steps(question: dict[str, Any]) -> int:
    """Reasoning steps, without those that only say what was found."""
    told = (f"{step['operation']}: {step['argument']}" for step in question["semantic"])
    return sum(not any(words in step for words in ("exist", "query: name", "choose name")) for step in told)


def belongs(answer: str, group: list[str], question: dict[str, Any]) -> bool:
    """Whether an answer is one that the choices allow."""
    return answer in (["color", "material", "shape"] if "Common" in question["types"]["detailed"] else group)


def distribution(gold: dict[str, dict[str, int]], given: dict[str, dict[str, int]]) -> float:
    """Chi-square of given against right answers, averaged over groups weighted by their size, over 100; lower is better."""
    weighted, everything = 0.0, 0
    for group, right in gold.items():
        size = sum(right.values())
        weighted += sum((given[group].get(answer, 0) - count) ** 2 / count for answer, count in right.items()) * size
        everything += size
    if not everything:
        note(
            "gqa: no question is in a group, so there is no distribution; the official code divides by zero, 0 is given"
        )
    return weighted / everything / 100 if everything else 0.0


def consistency(questions: Questions, given: dict[str, str]) -> float:
    """How many of the questions that a right answer entails are right too, in percent: the mean over balanced questions.

    Where not all questions are answered, the official code can only run without --consistency, and leaves 0.
    """
    if len(given) < len(questions):
        return 0.0
    right = {k: given[k] == q["answer"] for k, q in questions.items()}
    entailed = [[e for e in q["entailed"] if e != k] for k, q in questions.items() if q["isBalanced"] and right[k]]
    if not all(e in right for those in entailed for e in those):
        return 0.0
    return average([average([float(right[e]) for e in those]) for those in entailed if those]) * 100


def answered(data: Path, split: str, rows: list[Row], only: Collection[str] | None) -> tuple[Questions, Matched]:
    """The questions and their converted answers; ValueError where the official code stops."""
    questions = {k: q for k, q in records(data, split).items() if only is None or k in only}
    if any("answer" not in q for q in questions.values()):
        raise ValueError(
            f"the answers of {split} are not public: submit the file for it to EvalAI's challenge 225, which scores it"
        )
    found = match(({**row, "text": convert(row["text"])} for row in rows), questions)
    unanswered = [k for k in found.missing if questions[k]["isBalanced"]]
    if unanswered:
        raise ValueError(
            f"gqa {split}: {found.amiss()}; {len(unanswered)} of these questions are balanced ones, and the official code "
            "stops where one has no answer"
        )
    if not any(question["isBalanced"] for question in questions.values()):
        raise ValueError(f"gqa {split}: none of the {len(questions)} questions is balanced, and only those are scored")
    if found.amiss():
        note(f"gqa {split}: {found.amiss()}; the official code takes the last of several and leaves out others")
    return questions, found


def score(data: Path, split: str, rows: list[Row], only: Collection[str] | None = None) -> dict[str, Any]:
    """All that the official code computes of balanced questions, in percent."""
    questions, found = answered(data, split, rows, only)
    file = find(data, f"{split}_choices.json")
    choices = read_object(file) if file else None
    hits: dict[str, list[float]] = defaultdict(list)
    by: dict[str, dict[Any, list[float]]] = {
        f"accuracyPer{name}": defaultdict(list) for name in ("StructuralType", "SemanticType", "Steps", "Length")
    }
    gold: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    given: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for name, question in questions.items():
        if not question["isBalanced"]:
            continue
        right, answer, types = question["answer"], found.answers[name], question["types"]
        hit = float(answer == right)
        hits["accuracy"].append(hit)
        hits["open" if types["structural"] == "query" else "binary"].append(hit)
        by["accuracyPerStructuralType"][types["structural"]].append(hit)
        by["accuracyPerSemanticType"][types["semantic"]].append(hit)
        by["accuracyPerSteps"][steps(question)].append(hit)
        by["accuracyPerLength"][len(question["question"].split())].append(hit)
        if choices is not None:
            for kind, allowed in (("validity", "valid"), ("plausibility", "plausible")):
                hits[kind].append(float(belongs(answer, choices[name][allowed], question)))
        if (group := question["groups"]["global"]) is not None:
            gold[group][right] += 1
            given[group][answer] += 1
    return {
        **{name: average(hits[name]) * 100 for name in ("accuracy", "binary", "open")},
        "distribution": distribution(gold, given),
        **{name: average(hits[name]) * 100 for name in ("validity", "plausibility")},
        "consistency": consistency(questions, found.answers),
        **{
            name: {str(kind): {"acc": average(part) * 100, "n": len(part)} for kind, part in sorted(parts.items())}
            for name, parts in by.items()
        },
    }


def per_question(data: Path, split: str, rows: list[Row], only: Collection[str] | None = None) -> dict[str, float]:
    questions, found = answered(data, split, rows, only)
    return {k: float(found.answers[k] == q["answer"]) for k, q in questions.items() if q["isBalanced"]}
