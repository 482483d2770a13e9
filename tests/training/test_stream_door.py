"""Training from a stream through the door that users use: killed and gone on with, and on two ranks."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.training import streamed_set
from visualrwkv.checkpoint import load_model, save_model

pytest.importorskip("deepspeed", reason="deepspeed is not installed")
pytestmark = pytest.mark.xdist_group("training")
ROOT = Path(__file__).parents[2]
RECIPE = ("--tokens", "160", "--steps", "10", "--warmup", "0", "--no-bf16", "--lr", "1e-4", "--optimizer", "adamw")
STREAM = ("--streaming", "--look-ahead", "8", "--bad", "skip", "--save-every", "2")


def environment(**more: object) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path, **{k: str(v) for k, v in more.items()}}


def command(place: Path, out: str, *options: str) -> list[str]:
    files = ["--stage", "finetune", "--model", place / "model", "--data", place / "set", "--out", place / out]
    return [sys.executable, "-m", "visualrwkv.training", *map(str, files), *RECIPE, *options]


def run(told: list[str], **variables: object) -> subprocess.CompletedProcess:
    env = environment(**variables)
    return subprocess.run(told, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False)


def rows_of(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(len(rows))), "no step twice, none left out"
    return rows


def told_by(out: Path, *names: str) -> list[list]:
    return [[row[name] for name in names] for row in rows_of(out)]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model, picture) -> Path:
    """A tiny model, twenty-six records in three files, two of them bad, and a run over more than two epochs of them."""
    folder = tmp_path_factory.mktemp("stream-door")
    streamed_set.write(folder / "set", picture, streamed_set.BROKEN)
    save_model(tiny_model(image_tokens=4), folder / "model")
    done = run(command(folder, "whole", *STREAM, "--accumulate", "2"))
    assert done.returncode == 0, done.stderr
    assert "a stream of 3 files, the first 24 records of " in done.stderr
    assert done.stderr.count("has no answer to learn from") == rows_of(folder / "whole")[-1]["left_out"]
    return folder


def test_it_learns_from_what_it_can(place):
    rows = rows_of(place / "whole")
    assert len(rows) == 10
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["left_out"] > len(streamed_set.BROKEN)
    assert not (place / "whole/checkpoints").exists()


@pytest.mark.parametrize("workers", ["0", "2"])
def test_killed_it_goes_on_bit_for_bit(place, workers):
    """kill -9 in a step, with and without processes that read ahead."""
    out = place / f"killed-{workers}"
    told = command(place, out.name, *STREAM, "--accumulate", "2", "--workers", workers)
    running = subprocess.Popen(told, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL)
    latest = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_text().count("\n") < 4:
        assert time.monotonic() < latest
        time.sleep(0.002)
    running.kill()
    running.wait()
    assert (out / "checkpoints/latest").exists()
    done = run(told)
    assert done.returncode == 0, done.stderr
    assert told_by(out, "loss", "tokens", "left_out") == told_by(place / "whole", "loss", "tokens", "left_out")
    wanted = load_model(place / "whole").state_dict()
    for name, tensor in load_model(out).state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


def test_two_ranks_do_what_one_does_with_accumulation(place):
    files = {"MODEL": place / "model", "DATA": place / "set", "OUT": place / "two", "IMAGES": place}
    done = run(["bash", "scripts/finetune.sh", *RECIPE, *STREAM], RANKS=2, **files)
    assert done.returncode == 0, done.stderr
    assert told_by(place / "two", "tokens", "left_out") == told_by(place / "whole", "tokens", "left_out")
    wanted = load_model(place / "whole").state_dict()
    for name, tensor in load_model(place / "two").state_dict().items():
        assert (tensor - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--streaming", "--steps", "0"], "streaming needs steps"),
        (["--streaming", "--features", "kept"], "--features goes over all pictures"),
        (["--streaming"], "has no answer to learn from"),
    ],
)
def test_wrong_settings_are_one_sentence(place, options, words):
    done = run(command(place, "wrong", *options))
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (place / "wrong").exists()


def test_files_that_have_changed_are_refused(place):
    (place / "set/0.parquet").touch()
    done = run(command(place, "whole", *STREAM, "--accumulate", "2"))
    assert done.returncode == 1
    assert "has changed since the run in" in done.stderr
