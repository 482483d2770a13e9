"""CLIP by open_clip's names: the same network and the same features as transformers', so that only the names differ."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from visualrwkv.config import ViTConfig

NAMES = {
    "class_embedding": "embeddings.class_embedding",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre.": "pre_layrnorm.",
    "ln_post.": "post_layernorm.",
}
LAYER = {
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "attn.out_proj.": "self_attn.out_proj.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}


def open_clip_config(name: str) -> ViTConfig:
    """The config of one of open_clip's models; ValueError where its vision encoder is not a plain ViT."""
    import open_clip

    whole: dict[str, Any] | None = open_clip.get_model_config(name)
    if whole is None:
        raise ValueError(f"open_clip has no model {name!r}; see open_clip.list_models()")
    part = whole["vision_cfg"]
    if not isinstance(part.get("layers"), int) or "timm_model_name" in part or part.get("attentional_pool"):
        raise ValueError(f"open_clip's {name!r} is no plain ViT; give the encoder by its Hugging Face id instead")
    width, size = part["width"], part["image_size"]
    return ViTConfig(
        depth=part["layers"],
        width=width,
        heads=width // part.get("head_width", 64),
        ffn=int(width * part.get("mlp_ratio", 4.0)),
        image_size=size[0] if isinstance(size, (list, tuple)) else size,
        patch_size=part["patch_size"],
        activation="quick_gelu" if whole.get("quick_gelu") else "gelu",
    )


def transformers_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """An open_clip model's or visual part's tensors -> a CLIP vision encoder's by transformers' names.

    What only the text part or the projection to the common space needs is left out.
    """
    prefix = "visual." if any(k.startswith("visual.") for k in weights) else ""
    found = {}
    for key, x in weights.items():
        if not key.startswith(prefix) or key == f"{prefix}proj":
            continue
        name = key.removeprefix(prefix)
        if name.startswith("transformer.resblocks."):
            _, _, layer, rest = name.split(".", 3)
            root = f"vision_model.encoder.layers.{layer}."
            if rest.startswith("attn.in_proj_"):
                for letter, part in zip("qkv", x.chunk(3)):
                    found[f"{root}self_attn.{letter}_proj.{rest.removeprefix('attn.in_proj_')}"] = part
                continue
            found[root + _replaced(rest, LAYER)] = x
        else:
            found["vision_model." + _replaced(name, NAMES)] = x
    return found


def _replaced(name: str, table: dict[str, str]) -> str:
    return next((ours + name[len(theirs) :] for theirs, ours in table.items() if name.startswith(theirs)), name)
