"""MMMU: prompts, subjects, answers that are missing, the evaluator's file."""

import json

import pytest
from benches import mmmu

ROWS = [
    {
        "id": "validation_Art_Theory_1",
        "question": "What is <image 1>?",
        "options": "['a dome', \"a 'nave'\"]",
        "answer": "B",
        "question_type": "multiple-choice",
        "image_1": "images/1.png",
    },
    {
        "id": "validation_Math_1",
        "question": "How many?",
        "options": "[]",
        "answer": ["3", "three"],
        "question_type": "open",
        "image_1": "images/2.png",
    },
    {
        "id": "validation_Math_2",
        "question": "Which?",
        "options": ["<image 1>", "<image 2>"],
        "answer": "A",
        "question_type": "multiple-choice",
        "image_1": "images/3.png",
    },
]


@pytest.fixture
def data(tmp_path):
    (tmp_path / "mmmu_val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def answers(*texts):
    return [{"question_id": row["id"], "text": text} for row, text in zip(ROWS, texts)]


def test_prompts(data):
    first, second, third = mmmu.load(data, "val")
    assert first.text == (
        "What is <image 1>?\n(A) a dome\n(B) a 'nave'\n\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert second.text == "How many?\nAnswer the question using a single word or phrase."
    assert first.pictures == (data / "images/1.png",)
    assert third.pictures == ()  # the options are pictures


def test_subjects_and_disciplines(data):
    figures = mmmu.score(data, "val", answers("(B)", "It is three.", "B"))
    assert figures == {
        "overall": 2 / 3,
        "per_subject": {"Art_Theory": 1.0, "Math": 0.5},
        "per_discipline": {"Art and Design": 1.0, "Science": 0.5},
    }


def test_missing_answers_are_not_counted_and_foreign_ones_refused(data, capsys):
    assert mmmu.score(data, "val", answers("B", "4"))["overall"] == 0.5
    assert "1 of 3 questions have no answer" in capsys.readouterr().err
    with pytest.raises(ValueError, match="KeyError"):
        mmmu.score(data, "val", [{"question_id": "test_Art_1", "text": "A"}])


def test_the_answers_file_comes_first(data):
    keys = {"validation_Math_1": {"question_type": "short-answer", "ground_truth": "7"}}
    (data / "answer_dict_val.json").write_text(json.dumps(keys))
    assert mmmu.per_question(data, "val", answers("A", "7", "A")) == {
        "validation_Art_Theory_1": 0.0,
        "validation_Math_1": 1.0,
        "validation_Math_2": 1.0,
    }


def test_the_evaluators_file(data):
    file = mmmu.submit(data, "val", answers("(B) it is", "three.", "A!"), data)
    assert list(json.loads(file.read_text()).values()) == ["B", "three.", "A"]


def test_the_test_split_is_for_the_server(data):
    (data / "mmmu_test.jsonl").write_text(json.dumps(ROWS[0] | {"answer": "?"}) + "\n")
    assert mmmu.splits(data) == ["val", "test"]
    with pytest.raises(ValueError, match="submit"):
        mmmu.score(data, "test", answers("A"))
