"""OUT/result.json: what came out, of which model, under which settings."""

from __future__ import annotations

import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from questions import whole

ROOT = Path(__file__).parents[1]
BY_BENCH = ("scores", "more", "questions", "settings", "seconds")
"""What a result has of each bench; all else is of the run."""


def surroundings() -> dict[str, Any]:
    """The commit and the versions that a result came from."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "visualrwkv"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    return {"commit": commit, "versions": versions}


def write_result(out: Path, result: dict[str, Any]) -> None:
    """OUT/result.json; benches that were asked there before, under the same settings, stay in it."""
    file = out / "result.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    same = ("model_hash", "image_position", "template", "scan", "dtype", "predictions", "limit")
    if all(before.get(name) == result.get(name) for name in same):
        result = result | {name: before.get(name, {}) | result[name] for name in BY_BENCH}
    with whole(file) as part:
        part.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
