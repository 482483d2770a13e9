"""What every bench hands out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Question:
    """One question: its id, its picture, the full prompt text, the bench's own category, the reference answer."""

    id: str
    picture: Path
    text: str
    kind: str
    answer: str
