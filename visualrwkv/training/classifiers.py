"""The networks that are trained to classify: Vision-RWKV, fresh or from a file, and timm's, beside which it is compared.

B pictures, K classes.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from visualrwkv.checkpoint import class_names, load_vision, save_vision
from visualrwkv.config import IMAGENET, VISION_PRESETS
from visualrwkv.training.classify_recipes import ClassifyRecipe
from visualrwkv.vision.vrwkv import VRWKV

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)
CROP = 0.875  # of timm's networks, as of the published Vision-RWKV
VIT_NANO: dict[str, Any] = {
    "img_size": 64,
    "patch_size": 8,
    "embed_dim": 128,
    "depth": 4,
    "num_heads": 4,
    "mlp_ratio": 4.5,  # vrwkv_nano's number of parameters, within a thousandth
    "class_token": False,
    "global_pool": "avg",
}


class Classifier(nn.Module):
    """A network, the names of its classes and how its pictures are prepared."""

    def __init__(self, net: nn.Module, classes: list[str], size: int, crop: float, arguments: dict[str, Any]):
        super().__init__()
        self.net, self.classes, self.size, self.crop, self.arguments = net, classes, size, crop, arguments

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pictures (B, 3, size, size) -> logits (B, K)."""
        return self.net.forward_head(self.net(pixels)) if isinstance(self.net, VRWKV) else self.net(pixels)

    @property
    def preparation(self) -> dict[str, Any]:
        """How pictures are prepared, in the words of timm's `create_transform`."""
        squash = (
            {"crop_pct": self.crop, "crop_mode": "center"} if self.crop else {"crop_pct": 1.0, "crop_mode": "squash"}
        )
        return {"input_size": (3, self.size, self.size), "interpolation": "bicubic", **IMAGENET, **squash}

    def groups(self, recipe: ClassifyRecipe) -> list[dict[str, Any]]:
        """Its parameters as an optimizer takes them: norms and biases are not decayed, all else is, vectors too."""
        from timm.optim import param_groups_layer_decay, param_groups_weight_decay

        exempt = [name for name, _ in self.net.named_parameters() if name.endswith("bias")]
        exempt += [f"{at}.weight" for at, module in self.net.named_modules() if isinstance(module, NORMS)]
        how: dict[str, Any] = {"weight_decay_exclude_1d": False, "no_weight_decay_list": exempt}
        if recipe.layer_decay == 1:
            return param_groups_weight_decay(self.net, recipe.weight_decay, **how)
        return param_groups_layer_decay(self.net, recipe.weight_decay, layer_decay=recipe.layer_decay, **how)

    def save(self, directory: Path) -> None:
        """Vision-RWKV as `load_vision` and `compose` open it, another as timm's `local-dir:` does; with the classes' names."""
        if isinstance(self.net, VRWKV):
            save_vision(self.net, directory, self.classes)
            return
        from timm.models import save_for_hf

        directory.mkdir(parents=True, exist_ok=True)
        about = {"model_config": {"label_names": self.classes}, "model_args": self.arguments}
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as part:
            save_for_hf(self.net, part, **about, data_config=self.preparation, safe_serialization=True)
            for file in sorted(Path(part).iterdir(), reverse=True):
                os.replace(file, directory / file.name)


def make_classifier(name: str, classes: list[str], recipe: ClassifyRecipe) -> Classifier:
    """A network of a preset's size or one of timm's, fresh, or the Vision-RWKV of a file or directory to go on from.

    Its classifier is fresh unless the directory's classes are these. ValueError says what may stand for a name.
    """
    torch.manual_seed(recipe.seed)
    if name in VISION_PRESETS:
        return fresh(name, classes, recipe)
    if Path(name).exists():
        return opened(name, classes, recipe)
    from timm import is_model

    if name != "vit_nano" and not is_model(name):
        raise ValueError(
            f"model is {name!r}; it may be {', '.join(VISION_PRESETS)}, vit_nano, a name of timm's, or the file or directory of "
            "a Vision-RWKV"
        )
    return of_timm(name, classes, recipe)


def fresh(name: str, classes: list[str], recipe: ClassifyRecipe) -> Classifier:
    """A Vision-RWKV of a preset's size."""
    config = VISION_PRESETS[name]
    if recipe.image_size:  # another table of positions, which nothing has learned yet
        config = replace(config, image_size=recipe.image_size, pos_grid=recipe.image_size // config.patch_size)
    config = replace(config, classes=len(classes), drop_path=recipe.drop_path)
    return Classifier(VRWKV(config), classes, config.image_size, config.crop, {})


def opened(name: str, classes: list[str], recipe: ClassifyRecipe) -> Classifier:
    """A trained Vision-RWKV, to go on from."""
    old = load_vision(name)
    if not isinstance(old, VRWKV):
        raise ValueError(f"{name} holds a {old.config.kind}; give a Vision-RWKV")
    size = recipe.image_size or old.config.image_size
    config = replace(old.config, classes=len(classes), drop_path=recipe.drop_path, image_size=size)
    net, known = VRWKV(config), class_names(name) == classes
    weights = {k: v for k, v in old.state_dict().items() if known or not k.startswith("head.")}
    missing, unexpected = net.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(k.startswith("head.") for k in missing)
    return Classifier(net, classes, size, config.crop, {})


def of_timm(name: str, classes: list[str], recipe: ClassifyRecipe) -> Classifier:
    """A fresh network of timm's, or the ViT of vrwkv_nano's size."""
    import timm

    nano = name == "vit_nano"
    arguments = dict(VIT_NANO) if nano else {}
    arguments |= {"drop_path_rate": recipe.drop_path} if recipe.drop_path else {}
    arguments |= {"img_size": recipe.image_size} if recipe.image_size else {}
    try:
        net = timm.create_model("vit_tiny_patch16_224" if nano else name, num_classes=len(classes), **arguments)
    except (TypeError, AssertionError) as error:
        given = ", ".join(f"{k} {v}" for k, v in arguments.items())
        raise ValueError(f"timm cannot make {name} with {given} ({error})") from error
    cfg: Any = net.pretrained_cfg
    return Classifier(net, classes, arguments.get("img_size", cfg["input_size"][-1]), 0.0 if nano else CROP, arguments)
