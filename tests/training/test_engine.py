"""DeepSpeed's settings come from the recipe, and a user's own override them one by one."""

import json
import subprocess
import sys

import pytest
import torch

from visualrwkv.training.engine import deepspeed_config, gradient_norms, other_ranks, recompute_blocks
from visualrwkv.training.recipes import RECIPES, Recipe, meeting


def test_settings_follow_the_recipe():
    settings = deepspeed_config(Recipe(accumulate=3, clip=0.5, zero=3, offload="all", weights_bf16=True), 4)
    assert settings["train_batch_size"] == 12
    assert settings["gradient_clipping"] == 0.5
    assert settings["bf16"] == {"enabled": True}
    zero = settings["zero_optimization"]
    assert (zero["stage"], zero["offload_optimizer"]["device"], zero["offload_param"]["device"]) == (3, "cpu", "cpu")
    plain = deepspeed_config(Recipe(), 1)
    assert plain["zero_optimization"] == {"stage": 0}
    assert "bf16" not in plain


def test_a_users_file_overrides_them(tmp_path):
    file = tmp_path / "own.json"
    file.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 5}, "wall_clock_breakdown": True}))
    settings = deepspeed_config(Recipe(zero=2), 1, file)
    assert settings["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 5}
    assert settings["wall_clock_breakdown"] is True
    assert settings["gradient_clipping"] == 1.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not valid JSON"),
        ("[]", "holds a list, not an object"),
        ('{"zero_optimization": {"stage": 3}}', "sets the stage of zero_optimization to 3, the recipe to 0"),
        ('{"gradient_accumulation_steps": 4}', "sets gradient_accumulation_steps to 4, the recipe to 1"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path, text, words):
    (tmp_path / "own.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        deepspeed_config(Recipe(), 1, tmp_path / "own.json")
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        deepspeed_config(Recipe(), 1, tmp_path / "none.json")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"offload": "all", "zero": 2}, "needs zero 3"),
        ({"offload": "optimizer"}, "needs zero 1 to 3"),
        ({"offload": "disk"}, "disk"),
        ({"weights_bf16": True, "optimizer": "muon"}, "fp32"),
        ({"keep": 0}, "keep"),
        ({"spike": -1}, "spike"),
        ({"bad": "ignore"}, "ignore"),
    ],
)
def test_recipes_that_cannot_be(settings, words):
    with pytest.raises(ValueError, match=words):
        Recipe(**settings)


def test_presets_are_the_papers():
    table = {name: (stages["finetune"].lr, stages["finetune"].lr_final) for name, stages in RECIPES.items()}
    assert table["v6.0-1b6"] == table["v6.0"] == (6e-5, 1.5e-5)
    assert table["v6.0-3b"] == (5e-5, 1.25e-5)
    assert table["v6.0-7b"] == (4e-5, 1e-5)
    assert {RECIPES[f"v7.00-{size}"]["pretrain"].lr_final for size in ("0b1", "0b4", "1b5")} == {5e-5}
    assert {s["pretrain"].lr for name, s in RECIPES.items() if name != "nano"} == {1e-3}
    assert (meeting("v6.0-3b"), meeting("v7.00"), meeting("nano")) == ("v6.0", "v7.00", "nano")


@pytest.mark.parametrize("zero", [0, 3])
@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("shown", [0, 1])
def test_blocks_made_again_give_the_same_gradients(tiny_model, pixels, zero, version, shown):
    ids = torch.cat([torch.arange(5, 15), torch.full((16 * shown,), 65535), torch.arange(20, 30)])[None]
    losses, grads = [], []
    for again in (False, True):
        model = tiny_model(version=version).train()
        model.rwkv.emb.requires_grad_(False)
        if again:
            recompute_blocks(model.rwkv, zero)
        hidden, _ = model.hidden(ids, pixels(1) if shown else None)
        hidden.square().sum().backward()
        losses.append(hidden.detach())
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert torch.equal(*losses)
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert (grads[1][name] - grad).norm() <= 1e-6 * grad.norm(), name


def test_norms_are_told_by_part(tiny_model):
    model = tiny_model(vocab_size=300)
    model.requires_grad_(False)
    for name in ("rwkv.blocks.0.att.key.weight", "rwkv.blocks.2.ffn.key.weight", "proj.gate.weight"):
        parameter = model.get_parameter(name).requires_grad_()
        parameter.grad = torch.full_like(parameter, 0.5)
    count = sum(model.get_parameter(f"rwkv.blocks.{n}.key.weight").numel() for n in ("0.att", "2.ffn"))
    norms = gradient_norms(model, 0)
    assert norms["blocks"] == pytest.approx(0.5 * count**0.5)
    assert norms["proj"] == pytest.approx(0.5 * model.get_parameter("proj.gate.weight").numel() ** 0.5)
    assert set(norms) == {"blocks", "proj"}


def test_a_rank_that_is_lost_is_one_sentence():
    with pytest.raises(ConnectionError, match="rank 3 stops because another rank has ended"), other_ranks(3):
        raise RuntimeError("gloo/pair.cc:538] Read error [127.0.0.1]:40850: Connection reset by peer")
    with pytest.raises(RuntimeError, match="shapes"), other_ranks(3):
        raise RuntimeError("shapes differ")


@pytest.mark.xdist_group("training")
@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is compiled for ranks on a GPU")
def test_a_killed_compilation_holds_nobody_up():
    """torch waits for its lock for ever, and whoever was killed leaves it."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    told = (
        "from visualrwkv.training import engine\n"
        "from torch.utils import cpp_extension\n"
        "from pathlib import Path\n"
        "engine.join_world()\n"
        "left = Path(cpp_extension._get_build_directory('deepspeed_shm_comm', verbose=False), 'lock')\n"
        "left.touch()\n"
        "from deepspeed.ops.op_builder.builder import OpBuilder\n"
        "OpBuilder._loaded_ops.clear()\n"
        "engine.compile_once()\n"
        "assert not left.exists()\n"
    )
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
