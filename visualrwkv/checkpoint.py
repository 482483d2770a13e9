"""Every file format: what is in a file is found out from its keys and shapes, never from its name.

Ours is a directory: `config.json` and `model.safetensors`, enough to rebuild the model. Also opened, local or on the Hub:
language models (BlinkDL's `.pth` of RWKV-5, 6 and 7; RWKV-org's and flash-linear-attention's directories), released
VisualRWKV files (whole or in two parts), vision encoders (CLIP and SigLIP directories, open_clip's names, Vision-RWKV's
classification files).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visualrwkv.config import (
    MEET_PRESETS,
    MODEL_TYPE,
    ModelConfig,
    VisionConfig,
    ViTConfig,
    preset,
    vision_config,
)
from visualrwkv.files import (
    CONFIG,
    WEIGHTS,
    fill,
    locate,
    model_hash,
    read_json,
    read_tensors,
    write_directory,
    write_whole,
)
from visualrwkv.formats import infer_meeting, infer_rwkv, infer_vision, projector_input, public_names, to_world
from visualrwkv.model import VisualRWKV
from visualrwkv.vision.encoder import Encoder, make_encoder
from visualrwkv.vision.openclip import open_clip_config, transformers_names
from visualrwkv.vision.vit import transformers_config
from visualrwkv.vision.vrwkv import official_names

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "class_names",
    "compose",
    "convert",
    "describe",
    "load_model",
    "load_vision",
    "model_hash",
    "read_config",
    "save_model",
    "save_vision",
]

log = logging.getLogger("visualrwkv")
VISION_TYPE = MODEL_TYPE + "-vision"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STEP_DTYPES = ("int8", "int4")  # of single tokens' steps on a CPU; the module itself is bf16
SETTINGS = ("image_tokens", "scan", "image_position", "projector", "template")
OPEN_CLIP = "open_clip:"


# Reading -------------------------------------------------------------------------------------------------------------


def load_model(
    path: str | Path,
    device: str = "cpu",
    dtype: str = "float32",
    *,
    vision: str | Path | None = None,
    **overrides: Any,
) -> VisualRWKV:
    """Open a model: our directory, a safetensors or .pth file, a directory for transformers, "hub-id" or "hub-id:file".

    Sizes come from the file. vision: the second file of a release in two parts. overrides: image_tokens, scan,
    image_position or projector where a released file is not what its kind is taken for. dtype "int8" or "int4": the
    language model's steps, a token each, round its weights so, on a CPU, and a prompt is read with the weights in bf16,
    which stay in memory beside. FileNotFoundError or ValueError
    in one sentence where there is no such file, where it is of no known format, or where names or shapes do not fit.
    """
    check_dtype(dtype, device)
    place = locate(path)
    config, weights = read_model(place, None if vision is None else locate(vision), overrides)
    if config.vision and not is_ours(place):
        name, _ = infer_meeting(config.rwkv, config.vision, weights)
        log.warning(
            "%s is taken for a %s: %d image tokens, scan %s, image position %s, projector %s, template %s",
            *(place.name, name, *(getattr(config, setting) for setting in SETTINGS)),
        )
    model = build(VisualRWKV, config, weights, place).to(device, DTYPES.get(dtype, torch.bfloat16)).eval()
    if dtype in STEP_DTYPES:
        model.rwkv.step_dtype = dtype
    return model


def check_dtype(dtype: str, device: str) -> None:
    """ValueError for a dtype that there is not, or not on this device."""
    if dtype not in (*DTYPES, *STEP_DTYPES):
        raise ValueError(f"dtype is {dtype!r}; allowed are {', '.join((*DTYPES, *STEP_DTYPES))}")
    if dtype in STEP_DTYPES and torch.device(device).type != "cpu":
        raise ValueError(
            f"dtype is {dtype!r}, which runs on a cpu, and the device is {device!r}; bfloat16 runs on both"
        )


def read_model(
    place: Path, second: Path | None = None, overrides: Mapping[str, Any] | None = None
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The config of a model and its tensors by our names, whatever its format."""
    changes = {k: v for k, v in (overrides or {}).items() if v is not None}
    if unknown := sorted(changes.keys() - set(SETTINGS)):
        raise ValueError(f"{unknown[0]} is no setting of a released model; there are {', '.join(SETTINGS)}")
    if is_ours(place):
        if second is not None:
            raise ValueError(f"{place} is a whole model; it takes no second file ({second})")
        return replace(read_config(place), **changes), read_tensors(place)
    weights = public_names(read_tensors(place), place)
    known: VisionConfig | None = None
    if second is not None:
        more, known = second_part(second)
        if both := sorted(weights.keys() & more.keys()):
            raise ValueError(f"{place} and {second} are no two parts of one model: both have {both[0]}")
        weights |= more
    rwkv = infer_rwkv(weights, place)
    encoder = {k.removeprefix("vit."): v for k, v in weights.items() if k.startswith("vit.")}
    if not encoder:
        return ModelConfig(rwkv), weights
    found = known or infer_vision(encoder, place, projector_input(weights))
    _, meet = infer_meeting(rwkv, found, weights)
    return ModelConfig(rwkv, found, **{**meet.settings(found), **changes}), weights


