"""`scienceqa`: which forms give a letter, and over what the two accuracies are."""

import json

import pytest
from benches import scienceqa


@pytest.fixture
def data(tmp_path):
    def problem(hint="", image=None, grade="grade3"):
        known = {"question": "Which  is it?", "choices": ["x", "y", "z"], "answer": 1, "hint": hint, "image": image}
        return known | {"grade": grade, "subject": "natural science"}

    problems = {"1": problem("Look.", "image.png"), "2": problem(), "3": problem("Read."), "9": problem(grade="grade9")}
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    splits = {"train": [], "val": ["9"], "test": ["1", "2", "3"]}
    (tmp_path / "pid_splits.json").write_text(json.dumps(splits))
    return tmp_path


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("B. because", "B"),
        ("B. ", "B"),
        ("The answer is B.", "B"),
        ("So: The answer is B!", "B"),
        ("The answer is B", "FAILED"),  # something must follow
        ("The answer is B\n", "FAILED"),
        ("The answer is A. The answer is B.", "FAILED"),
        ("b", "FAILED"),
        ("B.", "FAILED"),
        ("(B)", "FAILED"),
        ("B: x", "FAILED"),
        ("F", "FAILED"),
        ("", "FAILED"),
        ("The answer is Z.", "Z"),
    ],
)
def test_letters(text, letter):
    assert scienceqa.letter(text) == letter


def test_prompts(data):
    assert scienceqa.splits(data) == ["test", "val"]
    first, second, _ = scienceqa.load(data, "test")
    ending = "Which is it?\nA. x\nB. y\nC. z\nAnswer with the option's letter from the given choices directly."
    assert (first.text, first.pictures) == ("Context: Look.\n" + ending, (data / "images/test/1/image.png",))
    assert (second.text, second.pictures) == (ending, ())
    told = [{"id": "1", "image": "1/image.png", "conversations": [{"from": "human", "value": "<image>\nWhich?\nA. x"}]}]
    (data / "llava_test_CQM-A.json").write_text(json.dumps(told))
    (first,) = scienceqa.load(data, "test")
    assert first.text.startswith("Which?\nA. x\nAnswer with")
    assert first.pictures == (data / "images/test/1/image.png",)


def test_missing_answers_are_wrong_but_not_among_the_pictures(data, capsys):
    rows = [
        {"question_id": "2", "text": "B", "prompt": "Which?"},
        {"question_id": "3", "text": "D", "prompt": "<image>\nWhich?"},
    ]
    assert scienceqa.score(data, "test", rows) == {
        "total": 3,
        "correct": 1,
        "accuracy": pytest.approx(100 / 3),
        "img_accuracy": 0.0,
        "img_total": 1,
        "img_correct": 0,
    }
    assert "1 of 3 questions have no answer (as 1)" in capsys.readouterr().err
    # our own rows name the picture instead of holding the tag
    ours = [{"question_id": "1", "text": "B", "prompt": "Which?", "image": "1/image.png"}, *rows[:1]]
    assert scienceqa.score(data, "test", ours)["img_correct"] == 1
    further = scienceqa.more(data, "test", ours)
    assert further == {
        "NAT": pytest.approx(200 / 3),
        "G1-6": pytest.approx(200 / 3),
        "TXT": 50.0,
        "IMG": 100.0,
        "NO": 100.0,
    }
    assert scienceqa.per_question(data, "test", ours) == {"1": 1.0, "2": 1.0, "3": 0.0}


def test_answers_to_other_problems_have_no_score(data):
    with pytest.raises(ValueError, match="scienceqa test: none of the 1 answers is to one of the 3 questions"):
        scienceqa.score(data, "test", [{"question_id": "9", "text": "B", "prompt": "<image>"}])


def test_splits_without_problems_are_refused(data):
    (data / "pid_splits.json").write_text('{"train": [], "test": []}')
    with pytest.raises(ValueError, match="has no problem in any of test, val"):
        scienceqa.splits(data)


def test_each_answer_of_the_first_questions_only(data):
    rows = [{"question_id": "1", "text": "B", "prompt": "<image>"}]
    assert scienceqa.per_question(data, "test", rows, only={"1"}) == {"1": 1.0}
