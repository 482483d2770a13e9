"""LLaVA-Bench: what is read out of reviews, and the answers that a review reads."""

import json

import pytest
from benches import llava_bench


@pytest.mark.parametrize(
    ("review", "pair"),
    [
        ("8 9\nwhy", [8, 9]),
        ("8,9", [8, 9]),
        ("8, 9", [-1, -1]),
        ("8 9 ", [-1, -1]),
        ("8", [-1, -1]),
        ("eight nine", [-1, -1]),
        ("", [-1, -1]),
        ("8.5 1e1", [8.5, 10]),
    ],
)
def test_ratings_stand_on_the_first_line(review, pair):
    assert llava_bench.read_ratings(review) == pair


def test_unreadable_reviews_are_averaged_in(tmp_path):
    rows = [
        {"category": "llava_bench_conv", "content": "8 4"},
        {"category": "llava_bench_conv", "content": "?"},
        {"category": "llava_bench_detail", "tuple": [10.0, 5.0]},
        {"score": [3.0, 3.0]},
    ]
    figures = llava_bench.score(tmp_path / "nowhere", "in-the-wild", rows)
    assert list(figures) == ["all", "llava_bench_conv", "llava_bench_detail"]
    assert figures["all"] == {"relative": 55.0, "gpt4_x10": 50.0, "model_x10": 27.5}
    assert figures["llava_bench_conv"] == {"relative": 42.9, "gpt4_x10": 35.0, "model_x10": 15.0}


def test_a_review_without_words_is_unreadable_and_other_ratings_are_refused(tmp_path):
    rows = [{"content": None}, {"content": "9 5"}]
    assert llava_bench.score(tmp_path, "in-the-wild", rows)["all"] == {
        "relative": 50.0,
        "gpt4_x10": 40.0,
        "model_x10": 20.0,
    }
    for given in (None, 7, [1, 2, 3], ["8", "9"]):
        with pytest.raises(ValueError, match="instead of two numbers"):
            llava_bench.score(tmp_path, "in-the-wild", [{"tuple": given}])


def test_a_mean_of_0_leaves_no_ratio(tmp_path, capsys):
    figures = llava_bench.score(tmp_path, "in-the-wild", [{"tuple": [0, 5]}])
    assert figures["all"]["relative"] is None
    assert "divides" in capsys.readouterr().err


def test_answers_are_for_the_review(tmp_path):
    lines = [{"question_id": i, "image": "001.jpg", "text": f"q{i}", "category": "conv"} for i in range(2)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [q.text for q in llava_bench.load(tmp_path, "in-the-wild")] == ["q0", "q1"]
    rows = [{"question_id": "1", "text": "b"}, {"question_id": "0", "text": "a"}]
    with pytest.raises(ValueError, match="GPT-4"):
        llava_bench.score(tmp_path, "in-the-wild", rows)
    file = llava_bench.submit(tmp_path, "in-the-wild", rows, tmp_path)
    written = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["question_id"], row["prompt"], row["text"]) for row in written] == [(0, "q0", "a"), (1, "q1", "b")]
    assert len({row["answer_id"] for row in written}) == 2
    with pytest.raises(ValueError, match="order"):
        llava_bench.submit(tmp_path, "in-the-wild", rows[:1], tmp_path)


def test_without_questions_nothing_is_asked(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"questions\.jsonl"):
        llava_bench.load(tmp_path, "in-the-wild")
