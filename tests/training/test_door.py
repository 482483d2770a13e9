"""Training through the door that users use, under the real DeepSpeed: one rank, two ranks, interrupted and resumed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from visualrwkv.chat import load
from visualrwkv.checkpoint import load_model, save_model
from visualrwkv.training.data import Conversations
from visualrwkv.training.packing import plan_epoch

pytest.importorskip("deepspeed", reason="deepspeed is not installed")
pytestmark = pytest.mark.xdist_group("training")  # they compare with one run
ROOT = Path(__file__).parents[2]
ANSWERS = ("red", "blue", "two", "a cat", "yes", "no", "the left one", "green")


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model, picture):
    """A directory with a tiny model and eight records about eight pictures, one of them text only."""
    folder = tmp_path_factory.mktemp("door")
    records = []
    for i, answer in enumerate(ANSWERS):
        picture(i).save(folder / f"{i}.png")
        turns = [{"from": "human", "value": f"<image>\nWhat is number {i}?"}, {"from": "gpt", "value": answer}]
        records.append({"id": i, "image": f"{i}.png", "conversations": turns})
    del records[3]["image"]
    records[3]["conversations"][0]["value"] = "What is number 3?"
    (folder / "data.json").write_text(json.dumps(records))
    save_model(tiny_model(), folder / "model")
    return folder


RECIPE = ("--tokens", "80", "--steps", "6", "--warmup", "0", "--no-bf16", "--lr", "1e-2")


def command(place: Path, out: str, *options: str, data: str = "data.json", stage: str = "finetune") -> list[str]:
    files = ["--stage", stage, "--model", place / "model", "--data", place / data, "--out", place / out]
    return [sys.executable, "-m", "visualrwkv.training", *map(str, files), *RECIPE, *options]


def environment(**more: object) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path, **{k: str(v) for k, v in more.items()}}


def run(told: list[str], **variables: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        told, cwd=ROOT, env=environment(**variables), capture_output=True, text=True, timeout=240, check=False
    )


def train(place: Path, out: str, *options: str, **files: str) -> subprocess.CompletedProcess:
    return run(command(place, out, *options, **files))


def train_on_two(place: Path, out: str, *options: str, script: str = "finetune") -> subprocess.CompletedProcess:
    """Two ranks, by the script that users call."""
    files = {"MODEL": place / "model", "DATA": place / "data.json", "OUT": place / out}
    return run(["bash", f"scripts/{script}.sh", *RECIPE, *options], RANKS=2, **files)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_model(folder).state_dict()


@pytest.fixture(scope="module")
def whole(place):
    """An uninterrupted run on one rank; accumulation makes its steps as large as those of two ranks."""
    done = train(place, "whole", "--accumulate", "2")
    assert done.returncode == 0, done.stderr
    return place / "whole"


def test_a_run_leaves_all_that_it_should(whole, place):
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(6))
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert {"recipe.json", "deepspeed.json", "loss.png", "config.json"} <= {p.name for p in whole.iterdir()}
    assert not (whole / "checkpoints").exists()
    before, after = weights(place / "model"), weights(whole)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert "rwkv.emb.weight" not in moved
    assert not any(name.startswith("vit.") for name in moved)
    assert {"rwkv.head.weight", "proj.gate.weight", "rwkv.blocks.3.att.time_faaaa", "rwkv.ln_out.bias"} <= moved


def shared_memory() -> set[str]:
    """What DeepSpeed has left in memory that outlives processes."""
    return {path.name for path in Path("/dev/shm").glob("deepspeed*")}


ADAMW = ("--optimizer", "adamw", "--steps", "10", "--lr", "1e-4")


@pytest.fixture(scope="module")
def whole_adamw(place) -> Path:
    done = train(place, "adamw", "--accumulate", "2", *ADAMW)
    assert done.returncode == 0, done.stderr
    return place / "adamw"


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_two_ranks_do_what_one_does_with_accumulation(whole_adamw, place, zero):
    out, before = f"two-adamw-{zero}", shared_memory()
    done = train_on_two(place, out, "--zero", str(zero), *ADAMW)
    assert done.returncode == 0, done.stderr
    assert shared_memory() == before
    start, wanted, found = weights(place / "model"), weights(whole_adamw), weights(place / out)
    moved = [name for name in wanted if not torch.equal(start[name], wanted[name])]
    assert len(moved) > 50
    for name in wanted:
        assert (found[name] - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), name


def test_two_ranks_do_what_one_does_with_muon(whole, place):
    done = train_on_two(place, "two-muon", "--zero", "0")
    assert done.returncode == 0, done.stderr
    wanted = weights(whole)
    for name, tensor in weights(place / "two-muon").items():
        torch.testing.assert_close(tensor, wanted[name], rtol=2e-3, atol=2e-4, msg=name)


def test_ctrl_c_leaves_a_checkpoint_and_the_same_command_goes_on(whole, place):
    told = command(place, "halted", "--accumulate", "2", "--save-every", "2")
    running = subprocess.Popen(told, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    wait_for_steps(place / "halted", 2)
    running.send_signal(signal.SIGINT)
    said = running.communicate(timeout=60)[1]
    if running.returncode == 0:
        pytest.skip("it finished before the signal came")
    assert running.returncode == 130
    assert "goes on" in said
    assert "Traceback" not in said
    assert not (place / "halted/model.safetensors").exists()
    kept = shutil.copytree(place / "halted/checkpoints", place / "kept")
    assert (kept / "latest").exists()
    done = train(place, "halted", "--accumulate", "2", "--save-every", "2")
    assert done.returncode == 0, done.stderr
    assert len(losses(place / "halted")) == 6
    for name, tensor in weights(place / "halted").items():
        torch.testing.assert_close(tensor, weights(whole)[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_picture_that_breaks_on_the_way_loses_nothing(place, workers):
    records = json.loads((place / "data.json").read_text())
    data = Conversations(place / "data.json", place, load_model(place / "model").config)
    data.prepare()
    last = plan_epoch(data.lengths, 80, 0, 0)[-1][0]
    records[last] |= {"image": "broken.png"}
    records[last]["conversations"][0]["value"] = "<image>\nWhat is it?"
    (place / "breaks.json").write_text(json.dumps(records))
    (place / "broken.png").write_bytes((place / "0.png").read_bytes()[:100])
    out = f"breaks-{workers}"
    done = train(place, out, "--steps", "0", "--workers", workers, data="breaks.json")
    assert done.returncode == 1
    assert (
        done.stderr.strip().splitlines()[-1].startswith(f"error: {place / 'breaks.json'}, record {last} (id {last}): ")
    )
    assert "broken.png cannot be read as a picture" in done.stderr
    assert "Traceback" not in done.stderr
    kept = int((place / out / "checkpoints/latest").read_text().removeprefix("step-"))
    shutil.copy(place / "0.png", place / "broken.png")
    done = train(place, out, "--steps", "0", "--workers", workers, data="breaks.json")
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line)["step"] for line in (place / out / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(kept + 1)), "it went on with the last step"


def test_a_scheduler_that_asks_for_the_machine_gets_it(whole, place):
    """SIGTERM: a checkpoint, exit status 0, and the same command goes on."""
    told = command(place, "asked", "--accumulate", "2", "--steps", "400")
    running = subprocess.Popen(told, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    wait_for_steps(place / "asked", 2)
    running.send_signal(signal.SIGTERM)
    said = running.communicate(timeout=60)[1]
    assert running.returncode == 0, said
    assert "goes on" in said
    assert (place / "asked/checkpoints/latest").exists()
    assert not (place / "asked/model.safetensors").exists()


def wait_for_steps(out: Path, count: int) -> None:
    metrics, latest = out / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= count):
        assert time.monotonic() < latest
        time.sleep(0.002)


def losses(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(len(rows))), "no step twice, none left out"
    return [row["loss"] for row in rows]


MOMENTS = {"in a step": 0, "while it writes a checkpoint": 1, "while it drops one": 2}


def state_of(out: Path) -> dict[str, Any]:
    """What a run has written so far."""
    metrics, latest = out / "metrics.jsonl", out / "checkpoints/latest"
    return {
        "steps": metrics.read_text().count("\n") if metrics.exists() else 0,
        "files": {Path(at, f) for at, _, files in os.walk(out / "checkpoints") for f in files if f != "latest"},
        "latest": latest.read_text() if latest.exists() else "",
    }


def test_killed_at_any_moment_a_run_goes_on_bit_for_bit(place):
    """kill -9 in the middle of a step and of writing a checkpoint; benchmarks/kill_and_resume.py does so at random."""
    options = ("--steps", "12", "--save-every", "2", "--look-ahead", "8")
    done = train(place, "steady", *options)
    assert done.returncode == 0, done.stderr
    told, out = command(place, "killed", *options), place / "killed"
    for moment in MOMENTS:
        running = subprocess.Popen(told, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL)
        before, latest = state_of(out), time.monotonic() + 120
        while running.poll() is None and time.monotonic() < latest:
            now = state_of(out)
            if (now["steps"] > 3, now["files"] - before["files"], now["latest"] != before["latest"])[MOMENTS[moment]]:
                break
            time.sleep(0.001)
        running.kill()
        running.wait()
    done = run(told)
    assert done.returncode == 0, done.stderr
    assert losses(out) == losses(place / "steady")
    for name, tensor in weights(out).items():
        assert torch.equal(tensor, weights(place / "steady")[name]), name


def test_a_loss_that_is_no_number_stops_the_run(place):
    done = train(place, "burst", "--lr", "1e18", "--optimizer", "adamw")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: step ")
    assert "norms of the gradients: " in last
    assert "records " in last
    assert "Traceback" not in done.stderr
    assert not (place / "burst/model.safetensors").exists()


def test_a_record_that_fails_is_left_out_and_counted(place):
    records = json.loads((place / "data.json").read_text())
    records.append({"id": "torn", "image": "torn.png", "conversations": records[0]["conversations"]})
    records.append({"id": "none", "image": "none.png", "conversations": records[0]["conversations"]})
    (place / "torn.png").write_bytes((place / "0.png").read_bytes()[:100])
    (place / "torn.json").write_text(json.dumps(records))
    done = train(place, "torn", "--bad", "skip", "--steps", "0", "--tokens", "200", data="torn.json")
    assert done.returncode == 0, done.stderr
    assert "1 records are left out, the first: " in done.stderr
    assert "none.png" in done.stderr
    assert "left out: " in done.stderr
    assert "torn.png cannot be read as a picture" in done.stderr
    rows = [json.loads(line) for line in (place / "torn/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["left_out"] == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--preset", "giant"], "giant"),
        (["--lrr", "1"], "--lrr"),
        (["--lr", "fast"], "fast"),
        (["--zero", "7"], "7"),
        (["--samples"], "--watch"),
        (["--tokens", "10"], "more than the budget of 10"),
        (["--lora", "4", "--lora-targets", "att.key", "att.kye"], "lora_targets has 'att.kye', and no matrix"),
        (["--lora-alpha", "4"], "give a rank as well"),
        (["--zero", "3", "--optimizer", "adamw", "--watch", "data.json"], "--watch"),
    ],
)
def test_wrong_settings_are_one_sentence(place, options, words):
    done = train(place, "wrong", *options)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (place / "wrong").exists()


def test_stage_one_from_public_files(place, tiny_model):
    """A language model's .pth and a CLIP directory, as a user has them, by the script and the preset that joins them."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1}
    clip = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes, image_size=32, patch_size=16))
    clip.save_pretrained(place / "clip")
    language = tiny_model(vision=None, seed=3)
    torch.save({k: v.bfloat16() for k, v in language.rwkv.state_dict().items()}, place / "lm.pth")
    files = {"LM": place / "lm.pth", "VISION": place / "clip", "DATA": place / "data.json", "OUT": place / "stage1"}
    steps = ("--preset", "v6.0", "--steps", "2", "--tokens", "80", "--accumulate", "1", "--no-bf16")
    done = run(["bash", "scripts/pretrain.sh", *steps], **files)
    assert done.returncode == 0, done.stderr
    model = load_model(place / "stage1")
    assert (model.config.image_tokens, model.config.scan, model.config.projector) == (5, "bi", "linear")
    found, given = model.state_dict(), {k: v.float() for k, v in torch.load(place / "lm.pth").items()}
    assert all(torch.equal(found[f"rwkv.{k}"], v) for k, v in given.items())  # stage 1 trains the projector alone
    assert all(torch.equal(found[f"vit.vision_model.{k}"], v) for k, v in clip.state_dict().items())
    assert found["proj.weight"].shape == (32, 64)


