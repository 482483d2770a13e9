"""CLIP (arXiv 2103.00020) and SigLIP (arXiv 2303.15343, 2502.14786), as transformers computes them.

Names of parameters are those of the Hub's files, with the inner `vision_model.` level that newer versions leave out.
B pictures, P patches row-major, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from visualrwkv.config import SIGLIP, ViTConfig


class ViT(nn.Module):
    """The encoder. The patches are the raw output of a block (SigLIP's last: after its norm)."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

        self.config = config
        sizes: dict[str, Any] = {
            "hidden_size": config.width,
            "intermediate_size": config.ffn,
            "num_hidden_layers": config.depth,
            "num_attention_heads": config.heads,
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "hidden_act": config.activation,
            "layer_norm_eps": config.eps,
        }
        self.vision_model: Any
        if config.kind == "clip":
            self.vision_model = CLIPVisionModel(CLIPVisionConfig(**sizes))
        else:
            self.vision_model = SiglipVisionModel(SiglipVisionConfig(**(sizes | {"vision_use_head": config.pooled})))
        embeddings = self.vision_model.embeddings  # data, even while a model is laid out on the meta device
        embeddings.position_ids = torch.arange(embeddings.num_positions, device="cpu")[None]

    def grid(self, pixels: Tensor) -> tuple[int, int]:
        """Patches down and across pictures (B, 3, H, W)."""
        return self.config.grid, self.config.grid

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pictures (B, 3, image_size, image_size) -> patches (B, P, D), and the class token after them."""
        out = self.vision_model(pixel_values=pixels, output_hidden_states=self.config.layer != -1)
        x = out.last_hidden_state if self.config.layer == -1 else out.hidden_states[self.config.layer]
        if self.config.kind == "siglip":
            return x
        return torch.cat((x[:, 1:], x[:, :1]), 1) if self.config.cls_token else x[:, 1:]


def transformers_config(values: dict[str, Any]) -> ViTConfig:
    """The config of a Hub directory's `config.json`, of a whole CLIP or SigLIP or of its vision part alone.

    ValueError where it is another model. The pictures' sizes and normalisation are those that the family was trained with.
    """
    family = str(values.get("model_type", "")).removesuffix("_vision_model")
    if family not in ("clip", "siglip"):
        raise ValueError(f"model_type is {values.get('model_type')!r}; known are clip and siglip")
    part = values.get("vision_config") or values
    from transformers import CLIPVisionConfig, SiglipVisionConfig

    full = (CLIPVisionConfig if family == "clip" else SiglipVisionConfig)(
        **{k: v for k, v in part.items() if k not in ("model_type", "architectures", "transformers_version")}
    )
    sizes: dict[str, Any] = {
        "depth": full.num_hidden_layers,
        "width": full.hidden_size,
        "heads": full.num_attention_heads,
        "ffn": full.intermediate_size,
        "image_size": full.image_size,
        "patch_size": full.patch_size,
        "activation": full.hidden_act,
        "eps": full.layer_norm_eps,
    }
    if family == "clip":
        return ViTConfig(**sizes)
    return ViTConfig(**sizes, **SIGLIP, pooled=bool(getattr(full, "vision_use_head", True)))
