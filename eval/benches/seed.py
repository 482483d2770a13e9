"""`seed`: SEED-Bench-1, four options about a picture or a video's middle frame. Right is the bare letter alone."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any

from choices import DIRECTLY, listed
from places import matching, missing, picture
from questions import Question, Row, fitted, read_jsonl, read_object, whole

TREE = """\
DATA/                              or DATA/seed_bench/
  SEED-Bench.json                  19,242 questions: 14,233 about pictures, 5,009 about videos
  SEED-Bench-image/                pictures by their data_id
  SEED-Bench-video-image/          one frame of each video, named as in LLaVA's file, or QUESTION_ID.png without it
  llava-seed-bench.jsonl           LLaVA's question file; optional, it says where the frames are"""


def table(data: Path) -> Path:
    found = matching(data, ("seed_bench", "seed"), r"SEED-Bench\.json")
    if not found:
        raise missing("seed", data, TREE)
    return found[0]


def splits(data: Path) -> list[str]:
    table(data)  # an error where it is missing
    return ["all"]


def load(data: Path, split: str) -> list[Question]:
    """The questions with their four options; LLaVA's file, where it lies there, as it is."""
    file = table(data)
    if listing := matching(file.parent, (), r"llava-seed-bench\.jsonl"):
        return [
            Question(str(row["question_id"]), row["text"], (file.parent / row["image"],), {"image": row["image"]})
            for row in read_jsonl(listing[0])
        ]
    questions = []
    for entry in read_object(file)["questions"]:
        options = listed(entry[f"choice_{letter}"] for letter in "abcd")
        if entry["data_type"] == "video":
            place = picture(file.parent, f"{entry['question_id']}.png", "SEED-Bench-video-image")
        else:
            place = picture(file.parent, entry["data_id"], "SEED-Bench-image")
        text = f"{entry['question']}{options}\n{DIRECTLY}"
        questions.append(Question(str(entry["question_id"]), text, (place,), {"image": entry["data_id"]}))
    return questions


def hits(
    data: Path, rows: list[Row], only: Collection[str] | None = None
) -> tuple[dict[str, Any], list[tuple[dict[str, Any], str | None]]]:
    """The annotations, and each question with its answer."""
    given = read_object(table(data))
    asked = [entry for entry in given["questions"] if only is None or str(entry["question_id"]) in only]
    otherwise = "LLaVA's script takes the last of several, and counts a missing answer as wrong but cannot submit it"
    found = fitted("seed", rows, [entry["question_id"] for entry in asked], otherwise)
    return given, [(entry, found.answers.get(str(entry["question_id"]))) for entry in asked]


def score(data: Path, split: str, rows: list[Row], only: Collection[str] | None = None) -> dict[str, float]:
    """Percentages as LLaVA prints them: each type of question, all, pictures, videos.

    A type in which nothing is right is 0 here and stops LLaVA's script; without videos it stops too, and they are left out.
    """
    given, pairs = hits(data, rows, only)
    kinds = {number: name for name, number in given["question_type"].items()}
    parts: dict[str, list[bool]] = defaultdict(list)
    for entry, text in sorted(pairs, key=lambda pair: pair[0]["question_type_id"]):
        parts[kinds[entry["question_type_id"]]].append(text == entry["answer"])
    parts["Total accuracy"] = [text == entry["answer"] for entry, text in pairs]
    for kind in ("image", "video"):
        if those := [text == entry["answer"] for entry, text in pairs if entry["data_type"] == kind]:
            parts[f"{kind} accuracy"] = those
    return {name: float(f"{sum(h) / len(h) * 100:.2f}") for name, h in parts.items()}


def more(data: Path, split: str, rows: list[Row], only: Collection[str] | None = None) -> dict[str, Any]:
    """What lmms-eval would report: there the first character alone counts, in any case."""
    _, pairs = hits(data, rows, only)
    kinds = {"image": ("image",), "video": ("video",), "all": ("image", "video")}
    figures = {}
    for name, allowed in kinds.items():
        those = [
            (text or "").strip()[:1].lower() == entry["answer"].lower()
            for entry, text in pairs
            if entry["data_type"] in allowed
        ]
        if those:
            figures[name] = sum(those) / len(those) * 100
    return {"lmms_eval_first_char": figures}


def per_question(data: Path, split: str, rows: list[Row], only: Collection[str] | None = None) -> dict[str, float]:
    return {str(entry["question_id"]): float(text == entry["answer"]) for entry, text in hits(data, rows, only)[1]}


def submit(data: Path, split: str, rows: list[Row], out: Path) -> Path:
    """One line a question in the order of the annotations. ValueError unless all are answered."""
    _, pairs = hits(data, rows)
    unanswered = [entry["question_id"] for entry, text in pairs if text is None]
    if unanswered:
        raise ValueError(
            f"{len(unanswered)} of {len(pairs)} questions have no answer (as {unanswered[0]}); a submission needs all"
        )
    target = out / f"seed-{split}.jsonl"
    lines = [json.dumps({"question_id": e["question_id"], "prediction": text}) + "\n" for e, text in pairs]
    with whole(target) as part:
        part.write_text("".join(lines), encoding="utf-8")
    return target
