"""DocVQA and InfographicVQA: the files of the Robust Reading Competition, and its measure of near misses in reading."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from places import matching, missing, picture
from questions import Question, Row, match, read_json, whole

SUFFIX = "Answer the question using a single word or phrase."
SERVER = "https://rrc.cvc.uab.es/?ch=17"
THRESHOLD = 0.5
KINDS = ("question_types", "answer_type", "evidence", "operation/reasoning")
"""By these the competition splits its results up where a file has them."""

Entry = dict[str, Any]


def files(data: Path, bench: str, patterns: Sequence[str], tree: str) -> dict[str, Path]:
    """The splits' files by the first pattern that finds some, val first. Of several of a split the last in the alphabet."""
    found = {}
    for file in next(filter(None, (matching(data, (bench,), pattern) for pattern in patterns)), []):
        split = re.search("train|val|test", file.name.lower())
        found[split[0] if split else "val"] = file
    if not found:
        raise missing(bench, data, tree)
    return {split: found[split] for split in ("val", "test", "train") if split in found}


def entries(file: Path, only: Collection[str] | None = None) -> list[Entry]:
    given = read_json(file)
    if not isinstance(given, dict) or "data" not in given:
        raise ValueError(f"{file} has no list under 'data', as the competition's files have")
    return [entry for entry in given["data"] if only is None or str(entry["questionId"]) in only]


def load(file: Path, folder: str) -> list[Question]:
    """lmms-eval's prompt. DocVQA names a picture with its folder, InfographicVQA without."""
    questions = []
    for entry in entries(file):
        name = entry.get("image_local_name") or entry["image"]
        place = picture(file.parent, name, folder)
        text = f"{entry['question']}\n{SUFFIX}"
        questions.append(Question(str(entry["questionId"]), text, (place,), {"image": name}))
    return questions


def distance(a: str, b: str) -> int:
    """Levenshtein's: the fewest characters to insert, delete or replace."""
    if len(a) < len(b):
        a, b = b, a
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], before if x == y else 1 + min(before, row[j], row[j - 1])
    return row[-1]


def similarity(answer: str, rights: Sequence[str]) -> float:
    """1 less the distance to the nearest right answer as a share of the longer text; 0 below a half.

    The texts are compared without case and surplus space, but their lengths are taken with them.
    """
    shares = []
    for right in rights:
        length = max(len(right.upper()), len(answer.upper()))
        apart = distance(*(" ".join(text.strip().lower().split()) for text in (right, answer)))
        shares.append(apart / length if length else 0.0)
    value = 1 - min(shares)
    return value if value >= THRESHOLD else 0.0


def strict_similarity(answer: str, rights: Sequence[str]) -> float:
    """pix2struct's: nothing but case is evened out, and exactly a half is 0."""
    shares = []
    for right in rights:
        length = max(len(right), len(answer))
        shares.append(distance(right.lower(), answer.lower()) / length if length else 0.0)
    return max(1 - share if share < THRESHOLD else 0.0 for share in shares)


def answered(
    file: Path, split: str, rows: list[Row], bench: str, only: Collection[str] | None = None
) -> list[tuple[Entry, str]]:
    """Each question with its answer. ValueError unless every question has exactly one, as the competition wants it."""
    asked = entries(file, only)
    found = match(rows, (entry["questionId"] for entry in asked))
    if found.amiss():
        raise ValueError(f"{bench} {split}: {found.amiss()}; the official script takes only exactly one answer to each")
    return [(entry, found.answers[str(entry["questionId"])]) for entry in asked]


def judged(
    file: Path, split: str, rows: list[Row], bench: str, only: Collection[str] | None = None
) -> list[tuple[Entry, str]]:
    """`answered`, of a split whose answers are public."""
    if any(not entry.get("answers") for entry in entries(file)):
        raise ValueError(f"{bench} {split} has no public answers; the file of `submit` goes to {SERVER}")
    return answered(file, split, rows, bench, only)


def score(file: Path, split: str, rows: list[Row], bench: str, only: Collection[str] | None = None) -> dict[str, float]:
    """ANLS, 0 to 100."""
    values = [similarity(text, entry["answers"]) for entry, text in judged(file, split, rows, bench, only)]
    return {"anls": sum(values) / len(values) * 100}


def more(file: Path, split: str, rows: list[Row], bench: str, only: Collection[str] | None = None) -> dict[str, Any]:
    """ANLS by kinds of questions, and what others call by the same name or compare it with."""
    pairs = judged(file, split, rows, bench, only)
    kinds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for entry, text in pairs:
        for column in KINDS:
            for kind in entry.get(column) or []:
                kinds[column][kind].append(similarity(text, entry["answers"]))
    exact = [word(text) in [word(right) for right in entry["answers"]] for entry, text in pairs]
    figures: dict[str, Any] = {
        "pix2struct_anls": sum(strict_similarity(text, e["answers"]) for e, text in pairs) / len(pairs) * 100,
        "visualrwkv_exact": sum(exact) / len(pairs) * 100,
    }
    for column, parts in kinds.items():
        figures[f"anls_by_{column}"] = {kind: sum(v) / len(v) * 100 for kind, v in sorted(parts.items())}
    return figures


def word(text: str) -> str:
    """As VisualRWKV's own measure compares: that its published numbers are of."""
    return text.strip().lower().strip(".")


def per_question(
    file: Path, split: str, rows: list[Row], bench: str, only: Collection[str] | None = None
) -> dict[str, float]:
    pairs = judged(file, split, rows, bench, only)
    return {str(entry["questionId"]): similarity(text, entry["answers"]) for entry, text in pairs}


def submit(file: Path, split: str, rows: list[Row], out: Path, bench: str) -> Path:
    """[{"questionId": 1, "answer": "…"}, …] for the competition's server."""
    given = [{"questionId": e["questionId"], "answer": text} for e, text in answered(file, split, rows, bench)]
    target = out / f"{bench}-{split}.json"
    with whole(target) as part:
        part.write_text(json.dumps(given, ensure_ascii=False) + "\n", encoding="utf-8")
    return target
