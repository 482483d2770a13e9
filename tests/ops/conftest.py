"""The CUDA sources as a library that runs on the CPU."""

import ctypes
import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

from visualrwkv.ops import library
from visualrwkv.ops.build import build

FLAGS = ("-std=c++17", "-O2", "-x", "c++", "-DCUDA_EMULATED", "-U_FORTIFY_SOURCE", "-shared", "-fPIC")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """One worker builds the emulated library, and runs what needs it."""
    for item in items:
        if "emulated_library" in item.fixturenames:
            item.add_marker(pytest.mark.xdist_group("emulated"))


@pytest.fixture(scope="session")
def cpu_library() -> None:
    """The CPU library, built on first need."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to build the kernels with")
    if not library.library_path().exists():
        build()


class Emulated:
    """The functions of every CUDA source, and what the emulator offers beside: the order of warps, bytes moved."""

    def __init__(self, files: list[Path]):
        self.libraries = [ctypes.CDLL(str(file)) for file in files]

    def __getattr__(self, name: str):
        for found in self.libraries:
            if hasattr(found, name):
                return getattr(found, name)
        raise AttributeError(name)

    def schedule(self, order: int) -> None:
        """Run warps in turn (0), the first as far as it gets (1), or the last (2)."""
        for one in self.libraries:
            one.visualrwkv_emulator_schedule(ctypes.c_int64(order))

    def bytes(self) -> int:
        """Bytes of global memory moved since the last call."""
        counts = []
        for one in self.libraries:
            one.visualrwkv_emulator_bytes.restype = ctypes.c_int64
            counts.append(one.visualrwkv_emulator_bytes())
        return sum(counts)


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory) -> Emulated:
    if shutil.which("g++") is None:
        pytest.skip("no g++ to build the emulated kernels with")
    files = library.sources("cuda")
    headers = b"".join(f.read_bytes() for f in files if f.suffix == ".cuh")
    cache = library.library_path("cpu").parent
    cache.mkdir(parents=True, exist_ok=True)
    running, built = [], []
    for source in (f for f in files if f.suffix == ".cu"):
        digest = hashlib.sha256(headers + source.read_bytes() + " ".join(FLAGS).encode()).hexdigest()[:16]
        built.append(cache / f"emulated-{source.stem}-{digest}.so")
        if not built[-1].exists():
            part = tmp_path_factory.mktemp("emulated") / "library.so"
            command = ["g++", *FLAGS, str(source), "-o", str(part)]
            running.append((subprocess.Popen(command, stderr=subprocess.PIPE, text=True), part, built[-1]))
    for process, part, whole in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        shutil.move(part, whole)
    return Emulated(built)


@pytest.fixture
def emulated(emulated_library, monkeypatch) -> Emulated:
    """CUDA implementations, called directly, run on CPU tensors by emulation."""
    real = library.load
    monkeypatch.setattr(library, "load", lambda device: emulated_library if device == "cuda" else real(device))
    emulated_library.schedule(0)
    emulated_library.bytes()
    return emulated_library


@pytest.fixture
def split(monkeypatch):
    """split(n, sequences, heads): make an op divide each head's values into n parts."""

    def make_splits(n: int, sequences: int = 1, heads: int = 1) -> None:
        monkeypatch.setattr(library, "multiprocessors", lambda device: n * sequences * heads)

    return make_splits
