"""Vision-RWKV as a backbone: the quickstart's encoder under Mask R-CNN and UperNet, on drawn scenes (some five minutes each).

    OMP_NUM_THREADS=1 python benchmarks/dense.py

Boxes and masks by COCO's average precision, pixels by intersection over union, on 500 pictures that training did not show,
with handwriting that occurs in none that it showed. `--vision vrwkv_nano` starts from nothing instead.

Writes benchmarks/results/<machine>/<name>.json and its pictures of what was found, <name>_detect.png and <name>_segment.png.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import measure  # first: it pins threads

from visualrwkv.training import scene_masks
from visualrwkv.training.dense import TASKS, DenseRecipe, train_dense


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vision", default="runs/quickstart/encoder", help="a directory, or a preset's name")
    parser.add_argument("--work", type=Path, default=Path("runs/dense"), help="where data and runs are kept")
    parser.add_argument("--steps", type=int, default=DenseRecipe.steps)
    parser.add_argument("--name", default="dense", help="of the result")
    options = parser.parse_args()
    scene_masks.write(options.work / "data")
    figures: dict[str, Any] = {}
    recipe = DenseRecipe(steps=options.steps)
    for task in TASKS:
        figures[task] = train_dense(task, options.vision, options.work / "data", options.work / task, recipe)
        print(task, json.dumps(figures[task]), flush=True)
    about = json.loads((options.work / "data/scene_masks.json").read_text())
    shapes = {"encoder": options.vision, "data": about, "recipe": vars(recipe)}
    packages = ("torch", "torchvision", "transformers", "timm")
    path = measure.record(options.name, {"shapes": shapes, "figures": figures}, packages)
    for task in TASKS:
        shutil.copyfile(options.work / task / "predictions.png", path.with_name(f"{options.name}_{task}.png"))
    print(path)


if __name__ == "__main__":
    main()
