"""What MMMU's evaluator reads out of answers."""

import random

import pytest
from parsing import SEED, fits, key_parts, normalise, read_letter, read_open

PETS = {"A": "teddy bear", "B": "rabbit", "C": "cat", "D": "dog"}


class NoLot(random.Random):
    def choice(self, seq):
        raise AssertionError("an answer was drawn by lot")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("C", "C"),
        ("'C'", "C"),
        ("(C) or (A)", "A"),  # the last of several
        ("C, no: (A) or D", "A"),  # brackets come before bare letters
        ("A then D then A now", "A"),
        ("what I see is no rabbit but a DOG", "D"),
        ("C.", "C"),
    ],
)
def test_letters_that_are_found(answer, letter):
    assert read_letter(answer, PETS, NoLot()) == letter


@pytest.mark.parametrize("answer", ["c", "C. cat", '"C"', "a cat", "C,.", ""])
def test_letters_that_are_not(answer):
    with pytest.raises(AssertionError, match="by lot"):
        read_letter(answer, PETS, NoLot())


def test_lots_are_drawn_in_order():
    lot, again = random.Random(SEED), random.Random(SEED)
    assert [read_letter("?", PETS, lot) for _ in range(20)] == [again.choice("ABCD") for _ in range(20)]


@pytest.mark.parametrize(
    ("text", "values"),
    [("1,234.567", [1234.57]), (" Yes ", ["yes"]), ("X", [" x", "x "]), ("", [""]), ("1e2", [100.0]), ("5%", ["5%"])],
)
def test_normalised(text, values):
    assert normalise(text) == values


@pytest.mark.parametrize(
    ("answer", "parts"),
    [
        ("Paris", ["paris"]),
        ("It is so, the answer is Paris.", ["paris"]),
        ("x = 3\ny = 4", ["4"]),  # an equation counts in the last line
        ("it is red. It is blue", ["blue"]),  # one line, however many sentences
        ("so :\nred", ["so :\nred"]),  # nothing but a mark follows
    ],
)
def test_key_parts(answer, parts):
    assert key_parts(answer) == parts


def test_open_answers():
    assert read_open("about 1,000") == {"about 1,000", 1000.0, 0.0}
    assert fits(read_open("the result is 2.999"), ["3"])
    assert fits(read_open("It is Paris, France"), ["Rome", "paris"])
    assert not fits(read_open("banana"), ["a"])
    assert not fits(read_open(".5"), ["0.5"])
    assert not fits(read_open("5%"), ["0.05"])


def test_an_answer_that_is_the_right_one_always_fits():
    lot = random.Random(0)
    for _ in range(500):
        right = "".join(lot.choices("abc xyz-/'", k=lot.randint(2, 12))).strip(" .") or "ab"
        assert fits(read_open(right), [right]), right
        number = f"{lot.uniform(-1e4, 1e4):.2f}"
        assert fits(read_open(f"the answer is {number}"), [number]), number
