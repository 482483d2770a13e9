"""What a run says: metrics that survive a cut, and an alarm for losses that nobody should train on."""

import json
import math

import pytest

from visualrwkv.training.log import Alarm, Log


def test_an_alarm_for_no_number():
    alarm = Alarm(0)
    assert alarm(1.0) is None
    assert alarm(1e30) is None, "0 lets any number pass"
    assert "nan" in alarm(math.nan)
    assert "inf" in alarm(math.inf)


def test_an_alarm_for_a_spike_once_the_usual_is_known():
    alarm = Alarm(5)
    assert alarm(100.0) is None
    for i in range(70):
        assert alarm(1 + 0.3 * (i % 3)) is None
    assert alarm(4.0) is None
    assert "6.8" in alarm(6.8)
    assert alarm(1.0) is None, "a spike does not become usual"
    quiet = Alarm(5)
    for _ in range(70):
        assert quiet(0.01) is None
    assert quiet(0.9) is None, "small losses may jump"


def test_metrics_go_on_from_the_checkpoint(tmp_path):
    log = Log(tmp_path, 0)
    for step in range(5):
        log.add(step, loss=1.0 / (step + 1), tokens=10, seconds=0.1, lr=0.5)
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # killed while it wrote
    log = Log(tmp_path, 3)
    log.add(3, loss=0.2, tokens=10, seconds=0.1)
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert rows[1] == {"step": 1, "loss": 0.5, "tokens": 10, "seconds": 0.1, "tokens_per_second": 100.0, "lr": 0.5}


def test_tensorboard_shows_the_same(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = Log(tmp_path, 0)
    for step in range(3):
        log.add(step, loss=float(step), tokens=10, seconds=0.1)
    log.close()
    board = events.EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [(0, 0.0), (1, 1.0), (2, 2.0)]
