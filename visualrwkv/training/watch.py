"""Seeing and blind accuracy side by side while a stage trains: the first thing to look at when a small model learns nothing."""

from __future__ import annotations

import random
from pathlib import Path

from visualrwkv.chat import VLM
from visualrwkv.model import VisualRWKV
from visualrwkv.text.prompt import IMAGE_TAG
from visualrwkv.training.data import read_records


class Watch:
    """Asks the opening questions of some records of a LLaVA file, with and without their pictures."""

    def __init__(self, model: VisualRWKV, data: Path, images: Path, every: int = 100, count: int = 128):
        self.model, self.every = model, every
        records = [r for r in read_records(data) if isinstance(r.get("image"), str)]
        records = random.Random(0).sample(records, min(count, len(records)))
        self.questions = [
            (images / r["image"], r["conversations"][0]["value"].replace(IMAGE_TAG, "").strip()) for r in records
        ]
        self.answers = [r["conversations"][1]["value"] for r in records]

    def due(self, step: int) -> bool:
        """Whether this step is one to look at."""
        return (step + 1) % self.every == 0

    def __call__(self) -> dict[str, float]:
        """Accuracies now."""
        self.model.eval()
        vlm = VLM(self.model)
        figures = {}
        for name, questions in (("seeing", self.questions), ("blind", [(None, text) for _, text in self.questions])):
            given = vlm.answer_batch(questions, max_new_tokens=8)
            figures[name] = sum(a.lower() == b.lower() for a, b in zip(given, self.answers)) / len(given)
        self.model.train()
        return figures
