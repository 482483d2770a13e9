"""`python eval/run.py`: the last line, going on after a kill, ranks, saved answers, errors of one sentence."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import plan
import pytest
import run
import torch

from visualrwkv.checkpoint import save_model
from visualrwkv.files import fingerprint
from visualrwkv.rwkv.state import State
from visualrwkv.task import TASK, save_task

ROOT = Path(__file__).parents[2]
CASES = next((p for p in (up / "shared/eval_cases" for up in ROOT.parents) if p.is_dir()), None)


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model, picture):
    """DATA of `scenes`, 24 pictures with two questions in each split, and a model."""
    place = tmp_path_factory.mktemp("scenes")
    turns = [
        {"from": "human", "value": "<image>\nHow many?"},
        {"from": "gpt", "value": "2"},
        {"from": "human", "value": "Which colour?"},
        {"from": "gpt", "value": "red"},
    ]
    for split in ("test", "test_unseen"):
        records = []
        for i in range(24):
            picture(i).save(place / f"{i}.png")
            types = ["count", "colour"]
            records.append({"id": f"{split}{i}", "image": f"{i}.png", "conversations": turns, "types": types})
        (place / f"{split}.json").write_text(json.dumps(records))
    save_model(tiny_model(), place / "model")
    return place


def told(place, out, *options):
    """The arguments of a short run."""
    given = ["--bench", "scenes", "--model", place / "model", "--data", place, "--out", out]
    return [*map(str, given), "--max-new-tokens", "3", "--batch-size", "4", *options]


@pytest.fixture(scope="module")
def uninterrupted(place):
    """What a run leaves that nothing disturbs, and its last line."""
    command = [sys.executable, "eval/run.py", *told(place, place / "whole", "--blind")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return place / "whole", json.loads(done.stdout.splitlines()[-1])


def same_answers(out, whole):
    found = {f.name: f.read_bytes() for f in out.glob("*.jsonl")}
    return found == {f.name: (whole / f.name).read_bytes() for f in whole.glob("*.jsonl")}


def test_scores_are_the_last_line_and_lie_beside_the_answers(uninterrupted):
    out, last = uninterrupted
    scores = last["scenes"]
    assert set(scores) == {"test", "test_unseen", "blind"}
    assert set(scores["test"]) == {"accuracy", "count", "colour"} == set(scores["blind"]["test_unseen"])
    result = json.loads((out / "result.json").read_text())
    assert result["scores"] == last
    assert result["questions"] == {"scenes": 96}
    assert result["settings"] == {"scenes": {"splits": ["test", "test_unseen"]}}
    known = {"model_hash", "commit", "versions", "template", "image_position", "scan", "dtype", "seconds", "limit"}
    assert known <= set(result)
    rows = [json.loads(line) for line in (out / "scenes-test.jsonl").read_text().split("\n")[:-1]]
    assert [row["question_id"] for row in rows[:3]] == ["test0-0", "test0-1", "test1-0"]
    assert {"prompt", "text", "answer", "kind", "image"} <= set(rows[0])


def test_a_second_run_asks_nothing_and_says_the_same(uninterrupted, place, here, monkeypatch):
    out, last = uninterrupted
    monkeypatch.setattr("visualrwkv.chat.VLM.answer_batch", None)
    assert here(*told(place, out, "--blind")) == last


def test_a_killed_run_goes_on_to_the_same_answers(uninterrupted, place, here, tmp_path):
    command = [sys.executable, "eval/run.py", *told(place, tmp_path, "--blind")]
    going = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    began = time.monotonic()
    while not any(f.stat().st_size for f in tmp_path.glob("*.jsonl")) and time.monotonic() - began < 60:
        time.sleep(0.001)
    going.kill()
    assert going.wait() == -9
    whole, last = uninterrupted
    assert not same_answers(tmp_path, whole)
    assert here(*told(place, tmp_path, "--blind")) == last
    assert same_answers(tmp_path, whole)


def test_two_ranks_leave_the_same_answers(uninterrupted, place, here, tmp_path, monkeypatch):
    command = [sys.executable, "eval/run.py", *told(place, tmp_path, "--blind")]
    second = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"RANK": "1", "WORLD_SIZE": "2"}, stdout=subprocess.PIPE, text=True
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    whole, last = uninterrupted
    assert here(*told(place, tmp_path, "--blind")) == last
    assert second.communicate(timeout=60)[0] == ""
    assert second.returncode == 0
    assert same_answers(tmp_path, whole)
    assert json.loads((tmp_path / "result.json").read_text())["ranks"] == 2


def test_other_settings_are_one_sentence(uninterrupted, place, here):
    out, _ = uninterrupted
    with pytest.raises(ValueError, match="image_position middle instead of first"):
        here(*told(place, out, "--image-position", "first"))


def test_a_task_is_where_questions_start(uninterrupted, place, here, tmp_path, tiny_model):
    out, _ = uninterrupted
    model = tiny_model()
    wkv = 3 * torch.randn(State.zeros(model.config.rwkv).wkv[:, 0].shape, generator=torch.Generator().manual_seed(0))
    save_task(tmp_path / TASK, wkv, model.config.rwkv, fingerprint(model.rwkv))
    with pytest.raises(ValueError, match=r"other settings .task unknown instead of"):
        here(*told(place, out, "--task", str(tmp_path / TASK)))
    here(*told(place, tmp_path / "out", "--task", str(tmp_path / TASK), "--split", "test"))
    assert (tmp_path / "out/scenes-test.jsonl").read_bytes() != (out / "scenes-test.jsonl").read_bytes()
    assert json.loads((tmp_path / "out/result.json").read_text())["task"]


def test_a_limited_run_is_scored_on_what_it_asked(place, here, tmp_path):
    scores = here(*told(place, tmp_path, "--limit", "3", "--split", "test"))["scenes"]["test"]
    assert scores["accuracy"] in (0, 1 / 3, 2 / 3, 1)
    assert json.loads((tmp_path / "result.json").read_text())["questions"] == {"scenes": 3}


def test_a_result_keeps_the_benches_that_were_asked_before(tmp_path):
    before = {"scores": {"a": 1}, "questions": {"a": 2}, "model_hash": "x", "dtype": "float32", "more": {}}
    (tmp_path / "result.json").write_text(json.dumps(before))
    now = {name: {"b": 3} for name in ("scores", "questions", "more", "settings", "seconds")} | {"dtype": "float32"}
    run.write_result(tmp_path, now | {"model_hash": "x"})
    assert json.loads((tmp_path / "result.json").read_text())["scores"] == {"a": 1, "b": 3}
    run.write_result(tmp_path, now | {"model_hash": "y"})
    assert json.loads((tmp_path / "result.json").read_text())["scores"] == {"b": 3}


# Saved answers -------------------------------------------------------------------------------------------------------


def cases() -> list[Path]:
    """The official scorers' worked cases of the benches that are written."""
    found = sorted(CASES.glob("*/*")) if CASES else []
    return [case for case in found if case.parent.name.replace("-", "_") in plan.BENCHES]


