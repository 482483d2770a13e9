"""The quickstart's main job: the real stages at nano size, from drawn pictures to a scored model, on a laptop.

Each phase is a process of its own and leaves a directory under runs/quickstart; one that is there is not done again.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from visualrwkv.commandline import parse, run
from visualrwkv.training.encoder import EncoderRecipe
from visualrwkv.training.recipes import RECIPES

HOME = Path("runs/quickstart")
PYTHON = sys.executable


@dataclass(frozen=True)
class Options:
    """Train a small VisualRWKV through the real stages, score it, and say how to ask it."""

    fresh: bool = False  # throw away what an earlier run made
    train: int = 12_000  # pictures to train on
    test: int = 1000  # pictures in each test split


class Memory(threading.Thread):
    """The most memory that this process and all below it held at once, shared pages counted once."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0

    def run(self) -> None:
        import psutil

        me = psutil.Process()
        while True:
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:  # it ended between the two calls
                    continue
            self.peak = max(self.peak, total)
            time.sleep(0.5)


def start(command: Sequence[str], threads: int | None = None, **variables: str) -> subprocess.Popen:
    """A phase's process; `threads` where several run side by side."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", **variables}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    return subprocess.Popen(command, env=environment)


def finish(*processes: subprocess.Popen) -> None:
    """Wait for phases; if one fails or Ctrl-C is pressed, end the others and stop with its status."""
    try:
        waiting = list(processes)
        while waiting:
            for process in waiting:
                if process.poll() is not None:
                    waiting.remove(process)
                    if process.returncode:
                        told = " ".join(map(str, process.args))  # type: ignore[union-attr,arg-type]
                        print(f"stopped with status {process.returncode}: {told}", file=sys.stderr)
                        raise SystemExit(process.returncode)
                    break
            else:
                time.sleep(0.1)
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
                process.wait()


class Phases:
    """Runs phases in order and keeps how long each took, so that an interrupted job adds up rightly."""

    def __init__(self, options: Options, recipe: dict[str, Any]):
        self.file = HOME / "phases.json"
        self.recipe = recipe
        kept = json.loads(self.file.read_text()) if self.file.exists() else {}
        if options.fresh and HOME.exists():
            shutil.rmtree(HOME)
            kept = {}
        elif kept and kept["recipe"] != recipe:
            raise ValueError(f"{HOME} holds a quickstart with another recipe; --fresh throws it away and starts over")
        HOME.mkdir(parents=True, exist_ok=True)
        self.done: list[str] = kept.get("done", [])
        self.seconds: dict[str, float] = kept.get("seconds", {})
        self.peak: int = kept.get("peak_memory_bytes", 0)
        self.memory = Memory()
        self.memory.start()

    def __call__(self, name: str, title: str, *commands: tuple[Sequence[str], dict[str, str]]) -> None:
        """One phase: its commands side by side, on the cores shared out evenly."""
        if name in self.done:
            print(f"── {title}: done before, in {self.seconds[name]:.0f} s", flush=True)
            return
        print(f"── {title}", flush=True)
        began = time.monotonic()
        threads = max(1, (os.cpu_count() or 1) // len(commands)) if len(commands) > 1 else None
        try:
            finish(*(start(command, threads, **variables) for command, variables in commands))
            self.done.append(name)
        finally:  # what was spent counts, whether or not the phase came to its end
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began
            self.save()

    def save(self) -> None:
        self.peak = max(self.peak, self.memory.peak)
        kept = {"recipe": self.recipe, "done": self.done, "seconds": self.seconds, "peak_memory_bytes": self.peak}
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(kept, indent=2) + "\n")
        part.replace(self.file)


def main() -> None:
    options = parse(Options)
    recipe = {
        "train": options.train,
        "test": options.test,
        "encoder": asdict(EncoderRecipe()),
        **{stage: asdict(r) for stage, r in RECIPES["nano"].items()},
    }
    phase = Phases(options, json.loads(json.dumps(recipe)))
    data, encoder, language = HOME / "data", HOME / "encoder", HOME / "language"
    pretrain, finetune, scores = HOME / "pretrain", HOME / "finetune", HOME / "eval"
    watch = ["--watch", str(data / "test.json")]
    train = [PYTHON, "-m", "visualrwkv.training"]
    draw = [PYTHON, "-m", "visualrwkv.training.scenes", "--out", str(data)]
    phase(
        "data",
        "data: pictures and questions",
        ([*draw, "--train", str(options.train), "--test", str(options.test)], {}),
    )
    phase(
        "pretrained",
        "what stands in for pretrained weights: a vision encoder, and a language model that has only read",
        ([PYTHON, "-m", "visualrwkv.training.encoder", "--data", str(data), "--out", str(encoder)], {}),
        (
            [
                *train,
                "--stage",
                "language",
                "--model",
                "rwkv6-nano",
                "--data",
                str(data / "language.json"),
                "--out",
                str(language),
            ],
            {},
        ),
    )
    phase(
        "pretrain",
        "stage 1: the projector learns to speak to the language model",
        (
            ["bash", "scripts/pretrain.sh", *watch],
            {"LM": str(language), "VISION": str(encoder), "DATA": str(data / "train.json"), "OUT": str(pretrain)},
        ),
    )
    phase(
        "finetune",
        "stage 2: projector and language model learn to answer",
        (
            ["bash", "scripts/finetune.sh", *watch],
            {"MODEL": str(pretrain), "DATA": str(data / "train.json"), "OUT": str(finetune)},
        ),
    )
    ask = [PYTHON, "eval/run.py", "--bench", "scenes", "--data", str(data), "--model", str(finetune)]
    phase("eval", "evaluation, with and without the picture", ([*ask, "--blind", "--out", str(scores)], {}))
    report(phase, scores, recipe)


def report(phase: Phases, scores: Path, recipe: dict[str, Any]) -> None:
    """result.json, the contact sheet, and the line to type next."""
    figures = json.loads((scores / "result.json").read_text())["scores"]["scenes"]
    blind = figures.pop("blind")
    phase.save()
    result = {
        "test": figures["test"]["accuracy"],
        "test_unseen": figures["test_unseen"]["accuracy"],
        "blind": blind["test"]["accuracy"],
        "per_type": {**figures, "blind": blind["test"], "blind_unseen": blind["test_unseen"]},
        "seconds": sum(phase.seconds.values()),
        "seconds_per_phase": phase.seconds,
        "peak_memory_bytes": phase.peak,
        "recipe": recipe,
    }
    part = HOME / ".result.part"
    part.write_text(json.dumps(result, indent=2) + "\n")
    part.replace(HOME / "result.json")
    contact_sheet(scores, HOME / "contact_sheet.png")
    kinds = [k for k in figures["test"] if k != "accuracy"]
    print(f"\n{'':<14}{'test':>8}{'unseen':>8}{'blind':>8}")
    for kind in ["accuracy", *kinds]:
        row = [part[kind] for part in (figures["test"], figures["test_unseen"], blind["test"])]
        print(f"{kind:<14}" + "".join(f"{100 * v:>7.1f}%" for v in row))
    print(
        f"\n{result['seconds']:.0f} s, peak memory {phase.peak / 2**30:.2f} GiB; {HOME / 'result.json'}, {HOME / 'contact_sheet.png'}"
    )
    picture = HOME / "data/images/test/000000.png"
    print(f"\nAsk it yourself:\n  .venv/bin/visualrwkv chat --model {HOME / 'finetune'} --image {picture}")


def contact_sheet(scores: Path, out: Path, columns: int = 8, rows: int = 4) -> None:
    """Pictures with question and answer, right ones green, wrong ones red with what was right; drawn without looking."""
    import random

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    answers = []
    for split in ("test", "test_unseen"):
        lines = (scores / f"scenes-{split}.jsonl").read_text().splitlines()
        answers += random.Random(0).sample([json.loads(line) for line in lines], columns * rows // 2)
    figure, axes = plt.subplots(rows, columns, figsize=(columns * 1.9, rows * 2.6))
    for place, row in zip(axes.flat, answers):
        given, right = row["text"], row["answer"]
        good = given.strip().lower() == right.lower()
        place.imshow(Image.open(row["image"]))
        place.set_axis_off()
        place.set_title("\n".join(textwrap.wrap(row["prompt"], 26)), fontsize=7, loc="left")
        said = f"✓ {given}" if good else f"✗ {given} (right: {right})"
        place.text(
            0,
            1.0,
            said,
            transform=place.transAxes,
            fontsize=8,
            color="tab:green" if good else "tab:red",
            va="top",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
    figure.suptitle(
        f"{columns * rows // 2} questions each of test (above) and test_unseen (below), drawn at random", fontsize=9
    )
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    run(main)
