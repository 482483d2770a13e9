"""What the frozen encoder made of the pictures so far: a run that shows a picture again neither opens nor encodes it again.

I pictures, M image tokens, D vision width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from visualrwkv.model import Encoded, VisualRWKV
from visualrwkv.training.data import Batch
from visualrwkv.training.shelf import Shelf


class Features:
    """Features by the names of their pictures, up to so many bytes; what does not fit is encoded each time.

    `shelf` holds, on disk, those of all pictures that can be read; then the encoder has nothing to do.
    """

    def __init__(self, most: float, shelf: Shelf | None = None):
        self.most, self.bytes, self.shelf = most, 0, shelf
        self.kept: dict[str, Tensor] = {}

    def __contains__(self, picture: object) -> bool:
        return picture in self.kept or (self.shelf is not None and picture in self.shelf)

    def known(self, picture: str) -> Tensor:
        """Those of a picture that was read before (M, D)."""
        if picture in self.kept or self.shelf is None:
            return self.kept[picture]
        return self.shelf[picture]

    def of(self, model: VisualRWKV, batch: Batch) -> Encoded | None:
        """Those of a batch's pictures (I, M, D), in their order; None without pictures."""
        if not batch.pictures:
            return None
        learns = model.vit is not None and any(p.requires_grad for p in model.vit.parameters())
        new: dict[str, Tensor] = {}
        if batch.images is not None:
            with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
                new = dict(zip(batch.unread, model.encode(batch.images), strict=True))
        found = torch.stack([new[key] if key in new else self.known(key).to(model.device) for key in batch.pictures])
        for key, features in new.items():
            size = features.numel() * features.element_size()
            if not learns and key not in self.kept and self.bytes + size <= self.most:
                self.kept[key] = features.to("cpu", copy=True)
                self.bytes += size
        return Encoded(found)
