"""What a finished evaluation left: its scores, and what each question came to, read for a report."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from intervals import Mean, clustered
from published import COLUMNS, Column
from questions import Row, note, read_json, read_jsonl


@dataclass(frozen=True)
class Figure:
    """A bench's headline figure of a run, with its interval where the figure is a mean over questions."""

    value: float
    interval: Mean | None = None  # in the figure's own unit
    accuracy: Mean | None = None  # in per cent, where the figure is no mean (an F1, a sum with pairs)
    split: str = ""
    questions: int = 0
    limit: int = 0
    values: Mapping[str, float] = field(default_factory=dict)  # each question's, for paired differences
    pictures: Mapping[str, str] = field(default_factory=dict)  # what each question is about

    def text(self, decimals: int) -> str:
        """As a cell says it."""
        told = f"{self.value:.{decimals}f}"
        if self.interval and math.isfinite(self.interval.half):
            told += f" ± {self.interval.half:.{max(decimals, 1)}f}"
        elif self.accuracy and math.isfinite(self.accuracy.half):
            told += f" (acc. {self.accuracy.mean:.1f} ± {self.accuracy.half:.1f})"
        return told + ("*" if self.limit else "")


@dataclass(frozen=True)
class Run:
    """A result.json with the answers beside it."""

    name: str
    settings: str
    figures: Mapping[str, Figure]


def read_run(place: Path) -> Run:
    """A directory of eval/run.py, or the result.json in it. FileNotFoundError or ValueError where it is no such file."""
    file = place / "result.json" if place.is_dir() else place
    result = read_json(file)
    if not isinstance(result, dict) or not isinstance(result.get("scores"), dict):
        raise ValueError(f"{file} holds no scores; it is not written by eval/run.py")
    asked = {name.replace("_", "-"): name for name, score in result["scores"].items() if score is not None}
    figures = {}
    for key, column in COLUMNS.items():
        name = asked.get(column.bench.replace("_", "-"))
        if name is None:
            continue
        value: Any = ((result.get("more") or {}) if column.further else result["scores"]).get(name)
        for part in column.path:
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            figures[key] = read_figure(file, result, name, column, value * column.scale)
    return Run(title(file, result), told_settings(result), figures)


def title(file: Path, result: Mapping[str, Any]) -> str:
    """A model by the last two parts of its path and its hash; saved answers by those of theirs."""
    if result.get("model"):
        return f"{'/'.join(Path(result['model']).parts[-2:])} ({result.get('model_hash', '?')})"
    return "/".join(Path(result.get("predictions") or file.parent).parts[-2:])


def told_settings(result: Mapping[str, Any]) -> str:
    """Under what settings a run was made, in few words."""
    words = [f"{name.replace('_', ' ')} {result[name]}" for name in ("template", "dtype", "commit") if result.get(name)]
    if result.get("image_position"):
        words.insert(0, f"image {result['image_position']}")
    return ", ".join(words)


def read_figure(file: Path, result: Mapping[str, Any], name: str, column: Column, value: float) -> Figure:
    """A figure with what its answers say of how sure it is; without that where they are gone or cannot be scored alone."""
    told = (result.get("settings") or {}).get(name) or {}
    split = (told.get("splits") or [""])[0]
    bare = Figure(
        value, split=split, questions=result.get("questions", {}).get(name) or 0, limit=result.get("limit") or 0
    )
    if column.further:
        return bare
    stem = name.replace("-", "_")
    answers = Path(result["predictions"]) if result.get("predictions") else file.parent / f"{stem}-{split}.jsonl"
    try:
        rows = read_jsonl(answers)
        data = Path(told.get("data") or result["data"])  # the former where it was fetched from the Hub
        values = question_values(stem, data, split, rows, bare.limit)
        pictures = question_pictures(stem, data, split, rows, values)
    except (FileNotFoundError, ValueError, KeyError) as error:
        note(f"{file}: {column.title} stands without an interval ({str(error).partition(chr(10))[0]})")
        return bare
    if not values:
        return bare
    mean = clustered(values, pictures)
    tolerance = 0.51 * 10 ** -min(column.decimals, 1)  # official scores are rounded
    factors = (100.0, float(len(values)))
    interval = next((mean.scaled(f) for f in factors if abs(mean.mean * f - value) < tolerance), None)
    return replace(
        bare,
        interval=interval,
        accuracy=None if interval else mean.scaled(100),
        questions=len(values),
        values=values,
        pictures=pictures,
    )


def question_values(stem: str, data: Path, split: str, rows: list[Row], limit: int) -> dict[str, float]:
    """What each question came to, by the bench; {} for a bench that does not say."""
    code = importlib.import_module(f"benches.{stem}")
    if not hasattr(code, "per_question"):
        return {}
    some: dict[str, Any] = {}
    if limit and "only" in inspect.signature(code.per_question).parameters:
        some = {"only": {str(row["question_id"]) for row in rows}}
    return code.per_question(data, split, rows, **some)


def question_pictures(
    stem: str, data: Path, split: str, rows: list[Row], values: Mapping[str, float]
) -> dict[str, str]:
    """What each question is about: the answers say it where we wrote them, else the questions."""
    pictures = {str(row["question_id"]): str(row["image"]) for row in rows if row.get("image")}
    if values.keys() <= pictures.keys():
        return pictures
    try:
        asked = importlib.import_module(f"benches.{stem}").load(data, split)
    except FileNotFoundError:
        return pictures
    return {question.id: str(question.fields["image"]) for question in asked if question.fields.get("image")}
