"""Cases that each run in a process of their own, with the memory that it held at most; what is done outlasts a kill.

A script gives its cases' names to `each`, which runs it again with `--only <case>`; that run prints the case's result as
its last line, in JSON. Results lie in benchmarks/results/<machine>/<name>.partial until all are there. Linux alone.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import measure  # first: it pins threads
import torch


def partial_file(name: str) -> Path:
    return measure.ROOT / "benchmarks/results" / measure.machine_name() / f"{name}.partial"


def each(name: str, script: str, cases: Sequence[str], options: Sequence[str] = ()) -> dict[str, Any]:
    """The result of every case, by its name. Those that an earlier run of the same commit and options left are kept.

    A case that the kernel kills, as it does for lack of memory, is kept as {"failed": why}.
    """
    path = partial_file(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(path.read_text()) if path.exists() else {}
    of = {"commit": measure.commit(), "options": list(options)}
    same = kept.get("of") == of and not of["commit"].endswith("+")  # edits have no name that tells them apart
    found = {case: result for case, result in kept["results"].items() if "failed" not in result} if same else {}
    for number, case in enumerate(cases):
        if case in found:
            print(f"{case}: kept from an earlier run", flush=True)
            continue
        print(f"{case} ({number + 1} of {len(cases)})", flush=True)
        found[case] = _run([sys.executable, script, *options, "--only", case])
        part = path.with_suffix(".part")
        part.write_text(json.dumps({"of": of, "results": found}, indent=1) + "\n")
        part.replace(path)
    return {case: found[case] for case in cases}


def _run(command: Sequence[str]) -> dict[str, Any]:
    cores = os.cpu_count() or 1
    os.sched_setaffinity(0, range(cores))  # torch bound this thread to one, which a child would inherit
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode == -signal.SIGKILL:
        return {"failed": "killed: out of memory"}
    if done.returncode:
        sys.exit(f"error: {' '.join(command[1:])} failed; what was measured before is kept for the next run")
    return json.loads(done.stdout.splitlines()[-1])


# Memory --------------------------------------------------------------------------------------------------------------


def resident(field: str = "VmRSS") -> int:
    """Bytes of this process in memory; "VmHWM": at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


class Peak:
    """`with Peak() as peak: ...` -> bytes in memory `before`, at most meanwhile (`most`), and `after`."""

    before = most = after = 0

    def __enter__(self) -> Peak:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before is nobody's
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        self.before = resident()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.most, self.after = resident("VmHWM"), resident()


class CudaPeak:
    """The same of a GPU's memory, as far as torch gave it out."""

    def __enter__(self) -> CudaPeak:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *_: object) -> None:
        torch.cuda.synchronize()
        self.most, self.after = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
