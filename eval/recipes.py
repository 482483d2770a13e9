"""How the rows of data sets on the Hub become the official files that the benches read.

Nothing is made up: what a data set lacks is left out, and hub.py says so where a reader of the score must know.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

from folder import Folder, bytes_of

Rows = Iterable[Mapping[str, Any]]
"""A split's rows; a picture is {"bytes": …, "path": …}."""


def some(row: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: row[name] for name in names}


def public(answers: list[str] | None) -> list[str]:
    """The answers where they are public: a test split has none, or empty ones in their place."""
    return list(answers) if answers and any(answers) else []


# Open questions ------------------------------------------------------------------------------------------------------


def vqav2(folder: Folder, split: str, rows: Rows) -> None:
    subset = split.replace("test-dev", "test")
    questions = folder.entries(f"v2_OpenEnded_mscoco_{split}_questions.json", "questions")
    annotations = folder.entries(f"v2_mscoco_{split}_annotations.json", "annotations")
    with questions, annotations:
        for row in rows:
            folder.picture(row["image"], subset, f"COCO_{subset}_{row['image_id']:012d}.jpg")
            questions.add(some(row, "image_id", "question", "question_id"))
            if answers := objects(row["answers"]):
                kept = ("question_id", "image_id", "question_type", "answer_type", "multiple_choice_answer")
                annotations.add(some(row, *kept) | {"answers": answers})


def gqa(folder: Folder, split: str, questions: Rows, pictures: Rows) -> None:
    kept = ("question", "imageId", "isBalanced", "groups", "answer", "fullAnswer", "types", "semanticStr")
    given = {}
    for row in questions:
        names = {name: re.findall(r"\w+", row[name] or "") for name in ("entailed", "equivalent")}  # "['05515938', …]"
        given[row["id"]] = some(row, *kept) | names | {"semantic": objects(row["semantic"])}
    folder.json(f"{split}_questions.json", given)
    for row in pictures:
        folder.picture(row["image"], "images", f"{row['id']}.jpg")


def objects(given: Any) -> list[dict[str, Any]]:
    """A list of objects, which `datasets` may hand out as an object of lists."""
    if isinstance(given, Mapping):
        return [dict(zip(given, values)) for values in zip(*given.values())]
    return list(given or ())


def textvqa(folder: Folder, split: str, rows: Rows) -> None:
    pictures = "test_images" if split == "test" else "train_images"
    with folder.entries(f"TextVQA_0.5.1_{split}.json", "data") as records:
        for row in rows:
            folder.picture(row["image"], pictures, f"{row['image_id']}.jpg")
            answers = public(row["answers"])
            record = some(row, "question", "question_id", "image_id")
            records.add(record | ({"answers": answers} if answers else {}))


def vizwiz(folder: Folder, split: str, rows: Rows) -> None:
    with folder.entries(f"Annotations/{split}.json") as records:
        for row in rows:
            image = folder.picture(row["image"], split, f"{row['question_id']}.jpg")
            record: dict[str, Any] = {"image": image, "question": row["question"]}
            if answers := public(row["answers"]):
                record |= {"answers": [{"answer": answer} for answer in answers], "answer_type": row["category"]}
            records.add(record)


def mm_vet(folder: Folder, split: str, rows: Rows) -> None:
    entries = {}
    for row in rows:
        name = row["question_id"]
        entries[name] = some(row, "question", "answer") | {
            "imagename": folder.picture(row["image"], "images", stem=name),
            "capability": [word.strip() for word in row["capability"].split(",")],
            "imagesource": row["image_source"],
        }
    folder.json("mm-vet.json", entries)


def llava_bench(folder: Folder, split: str, rows: Rows) -> None:
    with folder.lines("questions.jsonl") as lines:
        for row in rows:
            stem = str(row["image_id"]).rpartition("/")[2].partition(".")[0]
            image = folder.picture(row["image"], "images", stem=stem)
            lines.add(some(row, "question_id", "category") | {"image": image, "text": row["question"]})


def chartqa(folder: Folder, split: str, rows: Rows) -> None:
    parts = {part: folder.entries(f"test_{part}.json") for part in ("human", "augmented")}
    with ExitStack() as files:
        for part in parts.values():
            files.enter_context(part)
        for row in rows:
            part = chosen(parts, "type", row["type"].removesuffix("_test"))
            image = folder.picture(row["image"], "png")
            part.add({"imgname": image, "query": row["question"], "label": row["answer"]})


def chosen(parts: Mapping[str, Any], column: str, name: str) -> Any:
    if name not in parts:
        raise ValueError(f"its column {column} says {name!r}, which is none of {', '.join(parts)}")
    return parts[name]


def docvqa(folder: Folder, split: str, rows: Rows) -> None:
    with folder.entries(f"{split}_v1.0{'' if split == 'test' else '_withQT'}.json", "data") as entries:
        for row in rows:
            stem = f"{row['ucsf_document_id']}_{row['ucsf_document_page_no']}"
            image = f"documents/{folder.picture(row['image'], 'documents', stem=stem)}"
            entries.add(document(row, "question_types", "docId") | {"image": image})


def infographicvqa(folder: Folder, split: str, rows: Rows) -> None:
    file = f"infographicsVQA_{split}_v1.0{'' if split == 'test' else '_withQT'}.json"
    with folder.entries(file, "data") as entries:
        for row in rows:
            image = folder.picture(row["image"], "infographicsvqa_images")
            entry = document(row, "answer_type", "operation/reasoning", "image_url")
            entries.add(entry | {"image_local_name": image})


