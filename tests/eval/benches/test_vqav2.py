"""`vqav2`: what is compared as it stands, what is normalised, who counts, what is handed in."""

import json

import pytest
from benches import vqav2

SA = "\nAnswer the question using a single word or phrase."


def annotation(number, answers, kind="what is", expects="other", ids=True):
    people = [
        {"answer": a, "answer_confidence": "yes"} | ({"answer_id": i} if ids else {}) for i, a in enumerate(answers)
    ]
    return {"question_id": number, "image_id": 7, "question_type": kind, "answer_type": expects, "answers": people}


@pytest.fixture
def write(tmp_path):
    """write(annotations…): an official val2014 with these questions."""

    def make(*annotations):
        questions = [{"question_id": a["question_id"], "image_id": 7, "question": "Is it?"} for a in annotations]
        for name, content in (
            ("v2_OpenEnded_mscoco_val2014_questions.json", {"info": {}, "questions": questions}),
            ("v2_mscoco_val2014_annotations.json", {"info": {"answer": 1}, "annotations": list(annotations)}),
        ):
            (tmp_path / name).write_text(json.dumps(content))
        vqav2.annotated.cache_clear()
        return tmp_path

    return make


def row(number, text):
    return {"question_id": number, "text": text}


@pytest.mark.parametrize(
    ("text", "people", "share"),
    [
        ("Red", ["red"] * 10, 0),  # all agree: as it stands
        (" red\n", ["red"] * 10, 100),
        ("The RED.", ["red"] * 9 + ["blue"], 100),
        ("a", [" a"] * 10, 100),  # people's answers are trimmed before it is asked whether they agree
        ("red", ["red", "Red", "a red", *(f"no {i}" for i in range(7))], 90),
        ("red", ["red", "red ", *(f"no {i}" for i in range(8))], 60),
    ],
)
def test_one_question(write, text, people, share):
    scores = vqav2.score(write(annotation(5, people)), "val2014", [row(5, text)])
    assert scores == {"overall": share, "perAnswerType": {"other": share}, "perQuestionType": {"what is": share}}


def test_breakdowns_have_two_decimals(write):
    ten = ["yes"] * 9 + ["no"]
    data = write(annotation(1, ten, "is the", "yes/no"), annotation(2, ten), annotation(3, ten))
    scores = vqav2.score(data, "val2014", [row(1, "yes"), row("2", "yes"), row(3, "left")])
    assert scores["overall"] == 66.67
    assert scores["perAnswerType"] == {"yes/no": 100.0, "other": 50.0}
    assert scores["perQuestionType"] == {"is the": 100.0, "what is": 50.0}
    assert vqav2.per_question(data, "val2014", [row(1, "yes"), row(2, "no"), row(3, "left")]) == {
        "1": 1.0,
        "2": pytest.approx(0.3),
        "3": 0.0,
    }


def test_records_that_are_equal_in_all_leave_each_other_out(write):
    """Without answer ids the official code cannot tell those apart who said the same."""
    people = ["red"] * 5 + ["blue"] * 5
    with_ids = vqav2.score(write(annotation(1, people)), "val2014", [row(1, "red")])
    without = vqav2.score(write(annotation(1, people, ids=False)), "val2014", [row(1, "red")])
    assert (with_ids["overall"], without["overall"]) == (100.0, 50.0)


def test_what_llava_submits_and_the_earlier_revision(write):
    data = write(annotation(1, ["kellogg's"] * 10), annotation(2, ["Cat"] * 9 + ["cat"]))
    rows = [row(1, "Kellogg's"), row(2, "Cat")]
    assert vqav2.score(data, "val2014", rows)["overall"] == 50.0
    further = vqav2.more(data, "val2014", rows)
    assert further["llava_submission"]["overall"] == 50.0  # "kellogg 's" is not "kellogg's", "cat" is "cat"
    assert further["revision_2016"] == 65.0  # 1 and 0.3: all answers are normalised, and people's capitals stay


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([row(1, "a")], "1 of 2 questions have no answer (as 2)"),
        ([row(1, "a"), row(2, "b"), row(9, "c")], "1 answers are to no question of this split (as 9)"),
    ],
)
def test_other_ids_than_the_annotated_ones_are_refused(write, rows, words):
    data = write(annotation(1, ["a"] * 10), annotation(2, ["b"] * 10))
    with pytest.raises(ValueError, match="the official code stops") as error:
        vqav2.score(data, "val2014", rows)
    assert words in str(error.value)


def test_of_a_doubled_id_the_last_counts(write, capsys):
    data = write(annotation(1, ["a cat"] * 10))
    assert vqav2.score(data, "val2014", [row(1, "x"), row(1, "a cat")])["overall"] == 100.0
    assert "1 ids have several answers (as 1)" in capsys.readouterr().err


def test_prompts_and_pictures(write):
    data = write(annotation(1, ["a"] * 10))
    (question,) = vqav2.load(data, "val2014")
    assert (question.id, question.text) == ("1", "Is it?" + SA)
    assert question.pictures == (data / "val2014/COCO_val2014_000000000007.jpg",)
    told = {"question_id": 1, "image": "x.jpg", "text": "As LLaVA writes it", "category": "default"}
    (data / "llava_vqav2_mscoco_val2014.jsonl").write_text(json.dumps(told) + "\n")
    (data / "images").mkdir()
    (question,) = vqav2.load(data, "val2014")
    assert (question.text, question.pictures) == ("As LLaVA writes it", (data / "images/x.jpg",))


def test_the_file_for_the_server_has_all_of_test2015(tmp_path):
    for split, ids in (("test-dev2015", [1]), ("test2015", [2, 1])):
        asked = [{"question_id": i, "image_id": 3, "question": "Is it?"} for i in ids]
        (tmp_path / f"v2_OpenEnded_mscoco_{split}_questions.json").write_text(json.dumps({"questions": asked}))
    assert vqav2.splits(tmp_path) == ["test-dev2015", "test2015"]
    (question,) = vqav2.load(tmp_path, "test-dev2015")
    assert question.pictures[0].name == "COCO_test2015_000000000003.jpg"
    rows = [row("1", "It's 5.")]
    file = vqav2.submit(tmp_path, "test-dev2015", rows, tmp_path / "out")
    assert json.loads(file.read_text()) == [{"question_id": 2, "answer": ""}, {"question_id": 1, "answer": "it 's 5"}]
    with pytest.raises(ValueError, match="submit the file"):
        vqav2.score(tmp_path, "test-dev2015", rows)
    (tmp_path / "v2_OpenEnded_mscoco_test2015_questions.json").unlink()
    with pytest.raises(ValueError, match="each question of test2015"):
        vqav2.submit(tmp_path, "test-dev2015", rows, tmp_path / "out")
