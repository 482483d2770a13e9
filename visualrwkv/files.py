"""Files: found here or on the Hub, read without running code that they may hold, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX, PICKLED = "model.safetensors.index.json", "pytorch_model.bin"
CONTAINERS = ("state_dict", "model", "module", "model_ema")  # what training codes put a table of tensors in


# Reading -------------------------------------------------------------------------------------------------------------


def locate(path: str | Path) -> Path:
    """The local file or directory of a path or Hub id ("name/model" or "name/model:file")."""
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


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file or of a directory's weights (whole, or in the parts that an index lists), mapped to memory.

    ValueError where the file is no plain table of tensors: one that could run code is not opened.
    """
    path = Path(path)
    if path.is_dir():
        if (path / INDEX).exists():
            parts = sorted(set(read_json(path / INDEX).get("weight_map", {}).values()))
            return {k: v for part in parts for k, v in read_tensors(path / part).items()}
        return read_tensors(
            path / (PICKLED if (path / PICKLED).exists() and not (path / WEIGHTS).exists() else WEIGHTS)
        )
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
    if isinstance(data, Mapping):
        data = next((data[name] for name in CONTAINERS if isinstance(data.get(name), Mapping)), data)
    if not isinstance(data, Mapping) or not all(isinstance(v, Tensor) for v in data.values()):
        raise ValueError(f"{path} holds no table of tensors")
    return dict(data)


def fill(module: nn.Module, weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Give a module these weights, and ValueError with the differences unless names and shapes are exactly its own."""
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
    for name, x in weights.items():
        total = x.sum(dtype=torch.float32)  # fp32: wide enough for any sum of weights
        if not total.isfinite():
            raise ValueError(f"{path} holds numbers that are not finite: {name}")
    module.load_state_dict(dict(weights), assign=True)


# Writing -------------------------------------------------------------------------------------------------------------


def write_whole(writers: Mapping[Path, Callable[[Path], object]]) -> None:
    """Let each writer make its file under another name, then put all in their places; on failure what was there stays."""
    parts = {path: path.with_name(f".{path.name}.part") for path in writers}
    try:
        for path, write in writers.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write(parts[path])
        for path, part in parts.items():
            os.replace(part, path)
    except (OSError, SafetensorError, RuntimeError) as error:
        places = ", ".join(map(str, writers))
        raise OSError(f"{places} could not be written ({error}); what was there is unchanged") from error
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def text_writers(directory: Path, texts: Mapping[str, str]) -> dict[Path, Callable[[Path], object]]:
    """What `write_whole` takes, for texts by the names of their files."""
    return {directory / name: partial(Path.write_text, data=text, encoding="utf-8") for name, text in texts.items()}


def write_directory(
    directory: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor], texts: Mapping[str, str] | None = None
) -> None:
    """Write our format: a config and the weights, as contiguous tensors of the CPU; and further texts by their names."""
    kept = {k: v.detach().cpu().contiguous() for k, v in weights.items()}
    writers = text_writers(directory, texts or {})
    writers[directory / WEIGHTS] = lambda part: save_file(kept, part, metadata={"format": "pt"})
    writers[directory / CONFIG] = lambda part: part.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_whole(writers)


def model_hash(path: str | Path) -> str:
    """Twelve hex digits that name the weights of a model directory or file."""
    place = Path(path)
    found = hashlib.sha256()
    parts = [place] if place.is_file() else sorted(p for p in place.iterdir() if p.suffix in (".safetensors", ".bin"))
    for part in parts:
        with open(part, "rb") as file:
            while chunk := file.read(1 << 24):
                found.update(chunk)
    return found.hexdigest()[:12]


SOME = 4096  # numbers of a tensor that go into a fingerprint


def fingerprint(model: nn.Module) -> str:
    """Twelve hex digits that name a model by its numbers, whatever the file and the dtype that they come from.

    Of every tensor some numbers, rounded to bf16: quick at any size, and no training leaves all of them where they were.
    """
    found = hashlib.sha256()
    for name, x in sorted(model.state_dict().items()):
        some = x.detach().flatten()[:: max(x.numel() // SOME, 1)].to("cpu", torch.bfloat16)
        found.update(f"{name} {tuple(x.shape)}".encode() + some.view(torch.int16).numpy().tobytes())
    return found.hexdigest()[:12]
