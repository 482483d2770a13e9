"""Building, finding and refusing the compiled kernels."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from visualrwkv.ops import build as build_module
from visualrwkv.ops import library
from visualrwkv.ops.biwkv import bi_wkv_compiled
from visualrwkv.ops.elementwise import relu_squared
from visualrwkv.ops.gates7 import before_wkv7
from visualrwkv.ops.mix import token_mix_compiled
from visualrwkv.ops.wkv6 import wkv6_compiled
from visualrwkv.ops.wkv7 import wkv7_compiled

ROOT = Path(__file__).parents[2]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build the kernels with")


@pytest.fixture(scope="module")
def library_file():
    """The built library of this machine."""
    path = library.library_path()
    return path if path.exists() else build_module.build("none")[0]


def python(code, **environment):
    """Run Python in a process of its own, where the decision made at import is made anew."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


WHICH = """
import torch
from visualrwkv.ops import wkv6, bi_wkv
from visualrwkv.ops.wkv6 import wkv6_torch
ran = []
class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        ran.append(op.namespace)
        return op(*args, **(kwargs or {}))
x, c = torch.randn(1, 3, 1, 16), torch.randn(4)
with Watch():
    for call in (lambda: wkv6(x, x, x, x, x[0, 0]), lambda: bi_wkv(c, c, torch.randn(1, 3, 4), torch.randn(1, 3, 4))):
        ran.clear()
        call()
        print("compiled" if "visualrwkv" in ran else "torch", end=" ")
"""


