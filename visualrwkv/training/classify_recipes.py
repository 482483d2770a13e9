"""How a classifier is trained: one frozen dataclass, and the presets as a table.

The presets t, s and b are those of arXiv 2403.02308 (section 4.1 and its code) for ImageNet at 224 pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from visualrwkv.config import VISION_PRESETS


@dataclass(frozen=True)
class ClassifyRecipe:
    """Everything about a run but its network, its pictures and its place."""

    epochs: float = 300.0
    batch: int = 1024  # pictures of an optimiser step
    together: int = 256  # of them in the network at once, as memory allows
    lr: float = 1e-3  # for that batch; 1e-3 × batch / 1024 for another
    lr_final: float = 1e-5  # where the cosine ends
    warmup: float = 20.0  # epochs, linear from a thousandth of lr
    weight_decay: float = 0.05  # not of norms and biases
    layer_decay: float = 1.0  # lr of each layer against the next one's; below 1 to go on from a trained encoder
    beta1: float = 0.9
    beta2: float = 0.999
    clip: float = 5.0  # gradient norm
    drop_path: float = 0.0  # of the last layer, linear from 0 at the first
    ema: float = 0.0  # decay of a mean of the weights, which is then checked and saved; 0: none
    smoothing: float = 0.1  # of the labels
    mixup: float = 0.8  # alpha; 0: none
    cutmix: float = 1.0  # alpha; 0: none
    mix_prob: float = 1.0  # of mixing a batch at all
    cutmix_prob: float = 0.5  # of cutmix in place of mixup
    randaugment: str = "rand-m9-mstd0.5-inc1"  # in timm's words; empty: none
    erase: float = 0.25  # probability of random erasing
    scale: tuple[float, float] = (0.08, 1.0)  # share of a picture's area that a crop keeps, from and to
    flip: float = 0.5  # probability; 0 where left and right mean something
    image_size: int = 0  # side of the square picture; 0: the network's own
    held_out: float = 0.1  # share of each class that is kept to check with, where the data has no such part
    bf16: bool = True  # matrix products in bf16, everything else in fp32
    workers: int = 0  # processes that load pictures
    check_every: float = 1.0  # epochs between two checks, each of which leaves a checkpoint
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch", "together"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("epochs", "lr", "layer_decay", "check_every"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        negative = ("seed", "lr_final", "warmup", "weight_decay", "clip", "mixup", "cutmix", "image_size", "workers")
        for name in negative:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        for name in ("smoothing", "mix_prob", "cutmix_prob", "erase", "flip", "ema"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be from 0 to 1")
        for name in ("drop_path", "held_out"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0 and below 1")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale is {self.scale}; it must be two rising numbers above 0 and up to 1")
        if self.warmup >= self.epochs:
            raise ValueError(f"warmup is {self.warmup} epochs of {self.epochs}; it must end before them")
        if self.mixes and self.batch % 2:
            raise ValueError(
                f"batch is {self.batch}; pictures are mixed in pairs: take an even number, or mixup and cutmix 0"
            )

    @property
    def mixes(self) -> bool:
        """Whether pictures are mixed with one another."""
        return bool(self.mixup or self.cutmix) and self.mix_prob > 0


NANO = ClassifyRecipe(epochs=60, batch=64, together=64, lr=1e-3, warmup=5, mixup=0, cutmix=0, scale=(0.3, 1.0))

CLASSIFY_RECIPES: dict[str, ClassifyRecipe] = {
    "nano": NANO,
    "digits": replace(NANO, epochs=20, warmup=2, flip=0.0, scale=(0.6, 1.0), image_size=32),
    "t": ClassifyRecipe(mixup=0, cutmix=0),
    "s": ClassifyRecipe(drop_path=VISION_PRESETS["vrwkv_s"].drop_path),
    "b": ClassifyRecipe(drop_path=VISION_PRESETS["vrwkv_b"].drop_path),
}

OF_MODEL: dict[str, str] = {
    "vrwkv_nano": "nano",
    "vit_nano": "nano",
    **{f"{family}_{size}": size for family in ("vrwkv", "vrwkv6") for size in "tsb"},
    **{f"vit_{word}_patch16_224": word[0] for word in ("tiny", "small", "base")},
}
"""The preset of a network, where none is given."""
