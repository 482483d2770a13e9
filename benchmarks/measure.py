"""How everything here is measured: candidates take turns in one process, and medians and their ratios are kept.

Import this before torch: it pins threads, without which medians on a shared machine say little.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_PROC_BIND", "true")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def take_turns(
    candidates: Mapping[str, Callable[[], object]],
    seconds: float = 20.0,
    least: int = 5,
    most: int = 200,
    warm: bool = False,
) -> dict[str, list[float]]:
    """Seconds of each call of each candidate, in rounds in which each runs once, for about `seconds` in all.

    At least `least` rounds after one to warm up, unless they are warm; who goes first changes from round to round.
    """
    names = list(candidates)
    for run in () if warm else candidates.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in names}
    began = time.perf_counter()
    for turn in range(most):
        if turn >= least and time.perf_counter() - began > seconds:
            break
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            start = time.perf_counter()
            candidates[name]()
            times[name].append(time.perf_counter() - start)
    return times


def figures(times: Mapping[str, list[float]]) -> dict[str, Any]:
    """Per candidate its median, quartiles, unit, and how many times longer each other one took (median over rounds)."""
    result = {}
    for name, mine in times.items():
        low, _, high = statistics.quantiles(mine, n=4)
        ratio = {
            other: statistics.median(b / a for a, b in zip(mine, theirs, strict=True))
            for other, theirs in times.items()
            if other != name
        }
        result[name] = {
            "median": statistics.median(mine),
            "spread": [low, high],
            "unit": "s",
            "rounds": len(mine),
            "ratio": ratio,
        }
    return result


def ratio(times: Mapping[str, list[float]], slow: str, fast: str, factor: float = 1.0) -> dict[str, Any]:
    """How many times as long one took as the other, times a factor: median and quartiles over rounds, and of the fastest
    round of each, which other work disturbs least.
    """
    rounds = [factor * a / b for a, b in zip(times[slow], times[fast], strict=True)]
    low, _, high = statistics.quantiles(rounds, n=4)
    fastest = factor * min(times[slow]) / min(times[fast])
    return {"median": statistics.median(rounds), "spread": [low, high], "of the fastest": fastest}


def machine_name() -> str:
    """The directory of results: what this machine is, as far as it matters."""
    return f"cpu-{os.cpu_count()}core"


def record(name: str, measured: dict[str, Any], packages: tuple[str, ...], folder: str | None = None) -> Path:
    """Write benchmarks/results/<machine>/<name>.json: what was measured, and by what, with what, on what."""
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    result = {
        "command": " ".join(["python", *map(str, sys.argv)]),
        "commit": commit(),
        "versions": versions,
        "machine": {"cpu": _processor(), "cores": os.cpu_count(), "threads": os.environ.get("OMP_NUM_THREADS")},
        **measured,
    }
    path = ROOT / "benchmarks/results" / (folder or machine_name()) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=2) + "\n")
    part.replace(path)
    return path


def commit() -> str:
    """What is checked out; a "+" if files were changed since."""
    return _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "-uno") else "")


def _git(*words: str) -> str:
    try:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
