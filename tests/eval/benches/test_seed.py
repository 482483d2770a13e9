"""SEED-Bench: the bare letter alone, types, pictures and videos."""

import json

import pytest
from benches import seed


def write(place, entries):
    given = {"question_type": {"Scene": 1, "Action": 10}, "questions": entries}
    (place / "SEED-Bench.json").write_text(json.dumps(given))
    return place


def entry(name, answer, kind=1, data="image"):
    choices = {f"choice_{letter}": f"text {letter}" for letter in "abcd"}
    return choices | {
        "question_id": name,
        "question": "Which?",
        "answer": answer,
        "question_type_id": kind,
        "data_type": data,
        "data_id": f"{name}_x",
    }


ENTRIES = [entry("1", "A"), entry("2", "B"), entry("3", "C"), entry("v4", "D", 10, "video")]


def answers(*texts):
    return [{"question_id": name, "text": text} for name, text in zip((1, 2, "3", "v4"), texts)]


def test_only_the_bare_letter_counts(tmp_path):
    figures = seed.score(write(tmp_path, ENTRIES), "all", answers("A", "b", "C.", "D"))
    assert figures == {
        "Scene": 33.33,
        "Action": 100.0,
        "Total accuracy": 50.0,
        "image accuracy": 33.33,
        "video accuracy": 100.0,
    }


def test_a_type_without_a_hit_is_0_and_videos_may_be_absent(tmp_path):
    figures = seed.score(write(tmp_path, ENTRIES[:3]), "all", answers("B", "b", "C."))
    assert figures == {"Scene": 0.0, "Total accuracy": 0.0, "image accuracy": 0.0}


def test_the_first_character_is_another_measure(tmp_path):
    figures = seed.more(write(tmp_path, ENTRIES), "all", answers(" a", "b", "C.", "answer D"))
    assert figures == {"lmms_eval_first_char": {"image": 100.0, "video": 0.0, "all": 75.0}}


def test_prompt_and_pictures(tmp_path):
    questions = seed.load(write(tmp_path, ENTRIES), "all")
    assert questions[0].text == (
        "Which?\nA. text a\nB. text b\nC. text c\nD. text d\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert questions[0].pictures == (tmp_path / "SEED-Bench-image/1_x",)
    assert questions[3].pictures == (tmp_path / "SEED-Bench-video-image/v4.png",)
    row = {"question_id": 1, "image": "SEED-Bench-image/1_x", "text": "as it is", "category": "c"}
    (tmp_path / "llava-seed-bench.jsonl").write_text(json.dumps(row) + "\n")
    (question,) = seed.load(tmp_path, "all")
    assert (question.id, question.text) == ("1", "as it is")


def test_submission_is_in_the_order_of_the_annotations(tmp_path):
    data = write(tmp_path, ENTRIES)
    file = seed.submit(data, "all", answers("A", "B", " C", "")[::-1], tmp_path)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines == [{"question_id": n, "prediction": p} for n, p in zip(("1", "2", "3", "v4"), ("A", "B", " C", ""))]
    with pytest.raises(ValueError, match=r"1 of 4 questions .* v4"):
        seed.submit(data, "all", answers("A", "B", "C"), tmp_path)


def test_what_does_not_fit_is_told_and_another_splits_answers_are_refused(tmp_path, capsys):
    data = write(tmp_path, ENTRIES)
    rows = [*answers("A", "B", "C"), {"question_id": 1, "text": "B"}, {"question_id": 99, "text": "A"}]
    assert seed.score(data, "all", rows)["Total accuracy"] == 50.0
    said = capsys.readouterr().err
    assert (
        "1 of 4 questions have no answer (as v4), 1 ids have several answers (as 1), 1 answers are to no question"
        in said
    )
    with pytest.raises(ValueError, match="none of the 1 answers"):
        seed.score(data, "all", rows[-1:])
