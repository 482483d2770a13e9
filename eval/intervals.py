"""How sure a mean over questions is, where several ask about one picture: its answers rise and fall together."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Mean:
    """A mean with its 95 % interval, mean ± half; half is infinite for a single picture."""

    mean: float
    half: float
    questions: int
    pictures: int

    def scaled(self, factor: float) -> Mean:
        return Mean(self.mean * factor, self.half * factor, self.questions, self.pictures)

    @property
    def holds_zero(self) -> bool:
        """Whether the interval holds 0: a difference that may be none."""
        return abs(self.mean) <= self.half


def clustered(values: Mapping[str, float], pictures: Mapping[str, str]) -> Mean:
    """The mean of all questions' values; `pictures` says which picture a question is about, else it has its own.

    Cluster-robust: a picture's questions count as one observation of the sum of their deviations (Cameron and Miller,
    2015, with their small-sample factor), and Student's t with as many degrees of freedom as pictures less one.
    """
    if not values:
        raise ValueError("there is no question to take a mean of")
    count = len(values)
    mean = sum(values.values()) / count
    sums: dict[str, float] = defaultdict(float)
    for question, value in values.items():
        sums[pictures.get(question, f"question {question}")] += value - mean
    groups = len(sums)
    if groups == 1:
        return Mean(mean, math.inf, count, 1)
    from scipy.stats import t

    variance = groups / (groups - 1) * sum(s * s for s in sums.values()) / count**2
    return Mean(mean, float(t.ppf((1 + CONFIDENCE) / 2, groups - 1)) * math.sqrt(variance), count, groups)


def paired(first: Mapping[str, float], second: Mapping[str, float], pictures: Mapping[str, str]) -> Mean:
    """By how much the second is better on the questions that both answered, question by question."""
    both = [question for question in first if question in second]
    return clustered({question: second[question] - first[question] for question in both}, pictures)
