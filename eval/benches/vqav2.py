"""`vqav2`: VQAv2. Scored as the official vqaEval.py does (revision of 2021), which runs on Python 2.

Where all ten annotators agree, that code compares the answer as it stands: "Yes" against ten "yes" is wrong. `more` gives the
same score for answers normalised as LLaVA submits them, and the overall one of the revision of 2016, which many copied.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import answers
from llava import SHORT_ANSWER, find, folder, need, question_rows
from questions import Matched, Question, Row, match, note, read_object, write_json

TREE = """\
DATA/
  v2_OpenEnded_mscoco_val2014_questions.json     or test-dev2015, test2015, train2014
  v2_mscoco_val2014_annotations.json             val2014 and train2014 only: what a score needs
  val2014/COCO_val2014_000000000042.jpg          or test2015/
  llava_vqav2_mscoco_val2014.jsonl               LLaVA's question file, taken where it lies there"""
SPLITS = ("val2014", "test-dev2015", "test2015", "train2014")


def names(split: str) -> dict[str, str]:
    """The files of a split."""
    return {
        "questions": f"v2_OpenEnded_mscoco_{split}_questions.json",
        "annotations": f"v2_mscoco_{split}_annotations.json",
        "llava": f"llava_vqav2_mscoco_{split}.jsonl",
    }


def splits(data: Path) -> list[str]:
    found = [split for split in SPLITS if find(data, *names(split).values())]
    if not found:
        raise FileNotFoundError(f"{data} holds none of the files of vqav2\n{TREE}")
    return found


def asked(data: Path, split: str) -> list[tuple[int, str, str]]:
    """(question id, text, picture's name) of every question, from LLaVA's file or the official one."""
    if file := find(data, names(split)["llava"]):
        return [(row["question_id"], row["text"], row["image"]) for row in question_rows(file)]
    file = need(data, TREE, names(split)["questions"])
    subset = split.replace("test-dev", "test")
    return [
        (q["question_id"], q["question"] + SHORT_ANSWER, f"COCO_{subset}_{q['image_id']:012d}.jpg")
        for q in read_object(file)["questions"]
    ]


def load(data: Path, split: str) -> list[Question]:
    subset = split.replace("test-dev", "test")
    pictures = folder(data, subset, f"images/{subset}", "images")
    return [
        Question(str(name), text, (pictures / image,), {"image": image}) for name, text, image in asked(data, split)
    ]


# Annotations ---------------------------------------------------------------------------------------------------------


class Annotation(NamedTuple):
    """What is scored of a question. Two million answers as dicts would not fit in a small memory."""

    question: str
    kind: str  # question_type
    expects: str  # answer_type
    answers: tuple[str, ...]
    doubles: tuple[Any, ...]  # what else the annotators' records say where two say the same; mostly empty


def smaller(pairs: list[tuple[str, Any]]) -> Any:
    """An annotator's record as (answer, the rest), a question's as an Annotation."""
    found = dict(pairs)
    if "answer" in found and "answers" not in found:
        answer = found.pop("answer")
        return _same(answer), _same(tuple(found.items()))
    if "answers" in found and "question_id" in found:
        texts, rest = zip(*found["answers"])
        return Annotation(
            str(found["question_id"]),
            _same(found["question_type"]),
            _same(found["answer_type"]),
            texts,
            () if len(set(rest)) == len(rest) else rest,
        )
    return found


_same: Callable[[Any], Any] = cache(lambda value: value)  # one copy of what comes often


@lru_cache(maxsize=1)
def annotated(data: Path, split: str) -> list[Annotation]:
    file = find(data, names(split)["annotations"])
    if file is None and split.startswith("test"):
        raise ValueError(
            f"the answers of {split} are not public: submit the file for it to EvalAI's challenge 830, which scores it"
        )
    file = file or need(data, TREE, names(split)["annotations"])
    return read_object(file, smaller)["annotations"]


# Scores --------------------------------------------------------------------------------------------------------------


@cache
def normal(text: str) -> str:
    return answers.vqa(text)


@cache
def punctuated(text: str) -> str:
    return answers.punctuation(text)


def accuracy(text: str, annotation: Annotation) -> float:
    """One question's score, 0 to 1, revision of 2021."""
    text = answers.trim(text)
    given = [answers.trim(answer) for answer in annotation.answers]
    if given.count(given[0]) < len(given):
        text, given = normal(text), [normal(answer) for answer in given]
    return leave_one_out(text, given, annotation.doubles)


