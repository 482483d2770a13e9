"""`mme`: MME, converted as LLaVA does and scored as the official calculation.py: accuracy and, for pairs of lines, accuracy+."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any

from llava import SHORT_ANSWER, find, question_rows
from questions import Question, Row, note, whole

TREE = """\
DATA/MME_Benchmark_release_version/          or DATA itself
  existence/000000006040.jpg                 nine subtasks: pictures and questions side by side
  existence/000000006040.txt
  posters/images/tt0048028.jpg               posters, celebrity, scene, landmark, artwork: apart
  posters/questions_answers_YN/tt0048028.txt
DATA/llava_mme.jsonl                         LLaVA's question file, taken where it lies there"""
GROUPS = {
    "perception": (
        "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
    ),
    "cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
}  # fmt: skip
SUBTASKS = tuple(name for names in GROUPS.values() for name in names)
YES_NO = " Please answer yes or no."


def home(data: Path) -> Path:
    inside = data / "MME_Benchmark_release_version"
    return inside if inside.is_dir() else data


def texts(data: Path, subtask: str) -> list[Path]:
    """The files of a subtask's questions."""
    place = home(data) / subtask
    apart = place / "questions_answers_YN"
    return sorted((apart if apart.is_dir() else place).glob("*.txt"))


def splits(data: Path) -> list[str]:
    if not any(texts(data, subtask) for subtask in SUBTASKS) and not find(data, "llava_mme.jsonl"):
        raise FileNotFoundError(f"{data} holds none of the files of mme\n{TREE}")
    return ["test"]


def lines(file: Path) -> list[tuple[str, str]]:
    """The questions of a file with their answers."""
    pairs = []
    for number, line in enumerate(file.read_text(encoding="utf-8").strip().split("\n"), 1):
        question, tab, answer = line.strip().partition("\t")
        if not tab or answer.lower() not in ("yes", "no"):
            raise ValueError(f"{file}, line {number}: {line!r} is no question, tab, and Yes or No")
        pairs.append((question, answer))
    return pairs


def load(data: Path, split: str) -> list[Question]:
    """An id is the picture's name, which is all that LLaVA gives, and which of its questions it is."""
    count: dict[str, int] = defaultdict(int)
    questions = []
    for image, text in asked(data):
        count[image] += 1
        questions.append(Question(f"{image}#{count[image]}", text, (home(data) / image,), {"image": image}))
    return questions


def asked(data: Path) -> list[tuple[str, str]]:
    """(picture, text) of every question; a picture is named from the benchmark's folder."""
    if file := find(data, "llava_mme.jsonl"):
        return [(row["image"], row["text"]) for row in question_rows(file)]
    found = []
    for subtask in SUBTASKS:
        for file in texts(data, subtask):
            apart = file.parent.name == "questions_answers_YN"
            inside = f"{subtask}/images" if apart else subtask
            suffix = next(
                (s for s in (".jpg", ".png", ".jpeg") if (home(data) / inside / (file.stem + s)).exists()), ".jpg"
            )
            for question, _ in lines(file):
                text = question.replace("Please answer yes or no.", "").strip() + SHORT_ANSWER
                found.append((f"{inside}/{file.stem}{suffix}", text))
    return found


# Scores --------------------------------------------------------------------------------------------------------------


def parse(answer: str) -> str:
    """yes, no or other: the whole answer, else what its first four characters hold."""
    answer = answer.lower()
    if answer in ("yes", "no"):
        return answer
    return next((word for word in ("yes", "no") if word in answer[:4]), "other")


Line = tuple[str, str, str, str]
"""A line of the official code's input: file, question, right answer, answer."""


