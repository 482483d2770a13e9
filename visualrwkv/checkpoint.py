"""Every file format: what is in a file is found out from its keys and shapes, never from its name.

Ours is a directory: `config.json` and `model.safetensors`, enough to rebuild the model. Also opened: a `.safetensors` or
`.pth` file with the public names of RWKV-6 or RWKV-7, with or without the `rwkv.` prefix, local or on the Hub.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from visualrwkv.config import MEET_PRESETS, ModelConfig, RWKVConfig, VisionConfig, from_values, preset
from visualrwkv.model import VisualRWKV
from visualrwkv.vision.vrwkv import VRWKV

CONFIG, WEIGHTS = "config.json", "model.safetensors"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# Reading -------------------------------------------------------------------------------------------------------------


def load_model(path: str | Path, device: str = "cpu", dtype: str = "float32") -> VisualRWKV:
    """Open a model: our directory, a safetensors or .pth file, "hub-id" or "hub-id:file".

    Sizes come from the file. FileNotFoundError or ValueError in one sentence where there is no such file, where it is of
    no known format, or where names or shapes do not fit.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; allowed are {', '.join(DTYPES)}")
    place = locate(path)
    if place.is_dir():
        config = read_config(place)
        weights = read_tensors(place / WEIGHTS)
    else:
        weights = rename(read_tensors(place), place)
        config = ModelConfig(infer_rwkv(weights, place))
    return build(VisualRWKV, config, weights, place).to(device, DTYPES[dtype]).eval()


def load_vision(path: str | Path) -> VRWKV:
    """Open a vision encoder from our directory; a whole model's directory gives its encoder."""
    place = locate(path)
    if not place.is_dir():
        raise ValueError(f"{place} is a file; a vision encoder is a directory with {CONFIG} and {WEIGHTS}")
    data = read_json(place / CONFIG)
    weights = read_tensors(place / WEIGHTS)
    if data.get("format") == "visualrwkv-vision":
        config = from_values(VisionConfig, data.get("vision"))
    else:
        whole = read_config(place)
        if whole.vision is None:
            raise ValueError(f"{place} has no vision encoder")
        config = whole.vision
        weights = {k.removeprefix("vit."): v for k, v in weights.items() if k.startswith("vit.")}
    return build(VRWKV, config, weights, place)


def locate(path: str | Path) -> Path:
    """The local file or directory of a path or Hub id."""
    place = Path(path)
    if place.exists():
        if place.is_dir() and not (place / CONFIG).exists():
            raise ValueError(f"{place} is no model directory: it has no {CONFIG}")
        return place
    name, _, file = str(path).partition(":")
    if place.is_absolute() or name.count("/") != 1 or name.startswith(".") or Path(name).parent.exists():
        raise FileNotFoundError(f"{path}: there is no such model file or directory")
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, file) if file else snapshot_download(name))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(f"{path}: no such file here, and the Hub gave none ({type(error).__name__})") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or one sentence about why not."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__}, not an object")
    return data


def read_config(directory: Path) -> ModelConfig:
    """The config of our directory."""
    try:
        return ModelConfig.from_dict(read_json(directory / CONFIG))
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG}: {error}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .pth file, without running any code that the file may hold."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except Exception as error:  # on a foreign file torch's unpickler raises anything; its own kinds are private to it
        if "pickl" in f"{type(error)} {error}".lower():
            raise ValueError(f"{path} is not a plain file of tensors; it was not opened: it could run code") from error
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} cannot be read as a checkpoint ({reason})") from error
    if not isinstance(data, Mapping) or not all(isinstance(v, Tensor) for v in data.values()):
        raise ValueError(f"{path} holds no table of tensors")
    return dict(data)


