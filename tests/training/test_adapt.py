"""Fine-tuning with little: what is trained, what it adds up to, what is left, and what is refused. Runs: test_door.py."""

import json
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from visualrwkv.checkpoint import load_model, save_model
from visualrwkv.config import ViTConfig
from visualrwkv.files import fingerprint, read_tensors
from visualrwkv.rwkv.state import State
from visualrwkv.task import TASK, load_task
from visualrwkv.training.adapt import add_adapters, check_adaptation, leave, merge, merged, save_adapters, targets
from visualrwkv.training.data import Conversations
from visualrwkv.training.log import table
from visualrwkv.training.objective import Objective
from visualrwkv.training.optim import freeze
from visualrwkv.training.recipes import Recipe

peft = pytest.importorskip("peft", reason="peft is not installed")

LORA = Recipe(lora=4)
MATRICES = {
    5: ["att.receptance", "att.key", "att.value", "att.output", "att.gate", "ffn.key", "ffn.receptance", "ffn.value"],
    6: ["att.receptance", "att.key", "att.value", "att.output", "att.gate", "ffn.key", "ffn.receptance", "ffn.value"],
    7: ["att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value"],
}
CLIP = ViTConfig(depth=2, width=64, heads=1, ffn=64, image_size=32, patch_size=8, cls_token=False)


@pytest.fixture
def adapted(tiny_model, randomise):
    """adapted(recipe, stage, **tiny_model's): the model as it was, and one with adapters and a projector that have learned."""

    def make(recipe=LORA, stage="finetune", **sizes):
        base, model = (tiny_model(vocab_size=300, **sizes) for _ in range(2))
        freeze(model, stage)
        add_adapters(model, stage, recipe)
        learned = torch.nn.ParameterList(p for p in model.parameters() if p.requires_grad)
        randomise(learned, seed=5, deviation=0.1)
        return base, model

    return make


def read(model, pixels):
    """The logits of a row about a picture."""
    ids = torch.cat([torch.arange(5, 15), torch.full((16,), 65535), torch.arange(20, 30)])[None]
    with torch.no_grad():
        return model(ids, pixels(1))[0]


