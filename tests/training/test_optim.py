"""What is trained, and how fast."""

from copy import deepcopy

import pytest
import torch

from visualrwkv.training.adapt import add_adapters
from visualrwkv.training.optim import freeze, learning_rate, make_optimizer
from visualrwkv.training.recipes import RECIPES, Recipe

LONG = Recipe(lr=1e-3, lr_final=1e-5)
WARM = Recipe(lr=6e-5, lr_final=1.5e-5, warmup=100)


@pytest.mark.parametrize(
    ("recipe", "total", "step", "rate"),
    [
        (LONG, 9000, 0, 9.99999969843e-4),
        (LONG, 9000, 1, 9.99999879372e-4),
        (LONG, 9000, 4500, 5.04827212408e-4),
        (LONG, 9000, 8998, 1.00000301573e-5),
        (LONG, 9000, 8999, 1e-5),
        (WARM, 1000, 0, 6e-6),
        (WARM, 1000, 50, 3.3e-5),
        (WARM, 1000, 99, 5.946e-5),
        (WARM, 1000, 100, 5.99998629223e-5),
        (WARM, 1000, 500, 4.13297137312e-5),
        (WARM, 1000, 999, 1.5e-5),
    ],
)
def test_the_references_learning_rates(recipe, total, step, rate):
    assert learning_rate(recipe, step, total) == pytest.approx(rate, rel=1e-11)


@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (5, 5), (10, 5)])
def test_short_runs_have_a_rate(warmup, total):
    recipe = Recipe(lr=1e-3, lr_final=1e-5, warmup=warmup)
    assert all(0 < learning_rate(recipe, step, total) <= 1e-3 for step in range(total))


TRAINED = {
    "language": lambda name: name.startswith("rwkv."),
    "pretrain": lambda name: name.startswith("proj."),
    "finetune": lambda name: name.startswith(("proj.", "rwkv.")) and name != "rwkv.emb.weight",
    "state": lambda name: False,
}


@pytest.mark.parametrize("stage", TRAINED)
def test_a_stage_trains_its_parameters_only(tiny_model, stage):
    model = tiny_model(vocab_size=300)
    parameters = freeze(model, stage)
    wanted = {name for name, _ in model.named_parameters() if TRAINED[stage](name)}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == wanted
    assert {id(p) for p in parameters} == {id(p) for name, p in model.named_parameters() if name in wanted}
    assert len(parameters) == len(wanted)
    assert wanted or stage == "state"
    freeze(model, "pretrain")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if name.startswith("proj.")
    }, "an earlier stage leaves nothing behind"


def test_unknown_stage(tiny_model):
    with pytest.raises(ValueError, match="stage is 'sft'; allowed are language, pretrain, finetune, state"):
        freeze(tiny_model(vocab_size=300), "sft")


def test_matrices_decay_and_vectors_do_not(tiny_model):
    model = tiny_model(vocab_size=300)
    freeze(model, "finetune")
    optimizer = make_optimizer(model, Recipe(weight_decay=0.1, beta1=0.8, beta2=0.95, eps=1e-6))
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, kept = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert decayed | kept == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not decayed & kept
    assert {"rwkv.head.weight", "rwkv.blocks.1.att.time_maa_w2", "proj.gate.weight"} <= decayed
    assert {
        "rwkv.ln_out.bias",
        "rwkv.blocks.1.att.time_decay",
        "rwkv.blocks.0.ffn.time_maa_k",
        "proj.ln_v.weight",
    } <= kept
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert all(group["betas"] == (0.8, 0.95) and group["eps"] == 1e-6 for group in optimizer.param_groups)


def test_a_group_may_be_empty(tiny_model):
    model = tiny_model(vocab_size=300, projector="linear")
    freeze(model, "pretrain")
    optimizer = make_optimizer(model, Recipe())
    assert len(optimizer.param_groups) == 1
    assert isinstance(optimizer, torch.optim.AdamW)


def test_muon_takes_the_matrices_of_the_blocks_and_goes_on_from_its_state(tiny_model):
    recipe = Recipe(optimizer="muon", lr=1e-2, muon_lr=5e-2)

    def start():
        torch.manual_seed(0)
        model = tiny_model(vocab_size=300)
        freeze(model, "finetune")
        return model, make_optimizer(model, recipe)

    def step(model, optimizer, seed):
        draw = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=draw) if p.requires_grad else None
        optimizer.step()

    model, optimizer = start()
    names = {id(p): name for name, p in model.named_parameters()}
    muon = {names[id(p)] for p in optimizer.parts["muon"].param_groups[0]["params"]}
    assert {"rwkv.blocks.0.att.key.weight", "rwkv.blocks.1.ffn.value.weight"} <= muon
    assert all(name.startswith("rwkv.blocks.") for name in muon)
    every = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    assert sorted(every) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    assert {group.get("lr_scale") for group in optimizer.param_groups} == {5.0, None}

    step(model, optimizer, 1)
    weights, kept = {k: v.clone() for k, v in model.state_dict().items()}, deepcopy(optimizer.state_dict())
    step(model, optimizer, 2)
    again, resumed = start()
    again.load_state_dict(weights)
    resumed.load_state_dict(kept)
    step(again, resumed, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.parametrize("stage", ["language", "finetune"])
def test_adapters_are_adamws(tiny_model, stage):
    pytest.importorskip("peft")
    model, recipe = tiny_model(vocab_size=300), Recipe(optimizer="muon", lora=4)
    freeze(model, stage)
    add_adapters(model, stage, recipe)
    optimizer = make_optimizer(model, recipe)
    assert isinstance(optimizer, torch.optim.AdamW)
    taken = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert taken == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr": -1.0}, "lr is -1"),
        ({"tokens": 0}, "tokens is 0"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"epochs": 0.0}, "epochs is 0"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'; allowed are adamw, muon"),
        ({"optimizer": "muon", "zero": 2}, "zero is 2; take zero 0 or optimizer adamw"),
        ({"zero": 4}, "zero is 4; allowed are 0, 1, 2, 3"),
        ({"lora": -1}, "lora is -1"),
        ({"lora_alpha": 8.0}, "lora is 0; give a rank as well"),
        ({"lora_targets": ("att.key",)}, "lora is 0; give a rank as well"),
        ({"image_position": "left"}, "image_position is 'left'"),
    ],
)
def test_a_recipe_names_a_wrong_value(settings, words):
    with pytest.raises(ValueError, match=words):
        Recipe(**settings)


def test_every_preset_has_a_recipe_for_every_stage():
    assert all(set(recipes) == set(TRAINED) for recipes in RECIPES.values())
