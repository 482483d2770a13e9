"""AI2D: lmms-eval's match, and VLMEvalKit's beside it."""

import json

import pytest
from benches import ai2d


@pytest.fixture
def data(tmp_path):
    row = {"image": "1.png", "question": "Which?", "options": ["egg", "larva"], "answer": "1"}
    lines = [json.dumps(row | {"question_id": i}) + "\n" for i in range(4)]
    (tmp_path / "ai2d_test.jsonl").write_text("".join(lines))
    return tmp_path


@pytest.mark.parametrize(
    ("answer", "letter"), [("B. larva", "B"), (" \nB.x", "B"), ("b. larva", "b. larva"), ("(B)", "(B)"), ("AB.", "AB.")]
)
def test_the_opening_letter(answer, letter):
    assert ai2d.opening(answer) == letter


def test_case_and_punctuation_are_even_but_space_counts():
    assert ai2d.reduced('"(b)!') == "b"
    assert ai2d.reduced("B ") == "b "


def test_score(data, capsys):
    rows = [{"question_id": i, "text": text} for i, text in enumerate(["b.", "larva", "B: larva"])]
    assert ai2d.score(data, "test", rows) == {"accuracy": 25.0, "n": 4}
    assert ai2d.more(data, "test", rows) == {"vlmevalkit_exact_matching": 50.0}
    assert "1 of 4" in capsys.readouterr().err


def test_prompt(data):
    question = ai2d.load(data, "test")[0]
    assert question.text == "Which?\nA. egg\nB. larva\nAnswer with the option's letter from the given choices directly."
    assert question.pictures == (data / "images/1.png",)
