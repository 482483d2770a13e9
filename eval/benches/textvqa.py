"""`textvqa`: TextVQA, scored as m4c's evaluator does: both sides always normalised, each annotator left out once."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any

import answers
from llava import SHORT_ANSWER, find, folder, need, question_rows
from questions import Question, Row, note, read_object, write_json

TREE = """\
DATA/
  TextVQA_0.5.1_val.json                   or test, train; with the answers, what a score needs
  train_images/003a8ae2ef43b901.jpg        of train and val; test has test_images/
  llava_textvqa_val_v051_ocr.jsonl         LLaVA's question file, with OCR tokens; taken where it lies there
  TextVQA_Rosetta_OCR_v0.2_val.json        else OCR tokens come from here; without either, the prompts have none"""
SPLITS = ("val", "test", "train")
OCR = "\nReference OCR token: "


def names(split: str) -> dict[str, str]:
    """The files of a split."""
    return {
        "official": f"TextVQA_0.5.1_{split}.json",
        "llava": f"llava_textvqa_{split}_v051_ocr.jsonl",
        "ocr": f"TextVQA_Rosetta_OCR_v0.2_{split}.json",
    }


def splits(data: Path) -> list[str]:
    found = [s for s in SPLITS if find(data, names(s)["official"], names(s)["llava"])]
    if not found:
        raise FileNotFoundError(f"{data} holds none of the files of textvqa\n{TREE}")
    return found


def records(data: Path, split: str) -> list[dict[str, Any]]:
    """The official questions, with their answers where they are public."""
    return read_object(need(data, TREE, names(split)["official"]))["data"]


def settings(data: Path, split: str) -> dict[str, Any]:
    """Whether the prompts hold OCR tokens, which is worth several points."""
    return {"ocr": find(data, names(split)["llava"], names(split)["ocr"]) is not None}


def load(data: Path, split: str) -> list[Question]:
    """Ids are the official question ids; LLaVA's file has only picture ids, of which several questions may share one."""
    pictures = folder(data, "test_images" if split == "test" else "train_images", "images")
    if file := find(data, names(split)["llava"]):
        ids: dict[tuple[str, str], list[str]] = defaultdict(list)
        for record in records(data, split) if find(data, names(split)["official"]) else []:
            ids[record["image_id"], record["question"].lower()].append(str(record["question_id"]))
        questions = []
        for number, row in enumerate(question_rows(file)):
            known = ids[str(row["question_id"]), asked_in(row["text"])]
            name = known.pop(0) if known else f"{row['question_id']}-{number}"
            questions.append(Question(name, row["text"], (pictures / row["image"],), {"image": row["image"]}))
        return questions
    tokens: dict[str, list[str]] = {}
    if file := find(data, names(split)["ocr"]):
        tokens = {record["image_id"]: record["ocr_tokens"] for record in read_object(file)["data"]}
    questions = []
    for record in records(data, split):
        image = f"{record['image_id']}.jpg"
        seen = OCR + ", ".join(tokens[record["image_id"]]) if record["image_id"] in tokens else ""
        text = record["question"].capitalize() + seen + SHORT_ANSWER
        questions.append(Question(str(record["question_id"]), text, (pictures / image,), {"image": image}))
    return questions


def asked_in(prompt: str) -> str:
    """The question that a prompt of LLaVA's asks, in lower case; ValueError for a prompt of another form."""
    prompt = prompt.removeprefix("User: ").removeprefix("<image>\n").removesuffix("\n\nAssistant:")
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: ") and (found := re.search("Question: (.*?) Short answer:", prompt, re.DOTALL)):
        return found[1].lower()
    if len(lines) == 3 and "Reference OCR token: " in prompt:
        return lines[prompt.startswith("Reference OCR token:")].lower()
    if len(lines) == 2:
        return lines[0].lower()
    raise ValueError(f"textvqa: no question can be told from the prompt {prompt!r}; the official code stops here")


def paired(data: Path, split: str, rows: list[Row]) -> list[tuple[Row, dict[str, Any]]]:
    """Each answer with the record of its question, found by question id or by what LLaVA's rows hold."""
    by_id: dict[str, dict[str, Any]] = {}
    by_text: dict[tuple[str, str], dict[str, Any]] = {}
    for record in records(data, split):
        by_id[str(record["question_id"])] = record
        by_text[record["image_id"], record["question"].lower()] = record
    pairs, foreign = [], []
    for row in rows:
        name = str(row["question_id"])
        found = by_id.get(name) or (by_text.get((name, asked_in(row["prompt"]))) if row.get("prompt") else None)
        if found:
            pairs.append((row, found))
        else:
            foreign.append(name)
    if foreign:
        raise ValueError(
            f"textvqa {split}: {len(foreign)} of {len(rows)} answers are to no question of this split "
            f"(as {foreign[0]}); the official code stops at the first"
        )
    return pairs


def accuracy(text: str, record: dict[str, Any]) -> float:
    """One question's score, 0 to 1."""
    if len(record["answers"]) != 10:
        raise ValueError(
            f"textvqa: question {record['question_id']} has {len(record['answers'])} answers, not 10; "
            "the official code stops here"
        )
    return answers.agreement(answers.m4c(text), [answers.m4c(answer) for answer in record["answers"]])


def per_question(data: Path, split: str, rows: list[Row]) -> dict[str, float]:
    return {str(record["question_id"]): accuracy(row["text"], record) for row, record in paired(data, split, rows)}


def score(data: Path, split: str, rows: list[Row], only: Collection[str] | None = None) -> dict[str, Any]:
    """The mean over the answers that there are, as the official code takes it."""
    pairs = paired(data, split, rows)
    if any("answers" not in record for _, record in pairs):
        raise ValueError(
            f"the answers of {split} are not public: submit the file for it to EvalAI's challenge 874, which scores it"
        )
    if not pairs:
        raise ValueError(f"textvqa {split}: there is no answer to score; the official code divides by zero")
    distinct = len({record["question_id"] for _, record in pairs})
    count = len(records(data, split)) if only is None else len(only)
    if distinct < count or distinct < len(pairs):
        note(
            f"textvqa {split}: {count - distinct} of {count} questions have no answer and {len(pairs) - distinct} answers "
            f"are to a question that has another; the official code takes the mean over the {len(pairs)} answers"
        )
    hits = [accuracy(row["text"], record) for row, record in pairs]
    return {"accuracy": 100.0 * (answers.total(hits) / len(hits)), "samples": len(hits)}


def submit(data: Path, split: str, rows: list[Row], out: Path) -> Path:
    """EvalAI's file."""
    answered = [{"question_id": r["question_id"], "answer": row["text"]} for row, r in paired(data, split, rows)]
    return write_json(out / f"textvqa-{split}-submission.json", answered)