def document(row: Mapping[str, Any], *names: str) -> dict[str, Any]:
    answers = public(row["answers"])
    entry = {"questionId": int(row["questionId"]), "question": row["question"]}
    return entry | some(row, *names) | ({"answers": answers} if answers else {})


def ocrbench(folder: Folder, split: str, rows: Rows) -> None:
    with folder.entries("OCRBench.json") as entries:
        for row in rows:
            entry = {"dataset_name": row["dataset"], "type": row["question_type"], "answers": row["answer"]}
            image = folder.picture(row["image"], "OCRBench_Images")
            entries.add(entry | {"question": row["question"], "image_path": image})


# Yes or no -----------------------------------------------------------------------------------------------------------


def pope(folder: Folder, split: str, rows: Rows) -> None:
    parts = {name: folder.lines(f"coco/coco_pope_{name}.json") for name in ("adversarial", "popular", "random")}
    with ExitStack() as files:
        for part in parts.values():
            files.enter_context(part)
        for row in rows:
            image = folder.picture(row["image"], "val2014", f"{row['image_source'].removesuffix('.jpg')}.jpg")
            label = row["answer"].strip().lower()
            line = {"question_id": int(row["question_id"]), "image": image, "text": row["question"], "label": label}
            chosen(parts, "category", row["category"]).add(line)


def mme(folder: Folder, split: str, rows: Rows) -> None:
    apart = ("posters", "celebrity", "scene", "landmark", "artwork")
    lines: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        subtask, stem = row["category"], row["question_id"].rpartition("/")[2].partition(".")[0]
        folder.picture(row["image"], f"{subtask}/images" if subtask in apart else subtask, stem=stem)
        place = f"{subtask}/questions_answers_YN" if subtask in apart else subtask
        lines[f"{place}/{stem}.txt"].append(f"{row['question'].strip()}\t{row['answer'].strip()}\n")
    for file, both in lines.items():
        folder.text(file, "".join(both))


# Multiple choice -----------------------------------------------------------------------------------------------------


def scienceqa(folder: Folder, split: str, rows: Rows) -> None:
    """Ids that no official one can be taken for: those are numbers, and the data set has none."""
    kept = ("question", "choices", "answer", "hint", "task", "grade", "subject", "topic", "category", "skill")
    problems = {}
    for number, row in enumerate(rows):
        name = f"{split}-{number}"
        image = folder.picture(row["image"], f"images/{split}/{name}", "image.png") if row["image"] else None
        problems[name] = some(row, *kept, "lecture", "solution") | {"image": image, "split": split}
    folder.json("problems.json", problems)
    folder.json("pid_splits.json", {split: list(problems)})


def mmbench(folder: Folder, split: str, rows: Rows) -> None:
    """VLMEvalKit's table: of rows with the same picture the first has it, the others that row's index."""
    columns = (
        "index",
        "question",
        "hint",
        *"ABCD",
        "answer",
        "category",
        "image",
        "source",
        "l2-category",
        "comment",
        "split",
    )
    table = io.StringIO()
    writer = csv.writer(table, delimiter="\t", lineterminator="\n")
    writer.writerow(columns)
    first: dict[bytes, Any] = {}
    for row in rows:
        content = bytes_of(row["image"])
        mark = hashlib.sha1(content, usedforsecurity=False).digest()
        image = first[mark] if mark in first else base64.b64encode(content).decode()
        first.setdefault(mark, row["index"])
        cells = dict(row) | {"image": image, "l2-category": row["L2-category"]}
        writer.writerow([cells[name] for name in columns])
    folder.text(f"MMBench_{split.upper()}.tsv", table.getvalue())


SEED_TYPES = (
    "Scene Understanding", "Instance Identity", "Instance Location", "Instance Attributes", "Instances Counting",
    "Spatial Relation", "Instance Interaction", "Visual Reasoning", "Text Understanding", "Action Recognition",
    "Action Prediction", "Procedure Understanding",
)  # fmt: skip
"""SEED-Bench's types of questions from 1, which its data set only numbers; its authors put 3 and 4 right in May 2024."""


def seed(folder: Folder, split: str, rows: Rows) -> None:
    types = {"question_type": {name: number for number, name in enumerate(SEED_TYPES, 1)}}
    choices = [f"choice_{letter}" for letter in "abcd"]
    with folder.entries("SEED-Bench.json", "questions", types) as entries:
        for row in rows:
            data, frames = row["data_id"], row["image"]
            data = data if isinstance(data, str) else data[0]
            if row["data_type"] == "video":
                middle = frames[len(frames) // 2]  # the frame that LLaVA shows
                folder.picture(middle, "SEED-Bench-video-image", f"{row['question_id']}.png")
            else:
                folder.picture(frames[0], "SEED-Bench-image", data)
            entry = some(row, "question_id", "question", "answer", "data_type", "question_type_id", *choices)
            entries.add(entry | {"data_id": data})


def mmmu(folder: Folder, split: str, rows: Rows) -> None:
    with folder.lines(f"mmmu_{split}.jsonl") as lines:
        for row in rows:
            image = folder.picture(row["image_1"], "images", stem=f"{row['id']}_1") if row["image_1"] else None
            lines.add(some(row, "id", "question", "options", "answer", "question_type") | {"image_1": image})


def ai2d(folder: Folder, split: str, rows: Rows) -> None:
    with folder.lines("ai2d_test.jsonl") as lines:
        for number, row in enumerate(rows):
            image = folder.picture(row["image"], "images")
            answer = {"answer": int(row["answer"]), "question_id": number}
            lines.add(some(row, "question", "options") | answer | {"image": image})
