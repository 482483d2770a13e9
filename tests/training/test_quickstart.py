"""The quickstart's phases: done once, resumed, their time added up, nothing thrown away unasked."""

import json
import sys

import pytest

from visualrwkv.training import quickstart
from visualrwkv.training.quickstart import Command, Options, Phases, python


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "HOME", tmp_path / "quickstart")
    return tmp_path / "quickstart"


def script(code: str) -> list[Command]:
    return [Command([sys.executable, "-c", code])]


def test_a_phase_runs_once(home, tmp_path):
    mark = script(f"open({str(tmp_path / 'ran')!r}, 'a').write('x')")
    for _ in range(2):
        Phases(Options(), {"lr": 1})("one", "title", mark)
    assert (tmp_path / "ran").read_text() == "x"
    assert json.loads((home / "phases.json").read_text())["done"] == ["one"]


def test_a_failed_phase_is_run_again_and_all_its_time_counts(home):
    with pytest.raises(SystemExit):
        Phases(Options(), {"lr": 1})("one", "title", script("import time; time.sleep(0.5); raise SystemExit(3)"))
    again = Phases(Options(), {"lr": 1})
    spent = again.seconds["one"]
    assert spent >= 0.5
    assert again.done == []
    again("one", "title", script("import time; time.sleep(0.3)"))
    assert again.seconds["one"] >= spent + 0.3


def test_another_recipe_is_refused_and_fresh_starts_over(home):
    Phases(Options(), {"lr": 1})("one", "title", script("pass"))
    (home / "model").mkdir()
    with pytest.raises(ValueError, match="--fresh"):
        Phases(Options(), {"lr": 2})
    assert (home / "model").exists()
    assert Phases(Options(fresh=True), {"lr": 2}).done == []
    assert not (home / "model").exists()


def test_lanes_run_side_by_side_and_the_commands_of_one_in_order(home, tmp_path):
    note = "import sys, time; time.sleep(float(sys.argv[2])); open({!r}, 'a').write(sys.argv[1])".format(
        str(tmp_path / "notes")
    )
    lane = [Command([sys.executable, "-c", note, word, "0.2"]) for word in "ab"]
    Phases(Options(), {})("three", "title", lane, [Command([sys.executable, "-c", note, "c", "2"])])
    assert (tmp_path / "notes").read_text() == "abc"


def test_options_become_words():
    assert python("-m", "x", lr_final=0.1, out="o").words == [
        sys.executable,
        "-m",
        "x",
        "--lr-final",
        "0.1",
        "--out",
        "o",
    ]


def test_when_one_of_two_fails_the_other_is_ended(home, tmp_path):
    slow = script(f"import time; time.sleep(30); open({str(tmp_path / 'late')!r}, 'w')")
    phases = Phases(Options(), {})
    with pytest.raises(SystemExit):
        phases("two", "title", slow, script("raise SystemExit(1)"))
    assert phases.seconds["two"] < 20
    assert not (tmp_path / "late").exists()


def test_each_phase_keeps_its_own_peak(home):
    phases = Phases(Options(), {})
    phases(
        "big",
        "title",
        script("import time; x = bytearray(200 << 20); x[::4096] = bytes(len(x[::4096])); time.sleep(1.5)"),
    )
    phases("small", "title", script("import time; time.sleep(1.5)"))
    assert phases.peaks["big"] > phases.peaks["small"] + (150 << 20)
    assert Phases(Options(), {}).peaks == phases.peaks
