"""Every CUDA source compiles for the GPUs that people train on, without spills and within the registers it may use."""

import re
import shutil
import subprocess

import pytest

from visualrwkv.ops import build, library

SOURCES = [p for p in library.sources("cuda") if p.suffix == ".cu"]
REGISTERS = {  # what a kernel may use, by its file and the beginning of its name; else 255, the most there are
    ("wkv6", "void (anonymous namespace)::forward_tiles<__nv_bfloat16"): 128,
    ("mix", ""): 128,
    ("biwkv", ""): 128,
}
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc to compile the CUDA kernels with")


def compiled(source, architecture, folder) -> dict[str, dict[str, int]]:
    """What ptxas says of each kernel: registers, bytes spilled."""
    command = ["nvcc", *build.CUDA_FLAGS, f"-arch=sm_{architecture}", "-cubin", "-Xptxas", "-v", str(source)]
    done = subprocess.run([*command, "-o", str(folder / "kernel.cubin")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = subprocess.run(["c++filt"], input=done.stderr, capture_output=True, text=True, check=True).stdout
    found = {}
    for part in re.split(r"Compiling entry function '", names)[1:]:
        name = part.split("' for '")[0]
        spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", part))
        found[name] = {"registers": int(re.search(r"Used (\d+) registers", part)[1]), "spilled": spilled}
    return found


@needs_nvcc
@pytest.mark.parametrize("architecture", ["80", "90"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_compiles_without_spills(source, architecture, tmp_path):
    kernels = compiled(source, architecture, tmp_path)
    assert kernels or source.stem == "library"
    assert {name: k for name, k in kernels.items() if k["spilled"]} == {}
    for name, kernel in kernels.items():
        most = [n for (file, start), n in REGISTERS.items() if file == source.stem and name.startswith(start)]
        assert kernel["registers"] <= min(most, default=255), name
