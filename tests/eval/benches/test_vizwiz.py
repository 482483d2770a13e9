"""`vizwiz`: ids are row numbers, people's answers count as they stand, nobody is left out."""

import json

import pytest
from benches import vizwiz


@pytest.fixture
def data(tmp_path):
    def record(number, people, kind):
        answers = [{"answer": a, "answer_confidence": "yes"} for a in people]
        return {"image": f"VizWiz_val_{number}.jpg", "question": "what IS it?", "answers": answers, "answer_type": kind}

    records = [
        record(0, ["unanswerable"] * 2 + ["a can"] * 8, "other"),
        record(1, ["Coke"] * 10, "other"),
        record(2, ["don't"] * 5 + ["2"] * 5, "number"),
    ]
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "Annotations/val.json").write_text(json.dumps(records))
    return tmp_path


def rows(*texts):
    return [{"question_id": i, "text": text} for i, text in enumerate(texts)]


def test_prompts(data):
    first = vizwiz.load(data, "val")[0]
    assert first.id == "0"
    assert first.pictures == (data / "val/VizWiz_val_0.jpg",)
    assert first.text == (
        "What is it?\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
        "Answer the question using a single word or phrase."
    )


def test_scores(data):
    assert vizwiz.score(data, "val", rows("Unanswerable.", "Coke", "two")) == {
        "overall": 55.56,  # 2 / 3, 0 as people's capital stays, 1
        "perAnswerType": {"other": 33.33, "number": 100.0},
    }
    by_picture = [{"question_id": f"VizWiz_val_{i}.jpg", "text": text} for i, text in enumerate(["", "Coke", "2"])]
    assert vizwiz.score(data, "val", by_picture)["overall"] == 33.33
    assert vizwiz.score(data, "val", rows("", "", "dont"))["overall"] == 0  # don’t is not don't
    assert vizwiz.more(data, "val", rows("", "", "dont"))["llava_submission"]["overall"] == 33.33
    assert vizwiz.per_question(data, "val", rows("a can", "", "")) == {"0": 0.0, "1": 0.0, "2": 0.0}


def test_the_file_for_the_server_wants_all_in_order(data):
    (data / "llava_val.jsonl").write_text(
        "".join(
            json.dumps({"question_id": 9 - i, "image": f"VizWiz_val_{i}.jpg", "text": "?"}) + "\n" for i in range(3)
        )
    )
    answered = [{"question_id": str(9 - i), "text": text} for i, text in enumerate(["It's", "b", "The c"])]
    file = vizwiz.submit(data, "val", answered[::-1], data)
    assert json.loads(file.read_text()) == [
        {"image": "VizWiz_val_0.jpg", "answer": "it 's"},
        {"image": "VizWiz_val_1.jpg", "answer": "b"},
        {"image": "VizWiz_val_2.jpg", "answer": "c"},
    ]
    with pytest.raises(ValueError, match=r"1 of 3 questions have no answer \(as 9\)"):
        vizwiz.submit(data, "val", answered[1:], data)


def test_the_test_split_is_for_the_server(tmp_path):
    (tmp_path / "test.json").write_text(json.dumps([{"image": "VizWiz_test_0.jpg", "question": "what?"}]))
    assert vizwiz.splits(tmp_path) == ["test"]
    with pytest.raises(ValueError, match="challenge 2185"):
        vizwiz.score(tmp_path, "test", rows("a"))


def test_questions_that_are_not_annotated_are_said(data, capsys):
    file = data / "Annotations/val.json"
    (data / "llava_val.jsonl").write_text(
        "".join(json.dumps({"question_id": i, "image": f"VizWiz_val_{i}.jpg", "text": "?"}) + "\n" for i in range(3))
    )
    file.write_text(json.dumps(json.loads(file.read_text())[1:]))
    assert vizwiz.score(data, "val", rows("", "", "2"))["overall"] == 50
    assert "of 3 questions 2 are among the annotated ones" in capsys.readouterr().err
    file.write_text("[]")
    with pytest.raises(ValueError, match="0 are among the annotated ones"):
        vizwiz.score(data, "val", rows("", "", ""))


def test_the_first_questions_only(data):
    assert vizwiz.per_question(data, "val", rows("a can"), only={"0"}) == {"0": 0.0}
