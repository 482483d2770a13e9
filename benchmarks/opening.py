"""Opening a released file: memory and the time to the first token. `python benchmarks/opening.py` (some minutes, 4 GB of disk).

Makes a file of random numbers in the layout of VisualRWKV-v060-1B6 (CLIP ViT-L/14-336 and RWKV-6 1B6, 3.8 GB in bf16), then
opens it in a fresh process for each dtype and asks about a picture. Anonymous memory is what the process itself needs: pages of
the mapped file come and go with what else the machine does.

Writes benchmarks/results/<machine>/opening.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import measure  # first: it pins threads
import torch


def make(path: Path, lm: str) -> int:
    """Write such a file; returns the number of its parameters."""
    from visualrwkv.config import CLIP_L_336, MEET_PRESETS, RWKV_PRESETS, ModelConfig
    from visualrwkv.model import VisualRWKV

    with torch.device("meta"):
        model = VisualRWKV(ModelConfig(RWKV_PRESETS[lm], CLIP_L_336, **MEET_PRESETS["v6.0"].settings(CLIP_L_336)))
    weights = {k: 0.02 * torch.randn(v.shape, dtype=torch.bfloat16) for k, v in model.state_dict().items()}
    torch.save(weights, path)
    return sum(v.numel() for v in weights.values())


def anonymous() -> int:
    """Bytes of this process that no file backs."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def open_and_ask(path: Path, dtype: str) -> dict[str, float]:
    """Seconds to open and to the first token, and the peak of anonymous memory meanwhile."""
    from PIL import Image

    from visualrwkv.chat import load

    picture = Image.effect_noise((640, 480), 60).convert("RGB")
    peak, done = anonymous(), threading.Event()

    def look() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=look)
    watcher.start()
    began = time.perf_counter()
    vlm = load(path, dtype=dtype)
    opened = time.perf_counter()
    for _ in vlm.stream(picture, "What is this?", max_new_tokens=1):
        pass
    answered = time.perf_counter()
    done.set()
    watcher.join()
    return {"open": opened - began, "first token": answered - began, "peak anonymous bytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm", default="rwkv6-1b6", help="a preset's name")
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float32"])
    parser.add_argument("--opened", nargs=2, metavar=("FILE", "DTYPE"), help=argparse.SUPPRESS)  # the fresh process
    options = parser.parse_args()
    if options.opened:
        print(json.dumps(open_and_ask(Path(options.opened[0]), options.opened[1])))
        return
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.pth"
        parameters = make(file, options.lm)
        for dtype in options.dtypes:
            command = [sys.executable, __file__, "--opened", str(file), dtype]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            weights = parameters * getattr(torch, dtype).itemsize
            figures[dtype] = {**found, "weights bytes": weights, "ratio": found["peak anonymous bytes"] / weights}
            print(f"{dtype}: {figures[dtype]}")
    shapes = {
        "file": f"v060 layout, {options.lm}, {parameters:,} parameters in bf16",
        "picture": "640 x 480, 577 image tokens",
    }
    path = measure.record("opening", {"shapes": shapes, "figures": figures}, ("visualrwkv", "torch", "transformers"))
    print(json.dumps({"written": str(path.relative_to(measure.ROOT))}))


if __name__ == "__main__":
    main()
