"""Worked cases from the official scorers, which lie beside some checkouts: every figure, in this process."""

import importlib
import json
import math
from pathlib import Path

import pytest
from questions import read_jsonl

ROOT = Path(__file__).parents[2]
PLACES = [place / "shared/eval_cases" for place in ROOT.parents]
CASES = next((place for place in PLACES if place.is_dir()), None)


def cases() -> list[Path]:
    """Every case whose bench is written."""
    found = sorted(CASES.glob("*/*")) if CASES else []
    return [case for case in found if (ROOT / f"eval/benches/{case.parent.name.replace('-', '_')}.py").exists()]


def differences(got, wanted, at=""):
    """Where two nested results differ, keys included."""
    if isinstance(wanted, dict) and isinstance(got, dict):
        odd = [f"{at}/{key}" for key in got.keys() ^ wanted.keys()]
        return odd + [
            d for key in got.keys() & wanted.keys() for d in differences(got[key], wanted[key], f"{at}/{key}")
        ]
    if isinstance(wanted, list) and isinstance(got, list) and len(wanted) == len(got):
        return [d for i, pair in enumerate(zip(got, wanted)) for d in differences(*pair, f"{at}/{i}")]
    if isinstance(wanted, float) and isinstance(got, (int, float)):
        return [] if math.isclose(got, wanted, rel_tol=0, abs_tol=1e-6) else [f"{at}: {got} instead of {wanted}"]
    return [] if got == wanted else [f"{at}: {got!r} instead of {wanted!r}"]


@pytest.mark.skipif(CASES is None, reason="the worked cases are not beside this checkout")
@pytest.mark.parametrize("case", cases(), ids=lambda case: f"{case.parent.name}-{case.name}")
def test_scores_are_the_official_ones(case):
    bench = importlib.import_module(f"benches.{case.parent.name.replace('-', '_')}")
    data = case / "data"
    rows = read_jsonl(case / "predictions.jsonl")
    wanted = json.loads((case / "expected.json").read_text())
    split = bench.splits(data)[0]
    assert differences(bench.score(data, split, rows), wanted["primary"]) == []
    if "variants" in wanted and hasattr(bench, "more"):
        further = bench.more(data, split, rows)
        assert (
            differences(
                *({k: v[k] for k in further.keys() & wanted["variants"].keys()} for v in (further, wanted["variants"]))
            )
            == []
        )


def test_a_difference_is_seen():
    assert differences({"a": {"b": 1.0}}, {"a": {"b": 1.0 + 1e-7}}) == []
    assert len(differences({"a": {"b": 1.0, "c": 2}}, {"a": {"b": 1.1}})) == 2
    assert len(differences([1.0], [1.0, 2.0])) == 1
