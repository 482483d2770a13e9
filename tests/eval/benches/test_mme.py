"""`mme`: LLaVA's conversion, the first four characters, pairs of lines."""

import json

import pytest
from benches import mme

SA = "\nAnswer the question using a single word or phrase."


@pytest.fixture
def data(tmp_path):
    """Two pictures, four questions in each subtask; posters apart, one question with two spaces as some official ones."""
    for subtask in mme.SUBTASKS:
        place = tmp_path / "MME_Benchmark_release_version" / subtask
        texts = place / "questions_answers_YN" if subtask == "posters" else place
        texts.mkdir(parents=True)
        for i in range(2):
            gap = "  " if i else " "
            (texts / f"{i}.txt").write_text(
                f"Is it {i}?{gap}Please answer yes or no.\tYes\nIs it not {i}? Please answer yes or no.\tNo\n"
            )
    return tmp_path


def answers(data, *texts):
    questions = mme.load(data, "test")
    return [{"question_id": q.id, "prompt": q.text, "text": t} for q, t in zip(questions, texts * len(questions))]


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("YES", "yes"),
        ("yes or no", "yes"),
        ("Eyes", "yes"),
        ("  no", "no"),
        ("Not sure", "no"),
        ("None", "no"),
        ("Unknown", "other"),
        ("y", "other"),
        ("A: yes", "other"),
        ("", "other"),
    ],
)
def test_parsing(text, parsed):
    assert mme.parse(text) == parsed


def test_prompts(data):
    questions = mme.load(data, "test")
    assert len(questions) == 14 * 4
    assert (questions[0].id, questions[1].id) == ("existence/0.jpg#1", "existence/0.jpg#2")
    assert (questions[0].text, questions[2].text) == ("Is it 0?" + SA, "Is it 1?" + SA)
    posters = next(q for q in questions if q.id.startswith("posters"))
    assert posters.pictures == (data / "MME_Benchmark_release_version/posters/images/0.jpg",)


def test_scores_count_questions_and_pairs(data):
    scores = mme.score(data, "test", answers(data, "Yes", "No", "Yes", "yes"))
    assert scores["count"] == 75 + 50
    assert (scores["perception"], scores["cognition"], scores["total"]) == (1250, 500, 1750)
    assert list(scores) == ["perception", *mme.GROUPS["perception"], "cognition", *mme.GROUPS["cognition"], "total"]
    assert mme.more(data, "test", answers(data, "Yes", "No", "Yes", "yes"))["OCR"] == {"acc": 75.0, "acc_plus": 50.0}
    hits = mme.per_question(data, "test", answers(data, "Yes", "No", "Yes", "yes"))
    assert (hits["OCR/1.jpg#1"], hits["OCR/1.jpg#2"]) == (1.0, 0.0)


def test_llavas_rows_share_ids_and_keep_their_order(data):
    rows = answers(data, "\nYe\ts", "no", "No", "Yes")
    rows = [row | {"question_id": row["question_id"].split("#")[0]} for row in rows]
    assert mme.score(data, "test", rows)["existence"] == 50 + 50
    first, second, *others = rows
    assert (
        mme.score(data, "test", [first, *others, second])["existence"] == 50 + 0
    )  # pairs are lines one after the other
    assert mme.per_question(data, "test", rows)["existence/0.jpg#2"] == 1.0


def test_answers_that_do_not_fit_are_refused(data, capsys):
    rows = answers(data, "Yes", "No")
    with pytest.raises(ValueError, match="existence 3 of 4"):
        mme.score(data, "test", rows[1:])
    with pytest.raises(ValueError, match="existence 0 of 4"):
        mme.score(data, "test", rows[4:])
    with pytest.raises(ValueError, match="1 of 56 answers are to no question here"):
        mme.score(data, "test", [rows[0] | {"prompt": "Is it 7?" + SA}, *rows[1:]])
    assert mme.score(data, "test", rows[2:])["existence"] == 200
    assert "existence 2 of 4" in capsys.readouterr().err


def test_a_group_without_all_its_subtasks_has_no_sum(data, capsys):
    for file in (data / "MME_Benchmark_release_version/code_reasoning").iterdir():
        file.unlink()
    scores = mme.score(data, "test", answers(data, "Yes", "No"))
    assert scores["perception"] == 2000
    assert not {"cognition", "total", "code_reasoning"} & set(scores)
    assert "no score for code_reasoning" in capsys.readouterr().err


def test_the_official_codes_input(data):
    place = mme.submit(data, "test", answers(data, "Yes", "N\no"), data / "out")
    lines = (place / "posters.txt").read_text().split("\n")
    assert lines[0] == "0.txt\tIs it 0? Please answer yes or no.\tYes\tYes"
    assert lines[2] == "1.txt\tIs it 1?  Please answer yes or no.\tYes\tYes"
    assert lines[3] == "1.txt\tIs it not 1? Please answer yes or no.\tNo\tNo"


def test_llavas_question_file_is_taken(data):
    told = [{"question_id": "count/0.jpg", "image": "count/0.jpg", "text": "Is it 0?" + SA}] * 2
    (data / "llava_mme.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    assert [q.id for q in mme.load(data, "test")] == ["count/0.jpg#1", "count/0.jpg#2"]
