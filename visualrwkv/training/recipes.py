"""How a stage is trained: one frozen dataclass, and the presets as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from visualrwkv.config import choose

Position = Literal["first", "middle", "last", "mixed"]
POSITIONS = ("first", "middle", "last", "mixed")
"""Where pictures stand; mixed: first in half of the records, middle in the others, so that one model learns both."""
Policy = Literal["error", "skip"]
Offload = Literal["none", "optimizer", "all"]
Stage = Literal["language", "pretrain", "finetune", "state"]
STAGES: tuple[str, ...] = ("language", "pretrain", "finetune", "state")
"""language: the whole language model, text alone; pretrain: projector only; finetune: projector and RWKV; state: nothing of
the model, but the state that every sample starts from."""


@dataclass(frozen=True)
class Recipe:
    """Everything about a run but its files."""

    epochs: float = 1.0  # ignored where steps is given
    steps: int = 0  # optimiser steps; 0: as many as `epochs` needs
    tokens: int = 8192  # token budget of a packed batch, image tokens included, per rank
    look_ahead: int = 1024  # records among which packing looks for one that fits; 1: they keep their order
    accumulate: int = 1  # batches per optimiser step and rank
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices of the RWKV blocks, AdamW for the rest
    muon_lr: float = 0.02  # Muon's peak rate; it follows the schedule of lr
    lr: float = 1e-3
    lr_final: float = 1e-5  # where the cosine ends
    warmup: int = 0  # optimiser steps
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0  # gradient norm
    lora: int = 0  # rank of adapters that are trained in place of the language model; 0: the model itself is
    lora_alpha: float = 0.0  # they count alpha / rank times; 0: twice
    lora_targets: tuple[
        str, ...
    ] = ()  # what the names of their matrices end in, such as att.key; none: all of the blocks
    l2wrap: bool = False  # hold the largest logits down as RWKV-LM does; costs the logits of every position
    image_position: Position = "middle"  # mixed: first in half of the records, middle in the others
    frames: int = 8  # of a video
    bad: Policy = "error"  # what to do about a record that fails: stop, or leave it out and count it
    streaming: bool = False  # read a Hugging Face data set as it comes, fetching only what is read; needs steps
    bf16: bool = False  # matrix products in bf16, everything else in fp32
    weights_bf16: bool = False  # the model itself in bf16; DeepSpeed keeps fp32 weights for the optimizer
    zero: int = 0  # DeepSpeed ZeRO stage, 0 to 3
    offload: Offload = "none"  # to the CPU's memory: the optimizer (zero 1 to 3), or parameters too (zero 3)
    recompute: bool = False  # make a block's activations again in backward instead of keeping them
    workers: int = 0  # processes that load pictures
    features_gb: float = 1.0  # memory for what the frozen encoder made of pictures, should they come again; 0: none
    save_every: int = 1000  # optimiser steps between checkpoints
    keep: int = 1  # the newest checkpoints that are kept
    spike: float = 5.0  # stop at a loss of more than so many times the usual; 0: never
    seed: int = 0

    def __post_init__(self) -> None:
        choose("image_position", self.image_position, POSITIONS)
        choose("bad", self.bad, ("error", "skip"))
        choose("offload", self.offload, ("none", "optimizer", "all"))
        choose("optimizer", self.optimizer, ("adamw", "muon"))
        for name in ("tokens", "accumulate", "save_every", "look_ahead", "frames", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in (
            "steps",
            "warmup",
            "workers",
            "lr",
            "lr_final",
            "muon_lr",
            "weight_decay",
            "spike",
            "lora",
            "lora_alpha",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        if (self.lora_alpha or self.lora_targets) and not self.lora:
            raise ValueError(
                "lora_alpha and lora_targets say how, and lora is 0; give a rank as well, such as --lora 16"
            )
        if self.steps == 0 and self.epochs <= 0:
            raise ValueError(f"epochs is {self.epochs} and steps 0; one of them must be above 0")
        if self.streaming and not self.steps:
            raise ValueError("streaming needs steps: nobody knows how many tokens a stream holds; give --steps as well")
        if self.zero not in (0, 1, 2, 3):
            raise ValueError(f"zero is {self.zero}; allowed are 0, 1, 2, 3")
        if self.offload != "none" and self.zero < (3 if self.offload == "all" else 1):
            raise ValueError(
                f"offload {self.offload} needs zero {'3' if self.offload == 'all' else '1 to 3'}, not {self.zero}"
            )
        if self.weights_bf16 and self.optimizer == "muon":
            raise ValueError("optimizer muon needs weights in fp32; take optimizer adamw or leave weights_bf16 out")
        if self.optimizer == "muon" and self.zero:
            raise ValueError(
                f"optimizer muon needs whole matrices on every rank: zero is {self.zero}; take zero 0 or optimizer adamw"
            )


@dataclass(frozen=True)
class EncoderRecipe:
    """How the vision encoder that stands in for a pretrained one is trained."""

    preset: str = "vrwkv_nano"
    image_tokens: int = 16  # the patches are pooled to so many, as the language model will see them
    steps: int = 840
    batch: int = 64
    lr: float = 4e-3
    weight_decay: float = 0.02
    seed: int = 0
    bf16: bool = True


NANO: dict[str, Any] = {"tokens": 4096, "look_ahead": 1, "optimizer": "muon", "bf16": True, "warmup": 10}


def published(position: Position, lr: float, lr_final: float, pretrain_final: float, **more: Any) -> dict[str, Recipe]:
    """The two stages of arXiv 2406.13362, table 6, where a step has 256 and 128 samples: here about as many, by tokens."""
    common: dict[str, Any] = {"tokens": 16384, "bf16": True, "recompute": True}
    stage1, stage2 = {"zero": 1, **common}, {"zero": 1, **common, **more}
    return {
        "language": Recipe(**stage2),
        "pretrain": Recipe(accumulate=10, lr=1e-3, lr_final=pretrain_final, image_position="first", **stage1),
        "finetune": Recipe(accumulate=5, lr=lr, lr_final=lr_final, image_position=position, **stage2),
        "state": Recipe(lr=1e-2, lr_final=1e-4, warmup=10, image_position=position, **stage2),
    }


V6 = {
    "1b6": published("middle", 6e-5, 1.5e-5, 1e-5, epochs=2.0),
    "3b": published("middle", 5e-5, 1.25e-5, 1e-5, epochs=2.0),
    "7b": published("middle", 4e-5, 1e-5, 1e-5, epochs=2.0, weights_bf16=True, zero=2),
}
V7 = published(
    "first", 6e-5, 1.5e-5, 5e-5
)  # 1,024 image tokens; the reference's scripts for 0B1, which stand for all sizes

RECIPES: dict[str, dict[str, Recipe]] = {
    "nano": {
        "language": Recipe(steps=320, lr=3e-3, lr_final=1e-3, **NANO),
        "pretrain": Recipe(steps=120, lr=5e-3, lr_final=1e-3, **NANO),
        "finetune": Recipe(steps=680, lr=2e-3, lr_final=1e-4, muon_lr=0.01, save_every=200, **NANO),
        "state": Recipe(steps=100, lr=10.0, lr_final=1.0, **NANO),
    },
    "v6.0": V6["1b6"],
    **{f"v6.0-{size}": stages for size, stages in V6.items()},
    "v7.00": V7,
    **{f"v7.00-{size}": V7 for size in ("0b1", "0b4", "1b5")},
}


def meeting(name: str) -> str:
    """The preset by which a recipe's language model and encoder meet: "v6.0" of "v6.0-3b"."""
    return name.split("-")[0]
