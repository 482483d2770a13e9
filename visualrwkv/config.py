"""What a model is made of: frozen dataclasses, preset tables beside them, and validation that names the bad value."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

ImagePosition = Literal["first", "middle", "last"]
Scan = Literal["uni", "bi", "multi"]
ProjectorKind = Literal["linear", "gated"]

IMAGE_POSITIONS: tuple[str, ...] = ("first", "middle", "last")
SCANS: tuple[str, ...] = ("uni", "bi", "multi")
PROJECTORS: tuple[str, ...] = ("linear", "gated")


def choose(name: str, value: str, allowed: tuple[str, ...] | dict) -> None:
    """Raise ValueError naming the setting, its value and the allowed ones unless `value` is one of them."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed are {', '.join(allowed)}")


@dataclass(frozen=True)
class RWKVConfig:
    """Sizes of a language model, RWKV-6 (x060) or RWKV-7 (x070)."""

    n_layer: int
    n_embd: int
    head_size: int = 64
    vocab_size: int = 65536
    dim_ffn: int = 0  # 0: 3.5 × n_embd, rounded down to a multiple of 32; in version 7 4 × n_embd
    mix_rank: int = 32  # of the data-dependent token shift; version 6 alone
    decay_rank: int = 64  # of the data-dependent decay
    version: int = 6
    rate_rank: int = 64  # of the in-context learning rate; this and the following: version 7 alone
    value_rank: int = 32  # of the part that the first layer's values have in the others'
    gate_rank: int = 128

    def __post_init__(self) -> None:
        if self.version not in (6, 7):
            raise ValueError(f"rwkv version is {self.version}; allowed are 6, 7")
        ranks = ("mix_rank", "decay_rank", "rate_rank", "value_rank", "gate_rank")
        for name in ("n_layer", "n_embd", "head_size", "vocab_size", *ranks):
            if getattr(self, name) < 1:
                raise ValueError(f"rwkv {name} is {getattr(self, name)}; it must be at least 1")
        if self.n_embd % self.head_size or self.head_size % 16:
            raise ValueError(
                f"n_embd {self.n_embd} with head_size {self.head_size}: head_size must be a multiple of 16 and divide n_embd"
            )
        if self.dim_ffn == 0:
            wide = self.n_embd * 4 if self.version == 7 else int(self.n_embd * 3.5) // 32 * 32
            object.__setattr__(self, "dim_ffn", wide)

    @property
    def n_head(self) -> int:
        return self.n_embd // self.head_size


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of a Vision-RWKV encoder, and how its pictures are prepared."""

    depth: int
    width: int  # D
    patch_size: int = 16
    image_size: int = 224  # side of the square picture it is given
    pos_grid: int = 14  # side of the learned position table
    ffn_rate: int = 4
    post_norm: bool = False
    layer_scale: float = 0.0  # initial γ; 0: no layer scale
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    kind: str = "vrwkv"

    def __post_init__(self) -> None:
        choose("vision kind", self.kind, ("vrwkv",))
        if self.width % 4:
            raise ValueError(f"vision width is {self.width}; the four-way shift needs a multiple of 4")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class ModelConfig:
    """A whole model: language model, vision encoder (None: text only) and how the two meet."""

    rwkv: RWKVConfig
    vision: VisionConfig | None = None
    projector: ProjectorKind = "linear"
    image_tokens: int = 64  # per picture, a square number: patches are pooled to it
    scan: Scan = "bi"
    image_position: ImagePosition = "middle"

    def __post_init__(self) -> None:
        choose("projector", self.projector, PROJECTORS)
        choose("scan", self.scan, SCANS)
        choose("image_position", self.image_position, IMAGE_POSITIONS)
        if self.image_tokens < 1 or math.isqrt(self.image_tokens) ** 2 != self.image_tokens:
            raise ValueError(f"image_tokens is {self.image_tokens}; it must be a square number such as 16, 64 or 576")
        if self.vision and self.token_grid > self.vision.grid:
            raise ValueError(
                f"image_tokens is {self.image_tokens}, more than the {self.vision.grid**2} patches of the vision encoder"
            )

    @property
    def token_grid(self) -> int:
        """Image tokens along a side."""
        return math.isqrt(self.image_tokens)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`; an unknown or missing setting is a ValueError that names it."""
        rwkv = from_values(RWKVConfig, data.get("rwkv") or {})
        vision = from_values(VisionConfig, data["vision"]) if data.get("vision") else None
        known = {k: v for k, v in data.items() if k != "format"}
        return from_values(cls, known | {"rwkv": rwkv, "vision": vision})


def from_values(cls: type, values: Any) -> Any:
    """A config of that class; an unknown, missing or ill-typed setting is a ValueError that names it."""
    if not isinstance(values, dict):
        raise ValueError(f"the settings of {cls.__name__} are {values!r:.40}; they must be an object")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - set(fields)):
        raise ValueError(f"{cls.__name__} has no setting {unknown[0]!r}; it has {', '.join(fields)}")
    required = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in values]
    if required:
        raise ValueError(f"{cls.__name__} lacks {required[0]!r}")
    try:
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    except TypeError as error:
        raise ValueError(f"a setting of {cls.__name__} is of the wrong type ({error})") from error


RWKV_PRESETS: dict[str, RWKVConfig] = {
    "rwkv6-nano": RWKVConfig(n_layer=3, n_embd=128, head_size=32, mix_rank=16, decay_rank=32),
    "rwkv6-1b6": RWKVConfig(n_layer=24, n_embd=2048),
    "rwkv6-3b": RWKVConfig(n_layer=32, n_embd=2560),
    "rwkv6-7b": RWKVConfig(n_layer=32, n_embd=4096, mix_rank=64, decay_rank=128),
    "rwkv7-0b1": RWKVConfig(12, 768, version=7),
    "rwkv7-0b4": RWKVConfig(24, 1024, version=7),
    "rwkv7-1b5": RWKVConfig(24, 2048, version=7, decay_rank=96, rate_rank=96, value_rank=64, gate_rank=256),
    "rwkv7-2b9": RWKVConfig(32, 2560, version=7, decay_rank=96, rate_rank=96, value_rank=64, gate_rank=320),
}

VISION_PRESETS: dict[str, VisionConfig] = {
    "vrwkv_nano": VisionConfig(depth=4, width=128, patch_size=8, image_size=64, pos_grid=8),
}


@dataclass(frozen=True)
class MeetPreset:
    """How a language model and an encoder are joined when a new model is composed for stage 1."""

    projector: ProjectorKind
    image_tokens: int
    scan: Scan
    image_position: ImagePosition = "middle"


MEET_PRESETS: dict[str, MeetPreset] = {
    "nano": MeetPreset(projector="gated", image_tokens=16, scan="bi"),
}


def preset(table: dict[str, Any], name: str, what: str) -> Any:
    """The preset of that name, or a ValueError that lists the names."""
    choose(what, name, table)
    return table[name]
