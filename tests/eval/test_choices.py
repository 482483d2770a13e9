"""Which option an answer means, by rules written out one at a time."""

import random

import pytest
from choices import LETTERS, infer, listed

PETS = {"A": "teddy bear", "B": "rabbit", "C": "cat", "D": "dog"}


def test_options_follow_the_question_line_by_line():
    assert "Which?" + listed(["one", "two"]) == "Which?\nA. one\nB. two"
    assert listed([]) == ""


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("C", "C"),
        ("{C}!", "C"),
        ("c", None),  # letters are capital
        ("C。", None),  # a full-width full stop is no separator
        ("B is the one", "B"),  # the fourth word from the end
        ("B is surely the one", None),  # the fifth
        ("B or C", None),
        ("E", None),  # no such option
        ("Z", "Z"),
        ("B Z", "B"),
        ("I can't process this file.", "Z"),
        ("Failed to obtain answer via API", None),
        ("Failed to obtain answer via API: cat", "C"),  # a text counts all the same
        ("The ANSWER is **D** for many a good reason", "D"),
        ("the answer is below me, that is all I say", "B"),  # as written, any word that begins so
        ("A RABBIT", "A"),  # the article comes first
        ("some rabbit", "B"),
        ("cat and dog", None),
        ("", None),
    ],
)
def test_one_rule_at_a_time(answer, letter):
    assert infer(answer, PETS) == letter


def test_a_text_counts_up_to_twice_the_options():
    options = {"A": "cat", "B": "cow"}
    assert infer("x" * 9 + "cat", options) == "A"
    assert infer("x" * 10 + "cat", options) is None


def test_a_text_that_is_part_of_another_is_ambiguous():
    options = {"A": "dog", "B": "hot dog"}
    assert infer("hot dog", options) is None
    assert infer("a dog", options) == "A"


def test_what_is_inferred_is_always_an_option_or_z():
    lot = random.Random(0)
    words = [*"ABCDEZ", "answer is", "cat", "dog", "(B)", "no", "nan", "A."]
    for _ in range(2000):
        options = dict(zip(LETTERS, lot.sample(["cat", "dog", "hot dog", "n", "3", "A"], lot.randint(1, 4))))
        assert infer(" ".join(lot.choices(words, k=lot.randint(0, 6))), options) in {*options, "Z", None}
