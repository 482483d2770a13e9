"""The model and its loss as one module, so that one forward is one training step's."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from PIL import Image
from torch import Tensor, nn

from visualrwkv.model import VisualRWKV
from visualrwkv.rwkv.state import State
from visualrwkv.training.data import Batch
from visualrwkv.training.features import Features
from visualrwkv.training.loss import packed_loss
from visualrwkv.training.recipes import Recipe
from visualrwkv.vision.processor import make_processor


class Objective(nn.Module):
    """What DeepSpeed trains.

    With `rows` (`distinct_rows`), these rows of the head are trained as a parameter of their own, `few`, and with `words`
    (U,), the ids that occur, rising, these rows of the embedding (text alone): gradients and optimizer states of the many
    others would cost a third of a small model's step. `spread` puts them back. With `state_tuning`, what each sample
    starts from is a parameter, `start` (L, H, N, N).
    """

    def __init__(
        self,
        model: VisualRWKV,
        recipe: Recipe,
        rows: Tensor | None = None,
        words: Tensor | None = None,
        features: Features | None = None,
        state_tuning: bool = False,
    ):
        super().__init__()
        self.model, self.recipe, self.rows, self.words = model, recipe, rows, words
        self.features = features or Features(0)
        self.blank = blank_picture(model) if recipe.zero == 3 else torch.empty(0)
        head, emb = model.rwkv.head.weight, model.rwkv.emb.weight
        self.few = None if rows is None else nn.Parameter(head.detach()[rows], requires_grad=head.requires_grad)
        self.alike = 1 if rows is None else len(head) - len(rows) + 1
        self.known = None if words is None else nn.Parameter(emb.detach()[words])
        shape = State.zeros(model.config.rwkv).wkv[:, 0]
        self.start = nn.Parameter(shape.to(model.device)) if state_tuning else None
        if rows is not None:
            head.requires_grad_(False)
        if words is not None:
            emb.requires_grad_(False)

    def forward(self, batch: Batch) -> Tensor:
        """A packed batch -> the sum over its samples of their mean loss."""
        device = self.model.device
        batch = batch.to(device)
        head = self.model.rwkv.head.weight if self.few is None else self.few
        mixed = self.recipe.bf16 and not self.recipe.weights_bf16
        with torch.autocast(device.type, torch.bfloat16) if mixed else nullcontext():
            if self.known is None or self.words is None:
                images = self.features.of(self.model, batch)
                state = self.starts(batch.samples)
                hidden = self.model.hidden(batch.ids[None], images, state, batch.cu_seqlens)[0][0]
            else:
                x = nn.functional.embedding(torch.searchsorted(self.words, batch.ids), self.known)
                hidden = self.model.rwkv(x, batch.cu_seqlens, None, None)[0]
            where = self.rows, self.alike, self.recipe.l2wrap
            loss = packed_loss(hidden, head, batch.labels, batch.cu_seqlens, *where)
            if not batch.pictures and self.known is None:
                loss = loss + self.without_pictures(hidden)
        return loss

    def starts(self, samples: int) -> State | None:
        """What so many samples start from; None: from nothing."""
        return None if self.start is None else State.starting(self.start.float(), samples)

    def without_pictures(self, hidden: Tensor) -> Tensor | float:
        """Zero, by way of the parts that a batch of text leaves out: other ranks wait for them.

        The projector's gradients are summed over all ranks, and ZeRO 3 gathers the encoder's weights from all of them.
        """
        model = self.model
        if model.proj is None or model.config.vision is None:
            return 0.0
        features = hidden.new_zeros(1, model.config.vision.width)
        if self.recipe.zero == 3 and model.vit is not None and self.features.shelf is None:
            blank = self.blank.to(hidden.device)
            with torch.no_grad():
                features = features + 0 * model.encode(blank)[0, :1]
        return 0 * model.proj(features).sum()

    @torch.no_grad()
    def spread(self) -> None:
        """Write the trained rows into the model's head and embedding."""
        head, emb = self.model.rwkv.head.weight, self.model.rwkv.emb.weight
        if self.few is not None and self.rows is not None and self.few.requires_grad:
            head.copy_(self.few[-1].expand_as(head))
            head[self.rows[:-1]] = self.few[:-1]
        if self.known is not None and self.words is not None:
            emb[self.words] = self.known


def blank_picture(model: VisualRWKV) -> Tensor:
    """What the encoder reads of a picture on which nothing is."""
    if model.config.vision is None:
        return torch.empty(0)
    return make_processor(model.config.vision)(Image.new("RGB", (32, 32)))[None]
