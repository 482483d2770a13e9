"""Vision-RWKV by its names in timm: importing this registers `vrwkv_t`, `vrwkv6_b` and the others with timm.create_model.

`visualrwkv.vision` imports it by itself where timm is imported already.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from visualrwkv.config import VISION_PRESETS, VRWKVConfig
from visualrwkv.vision.features import Features
from visualrwkv.vision.vrwkv import VRWKV, make_head, official_names

__all__ = ["Classifier"]


class Classifier(VRWKV):
    """Vision-RWKV as timm's classifiers are: its forward gives logits, or pooled features where num_classes is 0.

    B pictures, P patches, D width.
    """

    def __init__(
        self,
        config: VRWKVConfig,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float | None = None,  # default: the published one
    ):
        if drop_path_rate is not None:
            config = replace(config, drop_path=drop_path_rate)
        super().__init__(classifying(config, num_classes))
        self.in_chans = in_chans
        self.num_features = config.width
        self.head_drop = nn.Dropout(drop_rate)
        self.global_pool = global_pool
        self.reset_classifier(num_classes, global_pool)
        if in_chans != 3:
            patch = config.patch_size
            self.patch_embed.projection = nn.Conv2d(in_chans, config.width, patch, patch)

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised pictures (B, in_chans, H, W) -> patches (B, P, D), row-major, after the final norm."""
        return super().forward(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Patches (B, P, D) -> logits (B, num_classes), or what the classifier's last layer reads."""
        x = self.head_drop(x.mean(1) if self.global_pool else x)
        if self.head is None or (pre_logits and not self.config.head_width):
            return x
        return self.head[:-1](x) if pre_logits else self.head(x)  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        """Normalised pictures (B, in_chans, H, W) -> logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The classifier, an identity where there is none."""
        return nn.Identity() if self.head is None else self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier of so many classes; 0 takes it away."""
        if global_pool not in (None, "", "avg"):
            raise ValueError(f"global_pool is {global_pool!r}; allowed are 'avg' and ''")
        self.global_pool = self.global_pool if global_pool is None else global_pool
        self.config, self.num_classes = classifying(self.config, num_classes), num_classes
        self.head_hidden_size = self.config.head_width or self.config.width
        head = make_head(self.config)
        self.head = head and head.to(self.pos_embed)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """timm's switch; there is nothing to switch on."""
        if enable:
            raise ValueError("Vision-RWKV has no gradient checkpointing")


def classifying(config: VRWKVConfig, classes: int) -> VRWKVConfig:
    """That config with a classifier of so many classes, or none."""
    return replace(config, classes=classes, head_width=config.head_width if classes else 0)


def settings(config: VRWKVConfig) -> dict[str, Any]:
    """What timm notes of a model: the pictures it was made for, and where its first and last layers are."""
    return {
        "num_classes": config.classes,
        "input_size": (3, config.image_size, config.image_size),
        "pool_size": None,
        "crop_pct": config.crop or 1.0,
        "crop_mode": "center" if config.crop else "squash",
        "interpolation": "bicubic",
        "mean": config.mean,
        "std": config.std,
        "first_conv": "patch_embed.projection",
        "classifier": "head.2" if config.head_width else "head.fc",
        "license": "apache-2.0",
    }


def entrypoint(name: str) -> Callable[..., nn.Module]:
    """What timm calls for a name."""

    def make(pretrained: bool = False, strides: tuple[int, ...] | None = None, **options: Any) -> nn.Module:
        features = {"out_indices": None, "strides": strides, "feature_cls": Features}
        return build_model_with_cfg(
            *(Classifier, name, pretrained),
            config=VISION_PRESETS[name],
            feature_cfg=features,
            pretrained_filter_fn=lambda weights, model: official_names(weights),
            **options,
        )

    make.__name__ = name
    make.__doc__ = f"Vision-RWKV of the size {name}."
    return register_model(make)


default_cfgs = generate_default_cfgs({name: settings(config) for name, config in VISION_PRESETS.items()})
globals().update({name: entrypoint(name) for name in VISION_PRESETS})