def second_part(place: Path) -> tuple[dict[str, Tensor], VisionConfig | None]:
    """The second file of a release in two parts, or an encoder's own directory, whose config then comes with it."""
    if place.is_dir() and read_json(place / CONFIG).get("model_type") not in (None, MODEL_TYPE):
        encoder = load_vision(place)
        return {f"vit.{k}": v for k, v in encoder.state_dict().items()}, encoder.config
    return public_names(read_tensors(place), place), None


def is_ours(place: Path) -> bool:
    """Whether a directory holds a whole model in our format."""
    return place.is_dir() and read_json(place / CONFIG).get("model_type") == MODEL_TYPE


def read_config(directory: Path) -> ModelConfig:
    """The config of our directory."""
    try:
        return ModelConfig.from_dict(read_json(directory / CONFIG))
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG}: {error}") from error


def load_vision(path: str | Path) -> Encoder:
    """Open a vision encoder.

    path: our directory (of an encoder, or of a whole model), a CLIP or SigLIP directory or Hub id,
    "open_clip:NAME:TAG" with one of open_clip's tags or a file of weights, a Vision-RWKV classification file, or a
    released VisualRWKV file. ValueError in one sentence where it is none of these.
    """
    if str(path).startswith(OPEN_CLIP):
        return _open_clip(str(path))
    place = locate(path)
    config: VisionConfig
    values = read_json(place / CONFIG) if place.is_dir() else {}
    weights = read_tensors(place)
    model_type = values.get("model_type")
    if model_type == VISION_TYPE:
        config = vision_config(values.get("vision"))
    elif model_type and model_type != MODEL_TYPE:
        config = transformers_config(values)
        weights = _vision_part(weights)
    elif any(k.startswith(("vit.", "rwkv.")) for k in weights):
        ours = model_type == MODEL_TYPE
        weights = weights if ours else public_names(weights, place)
        read_by_projector = projector_input(weights)
        weights = {k.removeprefix("vit."): v for k, v in weights.items() if k.startswith("vit.")}
        if not weights:
            raise ValueError(f"{place} has no vision encoder")
        found = read_config(place).vision if ours else infer_vision(weights, place, read_by_projector)
        assert found is not None
        config = found
    else:
        weights = official_names(weights)
        config = infer_vision(weights, place)
    return build(make_encoder, config, weights, place)