def converted(data: Path, rows: list[Row]) -> list[tuple[str, Line]]:
    """LLaVA's conversion: the subtask and the line of each row."""
    right = {
        (subtask, file.name, question): answer
        for subtask in SUBTASKS
        for file in texts(data, subtask)
        for question, answer in lines(file)
    }
    if not right:
        raise FileNotFoundError(f"{data} holds no answers of mme\n{TREE}")
    found, foreign = [], []
    for row in rows:
        name = str(row["question_id"])
        subtask, file = name.split("/")[0], name.split("/")[-1].split(".")[0] + ".txt"
        question = (row.get("prompt") or "").replace(SHORT_ANSWER.strip(), "").strip()
        if YES_NO.strip() not in question:
            question += YES_NO
            if (subtask, file, question) not in right:  # some official questions have two spaces there
                question = question.replace(YES_NO, f" {YES_NO}")
        if (subtask, file, question) in right:
            answer = row["text"].replace("\n", "").replace("\t", "").replace("\r", "")
            found.append((subtask, (file, question, right[subtask, file, question], answer)))
        else:
            foreign.append(name)
    if foreign:
        raise ValueError(
            f"mme: {len(foreign)} of {len(rows)} answers are to no question here, by file and prompt (as {foreign[0]}); the "
            "official code stops at the first"
        )
    return found


def by_subtask(data: Path, rows: list[Row]) -> dict[str, list[Line]]:
    found: dict[str, list[Line]] = defaultdict(list)
    for subtask, line in converted(data, rows):
        found[subtask].append(line)
    return found


def measured(data: Path, rows: list[Row], only: Collection[str] | None) -> dict[str, tuple[float, float]]:
    """Accuracy and accuracy+ of each subtask, 0 to 1."""
    found = by_subtask(data, rows)
    wanted = {s: sum(len(lines(file)) for file in texts(data, s)) for s in SUBTASKS}
    short = {s: (len(found[s]), count) for s, count in wanted.items() if len(found[s]) != count}
    if short and only is None:
        told = ", ".join(f"{s} {given} of {count}" for s, (given, count) in short.items())
        empty = [s for s, (given, _) in short.items() if not given]
        if empty or any(given % 2 for given, _ in short.values()):
            raise ValueError(
                f"mme: not as many answers as questions ({told}); the official code stops where a subtask has none or an odd "
                "number of answers"
            )
        note(
            f"mme: not as many answers as questions ({told}); the official code scores the pairs of lines that there are"
        )
    figures = {}
    for subtask in SUBTASKS:
        hits = [parse(answer) == right.lower() for _, _, right, answer in found[subtask]]
        pairs = [a and b for a, b in zip(hits[::2], hits[1::2])]
        if pairs:
            figures[subtask] = (sum(hits) / len(hits), sum(pairs) / len(pairs))
    return figures


def per_question(data: Path, split: str, rows: list[Row]) -> dict[str, float]:
    """1 for each right answer, by the ids of `load`; two rows of LLaVA's that share one are counted."""
    count: dict[str, int] = defaultdict(int)
    hits = {}
    for row, (_, line) in zip(rows, converted(data, rows)):
        name = str(row["question_id"])
        count[name] += 1
        hits[name if "#" in name else f"{name}#{count[name]}"] = float(parse(line[3]) == line[2].lower())
    return hits


def score(data: Path, split: str, rows: list[Row], only: Collection[str] | None = None) -> dict[str, float]:
    """Each subtask's 100 (accuracy + accuracy+), and their sums; no sum where one of its subtasks is not in DATA."""
    figures = measured(data, rows, only)
    scores: dict[str, float] = {}
    for group, subtasks in GROUPS.items():
        parts = {s: figures[s][0] * 100 + figures[s][1] * 100 for s in subtasks if s in figures}
        if len(parts) == len(subtasks):
            scores[group] = sum(parts.values())
        scores |= parts
    if len(figures) < len(SUBTASKS):
        left_out = ", ".join(s for s in SUBTASKS if s not in figures)
        note(f"mme: there is no score for {left_out}, and no sum that they belong to; the official code stops here")
    else:
        scores["total"] = sum(scores[group] for group in GROUPS)
    return scores


def more(data: Path, split: str, rows: list[Row], only: Collection[str] | None = None) -> dict[str, Any]:
    """Accuracy and accuracy+ apart, in percent."""
    figures = measured(data, rows, only)
    return {s: {"acc": 100 * acc, "acc_plus": 100 * plus} for s, (acc, plus) in figures.items()}


def submit(data: Path, split: str, rows: list[Row], out: Path) -> Path:
    """The folder of text files that the official code reads."""
    place = out / "mme-results"
    for subtask, found in by_subtask(data, rows).items():
        with whole(place / f"{subtask}.txt") as part:
            part.write_text("".join("\t".join(line) + "\n" for line in found), encoding="utf-8")
    return place
