"""A data set is looked at whole: every problem is found, and the figures are those of the records that are left."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from visualrwkv.checkpoint import save_model
from visualrwkv.text.prompt import IGNORE, encode_conversation

ROOT = Path(__file__).parents[2]


def talk(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


GOOD = [
    {"id": "a", "image": "red.png", "conversations": talk("<image>\nWhat is this?", "Red")},
    {"id": "b", "conversations": talk("Hello", "Hi there")},
    {"id": "c", "image": ["red.png", "wide.png"], "conversations": talk("<image>\n<image>\nCompare", "They differ.")},
]
BAD = [
    ({"id": "d", "image": "none.png", "conversations": talk("<image>", "x")}, "there is no such picture"),
    ({"id": "e", "image": "words.png", "conversations": talk("<image>", "x")}, "cannot be read as a picture"),
    ({"id": "f", "image": "red.png", "conversations": talk("What?", "x")}, "has 0 <image> tags for 1 pictures"),
    ({"id": "g", "conversations": []}, "has no conversations"),
]


@pytest.fixture
def folder(tmp_path, tiny_model):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    Image.new("RGB", (350, 30), "blue").save(tmp_path / "wide.png")
    (tmp_path / "words.png").write_text("these are words")
    save_model(tiny_model(position="first"), tmp_path / "model")
    return tmp_path


def look(folder, records, *options):
    (folder / "data.json").write_text(json.dumps(records))
    line = [
        sys.executable,
        "-m",
        "visualrwkv.cli",
        "check-data",
        "data.json",
        "--model",
        "model",
        "--out",
        "report",
        *options,
    ]
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=120)


def test_a_good_set(folder):
    records = GOOD * 50  # several pieces of work
    done = look(folder, records, "--tokens", "100", "--workers", "2")
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / "report/check.json").read_text())
    encoded = [encode_conversation(r["conversations"], image_position="first", image_tokens=16) for r in records]
    lengths = [len(ids) for ids, _ in encoded]
    figures = report["figures"]
    assert report["problems"] == []
    assert (figures["records"], figures["pictures"], figures["empty turns"]) == (150, 150, 0)
    assert figures["tokens"] == sum(lengths)
    assert figures["learned tokens"] == sum(label != IGNORE for _, labels in encoded for label in labels)
    assert figures["tokens of a record"]["longest"] == max(lengths)
    assert figures["filled"] == pytest.approx(sum(lengths) / (100 * figures["batches an epoch"]), abs=1e-4)
    assert figures["cut to the budget"] == 0
    with Image.open(folder / "report/lengths.png") as drawn:
        assert drawn.size == (900, 300)


def test_every_problem_is_found_and_the_rest_is_counted(folder):
    done = look(folder, [BAD[0][0], *GOOD, *(record for record, _ in BAD[1:])], "--workers", "1")
    assert done.returncode == 1
    report = json.loads((folder / "report/check.json").read_text())
    assert [problem["record"] for problem in report["problems"]] == [0, 4, 5, 6]
    for problem, (record, words) in zip(report["problems"], BAD, strict=True):
        assert words in problem["what"]
        assert f"(id {record['id']})" in problem["what"]
        assert words in done.stderr
    assert report["figures"]["pictures"] == 3
    assert done.stderr.splitlines()[-1].startswith("error: 4 of 7 records cannot be trained on")


def test_empty_turns_and_long_records_are_counted(folder):
    many = [turn for i in range(20) for turn in talk(f"What is {i}?", "A number")]
    records = [*GOOD, {"id": "h", "conversations": [*talk("Hello", "Hi"), {"from": "human", "value": " "}]}]
    done = look(folder, [*records, {"id": "i", "conversations": many}], "--tokens", "60")
    assert done.returncode == 0, done.stderr
    figures = json.loads((folder / "report/check.json").read_text())["figures"]
    assert (figures["empty turns"], figures["cut to the budget"]) == (1, 1)
    assert figures["tokens of a record"]["longest"] <= 60


def test_without_a_model_the_released_one_counts(folder):
    (folder / "data.json").write_text(json.dumps(GOOD[:1]))
    line = [sys.executable, "-m", "visualrwkv.cli", "check-data", "data.json", "--out", "report"]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    wanted = encode_conversation(GOOD[0]["conversations"], image_tokens=577)[0]
    assert json.loads((folder / "report/check.json").read_text())["figures"]["tokens"] == len(wanted)


def test_what_is_no_data_is_one_sentence(folder):
    (folder / "data.json").write_text("{")
    line = [sys.executable, "-m", "visualrwkv.cli", "check-data", "data.json"]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=120)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "data.json is not valid JSON" in done.stderr
    assert not (folder / "runs").exists()
