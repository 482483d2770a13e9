"""What a model is made of: frozen dataclasses, preset tables beside them, and validation that names the bad value."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

ImagePosition = Literal["first", "middle", "last"]
Scan = Literal["uni", "bi", "multi"]
ProjectorKind = Literal["linear", "gated", "output_gated", "relu", "mlp"]

MODEL_TYPE = "visualrwkv"
"""What a config.json of ours says it is of, to us and to transformers."""
HUB_SETTINGS = ("model_type", "architectures", "auto_map")
"""What transformers needs in a config.json of ours."""

IMAGE_POSITIONS: tuple[str, ...] = ("first", "middle", "last")
SCANS: tuple[str, ...] = ("uni", "bi", "multi")
PROJECTORS: tuple[str, ...] = ("linear", "gated", "output_gated", "relu", "mlp")
TEMPLATES: dict[str, int] = {"visualrwkv": 261, "world": 24}
"""How turns are written, and the id that closes each: two newlines, or WorldRWKV's byte 0x17."""


def choose(name: str, value: str, allowed: tuple[str, ...] | dict) -> None:
    """Raise ValueError naming the setting, its value and the allowed ones unless `value` is one of them."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed are {', '.join(allowed)}")


@dataclass(frozen=True)
class RWKVConfig:
    """Sizes of a language model, RWKV-5 (x052), RWKV-6 (x060) or RWKV-7 (x070)."""

    n_layer: int
    n_embd: int
    head_size: int = 64
    vocab_size: int = 65536
    dim_ffn: int = 0  # 0: 3.5 × n_embd, rounded down to a multiple of 32; in version 7 4 × n_embd
    mix_rank: int = 32  # of the data-dependent token shift; version 6 alone
    decay_rank: int = 64  # of the data-dependent decay; versions 6 and 7
    version: int = 6
    rate_rank: int = 64  # of the in-context learning rate; this and the following: version 7 alone
    value_rank: int = 32  # of the part that the first layer's values have in the others'
    gate_rank: int = 128
    first_value: bool = False  # the first layer holds v0, v1 and v2 as others do, though it does not read them

    def __post_init__(self) -> None:
        if self.version not in (5, 6, 7):
            raise ValueError(f"rwkv version is {self.version}; allowed are 5, 6, 7")
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


IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@dataclass(frozen=True)
class VRWKVConfig:
    """Sizes of a Vision-RWKV encoder, and how its pictures are prepared."""

    depth: int
    width: int  # D
    patch_size: int = 16
    image_size: int = 224  # side of the square picture it is given
    pos_grid: int = 14  # side of the learned position table
    ffn_rate: int = 4
    post_norm: bool = False
    layer_scale: float = 0.0  # initial γ; 0: no layer scale
    mean: tuple[float, float, float] = IMAGENET["mean"]
    std: tuple[float, float, float] = IMAGENET["std"]
    kind: str = "vrwkv"  # or vrwkv6, whose decay depends on the data
    key_norm: bool = False  # norms inside both mixers
    head_size: int = 64  # vrwkv6 alone
    classes: int = 0  # of a classifier; 0: none
    head_width: int = 0  # hidden width of the classifier; 0: it is one layer
    crop: float = 0.0  # share of the shorter side that is kept of a picture, in its middle; 0: all of it, squashed
    drop_path: float = 0.0  # in training, the last layer's rate of leaving a picture out; linear from 0 at the first

    def __post_init__(self) -> None:
        choose("vision kind", self.kind, ("vrwkv", "vrwkv6"))
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path is {self.drop_path}; it must be at least 0 and below 1")
        parts = 4 * (self.width // self.head_size if self.kind == "vrwkv6" else 1)
        if self.width % parts:
            raise ValueError(f"vision width is {self.width}; the four-way shift needs a multiple of {parts}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch_size

    @property
    def cls_token(self) -> bool:
        return False


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of a CLIP or SigLIP vision encoder, and how its pictures are prepared."""

    depth: int
    width: int  # D
    heads: int
    ffn: int
    image_size: int
    patch_size: int
    kind: str = "clip"  # or siglip
    activation: str = "quick_gelu"
    eps: float = 1e-5
    layer: int = -1  # whose output the patches are; -2: the one before the last
    cls_token: bool = True  # the class token is one of the image tokens, the last
    pooled: bool = False  # the weights hold SigLIP's pooling head, which gives no patches
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    crop: float = 1.0  # as in VRWKVConfig

    def __post_init__(self) -> None:
        choose("vision kind", self.kind, ("clip", "siglip"))
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(f"vision width {self.width} does not divide into {self.heads} heads")
        if not -self.depth <= self.layer <= -1:
            raise ValueError(f"vision layer is {self.layer}; it must be from {-self.depth} to -1")
        if self.cls_token and self.kind == "siglip":
            raise ValueError("a siglip encoder has no class token; cls_token must be false")

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class TowersConfig:
    """Sizes of the three encoders of the HD, UHD and v7.00 releases: DINOv2, SigLIP and SAM, side by side in the channels."""

    dino_depth: int = 24
    dino_width: int = 1024
    siglip_depth: int = 27
    siglip_width: int = 1152
    siglip_ffn: int = 4304
    sam_depth: int = 12
    sam_width: int = 768
    sam_out: int = 256
    image_size: int = 448  # what DINOv2 and SigLIP see
    sam_size: int = 1024
    tiles: bool = False  # UHD: beside the whole picture its four quarters, at half the grid each
    kind: str = "towers"

    def __post_init__(self) -> None:
        choose("vision kind", self.kind, ("towers",))
        if self.image_size % 14 or self.sam_size != 32 * self.grid or (self.tiles and self.grid % 2):
            raise ValueError(
                f"image_size {self.image_size} and sam_size {self.sam_size} do not give one grid, of patches of 14 and of 32"
            )

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image_size // 14

    @property
    def width(self) -> int:
        return (self.dino_width + self.siglip_width + 4 * self.sam_out) * (2 if self.tiles else 1)

    @property
    def cls_token(self) -> bool:
        return False


