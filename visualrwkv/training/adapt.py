"""Fine-tuning with little: LoRA adapters by peft beside the blocks' big matrices, and what a run of each kind leaves."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from visualrwkv.checkpoint import DTYPES, WEIGHTS, load_model, save_model
from visualrwkv.config import choose
from visualrwkv.files import fingerprint, read_json, read_tensors, text_writers, write_whole
from visualrwkv.model import VisualRWKV
from visualrwkv.task import TASK, read_metadata, save_task
from visualrwkv.training.objective import Objective
from visualrwkv.training.recipes import Recipe, Stage

FOLDER, CONFIG, TENSORS = "adapter", "adapter_config.json", "adapter_model.safetensors"
BLOCKS, PREFIX = "rwkv.blocks.", "base_model.model."  # before peft's names of what it trained


def check_adaptation(model: VisualRWKV, stage: Stage, recipe: Recipe) -> None:
    """ValueError where a recipe's LoRA, or state tuning, cannot be done on this model in this stage."""
    if recipe.lora and stage not in ("language", "finetune"):
        raise ValueError(
            f"lora adapts the language model, which stage {stage} leaves as it is; take stage finetune or language"
        )
    if recipe.lora:
        pattern(model, recipe.lora_targets)
    if (recipe.lora or stage == "state") and not bool(model.rwkv.head.weight.any()):
        raise ValueError(
            "this model's head is zero: it has learned nothing yet, so there is nothing to adapt; train it first"
        )


def targets(model: VisualRWKV) -> list[str]:
    """What the blocks' big matrices are called inside a block, such as att.key."""
    found = [
        k.removeprefix(BLOCKS) for k, m in model.named_modules() if isinstance(m, nn.Linear) and k.startswith(BLOCKS)
    ]
    return list(dict.fromkeys(k.partition(".")[2] for k in found))


def pattern(model: VisualRWKV, wanted: Sequence[str]) -> str:
    """A regular expression of the matrices whose names end in one of the wanted ones; all of them where none is wanted.

    It looks for the blocks' name first: vision encoders have matrices of the same names.
    """
    there = targets(model)
    for target in wanted:
        if not any(
            f".{BLOCKS}{layer}.{k}".endswith(f".{target}") for layer in range(len(model.rwkv.blocks)) for k in there
        ):
            raise ValueError(
                f"lora_targets has {target!r}, and no matrix of the blocks ends so; there are {', '.join(there)}"
            )
    return rf"(?={re.escape(BLOCKS)})(?:.*\.)?(?:{'|'.join(map(re.escape, wanted or there))})"


def add_adapters(model: VisualRWKV, stage: Stage, recipe: Recipe) -> None:
    """Put adapters beside the model's matrices and train nothing but them, in finetune also the projector."""
    from peft import LoraConfig, inject_adapter_in_model

    alpha: Any = recipe.lora_alpha or 2 * recipe.lora
    inject_adapter_in_model(
        LoraConfig(r=recipe.lora, lora_alpha=alpha, target_modules=pattern(model, recipe.lora_targets)), model
    )
    if stage == "finetune" and model.proj is not None:
        model.proj.requires_grad_(True)


def merged(model: VisualRWKV) -> dict[str, Tensor]:
    """The model's weights by the names that they have without adapters, each with what its adapter adds."""
    from peft.tuners.lora import LoraLayer

    layers: dict[str, Any] = {f"{k}.weight": m for k, m in model.named_modules() if isinstance(m, LoraLayer)}
    weights = {}
    for name, x in model.state_dict().items():
        if ".lora_" in name:
            continue
        name = name.replace(".base_layer.", ".")
        if name in layers and not layers[name].merged:
            x = (x.float() + layers[name].get_delta_weight("default").float()).to(x.dtype)  # fp32: one rounding
        weights[name] = x
    return weights


