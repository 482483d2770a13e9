"""VisualRWKV: pictures become image tokens, image tokens take the placeholders' seats, the RNN reads the row.

B rows, T tokens a row, C channels, V vocabulary, I pictures, P patches, M image tokens, D vision width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from visualrwkv.config import ModelConfig
from visualrwkv.rwkv.network import RWKV, Order
from visualrwkv.rwkv.rwkv5 import RWKV5
from visualrwkv.rwkv.rwkv6 import RWKV6
from visualrwkv.rwkv.rwkv7 import RWKV7
from visualrwkv.rwkv.state import State
from visualrwkv.vision.encoder import Encoder, make_encoder
from visualrwkv.vision.pool import pool
from visualrwkv.vision.projector import make_projector
from visualrwkv.vision.scan import read_order, scan_orders

IMAGE_PLACEHOLDER = 65535
"""The id whose seat an image token takes; the World vocabulary does not define it."""

LANGUAGE_MODELS: dict[int, type[RWKV]] = {5: RWKV5, 6: RWKV6, 7: RWKV7}


@dataclass(frozen=True)
class Encoded:
    """Pictures that the vision encoder has read before: what `encode` gave (I, M, D). Goes wherever pixels go."""

    features: Tensor

    def __len__(self) -> int:
        return len(self.features)


Images = Tensor | Sequence[Tensor] | Encoded


class VisualRWKV(nn.Module):
    """Vision encoder `vit`, projector `proj` and language model `rwkv`; without a vision config, the language model alone."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.rwkv: RWKV = LANGUAGE_MODELS[config.rwkv.version](config.rwkv)
        self.vit: Encoder | None = None
        self.proj: nn.Module | None = None
        if config.vision:
            self.vit = make_encoder(config.vision)
            self.proj = make_projector(config.projector, config.vision.width, config.rwkv.n_embd)
            self.scan = scan_orders(config.scan, config.token_grid, config.extra_tokens)

    @property
    def device(self) -> torch.device:
        return self.rwkv.emb.weight.device

    def train(self, mode: bool = True) -> VisualRWKV:
        """As any module's, but an encoder that does not learn goes on seeing as it always does: no drop path."""
        super().train(mode)
        if self.vit is not None and not any(p.requires_grad for p in self.vit.parameters()):
            self.vit.eval()
        return self

    def encode(self, pixels: Tensor) -> Tensor:
        """Normalised pictures (I, 3, H, W) -> pooled features (I, M, D), before the projector."""
        assert self.vit is not None
        pixels = pixels.to(self.device, next(self.vit.parameters()).dtype)
        features, count = self.vit(pixels), math.prod(grid := self.vit.grid(pixels))
        patches, extra = features[:, :count], features[:, count:]
        return torch.cat((pool(patches, grid, self.config.token_grid), extra), 1)

    def embed_image(self, images: Images) -> Tensor:
        """Normalised pictures (I, 3, H, W), or a list of them, or encoded ones -> image tokens (I, M, C)."""
        if self.vit is None or self.proj is None:
            raise ValueError("this model has no vision encoder; it answers text only")
        if isinstance(images, Encoded):
            return self.proj(images.features.to(self.device))
        return self.proj(self.encode(images if isinstance(images, Tensor) else torch.stack(list(images))))

    def splice(self, ids: Tensor, images: Images | None) -> tuple[Tensor, Tensor]:
        """Embeddings with the image tokens in their seats: ids (T,) -> x (T, C), is_image (T,).

        images: pixels (I, 3, H, W), a list of (3, H, W), or `Encoded` features, in the order of their placeholders, M of
        which stand for each.
        """
        is_image = ids == IMAGE_PLACEHOLDER
        count = 0 if images is None else len(images)
        seats = int(is_image.sum())
        if seats != count * self.config.image_tokens:
            raise ValueError(
                f"{seats} image placeholders for {count} pictures of {self.config.image_tokens} image tokens each"
            )
        x = self.rwkv.emb(ids.masked_fill(is_image, 0))
        if images is not None and count:
            tokens = self.embed_image(images).flatten(0, 1)
            x = x.masked_scatter(is_image[:, None], tokens.to(x.dtype))
        return x, is_image

    def orders(self, is_image: Tensor) -> list[Order | None] | None:
        """Each block's reading order of a row, or None where all read it as it stands."""
        if self.vit is None or len(self.scan) == 1 or not bool(is_image.any()):
            return None
        return [None if order is None else Order(*read_order(is_image, order)) for order in self.scan]

    def hidden(
        self,
        ids: Tensor,
        images: Images | None = None,
        state: State | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """The last layer's output, before the head: arguments as `forward` -> hidden (B, T, C), State."""
        B, T = ids.shape
        if cu_seqlens is None:
            bounds = torch.arange(0, B * T + 1, T, device=ids.device)
        else:
            check_bounds(cu_seqlens, B, T)
            bounds = cu_seqlens.to(ids.device, torch.int64)
        if state is not None and len(state) != len(bounds) - 1:
            raise ValueError(f"the state holds {len(state)} sequences, the input {len(bounds) - 1}")
        x, is_image = self.splice(ids.flatten(), images)
        hidden, state = self.rwkv(x, bounds, state, self.orders(is_image))
        return hidden.view(B, T, -1), state

    def forward(
        self,
        ids: Tensor,
        images: Images | None = None,
        state: State | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Read ids (B, T) and say what may come next.

        images: the pictures' pixels in order, M placeholders each; state: where to go on from (B rows); cu_seqlens
        (S+1,): bounds of S sequences packed in one row (B = 1), then the State has S rows. Any T ≥ 1, no padding.
        Returns logits (B, T, V) and the new State; the given one is not changed.
        """
        hidden, state = self.hidden(ids, images, state, cu_seqlens)
        return self.rwkv.head(hidden), state


def check_bounds(cu_seqlens: Tensor, B: int, T: int) -> None:
    """ValueError unless cu_seqlens rises from 0 to T and B is 1."""
    if B != 1:
        raise ValueError(f"cu_seqlens needs one packed row, got a batch of {B}")
    bounds = cu_seqlens.tolist()
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != T or any(a >= b for a, b in itertools.pairwise(bounds)):
        raise ValueError(f"cu_seqlens must rise from 0 to {T} (the row's length), got {bounds[:8]}")


PIECE = 2048
"""Tokens that are read at a time of a long prompt."""


def pieces(ids: Tensor, images: Images | None, image_tokens: int) -> Iterator[tuple[Tensor, Images | None]]:
    """A prompt ids (T,) some PIECE tokens at a time, with the pictures that lie there; no picture is cut."""
    seats = (ids == IMAGE_PLACEHOLDER).nonzero()[:, 0]
    count = 0 if images is None else len(images)
    if len(ids) <= PIECE or len(seats) != count * image_tokens:  # the latter is an error, which the model explains
        yield ids, images
        return
    ends = seats.view(count, -1)[:, -1].add(1).tolist() if count else []  # where each picture's seats end
    start = first = 0
    while start < len(ids):
        stop = min(start + PIECE, len(ids))
        begun = -(-int((seats < stop).sum()) // image_tokens) if count else 0  # pictures that begin before the cut
        stop = max(stop, ends[begun - 1] if begun else 0)
        yield ids[start:stop], None if images is None or begun == first else _some(images, first, begun)
        start, first = stop, begun


def _some(images: Images, first: int, after: int) -> Images:
    return Encoded(images.features[first:after]) if isinstance(images, Encoded) else images[first:after]