def test_the_name_tells_sources_apart(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = library.library_path()
    assert before == library.library_path()
    assert before.parent == tmp_path / "visualrwkv"
    assert library.library_path("cuda") != before
    changed = tmp_path / "wkv6.cpp"
    changed.write_text("// other source")
    monkeypatch.setattr(library, "sources", lambda device: [changed])
    other = library.library_path()
    assert other != before, "other sources, another library"
    changed.write_text("// yet another")
    assert library.library_path() != other


def test_each_library_has_its_sources():
    cpu, cuda = ({p.name for p in library.sources(device)} for device in ("cpu", "cuda"))
    assert {"wkv6.cpp", "biwkv.cpp", "simd.h"} <= cpu
    assert {"library.cu", "gpu.cuh", "emulator.cuh"} <= cuda
    assert not cpu & cuda


def test_a_wheel_brings_its_library_and_a_built_one_comes_first(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(ROOT / "cuda", tmp_path / "package/_cuda")
    monkeypatch.setattr(library, "PACKAGE", tmp_path / "package")
    built = library.library_path()
    brought = tmp_path / "package/_kernels/cpu.so"
    brought.parent.mkdir()
    brought.touch()
    assert library.library_path() == brought
    built.parent.mkdir(parents=True)
    built.touch()
    assert library.library_path() == built


def test_cache_is_in_the_home_without_xdg(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert library.library_path().parent == tmp_path / ".cache" / "visualrwkv"


@needs_compiler
def test_build_leaves_one_whole_file(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "a folder/cpu.cpp"
    source.parent.mkdir()
    source.write_text('extern "C" void tiny() {}')
    for module in (library, build_module):
        monkeypatch.setattr(module, "sources", lambda device: [source])
    [path] = build_module.build("none")
    assert path == library.library_path()
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    source.write_text("this is not C++")
    with pytest.raises(RuntimeError, match=r"could not be compiled[\s\S]*error"):
        build_module.build("none")
    assert [p.name for p in path.parent.iterdir()] == [path.name], "a failed build leaves nothing behind"
    source.write_text('extern "C" void tiny() {}')
    assert build_module.build("none", tmp_path / "wheel") == [tmp_path / "wheel/cpu.so"]


def test_no_compiler_is_one_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build_module, "COMPILER", "no-such-compiler")
    with pytest.raises(RuntimeError, match="need a C\\+\\+ compiler and there is no 'no-such-compiler'"):
        build_module.build()
    with pytest.raises(SystemExit) as stop:
        build_module.main(["--cuda", "none"])
    assert stop.value.code == "error: the kernels need a C++ compiler and there is no 'no-such-compiler' on the PATH"


@needs_compiler
def test_cuda_is_for_those_who_have_its_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build_module, "CUDA_COMPILER", "no-such-nvcc")
    with pytest.raises(RuntimeError, match="there is no 'no-such-nvcc' on the PATH"):
        build_module.build("all")
    monkeypatch.setattr(build_module, "CUDA_COMPILER", "g++")  # there is one: what is asked for is looked at
    with pytest.raises(
        ValueError, match="cuda is 'hopper'; allowed are auto, none, all, or architectures such as 80,90"
    ):
        build_module.build("hopper")
    assert build_module._architectures("80,90") == ("80", "90")
    assert build_module._architectures("none") == ()


def test_each_gpu_has_its_code_once():
    every = re.findall(r"arch=compute_(\d+),code=\[(.*?)\]", build_module.cuda_plan(tuple(build_module.GENERATIONS)))
    codes = [code for _, made in every for code in made.split(",")]
    assert sorted(codes) == sorted(["compute_80", *(f"sm_{a}" for a in build_module.GENERATIONS)])
    assert all(int(ptx) <= int(code.split("_")[1]) for ptx, made in every for code in made.split(","))
    assert "'arch=compute_90,code=[sm_90]'" in build_module.cuda_plan(["90"])
    assert "'arch=compute_103,code=[sm_103]'" in build_module.cuda_plan(["103"])  # a GPU that is not in the list


@needs_compiler
def test_a_library_is_used_and_can_be_refused(library_file):
    with_library = python(WHICH, VISUALRWKV_KERNELS="1")
    assert (with_library.stdout, with_library.stderr) == ("compiled compiled ", "")
    without = python(WHICH, VISUALRWKV_KERNELS="0")
    assert (without.stdout, without.stderr) == ("torch torch ", "")


def test_a_missing_library_means_torch_and_one_line(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("VISUALRWKV_KERNELS", raising=False)
    assert imported_afresh().COMPILED is False
    assert len(caplog.messages) == 1
    assert "visualrwkv kernels build" in caplog.text
    assert not any(tmp_path.rglob("*.so")), "importing never compiles"


def test_a_broken_library_is_an_error_that_names_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("VISUALRWKV_KERNELS", raising=False)
    path = library.library_path()
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half a library")
    fresh = imported_afresh()
    assert fresh.COMPILED is True, "falling back in silence would hide a slow run"
    with pytest.raises(RuntimeError, match=r"do not load.*`visualrwkv kernels build`"):
        fresh.function("visualrwkv_wkv6_forward")


def supported() -> list[str]:
    """The variants of the CPU library that this processor runs."""
    best = library.variant()
    every = ["_baseline", "_avx2", "_avx512", "_avx512vnni"]
    return every[: every.index(best) + 1] if best else [""]


@needs_compiler
def test_every_instruction_set_computes_the_same(library_file, monkeypatch):
    g = torch.Generator().manual_seed(0)
    r, k, v, w, a, b = (torch.randn(2, 37, 3, 32, generator=g, requires_grad=True) for _ in range(6))
    u, c, d = torch.randn(3, 32, generator=g), torch.randn(9, generator=g) / 30, torch.randn(9, generator=g)
    x, y = torch.randn(2, 2, 37, 9, generator=g).unbind(0)
    weights, flat = torch.rand(4, 32, generator=g), [t[0, :, 0] for t in (k, w, r)]
    calls = {
        "wkv6": lambda: wkv6_compiled(r, k, v, w, u)[0],
        "wkv7": lambda: wkv7_compiled(r, w, k, v, a * 0.1, b * 0.1)[0],
        "bi_wkv": lambda: bi_wkv_compiled(c, d, x, y),
        "mix": lambda: torch.stack(token_mix_compiled(r[:, :, 0], None, weights[:2])),
        "before_wkv7": lambda: torch.stack(before_wkv7(*flat, *weights, 1)),
        "relu_squared": lambda: relu_squared(r),
    }
    variants = supported()
    assert variants
    found = {}
    for variant in variants:
        monkeypatch.setattr(library, "variant", lambda variant=variant: variant)
        library.function.cache_clear()
        for name, call in calls.items():
            out = call()
            gradient = torch.autograd.grad(out.square().sum(), r)[0] if out.requires_grad else out.detach()
            found.setdefault(name, []).append((out.detach(), gradient))
    library.function.cache_clear()
    for name, results in found.items():
        for other in results[1:]:
            for one, first in zip(other, results[0], strict=True):
                assert (one - first).norm() < 2e-6 * first.norm(), name


@needs_compiler
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm to look into the library with")
def test_no_function_is_shared_between_instruction_sets(library_file):
    """The linker would keep one copy of an inline function for all of them, and a baseline processor might get AVX-512."""
    symbols = subprocess.run(["nm", "-C", str(library_file)], capture_output=True, text=True, check=True).stdout
    names = [line.split(" W ")[1] for line in symbols.splitlines() if " W " in line]
    ours = [n for n in names if re.search("simd|tiles|packed|team|token|visualrwkv", n)]
    assert [n for n in ours if not re.search("::(avx512vnni|avx512|avx2|baseline|plain)::", n)] == []


def test_what_runs_here_is_told():
    with_library = python("from visualrwkv.ops.library import describe; print(*describe(), sep='|')")
    cpu, cuda = with_library.stdout.strip().split("|")
    assert cpu.startswith("cpu: ")
    assert cuda.startswith("cuda: ")
    without = python("from visualrwkv.ops.library import describe; print(*describe(), sep='|')", VISUALRWKV_KERNELS="0")
    assert without.stdout.startswith("cpu: the torch form runs")


def test_a_kernel_that_cannot_start_says_why(emulated):
    bounds = torch.zeros(1)
    emulated.libraries[0].visualrwkv_cuda_refuses = lambda *_: 1
    with pytest.raises(RuntimeError, match=r"kernel refuses could not start on cpu: invalid argument \(error 1\)"):
        library.launch("refuses", bounds, 3, 0.5, None)


def imported_afresh():
    """ops/library.py as a new import would find it."""
    spec = importlib.util.spec_from_file_location("library_afresh", library.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