def same(got, wanted):
    """Whether two nested results have the same keys and, to a millionth, the same figures."""
    if isinstance(wanted, dict):
        return isinstance(got, dict) and got.keys() == wanted.keys() and all(same(got[k], wanted[k]) for k in wanted)
    return got == (pytest.approx(wanted, rel=0, abs=1e-6) if isinstance(wanted, float) else wanted)


@pytest.mark.skipif(CASES is None, reason="the worked cases are not beside this checkout")
@pytest.mark.parametrize("case", cases(), ids=lambda case: f"{case.parent.name}-{case.name}")
def test_saved_answers_get_the_official_scores(case, here, tmp_path):
    name = case.parent.name
    scores = here(
        "--bench", name, "--data", case / "data", "--predictions", case / "predictions.jsonl", "--out", tmp_path
    )
    expected = json.loads((case / "expected.json").read_text())
    assert same(scores, {name: expected["primary"]})
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["scores"] == scores
    for variant, wanted in expected.get("variants", {}).items():
        if variant in ("official_on_llava_submission", "vizwiz_api_on_llava_submission"):
            assert same(result["more"][name]["llava_submission"], wanted)
    if name in ("vqav2", "gqa"):
        (file,) = [f for f in tmp_path.glob("*.json") if f.name != "result.json"]
        assert json.loads(file.read_text()) == expected["submission"]


