"""Looks at a whole data set before a run: every record and picture, how long the records are, and what packing makes of them."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from visualrwkv.config import ImagePosition, ModelConfig
from visualrwkv.files import write_whole
from visualrwkv.text.prompt import IGNORE
from visualrwkv.training.data import Conversations, plan_epoch
from visualrwkv.training.progress import Bar
from visualrwkv.vision.processor import open_picture

PIECE = 64  # records that a worker takes at a time


@dataclass
class Found:
    """What is in some records: their lengths in tokens, how many of these are learned, and what is wrong, by record."""

    lengths: list[int] = field(default_factory=list)
    learned: list[int] = field(default_factory=list)
    pictures: int = 0
    sides: Counter[int] = field(default_factory=Counter)  # the longer side of a picture, in hundreds of pixels
    empty: int = 0  # turns without a word
    problems: list[tuple[int, str]] = field(default_factory=list)

    def add(self, other: Found) -> None:
        self.lengths += other.lengths
        self.learned += other.learned
        self.pictures += other.pictures
        self.sides += other.sides
        self.empty += other.empty
        self.problems += other.problems


_data: Conversations  # a worker's, from the process that it parted from


def look(indices: range) -> Found:
    """Check these records as training would, and open their pictures."""
    found = Found()
    for index in indices:
        try:
            ids, labels = _data.encode(index)
            for picture in _data.pictures(index):
                found.sides[math.ceil(max(open_picture(picture).size) / 100)] += 1
                found.pictures += 1
        except (ValueError, OSError) as error:
            name = _data.name(index)
            found.problems.append((index, str(error) if name in str(error) else f"{name}: {error}"))
            continue
        found.lengths.append(len(ids))
        found.learned.append(sum(label != IGNORE for label in labels))
        found.empty += sum(not turn["value"].strip() for turn in _data.records[index]["conversations"])
    return found


def check(
    path: Path, images: Path, model: ModelConfig, position: ImagePosition, tokens: int, workers: int = 0
) -> tuple[Found, dict[str, Any]]:
    """Look at every record of a LLaVA file -> what was found, and the figures to report.

    tokens: the budget of a packed batch; workers: processes, 0 for one a core. ValueError or FileNotFoundError where the
    file itself cannot be read.
    """
    global _data
    _data = Conversations(path, images, model, position, strict=False)
    count = len(_data)
    pieces = [range(start, min(start + PIECE, count)) for start in range(0, count, PIECE)]
    found = Found()
    with Bar("check-data", count) as bar:
        for piece, part in zip(pieces, _run(pieces, workers or os.cpu_count() or 1), strict=True):
            found.add(part)
            bar.advance(len(piece), notes={"problems": str(len(found.problems))})
    return found, figures(found, count, tokens)


def _run(pieces: list[range], workers: int) -> Iterator[Found]:
    if workers == 1:
        yield from map(look, pieces)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:  # the records are shared, not sent
        yield from pool.map(look, pieces)


def figures(found: Found, count: int, tokens: int) -> dict[str, Any]:
    """The numbers of a report: records, pictures, tokens, and batches of `tokens` in an epoch."""
    report: dict[str, Any] = {"records": count, "problems": len(found.problems), "pictures": found.pictures}
    report["empty turns"] = found.empty
    if found.lengths:
        ordered = sorted(found.lengths)
        batches = plan_epoch(found.lengths, tokens, 0, 0)
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
            "longer than the budget": sum(length > tokens for length in ordered),
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