# What sets the SigLIP family apart from CLIP, beside its sizes.
SIGLIP: dict[str, Any] = {
    "kind": "siglip",
    "cls_token": False,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop": 0.0,
}

VisionConfig = VRWKVConfig | ViTConfig | TowersConfig

VISION_CONFIGS: dict[str, type[VisionConfig]] = {
    "vrwkv": VRWKVConfig,
    "vrwkv6": VRWKVConfig,
    "clip": ViTConfig,
    "siglip": ViTConfig,
    "towers": TowersConfig,
}


def vision_config(values: Any) -> VisionConfig:
    """The config of an encoder, its class by its kind; errors as `from_values`."""
    kind = values.get("kind", "vrwkv") if isinstance(values, dict) else "vrwkv"
    return from_values(preset(VISION_CONFIGS, kind, "vision kind"), values)


@dataclass(frozen=True)
class ModelConfig:
    """A whole model: language model, vision encoder (None: text only) and how the two meet."""

    rwkv: RWKVConfig
    vision: VisionConfig | None = None
    projector: ProjectorKind = "linear"
    image_tokens: int = (
        64  # per picture: a square number that patches are pooled to, and the class token where there is one
    )
    scan: Scan = "bi"
    image_position: ImagePosition = "middle"
    template: str = "visualrwkv"

    def __post_init__(self) -> None:
        choose("template", self.template, TEMPLATES)
        choose("projector", self.projector, PROJECTORS)
        choose("scan", self.scan, SCANS)
        choose("image_position", self.image_position, IMAGE_POSITIONS)
        if self.token_grid < 1 or self.token_grid**2 + self.extra_tokens != self.image_tokens:
            extra = ", and one for the class token" if self.extra_tokens else ""
            raise ValueError(
                f"image_tokens is {self.image_tokens}; it must be a square number such as 16, 64 or 576{extra}"
            )
        if self.vision and self.token_grid > self.vision.grid:
            raise ValueError(
                f"image_tokens is {self.image_tokens}, more than the {self.vision.grid**2} patches of the vision encoder"
            )

    @property
    def token_grid(self) -> int:
        """Image tokens along a side."""
        return math.isqrt(max(self.image_tokens - self.extra_tokens, 0))

    @property
    def extra_tokens(self) -> int:
        """Image tokens after those of the grid: 1 for a class token."""
        return int(self.vision is not None and self.vision.cls_token)

    @property
    def end_of_turn(self) -> int:
        """The id that closes a turn."""
        return TEMPLATES[self.template]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`; an unknown or missing setting is a ValueError that names it."""
        rwkv = from_values(RWKVConfig, data.get("rwkv") or {})
        vision = vision_config(data["vision"]) if data.get("vision") else None
        if "transformers_version" in data:  # written by transformers, with whatever else it keeps there
            data = {k: v for k, v in data.items() if k in {f.name for f in dataclasses.fields(cls)}}
        known = {k: v for k, v in data.items() if k not in HUB_SETTINGS}
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
    "rwkv5-0b4": RWKVConfig(24, 1024, version=5),
    "rwkv5-1b5": RWKVConfig(24, 2048, version=5),
    "rwkv5-3b": RWKVConfig(32, 2560, version=5),
    "rwkv5-7b": RWKVConfig(32, 4096, version=5),
    "rwkv6-1b6": RWKVConfig(n_layer=24, n_embd=2048),
    "rwkv6-3b": RWKVConfig(n_layer=32, n_embd=2560),
    "rwkv6-7b": RWKVConfig(n_layer=32, n_embd=4096, mix_rank=64, decay_rank=128),
    "rwkv7-0b1": RWKVConfig(12, 768, version=7),
    "rwkv7-0b4": RWKVConfig(24, 1024, version=7),
    "rwkv7-1b5": RWKVConfig(24, 2048, version=7, decay_rank=96, rate_rank=96, value_rank=64, gate_rank=256),
    "rwkv7-2b9": RWKVConfig(32, 2560, version=7, decay_rank=96, rate_rank=96, value_rank=64, gate_rank=320),
}

CLIP_L_336 = ViTConfig(24, 1024, 16, 4096, image_size=336, patch_size=14)
"""The encoder of the v060 releases."""

_CLASSIFIER: dict[str, Any] = {"depth": 12, "classes": 1000, "crop": 0.875}

VISION_PRESETS: dict[str, VRWKVConfig] = {
    "vrwkv_nano": VRWKVConfig(depth=4, width=128, patch_size=8, image_size=64, pos_grid=8),
    "vrwkv_t": VRWKVConfig(width=192, **_CLASSIFIER),
    "vrwkv_s": VRWKVConfig(width=384, post_norm=True, layer_scale=1.0, drop_path=0.3, **_CLASSIFIER),
    "vrwkv_b": VRWKVConfig(width=768, post_norm=True, layer_scale=1e-5, drop_path=0.5, **_CLASSIFIER),
    "vrwkv_l": VRWKVConfig(
        *(24, 1024),
        image_size=384,
        pos_grid=12,
        post_norm=True,
        layer_scale=1e-5,
        key_norm=True,
        classes=1000,
        head_width=3072,
        crop=1.0,
        drop_path=0.1,
    ),
    "vrwkv6_t": VRWKVConfig(width=192, kind="vrwkv6", **_CLASSIFIER),
    "vrwkv6_s": VRWKVConfig(width=384, kind="vrwkv6", post_norm=True, layer_scale=1e-5, drop_path=0.3, **_CLASSIFIER),
    "vrwkv6_b": VRWKVConfig(width=768, kind="vrwkv6", post_norm=True, layer_scale=1e-5, drop_path=0.5, **_CLASSIFIER),
}


@dataclass(frozen=True)
class MeetPreset:
    """How a language model and an encoder are joined when a new model is composed for stage 1."""

    projector: ProjectorKind
    image_tokens: int  # 0: as many as the encoder has patches, and its class token
    scan: Scan
    image_position: ImagePosition = "middle"
    template: str = "visualrwkv"

    def settings(self, vision: VisionConfig) -> dict[str, Any]:
        """The settings of a ModelConfig with that encoder."""
        return {**vars(self), "image_tokens": self.image_tokens or vision.grid**2 + vision.cls_token}


MEET_PRESETS: dict[str, MeetPreset] = {
    "nano": MeetPreset(projector="gated", image_tokens=16, scan="bi"),
    "v6.0": MeetPreset(projector="linear", image_tokens=0, scan="bi"),
    "HD": MeetPreset(projector="output_gated", image_tokens=0, scan="bi"),
    "UHD": MeetPreset(projector="relu", image_tokens=0, scan="bi"),
    "v7.00": MeetPreset(projector="gated", image_tokens=0, scan="uni", image_position="first"),
    "v7.01": MeetPreset(projector="gated", image_tokens=0, scan="uni", image_position="first"),
    "WorldRWKV": MeetPreset(projector="mlp", image_tokens=0, scan="uni", image_position="first", template="world"),
}


def preset(table: dict[str, Any], name: str, what: str) -> Any:
    """The preset of that name, or a ValueError that lists the names."""
    choose(what, name, table)
    return table[name]
