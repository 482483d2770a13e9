"""Seeing and blind accuracy side by side while a stage trains: the first thing to look at when a small model learns nothing."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from visualrwkv.chat import VLM
from visualrwkv.checkpoint import save_model
from visualrwkv.model import VisualRWKV
from visualrwkv.rwkv.state import State
from visualrwkv.text.prompt import IMAGE_TAG
from visualrwkv.training.records import read_record
from visualrwkv.training.sheet import contact_sheet
from visualrwkv.training.sources import open_source

SHOWN = 8


class Watch:
    """Asks the opening questions of some records of a data file, with and without their pictures.

    With `out`, each look leaves there answers-<step>.jsonl and, of the first few, answers-<step>.png; with `best`, the model
    that has answered most so far is kept in that directory.
    """

    def __init__(
        self,
        model: VisualRWKV,
        data: Path,
        images: Path,
        every: int = 100,
        count: int = 128,
        out: Path | None = None,
        best: Path | None = None,
    ):
        self.model, self.every, self.out, self.best = model, every, out, best
        source = open_source(data, images)
        self.questions: list[tuple[Any, str]] = []
        self.answers: list[str] = []
        for index in random.Random(0).sample(range(len(source)), len(source)):
            if len(self.answers) == count:
                break
            record = read_record(source, index)
            if len(record.pictures) != 1 or not isinstance(record.pictures[0], Path) or len(record.turns) < 2:
                continue
            self.questions.append((record.pictures[0], record.turns[0]["value"].replace(IMAGE_TAG, "").strip()))
            self.answers.append(record.turns[1]["value"])
        if not self.answers:
            raise ValueError(f"{data} has no record with one picture file and an answer, so there is nothing to watch")
        self.score = -1.0
        self.rows: list[dict[str, str]] = []

    def due(self, step: int) -> bool:
        """Whether this step is one to look at."""
        return (step + 1) % self.every == 0

    def __call__(self, start: State | None = None, keep: Callable[[Path], None] | None = None) -> dict[str, float]:
        """Accuracies now, of answers that start from that state of one row; keep: writes what is to be kept in `best`."""
        self.model.eval()
        vlm = VLM(self.model)
        vlm.start = start
        figures = {}
        for name, questions in (("seeing", self.questions), ("blind", [(None, text) for _, text in self.questions])):
            given = vlm.answer_batch(questions, max_new_tokens=8)
            figures[name] = sum(a.lower() == b.lower() for a, b in zip(given, self.answers)) / len(given)
            if name == "seeing":
                self.rows = [
                    {"image": str(image), "prompt": text, "text": said, "answer": right}
                    for (image, text), said, right in zip(questions, given, self.answers)
                ]
        self.model.train()
        if self.best and figures["seeing"] > self.score:
            self.score = figures["seeing"]
            (keep or partial(save_model, self.model))(self.best)
        return figures

    def draw(self, step: int) -> Path:
        """Leave the answers of the last look; returns the picture."""
        assert self.out is not None
        self.out.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows)
        (self.out / f"answers-{step + 1}.jsonl").write_text(lines, encoding="utf-8")
        picture = self.out / f"answers-{step + 1}.png"
        contact_sheet(self.rows[:SHOWN], picture, SHOWN // 2, f"after step {step + 1}")
        return picture