def save_adapters(model: VisualRWKV, folder: Path, made_for: str) -> None:
    """Write the adapters in peft's own layout, with the projector whole if it was trained.

    It lies there by its own name, as peft keeps embeddings, and peft opens it so: in peft's `modules_to_save` "proj" would
    stand for every module whose name ends so, as CLIP's q_proj. made_for: the `fingerprint` of the language model.
    """
    from peft import get_peft_model_state_dict

    config: Any = model.peft_config["default"]  # type: ignore[index]
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    if model.proj is not None and next(model.proj.parameters()).requires_grad:
        weights |= {f"proj.{k}": x for k, x in model.proj.state_dict().items()}
    tensors = {PREFIX + k: x.detach().cpu().contiguous() for k, x in weights.items()}
    with tempfile.TemporaryDirectory() as place:
        config.save_pretrained(place)
        writers = text_writers(folder, {CONFIG: Path(place, CONFIG).read_text(encoding="utf-8")})
    metadata = {"format": "pt", "model": made_for}
    write_whole(writers | {folder / TENSORS: lambda part: save_file(tensors, part, metadata=metadata)})


def merge(path: str | Path, folder: Path, out: Path, dtype: str = "float32") -> None:
    """Write the model of `path` with the adapters of `folder` in its weights, as a directory of ours.

    FileNotFoundError or ValueError in one sentence where there is no adapter, or where it does not fit the model.
    """
    choose("dtype", dtype, DTYPES)
    if not (folder / CONFIG).exists():
        raise FileNotFoundError(f"{folder}: there is no adapter here, it has no {CONFIG}")
    model = load_model(path)
    made_for, this = read_metadata(folder / TENSORS).get("model"), fingerprint(model.rwkv)
    if made_for and made_for != this:
        raise ValueError(
            f"{folder} was trained on a model with other weights than {path} ({made_for}, not {this}); merge it there"
        )
    open_adapters(model, folder)
    save_model(model, out, dtype, merged(model))


@torch.no_grad()
def open_adapters(model: VisualRWKV, folder: Path) -> None:
    """Put an adapter directory's adapters beside the model's matrices, merged into them, and its projector in the model."""
    from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    kind = read_json(folder / CONFIG).get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{folder} holds an adapter of kind {kind}; only LORA is known here")
    config: Any = PeftConfig.from_pretrained(str(folder))
    tensors = {k.removeprefix(PREFIX): x for k, x in read_tensors(folder / TENSORS).items()}
    config.modules_to_save = None  # what is whole goes into its place
    projector = any(k.startswith("proj.") for k in tensors)
    try:
        inject_adapter_in_model(config, model)
        result: Any = set_peft_model_state_dict(model, tensors)
    except (RuntimeError, ValueError) as error:
        first, *more = str(error).splitlines()  # torch opens with a line that says nothing
        raise ValueError(f"{folder} does not fit the model: {(more or [first])[0].strip()}") from error
    lacks = [k for k in result.missing_keys if ".lora_" in k or (projector and k.startswith("proj."))]
    if wrong := [f"unexpected {k}" for k in result.unexpected_keys] + [f"missing {k}" for k in lacks]:
        raise ValueError(f"{folder} does not fit the model: {'; '.join(wrong[:5])}")
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.merge()  # type: ignore[operator]


# What a run leaves ---------------------------------------------------------------------------------------------------


def result_of(stage: Stage) -> str:
    """The file whose presence says that a run is finished."""
    return TASK if stage == "state" else WEIGHTS


def leave(objective: Objective, out: Path, made_for: str) -> None:
    """Write what was trained, its parameters being whole on this rank: a task, or the model, after its adapters."""
    model = objective.model
    objective.spread()
    if objective.start is not None:
        save_task(out / TASK, objective.start, model.config.rwkv, made_for)
    elif objective.recipe.lora:
        save_adapters(model, out / FOLDER, made_for)
        save_model(model, out, weights=merged(model))
    else:
        save_model(model, out)
