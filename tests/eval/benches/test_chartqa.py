"""ChartQA: what is near enough."""

import json
import random

import pytest
from benches import chartqa


@pytest.mark.parametrize(
    ("answer", "label", "fits"),
    [
        ("105", "100", True),
        ("105.01", "100", False),
        ("-95", "-100", True),
        ("2014", "2015", True),
        ("50%", "0.5", True),
        ("50", "50%", False),
        ("1,000", "1000", False),
        ("1,000", "1,000", True),
        ("0", "0", True),
        ("0.0", "0", False),
        ("YES", "Yes", True),
        ("Yes.", "Yes", False),
        (" yes", "Yes", False),
        (" 100 ", "100", True),  # a number may have space around it
    ],
)
def test_one_rule_at_a_time(answer, label, fits):
    assert chartqa.fits(answer, label) is fits


def test_a_twentieth_either_way_fits_and_no_more():
    lot = random.Random(0)
    for _ in range(300):
        label = lot.choice([-1, 1]) * lot.uniform(0.01, 1e4)
        assert chartqa.fits(str(label * (1 + lot.uniform(-0.0499, 0.0499))), str(label))
        assert not chartqa.fits(str(label * (1 + lot.choice([-1, 1]) * lot.uniform(0.0501, 2))), str(label))


def write(place, part, labels):
    place.mkdir(parents=True, exist_ok=True)
    entries = [{"imgname": f"{i}.png", "query": f"q{i}", "label": label} for i, label in enumerate(labels)]
    (place / f"test_{part}.json").write_text(json.dumps(entries))


def test_parts_and_their_mean(tmp_path):
    write(tmp_path / "test", "human", ["10", "Yes", "3"])
    write(tmp_path / "test", "augmented", ["7"])
    rows = [{"question_id": name, "text": text} for name, text in [("human/0", "10.4"), ("augmented/0", "7")]]
    assert chartqa.score(tmp_path, "test", rows) == {
        "relaxed_human": pytest.approx(100 / 3),
        "relaxed_augmented": 100.0,
        "relaxed_overall": 50.0,
        "mean_of_splits": pytest.approx(200 / 3),
    }
    assert chartqa.more(tmp_path, "test", rows) == {"visualrwkv_exact": 25.0}
    question = chartqa.load(tmp_path, "test")[0]
    assert question.text == "q0\nAnswer the question with a single word."
    assert question.pictures == (tmp_path / "test/png/0.png",)
