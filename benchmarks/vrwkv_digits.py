"""Vision-RWKV against a ViT of equal size on real pictures: `python benchmarks/vrwkv_digits.py` (some ten minutes on a core)

Handwritten digits, as scripts/train_vrwkv.sh takes them without DATA: vrwkv_nano and vit_nano, which has an MLP of 4.5 times
its width and so as many parameters within a thousandth, by one recipe, three seeds each. A seed sets the weights at the start
and all that is drawn; the pictures to check with are the same in all runs. The accuracy is that of the end, not of the best check.

Intervals are of 95 %: of a model's mean over seeds by Student's t, and of the difference of the two on the same pictures, its
mean over seeds picture by picture. Goes on where an interrupted run left off. Writes benchmarks/results/<machine>/vrwkv_digits.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import fresh  # first: it pins threads
import measure

sys.path[:0] = [str(measure.ROOT / "eval")]

from intervals import clustered, paired  # noqa: E402

from visualrwkv.training.classify_recipes import CLASSIFY_RECIPES  # noqa: E402
from visualrwkv.training.digits import write  # noqa: E402
from visualrwkv.training.labelled import open_pictures  # noqa: E402

MODELS = ("vrwkv_nano", "vit_nano")
PACKAGES = ("torch", "timm", "scikit-learn", "numpy")


def one(case: str, epochs: float) -> dict[str, Any]:
    """A run of its own: its accuracy, and which pictures it got wrong."""
    model, seed = case.split()
    with tempfile.TemporaryDirectory() as folder:
        write(data := Path(folder) / "digits")
        words = ["--model", model, "--preset", "digits", "--seed", seed, "--epochs", str(epochs), "--device", "cpu"]
        line = [
            sys.executable,
            "-m",
            "visualrwkv.training.classify",
            "--data",
            str(data),
            "--out",
            f"{folder}/run",
            *words,
        ]
        subprocess.run(line, check=True, stdout=sys.stderr)
        result = json.loads((Path(folder) / "run/result.json").read_text())
        pictures = open_pictures(data).check
        names = [str(Path(pictures.source.name(i)).relative_to(data)) for i in range(len(pictures))]
        wrong = {str(Path(name).relative_to(data)) for name in result.pop("wrong")}
    assert len(names) == result["checked"]
    return result | {"pictures": {name: int(name not in wrong) for name in names}}


def compare(found: dict[str, dict[str, Any]], seeds: range) -> dict[str, Any]:
    """Accuracies in %, with their intervals, and the difference."""
    figures: dict[str, Any] = {}
    right: dict[str, dict[str, float]] = {}
    for model in MODELS:
        runs = [found[f"{model} {seed}"] for seed in seeds]
        mean = clustered({str(i): 100 * run["accuracy"] for i, run in enumerate(runs)}, {})
        right[model] = {name: sum(run["pictures"][name] for run in runs) / len(runs) for name in runs[0]["pictures"]}
        figures[model] = {
            "parameters": runs[0]["parameters"],
            "accuracy": mean.mean,
            "half": mean.half,
            "unit": "%",
            "of each seed": [100 * run["accuracy"] for run in runs],
            "best check of each seed": [100 * run["best"]["accuracy"] for run in runs],
        }
    difference = paired(right["vit_nano"], right["vrwkv_nano"], {}).scaled(100)
    by_seed = paired(
        *({str(i): 100 * found[f"{model} {i}"]["accuracy"] for i in seeds} for model in ("vit_nano", "vrwkv_nano")), {}
    )
    return figures | {
        "vrwkv_nano less vit_nano": {
            "points": difference.mean,
            "half, over pictures": difference.half,
            "half, over seeds": by_seed.half,
        }
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--epochs", type=float, default=CLASSIFY_RECIPES["digits"].epochs)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--only", help="one case, in this process")
    asked = options.parse_args()
    if asked.only:
        print(json.dumps(one(asked.only, asked.epochs)))
        return
    if asked.seeds < 2:
        sys.exit(f"error: seeds is {asked.seeds}; an interval needs at least 2")
    seeds = range(asked.seeds)
    cases = [f"{model} {seed}" for seed in seeds for model in MODELS]
    found = fresh.each("vrwkv_digits", __file__, cases, ["--epochs", str(asked.epochs)])
    figures = compare(found, seeds)
    first = found[cases[0]]
    shapes = {
        "trained on": first["trained on"],
        "checked": first["checked"],
        "steps": first["steps"],
        "epochs": asked.epochs,
    }
    recipe = asdict(CLASSIFY_RECIPES["digits"]) | {"epochs": asked.epochs}
    path = measure.record("vrwkv_digits", {"shapes": shapes, "recipe": recipe, "figures": figures}, PACKAGES)
    fresh.partial_file("vrwkv_digits").unlink()
    print(json.dumps(figures, indent=1), f"written to {path.relative_to(measure.ROOT)}", sep="\n")


if __name__ == "__main__":
    main()
