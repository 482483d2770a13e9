"""The embedded data set with boxes and masks, in COCO's format: what dense prediction is tried on.

    python -m visualrwkv.training.scene_masks --out DIR --seed 0

The same things on the same backgrounds as `scenes`, drawn by the same code; a mask is the pixels that show at least half of a
thing, its box their bounds, its class its kind:

    train.json, test.json             COCO's format; the handwriting of test occurs in no training picture
    images/<split>/000123.png
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from visualrwkv.training.coco import run_lengths
from visualrwkv.training.progress import Bar
from visualrwkv.training.scene_questions import KINDS
from visualrwkv.training.scenes import COUNTS, DIGIT_SHARE, arrange, draw_with_masks, is_there

MARKER = "scene_masks.json"
FORMAT = 1  # raise it when the same seed gives other data
CATEGORIES = [{"id": number, "name": kind} for number, kind in enumerate(KINDS, 1)]


def write(out: Path, seed: int = 0, train: int = 6000, test: int = 500, size: int = 64) -> None:
    """Writes the data set to `out`, or does nothing if it is there already with the same parameters.

    Args:
        out: the directory to make. It appears whole or not at all.
        seed: the same seed gives the same pictures.
        train: pictures to train on.
        test: pictures to measure with.
        size: side of the square pictures, in pixels.
    """
    parameters = {"format": FORMAT, "seed": seed, "train": train, "test": test, "size": size}
    if is_there(out, MARKER, parameters):
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch, Bar("scenes", train + test) as bar:
        partial = Path(scratch) / "scenes"
        for split, count in (("train", train), ("test", test)):
            (partial / "images" / split).mkdir(parents=True)
            data: dict[str, list] = {"images": [], "annotations": [], "categories": CATEGORIES}
            for number in range(count):
                rng = Random(f"{FORMAT} {seed} {size} {split} {number}")
                scene = arrange(rng, rng.choice(COUNTS), rng.random() < DIGIT_SHARE, split, size)
                picture, masks = draw_with_masks(scene, rng)
                name = f"images/{split}/{number:06d}.png"
                picture.save(partial / name, compress_level=1)
                data["images"].append({"id": number, "file_name": name, "width": size, "height": size})
                for thing, mask in zip(scene.things, masks, strict=True):
                    data["annotations"].append(
                        {"id": len(data["annotations"]), "image_id": number, **annotation(thing.kind, mask)}
                    )
                bar.advance()
            (partial / f"{split}.json").write_text(json.dumps(data))
        (partial / MARKER).write_text(json.dumps(parameters) + "\n")
        partial.replace(out)


def annotation(kind: str, mask: np.ndarray) -> dict[str, Any]:
    """A thing of that kind, shown by the mask (H, W), in COCO's words."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    left, top = int(columns[0]), int(rows[0])
    return {
        "category_id": KINDS.index(kind) + 1,
        "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
        "area": int(mask.sum()),
        "segmentation": run_lengths(mask),
        "iscrowd": 0,
    }


if __name__ == "__main__":
    from visualrwkv.commandline import parse, run

    run(lambda: parse(write))
