"""The papers' claims about accuracy, on `scenes` at nano size: `python benchmarks/claims.py` (hours; it goes on where it stopped).

Each claim is a comparison of training runs that differ in one thing: the recurrence (RWKV-5, RWKV-6, RWKV-7, and a Llama from
transformers), where pictures stand, the scan over image tokens, how many there are, and what the loss is a mean of. Equal are
the blocks' parameters (to half a percent), data, order, steps, rates and the frozen encoder; a seed changes fresh weights, the
order of the records and the language model that a run starts from. As many runs go side by side as there are cores.

Runs and their models lie in --home; data and encoder are the quickstart's, made here if they are not there. Writes
benchmarks/results/<machine>/claims.json and .png with what is finished, with 95 % intervals over seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import measure  # first: it pins threads
from claims_job import Trial
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

QUICKSTART = measure.ROOT / "runs/quickstart"
SPLITS = ("test", "test_unseen", "blind")
BASE = Trial()
"""What the others are measured against."""

EXPERIMENTS: dict[str, dict[str, Trial]] = {
    "recurrence": {kind: Trial(kind=kind) for kind in ("RWKV-5", "RWKV-6", "RWKV-7", "Llama")},
    "position": {name: Trial(position=name) for name in ("first", "middle", "last")},
    "scan": {name: Trial(scan=name) for name in ("uni", "bi", "multi")},
    "image tokens": {str(count): Trial(tokens=count) for count in (4, 16, 64)},
    "loss": {"mean over samples": Trial(), "mean over tokens": Trial(loss="token")},
    "the Llama's rates": {f"× {rate:g}": Trial(kind="Llama", rate=rate) for rate in (0.5, 1.0, 2.0)},
}

PUBLISHED = {
    "recurrence": "VQAv2, 1.6B: RWKV-5 51.1, RWKV-6 65.8; LLaVA-1.5 of 7B 78.5 beside VisualRWKV of 7B 75.8",
    "position": "VQAv2, 7B: first 67.9, middle (sandwich) 69.7, last 63.1",
    "scan": "VQAv2, 1.6B: uni 51.0 and bi 65.6 (base), bi 69.3 and multi 69.2 (with the sandwich)",
    "image tokens": "TextVQA, 1.6B at test: 577 tokens 50.3, 145 46.4, 1 41.7",
}
"""arXiv 2406.13362, tables 1 to 4 and 9: other data and a thousand times the size, so directions alone compare."""


def wanted(experiments: list[str], seeds: int, steps: int) -> list[Trial]:
    """Every run once: the recurrences of all seeds first, then seed after seed of the others."""
    ordered = (
        [t for seed in range(seeds) for t in seeded("recurrence", seed, steps)] if "recurrence" in experiments else []
    )
    ordered += [t for seed in range(seeds) for name in experiments for t in seeded(name, seed, steps)]
    return list(dict.fromkeys(ordered))


def seeded(experiment: str, seed: int, steps: int) -> list[Trial]:
    return [replace(trial, seed=seed, steps=steps) for trial in EXPERIMENTS[experiment].values()]


def result_of(home: Path, trial: Trial) -> Path:
    return home / "vision" / trial.name / "result.json"


# Running -------------------------------------------------------------------------------------------------------------


class Lanes:
    """Runs trials side by side, one to a core; of those that start from one language model the first makes it."""

    def __init__(self, home: Path, data: Path, encoder: Path, trials: list[Trial]):
        self.home, self.data, self.encoder = home, data, encoder
        self.waiting = [t for t in trials if not result_of(home, t).exists()]
        self.running: dict[subprocess.Popen, Trial] = {}

    def ready(self, trial: Trial) -> bool:
        made = (self.home / "language" / trial.language.name / "language/model.safetensors").exists()
        return made or all(other.language != trial.language for other in self.running.values())

    def start(self, trial: Trial) -> None:
        self.waiting.remove(trial)
        (self.home / "logs").mkdir(parents=True, exist_ok=True)
        words = [sys.executable, str(Path(__file__).with_name("claims_job.py")), json.dumps(asdict(trial))]
        with open(self.home / "logs" / f"{trial.name}.log", "a") as log:
            places = [str(place) for place in (self.home, self.data, self.encoder)]
            threads = {"OMP_NUM_THREADS": "1", "OMP_PROC_BIND": "false"}  # bound, all runs would share one core
            run = subprocess.Popen([*words, *places], stdout=log, stderr=log, env={**os.environ, **threads})
        self.running[run] = trial

    def run(self, lanes: int) -> None:
        """All that wait. A run that fails is told at the end, and ends this with status 1 then."""
        failed: list[Trial] = []
        columns = (
            TextColumn("runs"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        with Progress(*columns, console=Console(stderr=True), speed_estimate_period=1e5) as bar:
            task = bar.add_task("", total=len(self.waiting))
            try:
                while self.waiting or self.running:
                    for trial in [t for t in self.waiting if self.ready(t)][: lanes - len(self.running)]:
                        if self.ready(trial) and len(self.running) < lanes:
                            self.start(trial)
                    time.sleep(0.5)
                    for run in [run for run in self.running if run.poll() is not None]:
                        trial = self.running.pop(run)
                        bar.advance(task)
                        if run.returncode:
                            failed.append(trial)
                    bar.update(task, description=", ".join(trial.name for trial in self.running.values()))
            finally:
                for run in self.running:
                    run.terminate()
                for run in self.running:
                    run.wait()
        if failed:
            logs = ", ".join(str(self.home / "logs" / f"{trial.name}.log") for trial in failed)
            sys.exit(f"error: {len(failed)} runs failed, see {logs}; the same command tries them again")


def material(home: Path) -> tuple[Path, Path]:
    """The pictures and the encoder: the quickstart's, or made anew as it does."""
    data, encoder = QUICKSTART / "data", QUICKSTART / "encoder"
    if not (data / "test_unseen.json").exists() or not (encoder / "model.safetensors").exists():
        data, encoder = home / "data", home / "encoder"
        python = [sys.executable, "-m"]
        if not (data / "test_unseen.json").exists():
            subprocess.run([*python, "visualrwkv.training.scenes", "--out", str(data)], check=True)
        if not (encoder / "model.safetensors").exists():
            words = ["visualrwkv.training.encoder", "--data", str(data), "--out", str(encoder)]
            subprocess.run([*python, *words], check=True)
    return data, encoder


