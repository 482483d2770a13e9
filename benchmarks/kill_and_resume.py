"""Kills a training run with SIGKILL at random moments and shows that what comes of it is the same, bit for bit.

    python benchmarks/kill_and_resume.py --kills 20

A tiny model is trained once without interruption and once with a kill at each of so many moments, half of them as soon as a
checkpoint begins to be written. Losses, records and final weights must be equal: exit status 1 and a sentence where they are not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]

import torch  # noqa: E402
from PIL import Image  # noqa: E402

from visualrwkv.checkpoint import load_model, save_model  # noqa: E402
from visualrwkv.config import ModelConfig, RWKVConfig, VRWKVConfig  # noqa: E402
from visualrwkv.model import VisualRWKV  # noqa: E402

ROOT = Path(__file__).parents[1]
VISION = VRWKVConfig(depth=2, width=16, patch_size=8, image_size=32, pos_grid=4)
LANGUAGE = RWKVConfig(3, 32, head_size=16, mix_rank=4, decay_rank=4)


def make(folder: Path) -> None:
    """A tiny model and forty records."""
    torch.manual_seed(0)
    save_model(VisualRWKV(ModelConfig(LANGUAGE, VISION, "gated", 16)), folder / "model")
    records = []
    for i in range(40):
        Image.effect_noise((40, 32), 10 + 2 * i).convert("RGB").save(folder / f"{i}.png")
        turns = [
            {"from": "human", "value": f"<image>\nWhat is number {i}?"},
            {"from": "gpt", "value": f"It is {i * i}."},
        ]
        records.append({"id": i, "image": f"{i}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))


def command(folder: Path, out: str, steps: int) -> list[str]:
    files = ["--stage", "finetune", "--model", folder / "model", "--data", folder / "data.json", "--out", folder / out]
    recipe = [
        "--tokens",
        "160",
        "--steps",
        steps,
        "--save-every",
        "3",
        "--no-bf16",
        "--lr",
        "1e-2",
        "--look-ahead",
        "8",
    ]
    return [sys.executable, "-m", "visualrwkv.training", *map(str, files + recipe)]


def written(out: Path) -> set[str]:
    """The files of checkpoints."""
    return {os.path.join(at, name) for at, _, names in os.walk(out / "checkpoints") for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder)
        subprocess.run(command(folder, "steady", options.steps), env=environment, check=True, stderr=subprocess.DEVNULL)
        told, out = command(folder, "killed", options.steps), folder / "killed"
        kills = {"in a step": 0, "while a checkpoint was written": 0}
        while sum(kills.values()) < options.kills and not (out / "model.safetensors").exists():
            running = subprocess.Popen(told, env=environment, stderr=subprocess.DEVNULL)
            before, writing = written(out), sum(kills.values()) % 2
            while running.poll() is None and not (
                written(out) - before if writing else (out / "metrics.jsonl").exists()
            ):
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.02 if writing else 0.4))
            if running.poll() is None:
                running.kill()
                kills["while a checkpoint was written" if writing else "in a step"] += 1
            running.wait()
        done = subprocess.run(told, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"the run did not go on after {kills}: {done.stderr[-500:]}")
        rows = [[json.loads(line) for line in (folder / run / "metrics.jsonl").open()] for run in ("steady", "killed")]
        losses = [[(row["step"], row["loss"], row["tokens"]) for row in part] for part in rows]
        weights = [load_model(folder / run).state_dict() for run in ("steady", "killed")]
        if losses[0] != losses[1]:
            step = next((a[0] for a, b in zip(*losses) if a != b), len(losses[1]))
            raise SystemExit(f"after {kills} the losses differ from step {step} on")
        if any(not torch.equal(weights[0][k], weights[1][k]) for k in weights[0]):
            raise SystemExit(f"after {kills} the weights differ")
        print(f"{options.steps} steps, killed {kills}: losses, tokens and weights are equal, bit for bit")


if __name__ == "__main__":
    main()
