"""What is trained in a stage, and how fast."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from visualrwkv.config import choose
from visualrwkv.model import VisualRWKV
from visualrwkv.training.recipes import STAGES, Recipe, Stage


def freeze(model: VisualRWKV, stage: Stage) -> list[nn.Parameter]:
    """Leave only the stage's parameters trainable and return them.

    language: all of the RWKV; pretrain: the projector; finetune: projector and RWKV without its embedding; state: none.
    The vision encoder is frozen in all of them.
    """
    choose("stage", stage, STAGES)
    model.requires_grad_(False)
    if stage == "state":
        return []
    if stage != "pretrain":
        model.rwkv.requires_grad_(True)
    if stage == "finetune":
        model.rwkv.emb.requires_grad_(False)
    if stage != "language" and model.proj is not None:
        model.proj.requires_grad_(True)
    return [p for p in model.parameters() if p.requires_grad]


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the matrices of the RWKV blocks, AdamW for everything else, as one optimizer.

    A small model learns to look things up in its context several times sooner with it. A group's `lr_scale` is what the
    scheduled learning rate is multiplied by.
    """

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW):
        self.parts = {"muon": muon, "adamw": adamw}
        super().__init__([p for part in self.parts.values() for g in part.param_groups for p in g["params"]], {})
        self._gather()

    def _gather(self) -> None:
        self.param_groups = [group for part in self.parts.values() for group in part.param_groups]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part in self.parts.values():
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state_dict[name])
        self._gather()


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer for what is trainable in `model`; vectors are not decayed. Rates are set before each step."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    small = ("time_faaaa", "r_k")
    blocks = [p for name, p in named if ".blocks." in name and p.dim() == 2 and not name.endswith(small)]
    blocks = [] if any(".lora_" in name for name, _ in named) else blocks  # adapters are too thin for it
    muon = blocks if recipe.optimizer == "muon" else []
    mine = {id(p) for p in muon}
    rest = [p for _, p in named if id(p) not in mine]
    groups = [
        {"params": [p for p in rest if p.squeeze().dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in rest if p.squeeze().dim() < 2], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    adamw = torch.optim.AdamW(groups, lr=recipe.lr, betas=(recipe.beta1, recipe.beta2), eps=recipe.eps, fused=True)
    if not muon:
        return adamw
    scale = {"params": muon, "lr_scale": recipe.muon_lr / (recipe.lr or 1.0)}
    return MuonAdamW(torch.optim.Muon([scale], lr=recipe.muon_lr, weight_decay=recipe.weight_decay), adamw)


def learning_rate(recipe: Recipe, step: int, total: int) -> float:
    """The reference's schedule at step 0 … total − 1: linear from a tenth over `warmup`, cosine from lr to lr_final."""
    w = recipe.warmup
    progress = min(max((step - w + 1) / max(total - w, 1), 0.0), 1.0)
    lr = recipe.lr_final + (recipe.lr - recipe.lr_final) * 0.5 * (1 + math.cos(math.pi * progress))
    return lr * (0.1 + 0.9 * step / w) if step < w else lr