def rename(weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """A bare language model's names to ours."""
    if any(k.startswith("rwkv.") for k in weights):
        return weights
    if "emb.weight" not in weights:
        some = ", ".join(list(weights)[:3])
        raise ValueError(
            f"{path} is of no known format: neither emb.weight nor rwkv.emb.weight among its keys ({some}, …)"
        )
    return {f"rwkv.{k}": v for k, v in weights.items()}


def infer_rwkv(weights: dict[str, Tensor], path: Path) -> RWKVConfig:
    """Version and all sizes of a language model from the names and shapes of its tensors.

    Some RWKV-7 files hold v0, v1 and v2 of the first layer, which nothing reads: they are taken out of `weights`.
    """
    first = "rwkv.blocks.0."
    version = 7 if f"{first}att.r_k" in weights else 6
    if version == 7:
        for name in ("v0", "v1", "v2"):
            weights.pop(f"{first}att.{name}", None)
    try:
        vocab_size, n_embd = weights["rwkv.emb.weight"].shape
        n_head, head_size = weights[f"{first}att.{'r_k' if version == 7 else 'time_faaaa'}"].shape
        layers = {int(k.split(".")[2]) for k in weights if k.startswith("rwkv.blocks.")}
        sizes = {
            "n_layer": len(layers),
            "n_embd": n_embd,
            "head_size": head_size,
            "vocab_size": vocab_size,
            "dim_ffn": weights[f"{first}ffn.key.weight"].shape[0],
        }
        if version == 6:
            sizes["mix_rank"] = weights[f"{first}att.time_maa_w2"].shape[1]
            sizes["decay_rank"] = weights[f"{first}att.time_decay_w1"].shape[1]
        else:
            lows = {"decay_rank": "w1", "rate_rank": "a1", "gate_rank": "g1"}
            sizes |= {rank: weights[f"{first}att.{name}"].shape[1] for rank, name in lows.items()}
            if len(layers) > 1:
                sizes["value_rank"] = weights["rwkv.blocks.1.att.v1"].shape[1]
    except KeyError as error:
        raise ValueError(f"{path} is no RWKV-{version}: it lacks {error.args[0]}") from error
    if n_head * head_size != n_embd:
        raise ValueError(f"{path}: {n_head} heads of {head_size} do not make a width of {n_embd}")
    return RWKVConfig(version=version, **sizes)


def build(cls: type[Any], config: Any, weights: Mapping[str, Tensor], path: Path) -> Any:
    """A module of that config with these weights; strict, and without initialising what is about to be replaced."""
    with torch.device("meta"):
        module: nn.Module = cls(config)
    expected = {k: tuple(v.shape) for k, v in module.state_dict().items()}
    given = {k: tuple(v.shape) for k, v in weights.items()}
    problems = [f"missing {k}" for k in expected if k not in given]
    problems += [f"unexpected {k}" for k in given if k not in expected]
    problems += [
        f"{k} is {list(given[k])} instead of {list(shape)}"
        for k, shape in expected.items()
        if k in given and given[k] != shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{path} does not fit the model: {'; '.join(problems[:5])}{more}")
    module.load_state_dict(weights, assign=True)
    return module.requires_grad_(True)


# Writing -------------------------------------------------------------------------------------------------------------


def save_model(model: VisualRWKV, directory: str | Path, dtype: str | None = None) -> None:
    """Write our directory's files; each is replaced whole, or left as it was if the writing fails."""
    _write(Path(directory), {"format": "visualrwkv", **model.config.to_dict()}, model.state_dict(), dtype)


def save_vision(vit: VRWKV, directory: str | Path) -> None:
    """Write a vision encoder alone, for `compose`."""
    from dataclasses import asdict

    _write(Path(directory), {"format": "visualrwkv-vision", "vision": asdict(vit.config)}, vit.state_dict(), None)


def _write(directory: Path, config: dict[str, Any], weights: Mapping[str, Tensor], dtype: str | None) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    kept = {k: v.detach().to("cpu", DTYPES[dtype] if dtype else v.dtype).contiguous() for k, v in weights.items()}
    parts = {name: directory / f".{name}.part" for name in (WEIGHTS, CONFIG)}
    try:
        save_file(kept, parts[WEIGHTS], metadata={"format": "pt"})
        parts[CONFIG].write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name, part in parts.items():
            os.replace(part, directory / name)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{directory} could not be written ({error}); what was there is unchanged") from error
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def model_hash(path: str | Path) -> str:
    """Twelve hex digits that name the weights of a model directory or file."""
    place = Path(path)
    digest = hashlib.sha256()
    with open(place / WEIGHTS if place.is_dir() else place, "rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()[:12]


# Joining -------------------------------------------------------------------------------------------------------------


def compose(lm: str | Path, vision: str | Path, name: str = "nano", **overrides: Any) -> VisualRWKV:
    """A new model for stage 1: a language model's weights, an encoder's, and a fresh projector.

    `name` is a preset of how the two meet (projector, image tokens, scan, image position), each of which may be overridden.
    """
    meet = preset(MEET_PRESETS, name, "preset")
    language = load_model(lm)
    vit = load_vision(vision)
    settings = {**vars(meet), **{k: v for k, v in overrides.items() if v is not None}}
    model = VisualRWKV(ModelConfig(language.config.rwkv, vit.config, **settings))
    model.rwkv, model.vit = language.rwkv, vit
    return model
