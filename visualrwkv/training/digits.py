"""Handwritten digits as a directory of pictures: real pictures that a package carries, to try training on.

scikit-learn's 1,797 digits of 8 × 8 points (UCI, Alpaydin and Kaynak, 1998), made larger. The last fifth in their order is
there to check with: neighbours in it are often one writer's, and at random the same hands would be on both sides.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 64
CHECKED = 0.2  # share of the digits


def write(out: Path) -> None:
    """Write `out`/train/7/0012.png and so on, and `out`/val; a directory that is there already stays as it is."""
    if out.exists():
        return
    from sklearn.datasets import load_digits  # slow to import

    digits = load_digits()
    first = round(len(digits.target) * (1 - CHECKED))
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for number, (points, label) in enumerate(zip(digits.images, digits.target)):
        folder = part / ("train" if number < first else "val") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray(np.round(points / 16 * 255).astype(np.uint8))
        grey.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(folder / f"{number:04d}.png")
    part.replace(out)


def main() -> None:
    from visualrwkv.commandline import parse

    @dataclass(frozen=True)
    class Options:
        """Write the handwritten digits as a directory of pictures."""

        out: Path

    write(parse(Options).out)


if __name__ == "__main__":
    from visualrwkv.commandline import run

    run(main)
