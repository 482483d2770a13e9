"""The training loop around an engine that keeps DeepSpeed's contract: a mean over accumulated batches, then a step."""

import json
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from PIL import Image

from visualrwkv.checkpoint import load_model
from visualrwkv.training.checkpoints import Run
from visualrwkv.training.data import Conversations
from visualrwkv.training.log import Log
from visualrwkv.training.loop import train
from visualrwkv.training.objective import Objective
from visualrwkv.training.optim import learning_rate
from visualrwkv.training.packing import Plan
from visualrwkv.training.recipes import Recipe

RECIPE = Recipe(steps=6, tokens=30, look_ahead=1, accumulate=2, lr=1e-2, lr_final=1e-3, warmup=2, weight_decay=0.1)


class Engine:
    """DeepSpeed's engine, as far as the loop uses it."""

    device = torch.device("cpu")

    def __init__(self, model, optimizer, config):
        self.model, self.optimizer, self.accumulate = model, optimizer, config["gradient_accumulation_steps"]
        self.rates, self.first, self.micro = [], {}, 0

    def __call__(self, batch):
        return self.model(batch)

    def train(self):
        self.model.train()

    def backward(self, loss):
        (loss / self.accumulate).backward()

    def step(self):
        self.micro += 1
        if self.micro % self.accumulate == 0:
            self.rates.append([group["lr"] for group in self.optimizer.param_groups])
            named = self.model.model.named_parameters()
            self.first = self.first or {k: p.grad.clone() for k, p in named if p.grad is not None}
            self.optimizer.step()
            self.optimizer.zero_grad()

    def get_global_grad_norm(self):
        return None

    def save_checkpoint(self, folder, tag, client_state, save_latest, exclude_frozen_parameters):
        assert not save_latest, "it would not be written whole"
        (Path(folder) / tag).mkdir(parents=True)
        parts = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "client": client_state}
        torch.save(parts, Path(folder) / tag / "all.pt")

    def load_checkpoint(self, folder, load_module_strict):
        parts = torch.load(Path(folder) / (Path(folder) / "latest").read_text() / "all.pt", weights_only=False)
        self.model.load_state_dict(parts["model"])
        self.optimizer.load_state_dict(parts["optimizer"])
        return folder, parts["client"]


@pytest.fixture
def engines(monkeypatch):
    """The engines that were made, in order, in a world of one."""
    made = []

    def initialize(model, optimizer, model_parameters, config, dist_init_required):
        made.append(Engine(model, optimizer, config))
        return made[-1], optimizer, None, None

    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(initialize=initialize))
    monkeypatch.setattr(Log, "draw", lambda self, title: None)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield made
    dist.destroy_process_group()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def data(tmp_path):
    records = []
    for i in range(9):
        turns = [{"from": "human", "value": f"What is {i}?"}, {"from": "gpt", "value": f"Number {i * 7}"}]
        records.append({"id": i, "conversations": turns})
        if i % 3 == 0:
            Image.new("RGB", (8, 8), (20 * i, 99, 7)).save(tmp_path / f"{i}.png")
            turns[0]["value"] = "<image>\n" + turns[0]["value"]
            records[-1]["image"] = f"{i}.png"
    (tmp_path / "data.json").write_text(json.dumps(records))
    return tmp_path / "data.json"


def run_of(data, name, stage="finetune"):
    return Run(stage, data, data.parent, data.parent / name)