# Telling -------------------------------------------------------------------------------------------------------------


def interval(values: list[float]) -> dict[str, Any]:
    """Their mean and its 95 % interval by Student's t, in percent; half is None for a single one."""
    half = None
    if len(values) > 1:
        from scipy.stats import t

        half = 100 * float(t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return {"mean": 100 * mean(values), "half": half, "each": [100 * x for x in values], "unit": "%"}


def gathered(home: Path, experiments: list[str], seeds: int, steps: int) -> dict[str, Any]:
    """Of every experiment and variant: each split's accuracy, and by how much it beats the base, seed by seed."""
    found: dict[str, Any] = {}
    for name in experiments:
        for label, trial in EXPERIMENTS[name].items():
            scores = read_scores(home, replace(trial, steps=steps), seeds)
            base = read_scores(home, replace(BASE, steps=steps), seeds)
            if not scores:
                continue
            both = [seed for seed in scores if seed in base]
            row: dict[str, Any] = {split: interval([s[split]["accuracy"] for s in scores.values()]) for split in SPLITS}
            if trial != BASE and both:
                row["over the base"] = {
                    split: interval([scores[s][split]["accuracy"] - base[s][split]["accuracy"] for s in both])
                    for split in SPLITS
                }
            row["kinds of question"] = {
                kind: 100 * mean(s["test"][kind] for s in scores.values())
                for kind in next(iter(scores.values()))["test"]
            }
            found.setdefault(name, {})[label] = row
    return found


def read_scores(home: Path, trial: Trial, seeds: int) -> dict[int, dict[str, Any]]:
    """The scores of a variant by seed, of those that are finished."""
    files = {seed: result_of(home, replace(trial, seed=seed)) for seed in range(seeds)}
    return {seed: json.loads(file.read_text())["scores"] for seed, file in files.items() if file.exists()}


def told(value: dict[str, Any]) -> str:
    return f"{value['mean']:5.1f}" + (f" ± {value['half']:.1f}" if value["half"] is not None else "")


def draw(found: dict[str, Any], path: Path) -> None:
    """Each experiment as a panel of bars: seen pairs, unseen pairs, and blind."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(4.4 * columns, 3.4 * rows), sharey=True, squeeze=False)
    for panel, (name, variants) in zip(panels.flat, found.items()):
        for i, split in enumerate(SPLITS):
            places = [x + (i - 1) * 0.27 for x in range(len(variants))]
            values = [row[split] for row in variants.values()]
            halves = [v["half"] or 0 for v in values]
            style = {"color": ("#2a6f97", "#89c2d9", "#c9c9c9")[i], "capsize": 3, "label": split.replace("_", " ")}
            panel.bar(places, [v["mean"] for v in values], 0.25, yerr=halves, **style)
        panel.set_xticks(range(len(variants)), variants)
        panel.set(title=name, ylim=(0, 100))
        panel.grid(axis="y", alpha=0.3)
        panel.set_axisbelow(True)
    for panel in panels.flat[len(found) :]:
        panel.axis("off")
    for row in panels:
        row[0].set_ylabel("right answers, %")
    panels[0, 0].legend(fontsize=8, loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=measure.ROOT / "runs/claims")
    parser.add_argument(
        "--experiments", nargs="*", choices=list(EXPERIMENTS), default=list(EXPERIMENTS), metavar="NAME"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=BASE.steps, help="of stage 2")
    parser.add_argument("--lanes", type=int, default=os.cpu_count() or 1, help="runs side by side")
    parser.add_argument("--tell", action="store_true", help="train nothing: write what is finished")
    options = parser.parse_args()
    if min(options.seeds, options.steps, options.lanes) < 1:
        parser.error("--seeds, --steps and --lanes must be at least 1")
    if not options.tell:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the runs are told to save and end, too
        data, encoder = material(options.home)
        Lanes(options.home, data, encoder, wanted(options.experiments, options.seeds, options.steps)).run(options.lanes)
    found = gathered(options.home, options.experiments, options.seeds, options.steps)
    if not found:
        parser.error(f"nothing is finished under {options.home}; leave --tell out")
    from claims_models import KINDS, model, size

    shapes = {
        "parameters of the blocks": {kind: size(model(kind).rwkv) for kind in KINDS},
        "base": asdict(replace(BASE, steps=options.steps)),
        "interval": "95 %, Student's t over seeds; over the base: of the differences, seed by seed",
    }
    results = {"shapes": shapes, "published": PUBLISHED, "figures": found}
    path = measure.record("claims", results, ("visualrwkv", "torch", "transformers", "deepspeed"))
    draw(found, path.with_suffix(".png"))
    for name, variants in found.items():
        print(f"\n{name}" + (f"; published: {PUBLISHED[name]}" if name in PUBLISHED else ""))
        for label, row in variants.items():
            over = f"   over the base {told(row['over the base']['test'])}" if "over the base" in row else ""
            print(f"  {label:<18}" + "   ".join(f"{split} {told(row[split])}" for split in SPLITS) + over)
    print(json.dumps({"written": str(path.relative_to(measure.ROOT))}))


if __name__ == "__main__":
    main()
