"""Building, finding and refusing the compiled kernels."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from visualrwkv.ops import build as build_module
from visualrwkv.ops import library

ROOT = Path(__file__).parents[2]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build the kernels with")


@pytest.fixture(scope="module")
def library_file():
    """The built library of this machine."""
    path = library.library_path()
    return path if path.exists() else build_module.build()


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


def test_cache_and_hash(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = library.library_path()
    assert before == library.library_path()
    assert before.parent == tmp_path / "visualrwkv"
    monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, "-DOTHER"))
    assert library.library_path() != before, "other flags, other library"
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(library, "_processor", lambda: "another machine")
    assert library.library_path() != before, "another processor, another library"
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    changed = tmp_path / "wkv6.cpp"
    changed.write_text("// other source")
    monkeypatch.setattr(library, "sources", lambda: [changed])
    assert library.library_path() != before, "other sources, another library"


def test_cache_is_in_the_home_without_xdg(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert library.library_path().parent == tmp_path / ".cache" / "visualrwkv"


@needs_compiler
def test_build_leaves_one_whole_file(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "tiny.cpp"
    source.write_text('extern "C" void tiny() {}')
    for module in (library, build_module):
        monkeypatch.setattr(module, "sources", lambda: [source])
    path = build_module.build()
    assert path == library.library_path()
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    source.write_text("this is not C++")
    with pytest.raises(RuntimeError, match=r"could not compile[\s\S]*this is not C|could not compile[\s\S]*error"):
        build_module.build()
    assert [p.name for p in path.parent.iterdir()] == [path.name], "a failed build leaves nothing behind"


def test_no_compiler_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build_module, "COMPILER", "no-such-compiler")
    with pytest.raises(RuntimeError, match="need a C\\+\\+ compiler and there is no 'no-such-compiler'"):
        build_module.build()


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


def imported_afresh():
    """ops/library.py as a new import would find it."""
    spec = importlib.util.spec_from_file_location("library_afresh", library.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
