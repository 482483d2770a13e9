"""MM-Vet's grades out of a judge's replies, and their sums."""

import math

import pytest
from grades import judge, read_grade, settle, summarise


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        ("0.5", 0.5),
        ("1.0\n", 1.0),
        ("0.7 because", 0.7),
        (" 0.7", None),  # nothing stands before the first space
        ("1.1", None),
        ("-0.1", None),
        ("half", None),
        ("", None),
        (None, None),
    ],
)
def test_a_reply(reply, grade):
    assert read_grade(reply) == grade


def test_nan_passes_as_in_the_official_code():
    assert math.isnan(read_grade("nan"))


def test_five_replies_are_read_and_a_sixth_is_lost():
    replies = iter(["x", "x", "x", "x", "0.4", "0.9"])
    assert settle(replies) == 0.4
    assert next(replies) == "0.9"
    replies = iter(["x", "x", "x", "x", "x", "0.9", "0.8"])
    assert settle(replies) == 0.0
    assert next(replies) == "0.8"


def test_runs_go_on_where_the_last_ended():
    grades = judge({"v1_0": "q", "v1_1": "r"}, {"q": ["x", "0.1", "0.2"], "r": ["0.5"]}, 3)
    assert grades == {"v1_0": [0.1, 0.2, 0.2], "v1_1": [0.5, 0.5, 0.5]}


def test_sums_by_capability_and_by_set():
    needs = {"a": ["ocr", "math"], "b": ["math", "ocr"], "c": ["ocr"]}
    figures = summarise(needs, {"a": [1.0, 0.0], "b": [0.5, 0.5], "c": [0.0, 1.0]})
    tail = {"total": 50.0, "std": 0.0, "runs": [50.0, 50.0]}
    assert figures["capability"] == {"math": 50.0, "ocr": 50.0} | tail
    assert figures["capability_integration"] == {"math_ocr": 50.0, "ocr": 50.0} | tail
    figures = summarise({"a": ["rec"]}, {"a": [0.4, 0.5]})
    assert figures["capability"] == {"rec": 45.0, "total": 45.0, "std": 5.0, "runs": [40.0, 50.0]}