def _vision_part(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The vision encoder's tensors of a CLIP or SigLIP directory, by names that open with `vision_model.`."""
    part = {k: v for k, v in weights.items() if k.startswith("vision_model.")} or {
        f"vision_model.{k}": v for k, v in weights.items()
    }
    return {k: v for k, v in part.items() if not k.endswith("position_ids")}  # a buffer of older files


def _open_clip(path: str) -> Encoder:
    """The encoder of "open_clip:NAME:TAG"."""
    name, _, tag = path.removeprefix(OPEN_CLIP).partition(":")
    if not tag:
        raise ValueError(f"{path} names no weights: give {OPEN_CLIP}NAME:TAG, with a tag of open_clip's or a file")
    config = open_clip_config(name)
    if Path(tag).exists():
        weights = read_tensors(tag)
    else:
        import open_clip

        try:
            weights = open_clip.create_model(name, pretrained=tag).visual.state_dict()
        except RuntimeError as error:
            raise ValueError(f"{path}: {str(error).splitlines()[0]}") from error
    weights = {k.removeprefix("module."): v for k, v in weights.items()}
    return build(make_encoder, config, transformers_names(weights), Path(path))


def build(make: Callable[[Any], Any], config: Any, weights: Mapping[str, Tensor], path: Path) -> Any:
    """A module of that config with these weights; strict, and without initialising what is about to be replaced."""
    with torch.device("meta"):
        module: nn.Module = make(config)
    fill(module, weights, path)
    assert not any(x.is_meta for x in module.state_dict().values())
    assert not any(x.is_meta for x in module.buffers())
    return module.requires_grad_(True)


# Writing -------------------------------------------------------------------------------------------------------------


def save_model(
    model: VisualRWKV, directory: str | Path, dtype: str | None = None, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Write our directory's files; each is replaced whole, or left as it was if the writing fails.

    weights: in place of the model's own.
    """
    weights = model.state_dict() if weights is None else weights
    weights = {k: v.detach().to(DTYPES[dtype]) if dtype else v for k, v in weights.items()}
    write_directory(Path(directory), {"model_type": MODEL_TYPE, **model.config.to_dict()}, weights)


def save_vision(vit: Encoder, directory: str | Path, names: Sequence[str] = ()) -> None:
    """Write a vision encoder alone, for `compose`; names: of the classes that its classifier tells apart."""
    config = {"model_type": VISION_TYPE, "vision": asdict(vit.config)} | ({"class_names": [*names]} if names else {})
    write_directory(Path(directory), config, vit.state_dict())


def class_names(path: str | Path) -> list[str]:
    """The names of the classes that an encoder's directory was saved with; none of one that has no names."""
    return read_json(Path(path) / CONFIG).get("class_names", []) if Path(path).is_dir() else []


def convert(
    path: str | Path,
    out: Path,
    vision: str | Path | None = None,
    beside: Callable[[ModelConfig], tuple[dict[str, Any], dict[str, str]]] | None = None,
    **overrides: Any,
) -> ModelConfig:
    """Write any model as our directory or, where `out` ends in .pth, in the public layout; every number stays as it is.

    In a public file the language model alone has no `rwkv.` before its names. beside: what else a directory holds,
    settings in config.json and texts by the names of their files. Returns the config; errors as `load_model`, and nothing is written
    then.
    """
    place = locate(path)
    config, weights = read_model(place, None if vision is None else locate(vision), overrides)
    build(VisualRWKV, config, weights, place)  # strict
    if out.suffix == ".pth":
        worlds = config.template == "world" and isinstance(config.vision, ViTConfig)
        public = to_world(weights) if worlds or config.vision is None else weights
        table = {k: v.contiguous() for k, v in public.items()}
        write_whole({out: lambda part: torch.save(table, part)})
    else:
        more, texts = beside(config) if beside else ({}, {})
        write_directory(out, {"model_type": MODEL_TYPE, **config.to_dict(), **more}, weights, texts)
    return config


def describe(path: str | Path, vision: str | Path | None = None, **overrides: Any) -> dict[str, str]:
    """What a model file or directory holds, by the names of the facts; its numbers are not read. Errors as `load_model`."""
    place = locate(path)
    config, weights = read_model(place, None if vision is None else locate(vision), overrides)
    rwkv, count = config.rwkv, {"rwkv": 0, "vit": 0, "proj": 0}
    for name, x in weights.items():
        count[name.split(".")[0]] += x.numel()
    total = sum(count.values())
    dtypes = sorted({str(x.dtype).removeprefix("torch.") for x in weights.values()})
    state = 4 * rwkv.n_layer * (2 * rwkv.n_embd + rwkv.n_embd * rwkv.head_size)
    facts = {
        "file": str(place),
        "format": "ours" if is_ours(place) else "public",
        "language model": f"RWKV-{rwkv.version}, {rwkv.n_layer} layers of {rwkv.n_embd}, {rwkv.n_head} heads of "
        f"{rwkv.head_size}, vocabulary {rwkv.vocab_size:,}, {count['rwkv']:,} parameters",
    }
    if config.vision:
        like = "" if is_ours(place) else f", as in {infer_meeting(rwkv, config.vision, weights)[0]}"
        encoder = config.vision
        facts |= {
            "vision encoder": f"{encoder.kind}, {encoder.grid} x {encoder.grid} patches of width {encoder.width}, "
            f"{count['vit']:,} parameters",
            "projector": f"{config.projector}, {count['proj']:,} parameters",
            "pictures": f"{config.image_tokens} image tokens, scan {config.scan}, position {config.image_position}{like}",
        }
    return facts | {
        "stored as": ", ".join(dtypes),
        "memory": ", ".join(f"{size(total * x.itemsize)} in {name}" for name, x in DTYPES.items()),
        "state of a session": size(state),
    }


def size(count: int) -> str:
    """Bytes as a person reads them."""
    for unit, one in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= one:
            return f"{count / one:.3g} {unit}"
    return f"{count} bytes"


# Joining -------------------------------------------------------------------------------------------------------------


def compose(lm: str | Path, vision: str | Path, name: str = "nano", **overrides: Any) -> VisualRWKV:
    """A new model for stage 1: a language model's weights, an encoder's, and a fresh projector.

    `name` is a preset of how the two meet (projector, image tokens, scan, image position), each of which may be overridden.
    """
    meet = preset(MEET_PRESETS, name, "preset")
    language = load_model(lm)
    vit = load_vision(vision)
    settings = {**meet.settings(vit.config), **{k: v for k, v in overrides.items() if v is not None}}
    model = VisualRWKV(ModelConfig(language.config.rwkv, vit.config, **settings))
    model.rwkv, model.vit = language.rwkv, vit
    return model
