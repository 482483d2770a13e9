"""ANLS, and the files of the competition it comes from."""

import json
import random

import pytest
from benches import docvqa, infographicvqa
from documents import distance, similarity, strict_similarity


@pytest.mark.parametrize(("a", "b", "apart"), [("", "", 0), ("", "ab", 2), ("kitten", "sitting", 3), ("ab", "ba", 2)])
def test_distance(a, b, apart):
    assert distance(a, b) == distance(b, a) == apart


def test_distance_is_a_metric():
    lot = random.Random(0)
    words = ["".join(lot.choices("ab", k=lot.randint(0, 6))) for _ in range(40)]
    for _ in range(300):
        a, b, c = lot.choices(words, k=3)
        assert distance(a, c) <= distance(a, b) + distance(b, c)
        assert (distance(a, b) == 0) == (a == b)
        assert abs(len(a) - len(b)) <= distance(a, b) <= max(len(a), len(b))


@pytest.mark.parametrize(
    ("answer", "rights", "value"),
    [
        ("Two  Words\n", ["two words"], 1.0),
        ("abc", ["abcd"], 0.75),
        ("ab", ["abcd"], 0.5),  # a half is kept
        ("a", ["abc"], 0.0),
        ("abc", ["xyz", "abd"], pytest.approx(2 / 3)),
        ("", [""], 1.0),
        (" ab   ", ["ax"], pytest.approx(1 - 1 / 6)),  # space counts in the length alone
    ],
)
def test_similarity(answer, rights, value):
    assert similarity(answer, rights) == value


def test_another_measure_of_the_same_name():
    assert strict_similarity("ab", ["abcd"]) == 0.0
    assert strict_similarity("AB ", ["ab"]) == pytest.approx(2 / 3)


@pytest.fixture
def data(tmp_path):
    entries = [
        {
            "questionId": i,
            "question": f"q{i}",
            "image": f"documents/{i}.png",
            "answers": ["abcd"],
            "question_types": ["form"],
        }
        for i in (11, 12)
    ]
    (tmp_path / "val_v1.0.json").write_text(json.dumps({"dataset_name": "docvqa", "data": entries}))
    bare = [{key: entry[key] for key in ("questionId", "question", "image")} for entry in entries]
    (tmp_path / "test_v1.0.json").write_text(json.dumps({"data": bare}))
    return tmp_path


ROWS = [{"question_id": "12", "text": "ABCD"}, {"question_id": 11, "text": "abc"}]


def test_score_and_its_parts(data):
    assert docvqa.splits(data) == ["val", "test"]
    assert docvqa.score(data, "val", ROWS) == {"anls": 87.5}
    assert docvqa.per_question(data, "val", ROWS) == {"11": 0.75, "12": 1.0}
    assert docvqa.more(data, "val", ROWS)["anls_by_question_types"] == {"form": 87.5}


def test_exactly_one_answer_to_each(data):
    for rows in (ROWS[:1], [*ROWS, ROWS[0]], [*ROWS, {"question_id": 13, "text": ""}]):
        with pytest.raises(ValueError, match="exactly one"):
            docvqa.score(data, "val", rows)


def test_the_competitions_file(data):
    file = docvqa.submit(data, "test", ROWS, data / "out")
    assert json.loads(file.read_text()) == [{"questionId": 11, "answer": "abc"}, {"questionId": 12, "answer": "ABCD"}]
    with pytest.raises(ValueError, match="rrc"):
        docvqa.score(data, "test", ROWS)


def test_prompts_and_pictures(data):
    question = docvqa.load(data, "val")[0]
    assert question.text == "q11\nAnswer the question using a single word or phrase."
    (data / "documents").mkdir()
    (data / "documents/11.png").touch()
    assert docvqa.load(data, "val")[0].pictures == (data / "documents/11.png",)
    entry = {"questionId": 5, "question": "q", "image_local_name": "5.jpeg", "answers": ["x"], "evidence": ["Text"]}
    (data / "infographicsVQA_val_v1.0_withQT.json").write_text(json.dumps({"data": [entry]}))
    assert infographicvqa.load(data, "val")[0].pictures == (data / "infographicsvqa_images/5.jpeg",)
    more = infographicvqa.more(data, "val", [{"question_id": 5, "text": "x"}])
    assert more["anls_by_evidence"] == {"Text": 100.0}
