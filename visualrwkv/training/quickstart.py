"""The quickstart's main job: the real stages at nano size, from drawn pictures to a scored model, on a laptop.

Each phase is a process of its own and leaves a directory under runs/quickstart; one that is there is not done again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from visualrwkv.commandline import parse, run
from visualrwkv.training.recipes import RECIPES, EncoderRecipe
from visualrwkv.training.sheet import contact_sheet

HOME = Path("runs/quickstart")
RETELL: dict[str, Any] = {"steps": 320, "tokens": 2048, "lr_final": 2e-3}
"""How the first text stage differs from the preset's. From sentences that retell a sentence a model learns soon what goes
with what; from questions alone it does not in all the time there is."""


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
            family = [me, *me.children(recursive=True)]
            # Resident pages are quick to count and an upper bound; shared ones are told apart only where it matters.
            if self.total(family, lambda p: p.memory_info().rss) > self.peak:
                self.peak = max(self.peak, self.total(family, lambda p: p.memory_full_info().pss))
            time.sleep(0.5)

    @staticmethod
    def total(family: list[Any], size: Callable[[Any], int]) -> int:
        """The sum over processes; one that ended meanwhile counts nothing."""
        import psutil

        total = 0
        for process in family:
            with contextlib.suppress(psutil.Error):
                total += size(process)
        return total


@dataclass(frozen=True)
class Command:
    """What to run, and what it finds in its environment."""

    words: Sequence[str]
    variables: dict[str, str] = field(default_factory=dict)


def python(*words: str, **options: object) -> Command:
    """A command of this Python; options as `--name value`."""
    given = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return Command([sys.executable, *words, *given])


def start(command: Command, lanes: int) -> subprocess.Popen:
    """Start a command on its share of the cores, when so many lanes run side by side."""
    environment = {**os.environ, **command.variables}
    if lanes > 1:  # a thread that waits must not keep another lane from its core; alone, it is quicker not to sleep
        threads = max(1, (os.cpu_count() or 1) // lanes)
        environment |= {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    return subprocess.Popen(command.words, env=environment)


def finish(lanes: Sequence[Sequence[Command]]) -> None:
    """Run lanes side by side, the commands of each one after the other; if one fails, or at Ctrl-C, end the others and
    stop with its status."""
    waiting = [list(lane) for lane in lanes]
    running = {i: start(lane.pop(0), len(lanes)) for i, lane in enumerate(waiting)}
    try:
        while running:
            for i, process in list(running.items()):
                if process.poll() is None:
                    continue
                if process.returncode:
                    told = " ".join(map(str, process.args))  # type: ignore[union-attr,arg-type]
                    print(f"stopped with status {process.returncode}: {told}", file=sys.stderr)
                    raise SystemExit(process.returncode)
                del running[i]
                if waiting[i]:
                    running[i] = start(waiting[i].pop(0), len(lanes))
            time.sleep(0.1)
    finally:
        for process in running.values():
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
        self.peaks: dict[str, int] = kept.get("peak_memory_bytes", {})
        self.memory = Memory()
        self.memory.start()

    def __call__(self, name: str, title: str, *lanes: Sequence[Command]) -> None:
        """One phase: its lanes of commands side by side, on the cores shared out evenly."""
        if name in self.done:
            print(f"── {title}: done before, in {self.seconds[name]:.0f} s", flush=True)
            return
        print(f"── {title}", flush=True)
        began, self.memory.peak = time.monotonic(), 0
        try:
            finish(lanes)
            self.done.append(name)
        finally:  # what was spent counts, whether or not the phase came to its end
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began
            self.peaks[name] = max(self.peaks.get(name, 0), self.memory.peak)
            self.save()

    def save(self) -> None:
        kept = {"recipe": self.recipe, "done": self.done, "seconds": self.seconds, "peak_memory_bytes": self.peaks}
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(kept, indent=2) + "\n")
        part.replace(self.file)


def main() -> None:
    options = parse(Options)
    recipe = {
        "train": options.train,
        "test": options.test,
        "encoder": asdict(EncoderRecipe()),
        "retell": asdict(replace(RECIPES["nano"]["language"], **RETELL)),
        **{stage: asdict(RECIPES["nano"][stage]) for stage in ("language", "pretrain", "finetune")},
    }
    phase = Phases(options, json.loads(json.dumps(recipe)))
    data, encoder, retell, language = HOME / "data", HOME / "encoder", HOME / "retell", HOME / "language"
    pretrain, finetune, scores = HOME / "pretrain", HOME / "finetune", HOME / "eval"
    watch = ["--watch", str(data / "val.json")]
    phase(
        "data",
        "data: pictures and questions",
        [python("-m", "visualrwkv.training.scenes", out=data, train=options.train, test=options.test)],
    )
    read = ["-m", "visualrwkv.training", "--stage", "language"]
    phase(
        "pretrained",
        "what stands in for pretrained weights: a vision encoder, and a language model that has only read",
        [python("-m", "visualrwkv.training.encoder", data=data, out=encoder)],
        [
            python(*read, model="rwkv6-nano", data=data / "retell.json", out=retell, **RETELL),
            python(*read, model=retell, data=data / "language.json", out=language),
        ],
    )
    phase(
        "pretrain",
        "stage 1: the projector learns to speak to the language model",
        [
            Command(
                ["bash", "scripts/pretrain.sh", *watch],
                {
                    "LM": str(language),
                    "VISION": str(encoder),
                    "DATA": str(data / "captions.json"),
                    "OUT": str(pretrain),
                },
            )
        ],
    )
    phase(
        "finetune",
        "stage 2: projector and language model learn to answer",
        [
            Command(
                ["bash", "scripts/finetune.sh", *watch],
                {"MODEL": str(pretrain), "DATA": str(data / "mix.json"), "OUT": str(finetune)},
            )
        ],
    )
    phase(
        "eval",
        "evaluation, with and without the picture",
        [python("eval/run.py", "--blind", bench="scenes", data=data, model=finetune, out=scores)],
    )
    report(phase, scores, recipe)


def report(phase: Phases, scores: Path, recipe: dict[str, Any]) -> None:
    """result.json, the contact sheet, and the line to type next."""
    figures = json.loads((scores / "result.json").read_text())["scores"]["scenes"]
    blind = figures.pop("blind")
    peak = max(phase.peaks.values())
    result = {
        "test": figures["test"]["accuracy"],
        "test_unseen": figures["test_unseen"]["accuracy"],
        "blind": blind["test"]["accuracy"],
        "per_type": {**figures, "blind": blind["test"], "blind_unseen": blind["test_unseen"]},
        "seconds": sum(phase.seconds.values()),
        "seconds_per_phase": phase.seconds,
        "peak_memory_bytes": peak,
        "peak_memory_bytes_per_phase": phase.peaks,
        "recipe": recipe,
    }
    part = HOME / ".result.part"
    part.write_text(json.dumps(result, indent=2) + "\n")
    part.replace(HOME / "result.json")
    draw_answers(scores, HOME / "contact_sheet.png")
    kinds = [k for k in figures["test"] if k != "accuracy"]
    print(f"\n{'':<14}{'test':>8}{'unseen':>8}{'blind':>8}")
    for kind in ["accuracy", *kinds]:
        row = [part[kind] for part in (figures["test"], figures["test_unseen"], blind["test"])]
        print(f"{kind:<14}" + "".join(f"{100 * v:>7.1f}%" for v in row))
    print(
        f"\n{result['seconds']:.0f} s, peak memory {peak / 2**30:.2f} GiB; {HOME / 'result.json'}, {HOME / 'contact_sheet.png'}"
    )
    picture = HOME / "data/images/test/000000.png"
    print(f"\nAsk it yourself:\n  .venv/bin/visualrwkv chat --model {HOME / 'finetune'} --image {picture}")


def draw_answers(scores: Path, out: Path, columns: int = 8, rows: int = 4) -> None:
    """The contact sheet: questions of both splits, drawn without looking."""
    import random

    answers: list[dict[str, Any]] = []
    for split in ("test", "test_unseen"):
        lines = (scores / f"scenes-{split}.jsonl").read_text().splitlines()
        answers += random.Random(0).sample([json.loads(line) for line in lines], columns * rows // 2)
    title = f"{columns * rows // 2} questions each of test (above) and test_unseen (below), drawn at random"
    contact_sheet(answers, out, columns, title)


if __name__ == "__main__":
    run(main)
