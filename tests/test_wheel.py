"""The wheel brings its kernels along: installed where there is no compiler, it runs them."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = """
import shutil, sys, torch
assert not shutil.which("g++") and not shutil.which("nvcc")
import visualrwkv
from visualrwkv.ops import library, wkv6, wkv7
from visualrwkv.ops.wkv6 import wkv6_torch
assert visualrwkv.__file__.startswith(sys.argv[1]), visualrwkv.__file__
assert library.COMPILED
r, k, v, w = torch.randn(4, 1, 20, 2, 32).unbind(0)
torch.testing.assert_close(wkv6(r, k, v, w, r[0, 0]), wkv6_torch(r, k, v, w, r[0, 0]), rtol=1e-4, atol=1e-4)
print(*library.describe(), sep="\\n")
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build the kernels with")
@pytest.mark.skipif(not (ROOT / ".venv").exists(), reason="no .venv, which the script would make")
def test_a_wheel_needs_no_compiler(tmp_path):
    building = subprocess.run(
        ["bash", "scripts/build_wheel.sh"],
        cwd=ROOT,
        env={**os.environ, "CUDA": "none", "OUT": str(tmp_path / "dist")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert building.returncode == 0, building.stdout + building.stderr
    [wheel] = (tmp_path / "dist").iterdir()
    assert "-py3-none-manylinux_2_" in wheel.name
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python = tmp_path / "env/bin/python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel], check=True)
    [site] = (tmp_path / "env/lib").glob("python*/site-packages")
    (site / "torch_is_there.pth").write_text(sysconfig.get_path("purelib"))  # 6 GB need not be installed once more
    environment = {"PATH": str(tmp_path / "env/bin"), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [python, "-c", CODE, site], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"cpu: {site / 'visualrwkv/_kernels/cpu.so'}")
    assert done.stderr == ""
