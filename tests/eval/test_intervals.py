"""Intervals: against formulas for the simple case, and by how often they hold the truth in the clustered one."""

import math
import random
import statistics

import pytest
from intervals import clustered, paired


def test_questions_of_their_own_give_the_textbook_interval():
    lot = random.Random(0)
    values = {str(i): float(lot.random() < 0.7) for i in range(200)}
    found = clustered(values, {})
    assert found.mean == pytest.approx(statistics.mean(values.values()))
    half = 1.97196 * statistics.stdev(values.values()) / math.sqrt(200)  # t with 199 degrees of freedom
    assert found.half == pytest.approx(half, rel=1e-4)
    assert (found.questions, found.pictures) == (200, 200)


def test_the_same_answer_to_every_question_of_a_picture_counts_once():
    once = clustered({str(i): float(i % 3 == 0) for i in range(30)}, {})
    pictures = {f"{i}-{k}": str(i) for i in range(30) for k in range(5)}
    fivefold = clustered({name: float(int(i) % 3 == 0) for name, i in pictures.items()}, pictures)
    assert fivefold.mean == pytest.approx(once.mean)
    assert fivefold.half == pytest.approx(once.half)
    assert clustered(dict.fromkeys(pictures, 1.0), pictures).half == 0


def test_intervals_hold_the_truth_as_often_as_they_say():
    lot, held, naive = random.Random(1), 0, 0
    for _ in range(400):
        values, pictures = {}, {}
        for picture in range(40):
            ease = lot.gauss(0.6, 0.2)
            for k in range(6):
                values[f"{picture}-{k}"] = ease + lot.gauss(0, 0.1)
                pictures[f"{picture}-{k}"] = str(picture)
        found = clustered(values, pictures)
        held += abs(found.mean - 0.6) <= found.half
        naive += abs(found.mean - 0.6) <= clustered(values, {}).half
    assert 0.92 <= held / 400 <= 0.98
    assert naive / 400 < 0.75  # what is gained by it


def test_pairs_are_compared_question_by_question():
    lot = random.Random(2)
    first = {str(i): lot.random() for i in range(100)}
    second = {name: value + 0.05 for name, value in first.items() if name != "7"}
    found = paired(first, second | {"foreign": 1.0}, {})
    assert found.mean == pytest.approx(0.05)
    assert found.half < 1e-9
    assert not found.holds_zero
    assert found.questions == 99


def test_edges():
    assert clustered({"a": 1.0, "b": 0.0}, {"a": "p", "b": "p"}).half == math.inf
    with pytest.raises(ValueError, match="no question"):
        paired({"a": 1.0}, {"b": 1.0}, {})