def test_rates_gradients_and_what_is_frozen(tiny_model, engines, data):
    model, untouched = tiny_model(image_tokens=4), tiny_model(image_tokens=4)
    run = run_of(data, "out")
    assert train(model, run, RECIPE)
    (engine,) = engines
    assert engine.rates == [[learning_rate(RECIPE, step, 6)] * 2 for step in range(6)], "every group, every step"

    records = Conversations(data, data.parent, model.config)
    records.prepare()
    share = next(Plan(records.lengths, 30, 0, accumulate=2).shares(0, 0, 1))
    whole = records.pack([i for batch in share.batches for i in batch])
    loss = Objective(untouched, RECIPE)(whole) / share.samples
    loss.backward()
    rows = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(6))
    assert rows[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert rows[0]["tokens"] == len(whole.ids)
    for name, p in untouched.named_parameters():
        trained = not name.startswith("vit.") and name != "rwkv.emb.weight"
        assert (name in engine.first) == trained, name
        if trained:
            assert (engine.first[name] - p.grad).norm() <= 1e-4 * p.grad.norm() + 1e-9, name
    saved = load_model(run.out).state_dict()
    for name, before in untouched.state_dict().items():
        assert torch.equal(saved[name], before) == (name.startswith("vit.") or name == "rwkv.emb.weight"), name


@pytest.mark.parametrize(("at", "crash"), [(0, False), (3, False), (1, True), (5, True)])
def test_a_run_that_was_cut_goes_on_as_if_nothing_had_been(tiny_model, engines, data, at, crash):
    class Cut:
        """Asked after each step whether to look at the model."""

        def due(self, step):
            if step == at and crash:
                raise RuntimeError("a crash")
            if step == at:
                signal.raise_signal(signal.SIGINT)
            return False

    whole, parts = run_of(data, "whole"), run_of(data, "parts")
    recipe = replace(RECIPE, save_every=3)
    assert train(tiny_model(image_tokens=4), whole, recipe)
    if crash:
        with pytest.raises(RuntimeError, match="a crash"):
            train(tiny_model(image_tokens=4), parts, recipe, Cut())
    else:
        assert not train(tiny_model(image_tokens=4), parts, recipe, Cut())
    assert not (parts.out / "model.safetensors").exists()
    assert train(tiny_model(image_tokens=4), parts, recipe)
    assert len(engines[-1].rates) == 6 - ((at // 3 * 3) if crash else at + 1)
    torch.testing.assert_close(
        load_model(parts.out).state_dict(), load_model(whole.out).state_dict(), rtol=1e-5, atol=1e-6
    )
    steps = [json.loads(line)["step"] for line in (parts.out / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(6))
    assert not (parts.out / "checkpoints").exists()


def test_a_stage_without_pictures_trains_the_projector_no_less(tiny_model, engines, data):
    records = [r for r in json.loads(data.read_text()) if "image" not in r]
    data.write_text(json.dumps(records))
    model, before = tiny_model(image_tokens=4), tiny_model(image_tokens=4)
    assert train(model, run_of(data, "out", "pretrain"), Recipe(steps=1, tokens=60))
    assert set(engines[0].first) == {name for name, _ in model.named_parameters() if name.startswith("proj.")}
    assert not any(grad.any() for grad in engines[0].first.values())
    torch.testing.assert_close(model.state_dict(), before.state_dict())


def test_a_run_keeps_its_directory(tiny_model, engines, data, capsys):
    run, recipe = run_of(data, "out"), Recipe(steps=1, tokens=60)
    assert train(tiny_model(image_tokens=4), run, recipe)
    written = (run.out / "model.safetensors").read_bytes()
    assert train(tiny_model(image_tokens=4, seed=1), run, recipe)
    assert "is finished" in capsys.readouterr().err
    assert (run.out / "model.safetensors").read_bytes() == written
    with pytest.raises(ValueError, match=r"holds a run with lr 0.001, not 0.5; set OUT"):
        train(tiny_model(image_tokens=4), run, Recipe(steps=1, tokens=60, lr=0.5))
    (data.parent / "photos").mkdir()
    (data.parent / "photos" / "a.jpg").touch()
    with pytest.raises(ValueError, match="exists and is no training run"):
        train(tiny_model(image_tokens=4), run_of(data, "photos"), recipe)


def test_a_run_of_before_a_setting_was_known_goes_on(tiny_model, engines, data, capsys):
    run, recipe = run_of(data, "out"), Recipe(steps=1, tokens=60)
    assert train(tiny_model(image_tokens=4), run, recipe)
    known = json.loads((run.out / "recipe.json").read_text())
    (run.out / "recipe.json").write_text(json.dumps({k: v for k, v in known.items() if not k.startswith("lora")}))
    assert train(tiny_model(image_tokens=4), run, recipe)
    assert "is finished" in capsys.readouterr().err
    with pytest.raises(ValueError, match="holds a run with lora 0, not 4; set OUT"):
        train(tiny_model(image_tokens=4), run, replace(recipe, lora=4))


def test_changed_records_are_noticed(tiny_model, engines, data):
    run, recipe = run_of(data, "out"), Recipe(steps=1, tokens=60)
    assert train(tiny_model(image_tokens=4), run, recipe)
    data.write_text(json.dumps(json.loads(data.read_text())[1:]))
    with pytest.raises(ValueError, match=r"data\.json has changed since the run in .*out began; set OUT"):
        train(tiny_model(image_tokens=4), run, recipe)


def test_bad_records_leave_nothing_behind(tiny_model, engines, data):
    data.write_text(json.dumps([*json.loads(data.read_text()), {"id": "x"}]))
    with pytest.raises(ValueError, match=r"record 9 \(id x\) has no conversations"):
        train(tiny_model(image_tokens=4), run_of(data, "out"), RECIPE)
    assert not (data.parent / "out").exists()


def test_an_index_that_a_kill_left_out_is_made_again(tiny_model, engines, data):
    run = run_of(data, "out")
    assert train(tiny_model(image_tokens=4), run, Recipe(steps=1, tokens=60))
    (run.out / "index.npz").unlink()
    assert train(tiny_model(image_tokens=4), run, Recipe(steps=1, tokens=60))
    assert (run.out / "index.npz").exists()
