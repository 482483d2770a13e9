"""What is trained in a stage, and how fast."""

from __future__ import annotations

import math

import torch
from torch import nn

from visualrwkv.config import choose
from visualrwkv.model import VisualRWKV
from visualrwkv.training.recipes import STAGES, Recipe, Stage


def freeze(model: VisualRWKV, stage: Stage) -> list[nn.Parameter]:
    """Leave only the stage's parameters trainable and return them.

    language: all of the RWKV; pretrain: the projector; finetune: projector and RWKV without its embedding. The vision
    encoder is frozen in all of them.
    """
    choose("stage", stage, STAGES)
    model.requires_grad_(False)
    if stage != "pretrain":
        model.rwkv.requires_grad_(True)
    if stage == "finetune":
        model.rwkv.emb.requires_grad_(False)
    if stage != "language" and model.proj is not None:
        model.proj.requires_grad_(True)
    return [p for p in model.parameters() if p.requires_grad]


def make_optimizer(parameters: list[nn.Parameter], recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; vectors are not decayed. The learning rate is set before each step, for every group."""
    groups = [
        {"params": [p for p in parameters if p.squeeze().dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.squeeze().dim() < 2], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(recipe.beta1, recipe.beta2), eps=recipe.eps, fused=True)


def learning_rate(recipe: Recipe, step: int, total: int) -> float:
    """The reference's schedule at step 0 … total − 1: linear from a tenth over `warmup`, cosine from lr to lr_final."""
    w = recipe.warmup
    progress = min(max((step - w + 1) / max(total - w, 1), 0.0), 1.0)
    lr = recipe.lr_final + (recipe.lr - recipe.lr_final) * 0.5 * (1 + math.cos(math.pi * progress))
    return lr * (0.1 + 0.9 * step / w) if step < w else lr