def same(found, wanted):
    """Whether logits are the same but for rounding."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.std()))


# LoRA ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", MATRICES)
def test_the_matrices_of_the_blocks_get_adapters_and_nothing_else_learns(adapted, tiny_model, version):
    assert targets(tiny_model(version=version, vocab_size=300)) == MATRICES[version]
    for stage, proj in (("finetune", True), ("language", False)):
        base, model = adapted(stage=stage, version=version)
        learns = [name for name, p in model.named_parameters() if p.requires_grad]
        count = Counter(".".join(name.split(".")[3:5]) for name in learns if ".lora_" in name)
        assert count == dict.fromkeys(MATRICES[version], 2 * 4), "A and B in each of four layers"
        rest = {name for name in learns if ".lora_" not in name}
        assert rest == ({f"proj.{k}" for k, _ in base.proj.named_parameters()} if proj else set())


@pytest.mark.parametrize(
    ("wanted", "matched"),
    [
        (("att.key",), {f"{i}.att.key" for i in range(4)}),
        (("key", "1.att.value"), {f"{i}.{part}.key" for i in range(4) for part in ("att", "ffn")} | {"1.att.value"}),
        (("blocks.2.ffn.value",), {"2.ffn.value"}),
    ],
)
def test_targets_are_named_as_they_end(adapted, wanted, matched):
    _, model = adapted(replace(LORA, lora_targets=wanted))
    found = {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    assert found == {f"rwkv.blocks.{name}" for name in matched}, "of the encoder, whose names are alike, none"


def test_the_table_tells_adapters_apart(adapted):
    base, model = adapted()
    rows = {row.split()[0]: row.split()[-2:] for row in table(model, "finetune").splitlines()[1:]}
    blocks = sum(p.numel() for p in base.rwkv.blocks.parameters())
    adapters = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    assert rows["rwkv.blocks"] == ["0", f"{blocks:,}"]
    assert rows["adapters"] == [f"{adapters:,}", "0"]
    assert rows["proj"] == [f"{sum(p.numel() for p in base.proj.parameters()):,}", "0"]


@pytest.mark.parametrize("recipe", [LORA, replace(LORA, lora_alpha=2.0, lora_targets=("ffn.key", "att.output"))])
@pytest.mark.parametrize("version", MATRICES)
def test_merged_weights_are_the_adapted_model(adapted, pixels, tmp_path, version, recipe):
    base, model = adapted(recipe, version=version)
    wanted = read(model, pixels)
    assert not torch.allclose(read(base, pixels), wanted, atol=0.1)
    weights = merged(model)
    assert list(weights) == list(base.state_dict())
    save_model(model, tmp_path, weights=weights)
    same(read(load_model(tmp_path), pixels), wanted)
    torch.testing.assert_close(
        read(model, pixels), wanted, rtol=0, atol=0, msg="the model that is trained stays as it is"
    )


@pytest.mark.parametrize("vision", [None, CLIP], ids=["vrwkv", "clip"])
def test_adapters_lie_as_peft_lays_them_and_merge_later(adapted, pixels, tmp_path, vision):
    base, model = adapted(**({"vision": vision} if vision else {}))
    wanted = read(model, pixels)
    save_adapters(model, tmp_path / "adapter", fingerprint(base.rwkv))
    save_model(base, tmp_path / "base")
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}

    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    found = load_model(tmp_path / "out")
    same(read(found, pixels), wanted)
    for name, x in merged(model).items():
        torch.testing.assert_close(found.state_dict()[name], x, rtol=1e-6, atol=1e-6, msg=name)
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "half", "bfloat16")
    assert {x.dtype for x in read_tensors(tmp_path / "half").values()} == {torch.bfloat16}

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    same(read(theirs, pixels), wanted)


def test_an_adapter_of_pefts_own_merges(tiny_model, randomise, pixels, tmp_path):
    """DoRA, which adds more than a product of two matrices, and no word of the model it was trained on."""
    model = tiny_model(vocab_size=300)
    save_model(model, tmp_path / "base")
    whole = peft.get_peft_model(
        model, peft.LoraConfig(r=2, use_dora=True, target_modules=r"rwkv\.blocks\..*\.att\.key")
    )
    randomise(torch.nn.ParameterList(p for p in whole.parameters() if p.requires_grad))
    whole.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    same(read(load_model(tmp_path / "out"), pixels), read(whole, pixels))


def test_adapters_that_do_not_fit_are_refused(adapted, tiny_model, tmp_path):
    base, model = adapted()
    folder, out = tmp_path / "adapter", tmp_path / "out"
    save_adapters(model, folder, fingerprint(base.rwkv))
    for name, other in (
        ("other", tiny_model(vocab_size=300, seed=1)),
        ("seven", tiny_model(vocab_size=300, version=7)),
        ("text", tiny_model(vocab_size=300, vision=None)),
        ("linear", tiny_model(vocab_size=300, projector="linear")),
    ):
        save_model(other, tmp_path / name)
    with pytest.raises(ValueError, match=r"adapter was trained on a model with other weights than .*other \("):
        merge(tmp_path / "other", folder, out)
    with pytest.raises(ValueError, match="dtype is 'int8'; allowed are float32, bfloat16"):
        merge(tmp_path / "other", folder, out, "int8")
    save_adapters(model, folder, fingerprint(tiny_model(vocab_size=300, projector="linear").rwkv))
    with pytest.raises(ValueError, match="adapter does not fit the model: unexpected proj"):
        merge(tmp_path / "linear", folder, out)
    save_adapters(model, folder, fingerprint(tiny_model(vocab_size=300, vision=None).rwkv))
    with pytest.raises(ValueError, match="adapter does not fit the model: unexpected "):
        merge(tmp_path / "text", folder, out)
    save_adapters(model, folder, "")  # as an adapter of others, which does not say
    with pytest.raises(ValueError, match=r"adapter does not fit the model: size mismatch for rwkv\.blocks\.0"):
        merge(tmp_path / "seven", folder, out)
    assert not out.exists()
    values = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "IA3", "target_modules": values["target_modules"]})
    )
    with pytest.raises(ValueError, match="adapter of kind IA3; only LORA"):
        merge(tmp_path / "other", folder, out)


def test_what_cannot_be_adapted_is_said_beforehand(tiny_model):
    model = tiny_model(vocab_size=300)
    check_adaptation(model, "finetune", LORA)
    check_adaptation(model, "state", Recipe())
    for stage in ("pretrain", "state"):
        with pytest.raises(ValueError, match=f"which stage {stage} leaves as it is; take stage finetune or language"):
            check_adaptation(model, stage, LORA)
    there = ", ".join(MATRICES[6])
    for wrong in ("att.kye", "y", "vit.layers.0.att.key", "head"):
        with pytest.raises(ValueError, match=rf"lora_targets has '{wrong}', and no matrix .* there are {there}$"):
            check_adaptation(model, "finetune", replace(LORA, lora_targets=("att.key", wrong)))
    torch.nn.init.zeros_(model.rwkv.head.weight)
    check_adaptation(model, "finetune", Recipe())
    for stage, recipe in (("finetune", LORA), ("state", Recipe())):
        with pytest.raises(ValueError, match="head is zero: it has learned nothing yet"):
            check_adaptation(model, stage, recipe)


# State tuning --------------------------------------------------------------------------------------------------------


@pytest.fixture
def records(tiny_model, picture, tmp_path) -> Conversations:
    written = []
    for i, answer in enumerate(("red", "two", "a cat", "yes")):
        turns = [
            {"from": "human", "value": "<image>\n" * (i != 1) + f"What is number {i}?"},
            {"from": "gpt", "value": answer},
        ]
        picture(i).save(tmp_path / f"{i}.png")
        written.append({"id": i, "conversations": turns} | ({"image": f"{i}.png"} if i != 1 else {}))
    (tmp_path / "data.json").write_text(json.dumps(written))
    found = Conversations(tmp_path / "data.json", tmp_path, tiny_model().config)
    found.prepare()
    return found


@pytest.mark.parametrize("version", MATRICES)
def test_every_sample_of_a_row_starts_from_the_state(tiny_model, records, version):
    """One packed row has the loss and the gradient of its samples alone, and these are autograd's in float64."""
    losses, gradients = [], []
    for rows in ([[0, 1, 2, 3]], [[0], [1], [2], [3]]):
        model = tiny_model(version=version)
        freeze(model, "state")
        objective = Objective(model, Recipe(), state_tuning=True)
        assert [name for name, p in objective.named_parameters() if p.requires_grad] == ["start"]
        with torch.no_grad():
            objective.start.normal_(generator=torch.Generator().manual_seed(1))
        loss = sum(objective(records.pack(row)) for row in rows)
        loss.backward()
        losses.append(loss.item())
        gradients.append(objective.start.grad)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert (gradients[0] - gradients[1]).norm() <= 1e-4 * gradients[1].norm()

    batch, exact = records.pack([0, 1, 2, 3]), tiny_model(version=version).double()
    start = objective.start.detach().double().requires_grad_()
    hidden = exact.hidden(batch.ids[None], batch.images.double(), State.starting(start, 4), batch.cu_seqlens)[0][0]
    labels = torch.full_like(batch.labels, -100)
    labels[:-1] = batch.labels[1:]
    labels[batch.cu_seqlens[1:] - 1] = -100
    parts = zip(hidden.split(batch.cu_seqlens.diff().tolist()), labels.split(batch.cu_seqlens.diff().tolist()))
    total = sum(torch.nn.functional.cross_entropy(exact.rwkv.head(h), wanted) for h, wanted in parts)
    (gradient,) = torch.autograd.grad(total, start)
    assert total.item() == pytest.approx(losses[0], rel=1e-4)
    assert (gradients[0] - gradient).norm() <= 1e-3 * gradient.norm()
    assert all(layer.norm() > 0 for layer in gradient)


def test_a_run_leaves_the_state_alone(tiny_model, tmp_path):
    model = tiny_model()
    freeze(model, "state")
    objective = Objective(model, Recipe(), state_tuning=True)
    with torch.no_grad():
        objective.start.normal_()
    leave(objective, tmp_path / "out", fingerprint(model.rwkv))
    assert [p.name for p in Path(tmp_path / "out").iterdir()] == [TASK]
    assert torch.equal(load_task(tmp_path / "out", model.rwkv).wkv, objective.starts(1).wkv)
    rows = table(model, "state").splitlines()
    assert rows[-1].split() == ["initial", "state", f"{objective.start.numel():,}", "0"]
    assert {row.split()[-2] for row in rows[1:-1]} == {"0"}
