"""`python eval/run.py` on a small set with a tiny model: the last line, going on after a crash, errors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from visualrwkv.checkpoint import save_model

ROOT = Path(__file__).parents[2]


def ask(*options: str) -> subprocess.CompletedProcess:
    told = [sys.executable, "eval/run.py", "--bench", "scenes", *map(str, options)]
    return subprocess.run(told, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.fixture
def place(tmp_path, tiny_model, picture):
    for split in ("test", "test_unseen"):
        records = []
        for i in range(3):
            picture(i).save(tmp_path / f"{i}.png")
            turns = [
                {"from": "human", "value": "<image>\nHow many?"},
                {"from": "gpt", "value": "2"},
                {"from": "human", "value": "Which colour?"},
                {"from": "gpt", "value": "red"},
            ]
            records.append(
                {"id": f"{split}{i}", "image": f"{i}.png", "conversations": turns, "types": ["count", "colour"]}
            )
        (tmp_path / f"{split}.json").write_text(json.dumps(records))
    save_model(tiny_model(), tmp_path / "model")
    return tmp_path


def test_scores_are_the_last_line_and_a_second_run_goes_on(place):
    options = ["--model", place / "model", "--data", place, "--blind", "--max-new-tokens", "2", "--out", place / "out"]
    done = ask(*options)
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout.splitlines()[-1])["scenes"]
    assert set(scores) == {"test", "test_unseen", "blind"}
    assert set(scores["test"]) == {"accuracy", "count", "colour"} == set(scores["blind"]["test_unseen"])
    answers = place / "out/scenes-test.jsonl"
    lines = answers.read_text().splitlines()
    assert len(lines) == 6
    # a crash in the middle of a line; the answers that are there are kept as they are, right or wrong
    kept = [json.loads(line) for line in lines[:4]]
    for row in kept:
        row["text"] = row["answer"]
    answers.write_text("".join(json.dumps(row) + "\n" for row in kept) + lines[4][:20])
    done = ask(*options)
    assert done.returncode == 0, done.stderr
    again = json.loads(done.stdout.splitlines()[-1])["scenes"]
    assert again["test"]["accuracy"] >= 4 / 6
    assert len(scenes_answers(answers)) == 6
    result = json.loads((place / "out/result.json").read_text())
    assert result["scores"]["scenes"] == again
    assert {"model_hash", "image_position", "scan", "seconds"} <= set(result)


def scenes_answers(file: Path) -> set[str]:
    return {json.loads(line)["question_id"] for line in file.read_text().splitlines() if line.endswith("}")}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "{place}/model", "--data", "{place}/nowhere"], "nowhere"),
        (["--model", "{place}/nothing", "--data", "{place}"], "nothing"),
        (["--model", "{place}/model", "--data", "{place}", "--split", "dev"], "dev"),
    ],
)
def test_errors_are_one_sentence(place, options, words):
    done = ask(*(o.format(place=place) for o in options))
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert words in done.stderr
    assert "Traceback" not in done.stderr