def test_saved_answers_need_no_model_and_no_torch(place, tmp_path):
    rows = [{"question_id": f"test{i}-0", "text": "2" if i < 12 else ""} for i in range(24)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = "import sys, runpy; runpy.run_path('eval/run.py', run_name='__main__'); assert 'torch' not in sys.modules"
    options = ["--bench", "scenes", "--data", place, "--predictions", tmp_path / "a.jsonl", "--split", "test"]
    done = subprocess.run([sys.executable, "-c", code, *options], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["scenes"]["test"] == {"accuracy": 0.25, "count": 0.5, "colour": 0.0}
    assert "24 of 48 questions have no answer (as test0-1)" in done.stderr
    assert "12 of 24 answers are empty" in done.stderr


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--bench scenes --model {place}/model --data {place}/nowhere", "nowhere holds none of the files of scenes"),
        ("--bench scenes --model {place}/nothing --data {place}", "nothing"),
        ("--bench scenes --data {place} --split dev", "split is 'dev'; allowed are test, test_unseen"),
        ("--bench sceens --data {place}", "bench is 'sceens'; allowed are"),
        ("--bench scenes,vqav2", "scenes: it is drawn by scripts/quickstart.sh"),
        ("--bench pope,scenes", "scenes: it is drawn by scripts/quickstart.sh"),  # before pope is asked for
        ("--bench gqa,pope --split val_balanced", "split is 'val_balanced'; allowed are test"),
        ("--bench pope", "pope: lmms-lab/POPE cannot be reached"),
        ("--bench pope --split dev", "split is 'dev'; allowed are test"),
        ("--bench scenes --data {place} --predictions {place}/none.jsonl --split test", "none.jsonl"),
        ("--bench scenes --data {place} --predictions {place}/test.json", "several splits"),
        ("--bench scenes --data {place} --predictions {place}/test.json --split test", "a list stands where"),
        ("--bench scenes --data {place} --predictions {place}/bare.jsonl --split test", "answer 2 has no"),
        ("--bench scenes --data {place} --predictions {place}/empty.jsonl --split test", "holds no answer"),
        (
            "--bench scenes --data {place} --predictions {place}/listed.jsonl --split test",
            "answer 1 has no question_id",
        ),
        ("--bench scenes --data {place} --predictions {place}/prompt.jsonl --split test", "answer 1: its prompt is 5"),
        ("--bench llava-bench --data {place}/nowhere --predictions {place}/empty.jsonl", "holds no answer"),
        ("--bench scenes,scenes --data {place} --batch-size 0", "batch_size 0"),
        ("--bench scenes --data {place} --predictions a --limit 3 --split test", "--limit, --blind and --task"),
    ],
)
def test_errors_are_one_sentence(place, options, words, monkeypatch, capsys):
    (place / "bare.jsonl").write_text('{"question_id": "1", "text": "a"}\n{"question_id": "2", "answer": "a"}\n')
    (place / "listed.jsonl").write_text('{"question_id": [1], "text": "a"}\n')
    (place / "prompt.jsonl").write_text('{"question_id": 1, "text": "a", "prompt": 5}\n')
    (place / "empty.jsonl").write_text("\r\n")
    monkeypatch.setattr(sys, "argv", ["eval/run.py", *options.format(place=place).split()])
    with pytest.raises(SystemExit) as end:
        run.run(run.main)
    said = capsys.readouterr()
    assert end.value.code == 1
    assert said.err.splitlines()[-1].startswith("error: ")
    assert words in said.err.splitlines()[-1]
    assert said.out == ""


def test_a_file_that_is_not_as_published_is_said(here, tmp_path):
    (tmp_path / "TextVQA_0.5.1_val.json").write_text('{"questions": []}')
    (tmp_path / "a.jsonl").write_text('{"question_id": 1, "text": "a"}\n')
    with pytest.raises(ValueError, match=r"textvqa: a file in .* is not as it is published, it lacks 'data'"):
        here("--bench", "textvqa", "--data", tmp_path, "--predictions", tmp_path / "a.jsonl")


def test_missing_files_are_shown_as_a_tree(here, capsys):
    with pytest.raises(FileNotFoundError):
        here("--bench", "pope,mme")
    said = capsys.readouterr().err
    assert "coco/coco_pope_adversarial.json" in said
    assert "posters/questions_answers_YN/tt0048028.txt" in said


def test_several_benches_may_lie_side_by_side(place):
    (place / "several").mkdir()
    (place / "several/scenes").symlink_to(place, target_is_directory=True)
    for data in (place, place / "several/scenes"):
        assert [bench.data for bench in plan.planned("scenes", data, None)] == [data]
    (bench,) = plan.planned("scenes", place / "several", "test")
    assert (bench.data, bench.splits) == (place / "several/scenes", ("test",))


def test_the_first_split_is_taken_and_the_others_said(tmp_path, capsys):
    for split in ("val", "test"):
        (tmp_path / f"{split}.json").write_text("[]")
    (bench,) = plan.planned("vizwiz", tmp_path, None)
    assert bench.splits == ("val",)
    assert "there are also the files of test (--split)" in capsys.readouterr().err
