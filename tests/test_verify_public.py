"""The check of a public file, on small files of the same layouts."""

import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from visualrwkv.config import MEET_PRESETS, ModelConfig, RWKVConfig, ViTConfig
from visualrwkv.model import VisualRWKV

ROOT = Path(__file__).parents[1]
pytest.importorskip("rwkv")


@pytest.fixture(scope="module")
def released(randomise, tmp_path_factory):
    """A file in the layout of v060, with a small language model and a small CLIP."""
    vision = ViTConfig(2, 64, 1, 128, 32, 8)
    torch.manual_seed(0)
    model = randomise(
        VisualRWKV(ModelConfig(RWKVConfig(2, 64), vision, **MEET_PRESETS["v6.0"].settings(vision))), 0, 0.05
    )
    path = tmp_path_factory.mktemp("released") / "model.pth"
    torch.save(model.state_dict(), path)
    return path


def verify(*arguments):
    line = [sys.executable, "benchmarks/verify_public.py", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture
def script(released, monkeypatch):
    """The script as a module, about to be run on the released file."""
    spec = importlib.util.spec_from_file_location("verify_public", ROOT / "benchmarks/verify_public.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(sys, "argv", ["verify_public.py", str(released)])
    return script


def test_a_good_file(released, script, capsys):
    stated = hashlib.sha256(released.read_bytes()).hexdigest()
    sys.argv += ["--sha256", stated]
    script.main()
    out = capsys.readouterr().out
    said = json.loads(out.splitlines()[-1])
    assert said["sha256"] == stated
    assert said["logits"] < 1e-3
    assert said["greedy"] == 8
    assert out.count("Is there a person?\n  ") == 1


def test_another_file_than_stated(released):
    done = verify(released, "--sha256", "0" * 64)
    assert done.returncode == 1
    assert "is stated: it is another file, or was cut off" in done.stderr


def test_another_model_than_the_package_computes(script, monkeypatch, capsys):
    peer = script.peer

    def other(*arguments):
        logits, said = peer(*arguments)
        logits[7] += 0.01 * logits.std()
        return logits, said

    monkeypatch.setattr(script, "peer", other)
    with pytest.raises(SystemExit, match="the language model is not the rwkv package's"):
        script.main()
    assert "differ from the rwkv package's by 1.0e-02" in capsys.readouterr().out


def test_a_file_without_a_tensor(released, tmp_path):
    """Without its first norm a file is none of the layout: said, not computed."""
    weights = torch.load(released)
    del weights["rwkv.blocks.0.ln0.weight"]
    torch.save(weights, tmp_path / "less.pth")
    done = verify(tmp_path / "less.pth")
    assert done.returncode != 0
    assert "missing rwkv.blocks.0.ln0.weight" in done.stderr
