"""Looks at a whole data set before a run: every record and picture, how long the records are, and what packing makes of them."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visualrwkv.config import ModelConfig
from visualrwkv.files import write_whole
from visualrwkv.text.prompt import IGNORE
from visualrwkv.training.data import Conversations
from visualrwkv.training.index import in_pieces
from visualrwkv.training.packing import plan_epoch
from visualrwkv.training.progress import Bar
from visualrwkv.training.recipes import Position, Recipe
from visualrwkv.training.records import read_record
from visualrwkv.training.tables import Cell
from visualrwkv.vision.processor import open_picture

PIECE = 64  # records that a worker takes at a time


@dataclass
class Found:
    """What is in some records: their lengths in tokens, how many of these are learned, and what is wrong, by record."""

    lengths: list[int] = field(default_factory=list)
    learned: list[int] = field(default_factory=list)
    pictures: int = 0
    sides: Counter[int] = field(default_factory=Counter)  # the longer side of a picture, in hundreds of pixels
    cut: int = 0  # records that are longer than the budget
    empty: int = 0  # turns without a word
    problems: list[tuple[int, str]] = field(default_factory=list)

    def add(self, other: Found) -> None:
        self.lengths += other.lengths
        self.learned += other.learned
        self.pictures += other.pictures
        self.sides += other.sides
        self.cut += other.cut
        self.empty += other.empty
        self.problems += other.problems


def look(data: Conversations, indices: range) -> Found:
    """Check these records as training would, and open their pictures."""
    found = Found()
    for index in indices:
        try:
            ids, labels, pictures, cut = data.encode(index)
            sides = [math.ceil(max(open_picture(p.read() if isinstance(p, Cell) else p).size) / 100) for p in pictures]
            turns = read_record(data.source, index).turns
        except (ValueError, OSError) as error:
            name = data.name(index)
            found.problems.append((index, str(error) if name in str(error) else f"{name}: {error}"))
            continue
        found.sides.update(sides)
        found.pictures += len(pictures)
        found.lengths.append(len(ids))
        found.cut += cut
        found.learned.append(sum(label != IGNORE for label in labels))
        found.empty += sum(not turn["value"].strip() for turn in turns)
    return found


def check(
    path: Path, images: Path, model: ModelConfig, position: Position, tokens: int, workers: int = 0
) -> tuple[Found, dict[str, Any]]:
    """Look at every record of a data file or set -> what was found, and the figures to report.

    tokens: the budget of a packed batch; workers: processes, 0 for one a core. ValueError or FileNotFoundError where the
    file itself cannot be read.
    """
    data = Conversations(path, images, model, position, tokens)
    count = len(data)
    pieces = [range(start, min(start + PIECE, count)) for start in range(0, count, PIECE)]
    found = Found()
    with Bar("check-data", count) as bar:
        parts = in_pieces(lambda indices: look(data, indices), pieces, workers or os.cpu_count() or 1)
        for piece, part in zip(pieces, parts, strict=True):
            found.add(part)
            bar.advance(len(piece), notes={"problems": str(len(found.problems))})
    return found, figures(found, count, tokens)


def figures(found: Found, count: int, tokens: int) -> dict[str, Any]:
    """The numbers of a report: records, pictures, tokens, and batches of `tokens` in an epoch."""
    report: dict[str, Any] = {"records": count, "problems": len(found.problems), "pictures": found.pictures}
    report["empty turns"] = found.empty
    if found.lengths:
        ordered = sorted(found.lengths)
        batches = plan_epoch(found.lengths, tokens, 0, 0, Recipe().look_ahead)
        report |= {
            "tokens": sum(ordered),
            "learned tokens": sum(found.learned),
            "tokens of a record": {
                "mean": round(statistics.fmean(ordered), 1),
                "median": ordered[len(ordered) // 2],
                "99 %": ordered[min(len(ordered) * 99 // 100, len(ordered) - 1)],
                "longest": ordered[-1],
            },
            "budget": tokens,
            "cut to the budget": found.cut,
            "batches an epoch": len(batches),
            "filled": round(sum(ordered) / (len(batches) * tokens), 4),
        }
    return report


def write_report(out: Path, found: Found, report: dict[str, Any]) -> None:
    """check.json, with every problem, and lengths.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (lengths, sides) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    both, names = [found.lengths, found.learned], ["all", "learned"]
    lengths.hist(both, bins=60, histtype="stepfilled", alpha=0.7, color=["tab:blue", "tab:orange"], label=names)
    lengths.set(xlabel="tokens of a record", ylabel="records", yscale="log" if found.lengths else "linear")
    lengths.legend()
    sides.bar([100 * side - 50 for side in found.sides], list(found.sides.values()), width=100, color="tab:blue")
    sides.set(xlabel="longer side of a picture, pixels", ylabel="pictures")
    whole = {"figures": report, "problems": [{"record": i, "what": words} for i, words in found.problems]}
    write_whole(
        {
            out / "lengths.png": lambda part: figure.savefig(part, format="png", dpi=100),
            out / "check.json": lambda part: part.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8"),
        }
    )
    plt.close(figure)
