"""docs/evaluation.md shows what the benches say themselves, and every bench keeps the contract."""

import importlib
import inspect
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
BENCHES = sorted(file.stem for file in (ROOT / "eval/benches").glob("*.py"))


@pytest.mark.parametrize("stem", BENCHES)
def test_the_page_shows_the_files_of_every_bench(stem):
    bench = importlib.import_module(f"benches.{stem}")
    assert f"```\n{bench.TREE}\n```" in PAGE
    name = stem if f"`{stem}`" in PAGE else stem.replace("_", "-")
    assert f"\n### {name}\n" in PAGE
    assert f"--bench {name} " in PAGE


@pytest.mark.parametrize("stem", BENCHES)
def test_every_bench_keeps_the_contract(stem):
    bench = importlib.import_module(f"benches.{stem}")
    parameters = {
        "splits": ["data"],
        "load": ["data", "split"],
        "score": ["data", "split", "rows"],
        "more": ["data", "split", "rows"],
        "per_question": ["data", "split", "rows"],
        "submit": ["data", "split", "rows", "out"],
    }
    for name, wanted in parameters.items():
        if function := getattr(bench, name, None):
            assert [p for p in inspect.signature(function).parameters if p != "only"] == wanted
        else:
            assert name in ("more", "per_question", "submit")


def test_no_picture_is_opened_to_score():
    for file in (ROOT / "eval").rglob("*.py"):
        assert "Image.open" not in file.read_text(encoding="utf-8"), file
