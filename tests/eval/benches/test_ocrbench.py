"""OCRBench: an answer that holds the text is right."""

import json

import pytest
from benches import ocrbench


@pytest.mark.parametrize(
    ("text", "answers", "source", "holds"),
    [
        ("It says STOP here", "stop", "IIIT5K", True),
        ("new\nyork", "New York", "IIIT5K", True),
        ("newyork", "New York", "IIIT5K", False),
        ("b", ["a", "b"], "IIIT5K", True),
        ("x ^ 2", "x^2", "HME100k", True),
        ("X^2", "x^2", "HME100k", False),
        ("anything", "", "IIIT5K", True),
    ],
)
def test_one_rule_at_a_time(text, answers, source, holds):
    assert ocrbench.holds(text, answers, source) is holds


def entry(kind, answer, source="IIIT5K"):
    return {"dataset_name": source, "id": 0, "image_path": "x/0.png", "question": "q?", "answers": answer, "type": kind}


def test_sums(tmp_path, capsys):
    entries = [
        entry("Regular Text Recognition", "a"),
        entry("Doc-oriented VQA", "a", "docVQA"),
        entry("Doc-oriented VQA", ""),
    ]
    (tmp_path / "OCRBench.json").write_text(json.dumps(entries))
    rows = [{"question_id": 0, "text": "A"}, {"question_id": "1", "text": "b"}]
    by_type = {"Regular Text Recognition": [1, 1], "Doc-oriented VQA": [0, 2]}
    assert ocrbench.score(tmp_path, "test", rows) == {"sum_correct": 1, "n": 3, "by_type": by_type}
    assert "1 of 3" in capsys.readouterr().err
    assert ocrbench.more(tmp_path, "test", rows)["text_recognition"] == [1, 1]
    assert ocrbench.load(tmp_path, "test")[1].text == "q?\nAnswer the question using a single word or phrase."
    (tmp_path / "OCRBench.json").write_text(json.dumps([entry("Poetry", "a")]))
    with pytest.raises(ValueError, match="Poetry"):
        ocrbench.score(tmp_path, "test", rows[:1])
