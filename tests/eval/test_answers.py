"""The normalisers: worked examples of every rule, properties on random texts, and the arithmetic of the scorers."""

import random
from itertools import pairwise

import answers
import pytest

ALPHABET = [*"aA bT.,;/-_5 2?!'’\"()", "the ", "None ", "ten", "dont ", "he's ", "é", "٣", " "]


def texts(count: int = 400) -> list[str]:
    drawn = random.Random(0)
    return ["".join(drawn.choices(ALPHABET, k=drawn.randint(0, 14))) for _ in range(count)]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("Stop!", "stop"),
        ("left/right", "left right"),  # a mark without a space beside it becomes one
        ("left / right", "left right"),
        ("a-b c -d", "ab c d"),  # one hyphen beside a space drops them all
        ("ice-cream", "ice cream"),
        ("7,000 ice-creams", "7000 icecreams"),  # a comma between digits drops every mark
        ("7 ,000", "7 000"),  # but not where it stands beside a space
        ("No. 5.", "no 5"),  # a stop after a digit goes, too
        ("No.5", "no.5"),  # one before a digit stays
        ("v2.5", "v2.5"),
        ("NONE", "0"),
        ("Zero or ten", "0 or 10"),
        ("eleven", "eleven"),
        ("the cat and an owl", "cat and owl"),
        ("A", ""),
        ("havent", "haven't"),
        ("Ive", "ive"),  # the table has it with a capital, which is never met
        ("somebody'd", "somebodyd"),
        ("its", "its"),
        ("5:45 & 50% *", "5:45 & 50% *"),
        ("red,  white", "red white"),
    ],
)
def test_vqa_rules(given, wanted):
    assert answers.vqa(given) == wanted


def test_only_so_many_stops_go():
    assert answers.vqa("." * 40) == "." * 8


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("Kellogg's", "kellogg 's"),
        ("It's 5.", "it 's 5"),
        ("hes", "he's"),  # the contraction comes after
        ("3,000-4,000", "3000 4000"),  # the comma is gone before it could drop the hyphen
        ("green,blue", "greenblue"),
        ("why?not", "whynot"),
        ("up\tand\ndown", "up and down"),
    ],
)
def test_m4c_rules(given, wanted):
    assert answers.m4c(given) == wanted


def test_vizwiz_repairs_most_words_with_curly_apostrophes():
    assert answers.vizwiz("dont cant weve") == "don’t can't we've"
    assert answers.vizwiz("3,000-4,000") == "30004000"
    assert answers.vizwiz("couldn'tve hadnt've") == "couldn’t’ve hadnt've"  # this key is straight, that one curly


def test_digits_of_other_scripts_are_digits_to_python_3_only():
    assert answers.vqa("٣,٣ c-b") == "٣ ٣ c b"
    assert answers.vizwiz("٣,٣ c-b") == "٣٣ cb"
    assert answers.vqa(".٣") == "٣"
    assert answers.vizwiz(".٣") == ".٣"


@pytest.mark.parametrize("normalise", [answers.vqa, answers.m4c, answers.vizwiz])
def test_what_is_normal_has_one_form(normalise):
    for text in texts():
        found = normalise(text)
        assert found == found.lower()
        assert found == " ".join(found.split())
        assert not set(found) & set(answers.PUNCTUATION)
        assert not {"a", "an", "the", "none", "ten"} & set(found.split())
        assert normalise(answers.trim(f"\t{text}\n ")) == normalise(text.strip())


def test_vqa_is_done_in_one_go():
    for text in texts():
        assert answers.vqa(answers.vqa(text)) == answers.vqa(text)


def slow_punctuation(text: str) -> str:
    """The rule again, one mark of the text at a time."""
    digits = "0123456789"
    between = any(a in digits and b == "," and c in digits for a, b, c in zip(text, text[1:], text[2:]))
    beside = {b for a, b in pairwise(text) if a == " "} | {a for a, b in pairwise(text) if b == " "}
    kept = "".join(("" if between or c in beside else " ") if c in answers.PUNCTUATION else c for c in text)
    return "".join(c for c, after in zip(kept, [*kept[1:], ""]) if c != "." or (after and after in digits))


def test_punctuation_agrees_with_a_second_writing():
    for text in texts(2000):
        assert answers.punctuation(text) == slow_punctuation(text)


@pytest.mark.parametrize(("same", "share"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_agreement_leaves_one_out(same, share):
    given = ["red"] * same + [f"other {i}" for i in range(10 - same)]
    random.Random(same).shuffle(given)
    assert answers.agreement("red", given) == pytest.approx(share)


def test_percentages_round_halves_away_from_zero():
    assert answers.percent([1.0] * 21 + [0.0] * 11) == 65.63  # 65.625, which round() makes 65.62
    assert answers.percent([0.1] * 3) == 10.0