def accuracy_2016(text: str, annotation: Annotation) -> float:
    """One question's score, revision of 2016: only the prediction is normalised in full."""
    given = list(annotation.answers)
    if given.count(given[0]) < len(given):
        given = [punctuated(answer) for answer in given]
    return leave_one_out(normal(answers.trim(text)), given, annotation.doubles)


def leave_one_out(text: str, given: list[str], doubles: tuple[Any, ...]) -> float:
    """`agreement`; but annotators' records that are equal in all leave each other out, as the official code has it."""
    if not doubles:
        return answers.agreement(text, given)
    records = list(zip(given, doubles))
    others = ([other for other in records if other != mine] for mine in records)
    shares = [min(1.0, sum(answer == text for answer, _ in them) / 3) for them in others]
    return answers.total(shares) / len(shares)


def matched(asked: Iterable[Annotation], split: str, rows: list[Row]) -> Matched:
    """The answers; ValueError where the official loader stops, which wants exactly the annotated questions."""
    found = match(rows, (annotation.question for annotation in asked))
    if found.missing or found.foreign:
        raise ValueError(
            f"vqav2 {split}: {found.amiss()}; the official code stops, as it wants an answer to each question and no other"
        )
    if found.doubled:
        note(f"vqav2 {split}: {found.amiss()}; the official code takes the last one")
    return found


def selected(data: Path, split: str, only: Collection[str] | None) -> list[Annotation]:
    every = annotated(data, split)
    return every if only is None else [a for a in every if a.question in only]


def summary(
    asked: list[Annotation],
    given: dict[str, str],
    accuracy: Callable[[str, Annotation], float] = accuracy,
) -> dict[str, Any]:
    """Percentages as the official code rounds them: overall, by answer type, by question type."""
    hits: list[float] = []
    by_answer: dict[str, list[float]] = defaultdict(list)
    by_question: dict[str, list[float]] = defaultdict(list)
    for annotation in asked:
        hit = accuracy(given[annotation.question], annotation)
        hits.append(hit)
        by_answer[annotation.expects].append(hit)
        by_question[annotation.kind].append(hit)
    return {
        "overall": answers.percent(hits),
        "perAnswerType": {kind: answers.percent(part) for kind, part in by_answer.items()},
        "perQuestionType": {kind: answers.percent(part) for kind, part in by_question.items()},
    }


def score(data: Path, split: str, rows: list[Row], only: Collection[str] | None = None) -> dict[str, Any]:
    asked = selected(data, split, only)
    return summary(asked, matched(asked, split, rows).answers)


def per_question(data: Path, split: str, rows: list[Row], only: Collection[str] | None = None) -> dict[str, float]:
    asked = selected(data, split, only)
    given = matched(asked, split, rows).answers
    return {annotation.question: accuracy(given[annotation.question], annotation) for annotation in asked}


def more(data: Path, split: str, rows: list[Row], only: Collection[str] | None = None) -> dict[str, Any]:
    """The score of what LLaVA submits, and the overall score of the revision of 2016."""
    asked = selected(data, split, only)
    given = matched(asked, split, rows).answers
    submitted = {name: answers.m4c(text) for name, text in given.items()}
    return {
        "llava_submission": summary(asked, submitted),
        "revision_2016": summary(asked, given, accuracy_2016)["overall"],
    }


def submit(data: Path, split: str, rows: list[Row], out: Path) -> Path:
    """EvalAI's file, as LLaVA writes it: all of test2015 even where only test-dev was asked, "" for what is missing."""
    whole_split = "test2015" if split.startswith("test") else split
    if not find(data, *names(whole_split).values()):
        raise ValueError(
            f"EvalAI wants an answer to each question of {whole_split}, and {data} does not hold "
            f"{names(whole_split)['questions']}; put it there to get the file to submit"
        )
    given = {str(row["question_id"]): row["text"] for row in rows}
    answered = [
        {"question_id": name, "answer": answers.m4c(given[str(name)]) if str(name) in given else ""}
        for name, _, _ in asked(data, whole_split)
    ]
    return write_json(out / f"vqav2-{split}-submission.json", answered)
