"""MM-Vet: ids, the file for the server, grades that come back."""

import json

import pytest
from benches import mm_vet

ENTRIES = {
    "v1_0": {"imagename": "v1_0.png", "question": "What is x?", "answer": "1", "capability": ["math"]},
    "v1_1": {"imagename": "v1_1.png", "question": "Who?", "answer": "a", "capability": ["rec"]},
}
ROWS = [{"question_id": 1, "text": "me"}, {"question_id": "v1_0", "text": "x = 1"}]


@pytest.fixture
def data(tmp_path):
    (tmp_path / "mm-vet.json").write_text(json.dumps(ENTRIES))
    return tmp_path


def test_questions_are_bare(data):
    first = mm_vet.load(data, "test")[0]
    assert (first.id, first.text, first.pictures) == ("v1_0", "What is x?", (data / "images/v1_0.png",))
    (data / "mm-vet.json").unlink()
    row = {"question_id": 0, "image": "v1_0.png", "text": "Which?", "category": "conv"}
    (data / "llava-mm-vet.jsonl").write_text(json.dumps(row) + "\n")
    assert [(q.id, q.text) for q in mm_vet.load(data, "test")] == [("v1_0", "Which?")]


def test_the_servers_file(data, tmp_path):
    file = mm_vet.submit(data, "test", ROWS, tmp_path / "out")
    assert json.loads(file.read_text()) == {"v1_0": "x = 1", "v1_1": "me"}
    with pytest.raises(ValueError, match=r"1 of 2 questions have no answer \(as v1_1\)"):
        mm_vet.submit(data, "test", ROWS[1:], tmp_path / "out")


def test_without_grades_the_server_is_named(data):
    with pytest.raises(ValueError, match="upload"):
        mm_vet.score(data, "test", ROWS)


def test_the_evaluators_grades_are_summed_up(data):
    grades = {name: {"model": ["m"], "content": ["0.5"], "score": [0.5]} for name in ENTRIES}
    file = data / "ours_gpt-4-0613-grade-1runs.json"
    file.write_text(json.dumps(grades))
    assert mm_vet.score(data, "test", [])["capability"]["total"] == 50.0
    assert mm_vet.per_question(data, "test", []) == {"v1_0": 0.5, "v1_1": 0.5}
    del grades["v1_0"]
    file.write_text(json.dumps(grades))
    with pytest.raises(ValueError, match="1 of 2"):
        mm_vet.score(data, "test", [])


def test_a_judges_replies_written_down_need_every_answer(data):
    script = {"num_run": 2, "replies": {"What is x?": ["1.0", "0.0"], "Who?": ["0.2"]}}
    (data / "judge_script.json").write_text(json.dumps(script))
    assert mm_vet.score(data, "test", ROWS)["capability"]["runs"] == [60.0, 10.0]
    with pytest.raises(ValueError, match="KeyError"):
        mm_vet.score(data, "test", ROWS[:1])
