"""The floors of the house: imports only point down, and rooms of one floor do not know each other."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = (
    ("visualrwkv.config", "visualrwkv.commandline", "visualrwkv.files"),
    ("visualrwkv.ops", "visualrwkv.text"),
    ("visualrwkv.vision", "visualrwkv.rwkv"),
    ("visualrwkv.model", "visualrwkv.formats", "visualrwkv.sampling"),
    ("visualrwkv.checkpoint", "visualrwkv.generate", "visualrwkv.saved", "visualrwkv.task"),
    ("visualrwkv.chat", "visualrwkv.pace"),
    ("visualrwkv.training", "visualrwkv.serve", "visualrwkv.hf", "visualrwkv.lmms"),
    ("visualrwkv.cli", "eval", "demo", "benchmarks"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FOLDERS = ("visualrwkv", "eval", "demo", "benchmarks")
FILES = sorted(f for folder in FOLDERS for f in (ROOT / folder).rglob("*.py") if f != ROOT / "visualrwkv/__init__.py")


def room(module: str) -> str:
    """The room that a dotted name lies in."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "visualrwkv" else parts[0]


def imports(source: str) -> set[str]:
    """Every module that a source names in an import, at the top or inside functions; relative ones begin with a dot."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            whole = base == "visualrwkv"  # from visualrwkv import ops
            found |= {f"{base}.{alias.name}" for alias in node.names} if whole else {base}
    return found


def violations(here: str, source: str) -> list[str]:
    """The imports of a file in room `here` that do not point down."""
    ours = {m for m in imports(source) if m.startswith(".") or m.split(".")[0] in FOLDERS}
    bad = []
    for module in sorted(ours):
        there = room(module)
        if module.startswith(".") or there not in FLOOR or (there != here and FLOOR[there] >= FLOOR[here]):
            bad.append(f"{here} imports {module}")
    return bad


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_point_down(file):
    here = room(".".join(file.relative_to(ROOT).with_suffix("").parts))
    assert here in FLOOR, f"{file} is in no room of the plan"
    assert violations(here, file.read_text()) == []


@pytest.mark.parametrize(
    ("here", "line"),
    [
        ("visualrwkv.config", "import visualrwkv.ops"),
        ("visualrwkv.text", "from visualrwkv import ops"),
        ("visualrwkv.rwkv", "from visualrwkv.vision.scan import read_order"),
        ("visualrwkv.generate", "def f():\n    from visualrwkv.checkpoint import load_model"),
        ("visualrwkv.chat", "from visualrwkv.cli import main"),
        ("visualrwkv.training", "import visualrwkv.serve.app"),
        ("visualrwkv.model", "from .rwkv import state"),
        ("visualrwkv.model", "from visualrwkv.unplanned import x"),
    ],
)
def test_an_import_that_points_up_or_sideways_is_seen(here, line):
    assert len(violations(here, line)) == 1


def test_files_were_found():
    assert {"model.py", "wkv6.py", "loop.py", "run.py"} <= {f.name for f in FILES}


def test_folders_that_must_not_be_packages():
    assert [p for folder in ("cuda", "eval") for p in (ROOT / folder).rglob("__init__.py")] == []


def test_no_file_without_a_subject():
    nameless = {"utils", "helpers", "common", "misc"}
    files = [f for folder in (*FOLDERS, "cuda", "scripts", "tests") for f in (ROOT / folder).rglob("*") if f.is_file()]
    assert [f for f in files if nameless & set(f.relative_to(ROOT).with_suffix("").parts)] == []


def test_importing_pulls_in_nothing_heavy():
    code = """
import sys
import visualrwkv
assert "torch" not in sys.modules
visualrwkv.load, visualrwkv.load_model, visualrwkv.encode_conversation, visualrwkv.ops, visualrwkv.vision
import visualrwkv.cli, visualrwkv.training.loop
print([m for m in ("transformers", "timm", "deepspeed", "matplotlib", "huggingface_hub", "fastapi", "gradio", "peft") if m in sys.modules])
"""
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