# With little ---------------------------------------------------------------------------------------------------------

MANY = ("--accumulate", "2", "--steps", "12", "--optimizer", "adamw")
LITTLE: dict[str, tuple[str, ...]] = {
    "state": (*MANY, "--lr", "1"),
    "lora": (*MANY, "--lora", "4", "--lora-targets", "att.key", "ffn.key", "ffn.value"),
}


def learned(out: Path) -> dict[str, torch.Tensor]:
    """What a run with little has trained."""
    file = out / "state.safetensors"
    return load_file(file if file.exists() else out / "adapter/adapter_model.safetensors")


@pytest.fixture(scope="module", params=LITTLE)
def little(request, place) -> str:
    """A kind of such a run, of which one is at place / kind."""
    kind = request.param
    pytest.importorskip("peft", reason="peft is not installed")
    done = train(place, kind, *LITTLE[kind], stage="state" if kind == "state" else "finetune")
    assert done.returncode == 0, done.stderr
    assert ("initial state" if kind == "state" else "adapters") in done.stderr
    return kind


def test_a_run_with_little_learns_and_leaves_little(little, place, picture):
    out = place / little
    assert losses(out)[-1] < losses(out)[0] - 0.1
    assert not (out / "checkpoints").exists()
    if little == "state":
        assert not (out / "model.safetensors").exists()
        plain, tuned = load(place / "model"), load(place / "model", task=out)
        assert not torch.allclose(*(vlm.next_token_logits(picture(0), "What?") for vlm in (plain, tuned)), atol=1e-2)
        return
    before, after = weights(place / "model"), weights(out)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    matrices = {f"rwkv.blocks.{i}.{k}.weight" for i in range(4) for k in ("att.key", "ffn.key", "ffn.value")}
    assert moved == matrices | {name for name in after if name.startswith("proj.")}
    told = ["-m", "visualrwkv.cli", "merge", "--model", place / "model", "--adapter", out / "adapter", place / "merged"]
    assert run([sys.executable, *map(str, told)]).returncode == 0
    for name, tensor in weights(place / "merged").items():
        torch.testing.assert_close(tensor, after[name], rtol=1e-6, atol=1e-6, msg=name)


def test_two_ranks_do_the_same_with_little(little, place):
    options = (*LITTLE[little], "--accumulate", "1", "--zero", "3")  # the one that parts what is trained
    done = train_on_two(place, f"two-{little}", *options, script="tune_state" if little == "state" else "finetune")
    assert done.returncode == 0, done.stderr
    wanted = learned(place / little)
    for name, tensor in learned(place / f"two-{little}").items():
        torch.testing.assert_close(tensor, wanted[name], rtol=2e-3, atol=2e-4, msg=name)


def test_killed_with_little_it_goes_on_bit_for_bit(little, place):
    options = (*LITTLE[little], "--save-every", "2")
    stage, out = "state" if little == "state" else "finetune", place / f"killed-{little}"
    told = command(place, out.name, *options, stage=stage)
    running = subprocess.Popen(told, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL)
    wait_for_steps(out, 3)
    running.kill()
    running.wait()
    assert (out / "checkpoints/latest").exists()
    kept = [f for f in (out / "checkpoints").rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in kept) < 2e6, "nothing of what is frozen"
    done = run(told)
    assert done.returncode == 0, done.stderr
    assert losses(out) == losses(place / little)
    for name, tensor in learned(place / little).items():
        assert torch.equal(tensor, learned(out)[name]), name
