"""The report: our figures with intervals, published ones in their columns, models against each other."""

import json
import random
import re

import pytest
from finished import read_run
from published import COLUMNS, PUBLISHED
from report import ALL_PAIRS, differences, draw, main_table, markdown, protocols, told_apart, written

LABELS = [str(i) for i in range(100, 220)]


@pytest.fixture
def data(tmp_path):
    """ChartQA with three questions about each of forty pictures."""
    entries = [{"imgname": f"{i // 3}.png", "query": f"q{i}", "label": label} for i, label in enumerate(LABELS)]
    (tmp_path / "test_human.json").write_text(json.dumps(entries))
    return tmp_path


def make_run(place, data, right, **changes):
    """A directory as eval/run.py leaves it; `right`: which questions are answered rightly."""
    place.mkdir()
    rows = [
        {"question_id": f"human/{i}", "text": label if i in right else "?", "image": f"{i // 3}.png"}
        for i, label in enumerate(LABELS)
    ]
    (place / "chartqa-test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    share = len(right) / len(LABELS) * 100
    result = {
        "scores": {"chartqa": {"relaxed_human": share, "relaxed_overall": share, "mean_of_splits": share}},
        "more": {"chartqa": {"visualrwkv_exact": share}},
        "questions": {"chartqa": len(rows)},
        "settings": {"chartqa": {"splits": ["test"]}},
        "data": str(data),
        "model": f"runs/{place.name}/finetune",
        "model_hash": "0123",
        "image_position": "middle",
        "limit": 0,
    }
    (place / "result.json").write_text(json.dumps(result | changes))
    return place


def test_a_figure_has_an_interval_by_pictures(tmp_path, data):
    every_third = {i for i in range(len(LABELS)) if (i // 3) % 2}
    run = read_run(make_run(tmp_path / "a", data, every_third))
    figure = run.figures["chartqa"]
    assert figure.value == figure.interval.mean == 50
    assert figure.interval.pictures == 40
    assert 15 < figure.interval.half < 17  # of 40 pictures, not of 120 questions
    assert figure.text(1) == f"50.0 ± {figure.interval.half:.1f}"
    assert run.figures["chartqa-exact"].text(1) == "50.0"
    assert run.name == "a/finetune (0123)"
    assert "image middle" in run.settings


def test_published_figures_stand_in_the_columns_of_their_protocol(tmp_path, data):
    table = main_table([read_run(make_run(tmp_path / "a", data, {1, 2}) / "result.json")])
    assert table[0] == ["model", "source", "ChartQA", "ChartQA exact"]
    assert table[1][:2] == ["a/finetune (0123)", "ours"]
    assert ["VisualRWKV-HD 1.6B", "VisualRWKV-HD paper", "–", "33.0"] in table
    assert all(len(row) == 4 for row in table)
    assert not any(row[0].startswith("VisualRWKV-7") for row in table)  # nothing of theirs to compare
    lines = markdown(table).splitlines()
    assert lines[1] == "| --- | --- | --: | --: |"
    assert len({line.count("|") for line in lines}) == 1


def test_every_published_figure_has_a_column():
    for row in PUBLISHED:
        assert row.figures.keys() <= COLUMNS.keys(), row.name
        assert row.source
    assert {column.bench for column in COLUMNS.values()} >= {"vqav2", "mmbench_cn", "mm-vet", "docvqa"}


def test_two_models_are_compared_question_by_question(tmp_path, data):
    lot = random.Random(0)
    first = {i for i in range(len(LABELS)) if lot.random() < 0.5}
    better = first | {i for i in range(len(LABELS)) if i % 10 == 0}
    runs = [read_run(make_run(tmp_path / name, data, right)) for name, right in (("a", first), ("b", better))]
    (_, row) = differences(runs)
    gain = len(better - first) / len(LABELS) * 100
    assert row[0] == "ChartQA"
    assert re.fullmatch(rf"\*\*\+{gain:.1f} ± [\d.]+\*\*", row[3])
    one, two = (run.figures["chartqa"].interval for run in runs)
    assert abs(two.mean - one.mean) < one.half + two.half  # which the two intervals alone would not show
    assert row[4:] == ["120", "40"]
    (_, row) = differences([runs[0], read_run(make_run(tmp_path / "c", data, first))])
    assert row[3].startswith("+0.0")
    assert "Differences" in written(runs)
    assert "Differences" not in written(runs[:1])


def test_of_many_models_each_is_compared_with_the_first(tmp_path, data):
    runs = [read_run(make_run(tmp_path / str(i), data, {i})) for i in range(ALL_PAIRS + 1)]
    assert len(differences(runs[:ALL_PAIRS])) - 1 == ALL_PAIRS * (ALL_PAIRS - 1) / 2
    assert {row[1] for row in differences(runs)[1:]} == {runs[0].name}


def test_without_answers_a_figure_stands_alone(tmp_path, data, capsys):
    place = make_run(tmp_path / "a", data, {1})
    (place / "chartqa-test.jsonl").unlink()
    assert read_run(place).figures["chartqa"].text(1) == "0.8"
    assert "without an interval" in capsys.readouterr().err


def test_a_figure_that_is_no_mean_is_told_with_its_accuracy(tmp_path, data):
    place = make_run(tmp_path / "a", data, set(range(60)), scores={"chartqa": {"relaxed_overall": 81.5}})
    assert read_run(place).figures["chartqa"].text(1).startswith("81.5 (acc. 50.0 ± ")


def test_limited_runs_are_marked(tmp_path, data):
    run = read_run(make_run(tmp_path / "a", data, {1}, limit=120))
    assert run.figures["chartqa"].text(1).endswith("*")
    assert "first questions only" in written([run])
    assert any("ChartQA: test, relaxed accuracy. Ours: test split, 120 questions." in line for line in protocols([run]))


def test_runs_of_one_model_are_told_apart(tmp_path, data):
    places = [make_run(tmp_path / name, data, {1}, model="m/x") for name in ("a", "b")]
    names = [
        run.name for run in told_apart([read_run(place) for place in places], [places[0], places[1] / "result.json"])
    ]
    assert names == ["m/x (0123), a", "m/x (0123), b"]


def test_the_picture_is_one(tmp_path, data):
    from PIL import Image

    run = read_run(make_run(tmp_path / "a", data, {1}))
    draw(main_table([run]), 1, tmp_path / "report.png")
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 100
    assert not list(tmp_path.glob(".*"))


def test_another_file_is_refused(tmp_path):
    (tmp_path / "result.json").write_text("[]")
    with pytest.raises(ValueError, match="no scores"):
        read_run(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_run(tmp_path / "nowhere")
