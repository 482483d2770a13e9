"""MM-Vet's grades: how a judge's replies become them, and how they become scores, as in its own evaluator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, repeat
from typing import Any

import numpy as np

ATTEMPTS = 5
"""So many replies of the judge are read; another is asked for after the last, but not read, and the grade is 0."""


def read_grade(reply: str | None) -> float | None:
    """The number before a reply's first space, if it is one from 0 to 1. As in the official code, "nan" passes."""
    if not isinstance(reply, str):
        return None
    try:
        grade = float(reply.split(" ")[0].strip())
    except ValueError:
        return None
    return None if grade > 1 or grade < 0 else grade


def settle(replies: Iterator[str | None]) -> float:
    """One grade from as many replies as it takes."""
    for _ in range(ATTEMPTS):
        grade = read_grade(next(replies))
        if grade is not None:
            return grade
    next(replies)
    return 0.0


def judge(
    questions: Mapping[str, str], replies: Mapping[str, Sequence[str | None]], runs: int
) -> dict[str, list[float]]:
    """Grades of every question (id -> text) in each run from a judge's replies to each text; its last is repeated."""
    lines = {text: chain(given, repeat(given[-1])) for text, given in replies.items()}
    grades: dict[str, list[float]] = {name: [] for name in questions}
    for _ in range(runs):
        for name, text in questions.items():
            grades[name].append(settle(lines[text]))
    return grades


def summarise(capabilities: Mapping[str, Sequence[str]], grades: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Mean grades in per cent with one decimal: of each capability and of each set of them that a question needs.

    capabilities: those of each question; grades: those of each question, one a run. Every part has the total, the standard
    deviation of the runs' totals, and these.
    """
    table = np.array([grades[name] for name in capabilities]).T * 1.0  # (runs, questions)
    total = sum_up(table)
    tail = {"total": mean(total), "std": one_decimal(total.std()), "runs": [one_decimal(x) for x in total]}
    single: dict[str, list[int]] = {}
    joint: dict[str, list[int]] = {}
    for at, needed in enumerate(capabilities.values()):
        for name in sorted(set(needed)):
            single.setdefault(name, []).append(at)
        joint.setdefault("_".join(sorted(set(needed))), []).append(at)
    return {
        title: {name: mean(sum_up(table[:, columns])) for name, columns in parts.items()} | tail
        for title, parts in (("capability", single), ("capability_integration", joint))
    }


def sum_up(table: np.ndarray) -> np.ndarray:
    """(runs, questions) -> each run's mean in per cent, added up one by one as the official code does."""
    return np.array([sum(run.tolist()) for run in table]) / table.shape[1] * 100


def mean(runs: np.ndarray) -> float:
    return one_decimal(runs.mean())


def one_decimal(value: Any) -> float:
    return float(np.round(value, 1))
