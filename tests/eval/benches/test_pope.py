"""`pope`: what says no, figures by category, and answers that are not of these files."""

import json

import pytest
from benches import pope


@pytest.fixture
def data(tmp_path):
    (tmp_path / "coco").mkdir()
    for category in ("random", "popular", "adversarial"):
        labels = ["yes", "no", "yes", "no"]
        rows = [
            {"question_id": i + 1, "image": f"{i // 2}.jpg", "text": "Is there a cat?", "label": label}
            for i, label in enumerate(labels)
        ]
        (tmp_path / f"coco/coco_pope_{category}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def answers(data, *texts):
    return [{"question_id": q.id, "text": text} for q, text in zip(pope.load(data, "test"), texts * 3)]


@pytest.mark.parametrize(
    "text", ["No", "no", "No, it is", "It is not", "Yes, not sure", "I say no, sir. Yes", "a,no b no"]
)
def test_no(text):
    assert pope.says_no(text)


@pytest.mark.parametrize(
    "text", ["NO", "Nope", "no!", "No;", "(no)", "isn't", "cannot", "", "No\nthere", "Yes. No", "a,no"]
)
def test_all_else_is_yes(text):
    assert not pope.says_no(text)


def test_ids_of_the_categories_lie_apart(data):
    questions = pope.load(data, "test")
    assert [q.id for q in questions[::4]] == ["1", "10000001", "20000001"]
    assert [q.fields["category"] for q in questions[::4]] == ["adversarial", "random", "popular"]
    assert questions[0].text == "Is there a cat?\nAnswer the question using a single word or phrase."
    assert questions[2].pictures == (data / "val2014/1.jpg",)


def test_scores(data):
    scores = pope.score(data, "test", answers(data, "Yes", "Yes", "No", "No"))
    assert set(scores) == {"random", "popular", "adversarial", "mean_f1", "mean_accuracy"}
    assert scores["random"] == {
        "n": 4, "TP": 1, "FP": 1, "TN": 1, "FN": 1,
        "accuracy": 0.5, "precision": 0.5, "recall": 0.5, "f1": 0.5, "yes_ratio": 0.5,
    }  # fmt: skip
    assert scores["mean_f1"] == 0.5
    assert pope.per_question(data, "test", answers(data, "Yes", "Yes", "No", "No"))["20000004"] == 1.0


def test_only_no_is_a_zero(data):
    scores = pope.score(data, "test", answers(data, "no", "no", "no", "no"))
    assert (scores["random"]["precision"], scores["mean_f1"], scores["mean_accuracy"]) == (0, 0, 0.5)


def test_answers_that_do_not_fit_the_labels_are_refused(data):
    rows = answers(data, "Yes", "Yes", "No", "No")
    with pytest.raises(ValueError, match=r"3 answers for 4 labels of adversarial \(1 missing, 0 doubled\)"):
        pope.score(data, "test", rows[1:])
    with pytest.raises(ValueError, match=r"4 answers for 4 labels of adversarial \(1 missing, 1 doubled\)"):
        pope.score(data, "test", [rows[1], *rows[1:]])
    with pytest.raises(ValueError, match="1 of 13 answers are to no question here"):
        pope.score(data, "test", [*rows, {"question_id": 5, "text": "no"}])


def test_two_versions_of_the_files_are_told_apart(data):
    listed = [{"question_id": i + 1, "image": "a.jpg", "text": "?", "category": "random"} for i in range(3)]
    (data / "llava_pope_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed))
    for category in ("popular", "adversarial"):
        (data / f"coco/coco_pope_{category}.json").unlink()
    with pytest.raises(ValueError, match="has 4 labels for 3 questions of random"):
        pope.score(data, "test", [{"question_id": i + 1, "text": "no"} for i in range(3)])


def test_another_order_is_paired_by_place_and_said(data, capsys):
    rows = answers(data, "Yes", "No", "Yes", "No")
    assert pope.score(data, "test", rows)["mean_f1"] == 1
    assert pope.score(data, "test", rows[::-1])["mean_f1"] == 0
    assert "stand in another order" in capsys.readouterr().err


def test_some_questions_alone(data):
    rows = answers(data, "Yes", "No", "Yes", "No")[:3]
    scores = pope.score(data, "test", rows, only={row["question_id"] for row in rows})
    assert scores["adversarial"]["n"] == 3
    assert "random" not in scores
    assert len(pope.per_question(data, "test", rows, only={row["question_id"] for row in rows})) == 3


def test_a_category_without_labels_is_said(data, capsys):
    rows = answers(data, "Yes", "No", "Yes", "No")
    listed = [{"image": "a.jpg", "text": q.text, "question_id": q.id, **q.fields} for q in pope.load(data, "test")]
    (data / "llava_pope_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed))
    (data / "coco/coco_pope_random.json").unlink()
    assert pope.score(data, "test", rows).keys() == {"adversarial", "popular", "mean_f1", "mean_accuracy"}
    assert "no label file of random" in capsys.readouterr().err
