"""A task: what a model remembers before it reads the first word. State tuning learns it, and it is a file of a few MB.

The file holds `blocks.N.att.time_state` (H, N, N), named and laid out as RWKV-PEFT, RWKV-Runner and others do, [value, key]
in every version, so that theirs open too. L layers, H heads, N head size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from visualrwkv.config import RWKVConfig
from visualrwkv.files import fingerprint, read_tensors, write_whole
from visualrwkv.rwkv.network import RWKV
from visualrwkv.rwkv.state import State

TASK = "state.safetensors"
FORMAT, FORMAT_VERSION = "visualrwkv-task", 1
SIZES = ("version", "n_layer", "n_embd", "head_size")


def save_task(file: Path, wkv: Tensor, config: RWKVConfig, model: str) -> None:
    """Write the matrices (L, H, N, N) of a task; model: the `fingerprint` of the language model that it is for."""
    tensors = {tensor_name(i): x.contiguous() for i, x in enumerate(turned(wkv.detach().cpu().float(), config))}
    about = {"format": FORMAT, "format_version": FORMAT_VERSION, "model": model}
    about |= {size: getattr(config, size) for size in SIZES}
    metadata = {k: str(v) for k, v in about.items()}
    write_whole({file: lambda part: save_file(tensors, part, metadata=metadata)})


def load_task(path: str | Path, rwkv: RWKV) -> State:
    """What a session of this task starts from, of one row, on the model's device.

    path: a file of ours, the directory of the run that made it, or a file of RWKV-PEFT, which does not say what model it
    is for. FileNotFoundError or ValueError in one sentence where there is none, or where it is for another model.
    """
    path, config = Path(path), rwkv.config
    path = path / TASK if path.is_dir() else path
    tensors, about = read_tensors(path), read_metadata(path)
    if about.get("format") == FORMAT:
        if about.get("format_version") != str(FORMAT_VERSION):
            raise ValueError(
                f"{path} is a task of format version {about.get('format_version')}, and this package reads {FORMAT_VERSION}; "
                "open it with the version that made it"
            )
        theirs, ours = ({size: str(find(size)) for size in SIZES} for find in (about.get, vars(config).get))
        if theirs != ours:
            raise ValueError(
                f"{path} was tuned for an {words(theirs)}, not for this {words(ours)}; load the model it is for"
            )
    check(tensors, config, path)
    if (made_for := about.get("model")) and made_for != (this := fingerprint(rwkv)):
        raise ValueError(
            f"{path} was tuned for a model with other weights ({made_for}, not {this}); load the model it is for"
        )
    wkv = torch.stack([tensors[tensor_name(i)].float() for i in range(config.n_layer)])
    return State.starting(turned(wkv, config).contiguous().to(rwkv.emb.weight.device))


def tensor_name(layer: int) -> str:
    return f"blocks.{layer}.att.time_state"


def turned(wkv: Tensor, config: RWKVConfig) -> Tensor:
    """From our layout to the file's or back: a `State` has [key, value] in RWKV-5 and 6."""
    return wkv if config.version == 7 else wkv.transpose(-1, -2)


def words(sizes: dict[str, str]) -> str:
    return "RWKV-{version} of {n_layer} layers of {n_embd} with heads of {head_size}".format(**sizes)


def read_metadata(path: Path) -> dict[str, Any]:
    """What a safetensors file says of itself."""
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def check(tensors: dict[str, Tensor], config: RWKVConfig, path: Path) -> None:
    """ValueError unless these are a task's tensors for a model of that config."""
    wanted = {tensor_name(i): (config.n_head, config.head_size, config.head_size) for i in range(config.n_layer)}
    for key, shape in wanted.items():
        if key not in tensors:
            some = ", ".join(list(tensors)[:3])
            raise ValueError(
                f"{path} is no task for a model of {config.n_layer} layers: it lacks {key} (it has {some}, …)"
            )
        if tuple(tensors[key].shape) != shape:
            raise ValueError(
                f"{path} is for another model: {key} is {list(tensors[key].shape)} instead of {list(shape)}"
            )
        if not tensors[key].isfinite().all():
            raise ValueError(f"{path} holds numbers that are not finite: {key}")
    if more := [key for key in tensors if key not in wanted]:
        raise ValueError(f"{path} is no task for a model of {config.n_layer} layers: it has {more[0]}")
