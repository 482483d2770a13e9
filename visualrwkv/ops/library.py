"""Finds the compiled kernels: two libraries, for CPU and CUDA, with C interfaces, so they depend on no version of torch.

The decision is made once, at import: `COMPILED` and `CUDA` say whether the ops use a library or their torch form.
Importing never compiles; `visualrwkv kernels build` does, into the user's cache, and a wheel brings both along.
`VISUALRWKV_KERNELS=0` forces the torch form.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

PACKAGE = Path(__file__).parents[1]
Device = Literal["cpu", "cuda"]
ON_CPU = {torch.float32: "", torch.bfloat16: "_bf16"}  # how the C functions' names end
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}  # as cuda/gpu.cuh numbers them


FOLDERS = (PACKAGE.parent / "cuda", PACKAGE / "_cuda")
"""Where sources are: beside the package in a checkout, inside it in a wheel. An exported model comes without."""


def has_sources(device: Device) -> bool:
    """Whether there is anything to make that library from."""
    return any(_sources(device))


def sources(device: Device) -> list[Path]:
    """The files that a library is made from, headers included."""
    found = next(_sources(device), None)
    if found is None:
        raise FileNotFoundError(f"no kernel sources in {FOLDERS[0]} or {FOLDERS[1]}")
    return found


def _sources(device: Device) -> Iterator[list[Path]]:
    endings = (".cpp", ".h") if device == "cpu" else (".cu", ".cuh")
    for folder in FOLDERS:
        if found := [p for p in sorted(folder.glob("*")) if p.suffix in endings]:
            yield found


def library_path(device: Device = "cpu") -> Path:
    """Where the library for these sources belongs, whether or not it is there: in the cache, or as a wheel brought it.

    The name in the cache holds a hash of the sources, so a library made from others is never loaded.
    """
    packaged = PACKAGE / "_kernels" / f"{device}.so"
    if not has_sources(device):
        return packaged
    digest = hashlib.sha256(platform.machine().encode())
    for source in (*sources(device), Path(__file__).with_name("build.py")):  # build.py: the flags
        digest.update(source.name.encode() + source.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    built = cache / "visualrwkv" / f"{device}-{digest.hexdigest()[:16]}.so"
    return packaged if packaged.exists() and not built.exists() else built


def _found(device: Device) -> bool:
    return os.environ.get("VISUALRWKV_KERNELS") != "0" and library_path(device).exists()


COMPILED: bool = _found("cpu")
CUDA: bool = _found("cuda")


@functools.cache
def _say_torch_runs(device: Device) -> None:
    """One line, once: silence would hide a slow run."""
    if os.environ.get("VISUALRWKV_KERNELS") != "0":
        logging.getLogger(__name__).warning(
            "no compiled kernels for %s at %s: the slower torch form runs; %s",
            {"cpu": "the CPU", "cuda": "CUDA"}[device],
            library_path(device),
            "make them with `visualrwkv kernels build`" if has_sources(device) else "the package visualrwkv has them",
        )


if not COMPILED:
    _say_torch_runs("cpu")


def has_cuda() -> bool:
    """Whether CUDA tensors have compiled kernels; asked for the first time without them, says so in the log."""
    if not CUDA:
        _say_torch_runs("cuda")
    return CUDA


@functools.cache
def load(device: Device) -> ctypes.CDLL:
    """The library. RuntimeError if it is absent or does not load.

    Loading waits for the first use, so that a broken library does not stop the command that replaces it.
    """
    try:
        return ctypes.CDLL(str(library_path(device)))
    except OSError as error:
        raise RuntimeError(
            f"the compiled kernels do not load ({error}); rebuild them with `visualrwkv kernels build`"
        ) from error


@functools.cache
def variant() -> str:
    """Which of its instruction sets the CPU library runs here: the ending of its functions' names, "_avx512" …"""
    choose = load("cpu").visualrwkv_cpu_variant
    choose.restype = ctypes.c_char_p
    return choose().decode()


@functools.cache
def function(name: str, *argtypes: type):  # -> a ctypes function returning nothing
    """The C function `name` of the CPU library, for this processor. RuntimeError if it is not there."""
    try:
        found = getattr(load("cpu"), name + variant())
    except AttributeError as error:
        raise RuntimeError(
            f"the compiled kernels do not load ({error}); rebuild them with `visualrwkv kernels build`"
        ) from error
    found.argtypes, found.restype = argtypes, None
    return found


def launch(name: str, *arguments: Tensor | list[Tensor] | int | float | None) -> None:
    """Call `visualrwkv_cuda_<name>` on the current stream of the tensors' device.

    Tensors (contiguous) become pointers, a list of them an array of these, None a null pointer, int an int64, float a C
    float. RuntimeError with CUDA's
    words if a kernel cannot start; what happens inside one shows, as always with CUDA, at a later synchronisation.
    """
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    words = [_c(a) for a in arguments]
    call = getattr(load("cuda"), f"visualrwkv_cuda_{name}")
    if device.type == "cuda":
        with torch.cuda.device(device):
            status = call(*words, ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream))
    else:  # the emulated library, which only tests load
        status = call(*words, ctypes.c_void_p(None))
    if status:
        describe = load("cuda").visualrwkv_cuda_error
        describe.restype = ctypes.c_char_p
        raise RuntimeError(
            f"the CUDA kernel {name} could not start on {device}: {describe(status).decode()} (error {status}); if it "
            "was built for another GPU, `visualrwkv kernels build` makes one for this machine"
        )


def pointers(tensors: list[Tensor]) -> Any:
    """Where these are, as a C array."""
    return (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))


def _c(argument: Tensor | list[Tensor] | int | float | None) -> Any:
    if isinstance(argument, list):
        return pointers(argument)
    if argument is None or isinstance(argument, Tensor):
        return ctypes.c_void_p(None if argument is None else argument.data_ptr())
    return ctypes.c_int64(argument) if isinstance(argument, int) else ctypes.c_float(argument)


def describe() -> list[str]:
    """What runs here, one line for the CPU and one for CUDA."""
    lines = []
    for device, used in (("cpu", COMPILED), ("cuda", CUDA)):
        path = library_path(device)  # type: ignore[arg-type]
        if used and device == "cuda":
            architectures = load("cuda").visualrwkv_cuda_architectures
            architectures.restype = ctypes.c_char_p
            lines.append(f"cuda: {path}, for {architectures().decode()}")
        elif used:
            lines.append(f"cpu: {path}, {variant().strip('_') or platform.machine()}")
        else:
            lines.append(f"{device}: the torch form runs ({'VISUALRWKV_KERNELS=0' if path.exists() else f'no {path}'})")
    return lines


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many blocks a GPU runs side by side at least; 1 for the emulator."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
