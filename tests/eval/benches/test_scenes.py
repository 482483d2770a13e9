"""The bench `scenes`: every turn a question of its own; accuracy by type, missing answers wrong."""

import json

import pytest
from benches import scenes


@pytest.fixture
def place(tmp_path):
    turns = [{"value": "<image>\nHow many?"}, {"value": "2"}, {"value": "Which colour?"}, {"value": "red"}]
    record = {"id": "a", "image": "images/a.png", "conversations": turns, "types": ["count", "colour"]}
    (tmp_path / "test.json").write_text(json.dumps([record]))
    return tmp_path


def test_every_turn_is_a_question_of_its_own(place):
    assert scenes.splits(place) == ["test"]
    first, second = scenes.load(place, "test")
    assert (first.id, first.text, first.fields["answer"], first.fields["kind"]) == ("a-0", "How many?", "2", "count")
    assert (second.id, second.text, second.pictures) == ("a-1", "Which colour?", (place / "images/a.png",))


def test_case_and_full_stop_do_not_matter_and_a_missing_answer_is_wrong(place, capsys):
    row = {"question_id": "a-1", "text": " Red. "}
    assert scenes.score(place, "test", [row]) == {"accuracy": 0.5, "count": 0.0, "colour": 1.0}
    assert "1 of 2 questions have no answer (as a-0)" in capsys.readouterr().err
    assert scenes.score(place, "test", [row | {"text": "reddish"}])["colour"] == 0.0


def test_without_files_the_tree_is_shown(tmp_path):
    with pytest.raises(FileNotFoundError, match="test_unseen"):
        scenes.splits(tmp_path)
