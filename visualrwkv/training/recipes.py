"""How a stage is trained: one frozen dataclass, and the presets as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from visualrwkv.config import IMAGE_POSITIONS, ImagePosition, choose

Stage = Literal["language", "pretrain", "finetune"]
STAGES: tuple[str, ...] = ("language", "pretrain", "finetune")
"""language: the whole language model, text alone; pretrain: projector only; finetune: projector and RWKV."""


@dataclass(frozen=True)
class Recipe:
    """Everything about a run but its files."""

    epochs: float = 1.0  # ignored where steps is given
    steps: int = 0  # optimiser steps; 0: as many as `epochs` needs
    tokens: int = 8192  # token budget of a packed batch, image tokens included, per rank
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
    image_position: ImagePosition = "middle"
    bf16: bool = False  # matrix products in bf16, everything else in fp32
    zero: int = 0  # DeepSpeed ZeRO stage, 0 to 3
    workers: int = 0  # processes that load pictures
    features_gb: float = 1.0  # memory for what the frozen encoder made of pictures, should they come again; 0: none
    save_every: int = 1000  # optimiser steps between checkpoints
    seed: int = 0

    def __post_init__(self) -> None:
        choose("image_position", self.image_position, IMAGE_POSITIONS)
        choose("optimizer", self.optimizer, ("adamw", "muon"))
        for name in ("tokens", "accumulate", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("steps", "warmup", "workers", "lr", "lr_final", "muon_lr", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        if self.steps == 0 and self.epochs <= 0:
            raise ValueError(f"epochs is {self.epochs} and steps 0; one of them must be above 0")
        if self.zero not in (0, 1, 2, 3):
            raise ValueError(f"zero is {self.zero}; allowed are 0, 1, 2, 3")
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


NANO: dict[str, Any] = {"tokens": 4096, "optimizer": "muon", "bf16": True, "warmup": 10}


def published(position: ImagePosition, **stage2: Any) -> dict[str, Recipe]:
    """The two stages of arXiv 2406.13362, table 6, where a step has 256 and 128 samples: here about as many, by tokens."""
    common: dict[str, Any] = {"tokens": 16384, "bf16": True, "optimizer": "adamw"}
    return {
        "language": Recipe(**common),
        "pretrain": Recipe(accumulate=10, lr=1e-3, lr_final=1e-5, image_position="first", **common),
        "finetune": Recipe(accumulate=5, lr=6e-5, lr_final=1.5e-5, image_position=position, **stage2, **common),
    }


RECIPES: dict[str, dict[str, Recipe]] = {
    "nano": {
        "language": Recipe(steps=320, lr=3e-3, lr_final=1e-3, **NANO),
        "pretrain": Recipe(steps=120, lr=5e-3, lr_final=1e-3, **NANO),
        "finetune": Recipe(steps=680, lr=2e-3, lr_final=1e-4, muon_lr=0.01, save_every=200, **NANO),
    },
    "v6.0": published("middle", epochs=2.0),
    "v7.00": published("first"),
}
