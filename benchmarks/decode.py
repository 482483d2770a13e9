"""A token on the CPU against the `rwkv` package and the memory's speed: `python benchmarks/decode.py` (some five minutes).

RWKV-6 and RWKV-7 of 190 M and RWKV-6 of 1.6 B with random weights, batches of 1 and 16: ours in bf16, int8 and int4, the
package in bf16, and one read of as many bytes as the bf16 step reads, plain and with prefetches. Each model has a process of
its own, since the package is imported for one version. Writes benchmarks/results/<machine>/decode.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import measure  # first: it pins threads
import torch
from torch import nn

from visualrwkv.config import RWKV_PRESETS, RWKVConfig
from visualrwkv.model import LANGUAGE_MODELS
from visualrwkv.ops import library
from visualrwkv.ops.bandwidth import read
from visualrwkv.ops.pages import Pages
from visualrwkv.ops.token_step import TokenStep
from visualrwkv.rwkv.state import State

MODELS = {
    "rwkv6-190m": RWKVConfig(12, 768),
    "rwkv7-190m": RWKV_PRESETS["rwkv7-0b1"],
    "rwkv6-1b6": RWKV_PRESETS["rwkv6-1b6"],
}
DTYPES = ("bfloat16", "int8", "int4")
BATCH = 16


def random_model(config: RWKVConfig) -> nn.Module:
    """A language model of bf16 noise; speed does not depend on what the numbers are."""
    with torch.device("meta"):
        net = LANGUAGE_MODELS[config.version](config).to(torch.bfloat16)
    net = net.to_empty(device="cpu").requires_grad_(False)
    noise = 0.02 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    for parameter in net.parameters():
        flat = parameter.view(-1)
        for part in flat.split(len(noise)):
            part.copy_(noise[: len(part)])
    return net


def package(net: nn.Module, version: int, folder: str) -> Any:
    """The `rwkv` package's model of the same numbers. A process can have it of one version only."""
    os.environ |= {"RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0", "RWKV_V7_ON": str(int(version == 7))}
    path = Path(folder) / "random"
    torch.save(net.state_dict(), path.with_suffix(".pth"))
    from rwkv.model import RWKV

    quiet = {} if version == 7 else {"verbose": False}
    return RWKV(model=str(path if version == 7 else path.with_suffix(".pth")), strategy="cpu bf16", **quiet)


def candidates(name: str, folder: str) -> tuple[dict[str, Callable[[], object]], dict[str, int]]:
    """What takes turns, and the bytes that each of our steps reads."""
    config = MODELS[name]
    net = random_model(config)
    theirs = package(net, config.version, folder)
    _, after = theirs.forward([5], None)
    found: dict[str, Callable[[], object]] = {"rwkv package": lambda: theirs.forward([5], after)}
    sizes = {}
    for dtype in DTYPES:
        step = TokenStep(net, dtype)
        sizes[dtype] = step.nbytes()
        for batch in (1, BATCH):
            state = State.zeros(config, batch)
            arrays = (state.att_shift, state.ffn_shift, state.wkv)
            x = net.emb(torch.full((batch,), 5))
            found[f"{dtype}, batch {batch}"] = lambda step=step, x=x, arrays=arrays: step(x, arrays)
    del net  # the package and our steps have copies
    memory = Pages().empty(sizes["bfloat16"] // 1024 * 256, torch.int32)  # in pages such as the weights are in
    memory.random_()
    found["read, plain"] = lambda: read(memory, prefetch=False)
    found["read, prefetched"] = lambda: read(memory, prefetch=True)
    return found, sizes


def summary(times: dict[str, list[float]]) -> dict[str, Any]:
    """The bars' ratios: medians over rounds, and the same of each one's fastest round, which other work disturbs least."""

    ratio = partial(measure.ratio, times)
    bound = min(("read, plain", "read, prefetched"), key=lambda n: statistics.median(times[n]))
    return {
        "bandwidth bound": bound,
        "bf16 step's share of it": ratio(bound, "bfloat16, batch 1"),
        **{f"{dtype} against the rwkv package": ratio("rwkv package", f"{dtype}, batch 1") for dtype in DTYPES},
        f"tokens/s, batch {BATCH} against 1": ratio("bfloat16, batch 1", f"bfloat16, batch {BATCH}", BATCH),
    }


@torch.inference_mode()
def one(name: str, seconds: float) -> dict[str, Any]:
    """All that is measured of a model."""
    with tempfile.TemporaryDirectory() as folder:
        found, sizes = candidates(name, folder)
    times = measure.take_turns(found, seconds)
    figures = measure.figures(times)
    for key, values in figures.items():
        values["fastest"] = min(times[key])
    here = {"kernels": library.variant().strip("_"), "threads": torch.get_num_threads()}
    return {"figures": figures, "bars": summary(times), "bytes": sizes, **here}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--seconds", type=float, default=20.0, help="about so long a model")
    parser.add_argument("--only", choices=list(MODELS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not library.COMPILED:
        sys.exit("error: there are no compiled kernels to measure; `visualrwkv kernels build` makes them")
    if options.only:
        print(json.dumps(one(options.only, options.seconds)))
        return
    measured = {}
    for name in options.models:
        command = [sys.executable, __file__, "--only", name, "--seconds", str(options.seconds)]
        os.sched_setaffinity(
            0, range(os.cpu_count() or 1)
        )  # torch bound this thread to one, which a child would inherit
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        measured[name] = json.loads(done.stdout.splitlines()[-1])
        for bar, value in measured[name]["bars"].items():
            shown = value if isinstance(value, str) else f"{value['median']:.2f} ({value['of the fastest']:.2f})"
            print(f"{name}: {bar}: {shown}", flush=True)
    shapes = {name: f"{c.n_layer} layers of {c.n_embd}, RWKV-{c.version}" for name, c in MODELS.items()}
    results = {
        "shapes": {"weights": shapes, "batch": [1, BATCH], "state": "zeros"},
        "figures": {name: m["figures"] for name, m in measured.items()},
        **{key: {name: m[key] for name, m in measured.items()} for key in ("bars", "bytes", "kernels", "threads")},
    }
    path = measure.record("decode", results, ("visualrwkv", "torch", "rwkv"))
    print(json.dumps({"written": str(path.relative_to(measure.ROOT))}))


if __name__ == "__main__":
    main()
