"""`gqa`: exact matches of balanced questions, their breakdowns, and what needs further files."""

import json

import pytest
from benches import gqa


def question(text, answer, structural="query", semantic="attr", group="colour", steps=(), **more):
    semantics = [{"operation": op, "argument": arg, "dependencies": []} for op, arg in steps]
    types = {"structural": structural, "semantic": semantic, "detailed": more.pop("detailed", "x")}
    known = {"question": text, "answer": answer, "imageId": "n1", "isBalanced": True, "entailed": [], "types": types}
    return known | {"semantic": semantics, "groups": {"global": group, "local": "y"}} | more


@pytest.fixture
def data(tmp_path):
    questions = {
        "a": question("Which colour is it?", "red", steps=[("select", "dog (1)"), ("query", "color")]),
        "b": question("Which colour?", "blue", steps=[("select", "cat"), ("exist", "?")], entailed=["a", "b", "c"]),
        "c": question("Is it on?", "yes", "verify", "obj", None, [("query", "x"), ("choose name", "z")]),
        "d": question("And?", "no", isBalanced=False),
    }
    (tmp_path / "testdev_balanced_questions.json").write_text(json.dumps(questions))
    return tmp_path


def rows(**texts):
    return [{"question_id": name, "text": text} for name, text in texts.items()]


def test_prompts(data):
    first = gqa.load(data, "testdev_balanced")[0]
    assert first.text == "Which colour is it?\nAnswer the question using a single word or phrase."
    assert (first.id, first.pictures) == ("a", (data / "images/n1.jpg",))


def test_scores(data):
    scores = gqa.score(data, "testdev_balanced", rows(a="Red..", b="red", c="YES", d="?"))
    assert scores["accuracy"] == pytest.approx(200 / 3)
    assert (scores["binary"], scores["open"]) == (100.0, 50.0)
    assert scores["accuracyPerStructuralType"] == {"query": {"acc": 50.0, "n": 2}, "verify": {"acc": 100.0, "n": 1}}
    assert scores["accuracyPerSteps"] == {"1": {"acc": 50.0, "n": 2}, "2": {"acc": 100.0, "n": 1}}
    assert scores["accuracyPerLength"]["3"] == {"acc": 100.0, "n": 1}
    # right: red once, blue once; given: red twice. (2-1)²/1 + (0-1)²/1, one group, over 100
    assert scores["distribution"] == pytest.approx(0.02)
    assert (scores["validity"], scores["plausibility"], scores["consistency"]) == (0, 0, 0)
    assert gqa.per_question(data, "testdev_balanced", rows(a="red", b="", c="")) == {"a": 1.0, "b": 0.0, "c": 0.0}


@pytest.mark.parametrize("text", [" red", "a red", "red!", "red. "])
def test_nothing_but_closing_full_stops_and_case_is_forgiven(data, text):
    assert gqa.score(data, "testdev_balanced", rows(a=text, b="", c=""))["accuracy"] == 0


def test_choices_give_validity_and_plausibility(data):
    allowed = {k: {"valid": ["red", "yes"], "plausible": ["yes"]} for k in "abcd"}
    (data / "testdev_balanced_choices.json").write_text(json.dumps(allowed))
    scores = gqa.score(data, "testdev_balanced", rows(a="red", b="shape", c="yes", d=""))
    assert scores["validity"] == pytest.approx(200 / 3)
    assert scores["plausibility"] == pytest.approx(100 / 3)
    assert gqa.belongs("shape", [], {"types": {"detailed": "sameCommon"}})


def test_consistency_where_all_is_answered(data):
    def consistency(**given):
        return gqa.score(data, "testdev_balanced", rows(**given))["consistency"]

    assert consistency(a="red", b="blue", c="no", d="") == 50
    assert consistency(a="red", b="blue", c="yes", d="") == 100
    assert consistency(a="red", b="green", c="no", d="") == 0  # only a right answer entails
    assert consistency(a="red", b="blue", c="no") == 0


def test_consistency_is_of_balanced_questions(data):
    file = data / "testdev_balanced_questions.json"
    questions = json.loads(file.read_text())
    questions["d"]["entailed"] = ["c"]
    assert not questions["d"]["isBalanced"]
    file.write_text(json.dumps(questions))
    given = rows(a="red", b="blue", c="yes", d=questions["d"]["answer"])
    assert gqa.score(data, "testdev_balanced", given)["consistency"] == 100
    questions["b"]["entailed"] = ["nowhere"]
    file.write_text(json.dumps(questions))
    assert gqa.score(data, "testdev_balanced", given)["consistency"] == 0


def test_a_missing_balanced_question_is_refused_and_another_said(data, capsys):
    with pytest.raises(ValueError, match="1 of these questions are balanced ones"):
        gqa.score(data, "testdev_balanced", rows(a="red", b="blue"))
    assert gqa.score(data, "testdev_balanced", rows(a="red", b="x", c="x", z="y"))["open"] == 50.0
    said = capsys.readouterr().err
    assert "1 of 4 questions have no answer (as d)" in said
    assert "1 answers are to no question of this split (as z)" in said


def test_the_first_questions_only(data):
    assert gqa.per_question(data, "testdev_balanced", rows(a="red"), only={"a"}) == {"a": 1.0}


def test_vqav2s_questions_are_no_tier(data):
    (data / "v2_OpenEnded_mscoco_val2014_questions.json").write_text("{}")
    assert gqa.splits(data) == ["testdev_balanced"]


def test_the_scorers_input(data):
    file = gqa.submit(data, "testdev_balanced", rows(b="A man.", a="x"), data / "out")
    assert file.name == "testdev_balanced_predictions.json"
    assert json.loads(file.read_text()) == [
        {"questionId": "b", "prediction": "a man"},
        {"questionId": "a", "prediction": "x"},
    ]


def test_without_balanced_questions_there_is_no_score(data):
    (data / "testdev_balanced_questions.json").write_text(json.dumps({"d": question("And?", "no", isBalanced=False)}))
    with pytest.raises(ValueError, match="none of the 1 questions is balanced"):
        gqa.score(data, "testdev_balanced", rows(d="no"))
