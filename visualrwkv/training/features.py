"""What the frozen encoder made of the pictures so far: a run that shows a picture again neither opens nor encodes it again.

I pictures, M image tokens, D vision width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from visualrwkv.model import Encoded, VisualRWKV
from visualrwkv.training.data import Batch


class Features:
    """Features by the paths of their pictures, up to so many bytes; what does not fit is encoded each time."""

    def __init__(self, most: float):
        self.most, self.bytes = most, 0
        self.kept: dict[str, Tensor] = {}

    def __contains__(self, picture: object) -> bool:
        return picture in self.kept

    def of(self, model: VisualRWKV, batch: Batch) -> Encoded | None:
        """Those of a batch's pictures (I, M, D), in their order; None without pictures."""
        if not batch.pictures:
            return None
        learns = model.vit is not None and any(p.requires_grad for p in model.vit.parameters())
        new: dict[str, Tensor] = {}
        if batch.images is not None:
            with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
                new = dict(zip(batch.unread, model.encode(batch.images), strict=True))
        found = torch.stack([new[key] if key in new else self.kept[key].to(model.device) for key in batch.pictures])
        for key, features in new.items():
            size = features.numel() * features.element_size()
            if not learns and key not in self.kept and self.bytes + size <= self.most:
                self.kept[key] = features.to("cpu", copy=True)
                self.bytes += size
        return Encoded(found)
