"""Contact sheets: pictures with what was asked and answered."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from visualrwkv.vision.processor import open_picture


def contact_sheet(rows: Sequence[Mapping[str, Any]], out: Path, columns: int, title: str = "") -> None:
    """Draw rows of image, prompt, text and answer: right answers green, wrong ones red with what was right.

    An image is a path or an open picture; a row may say itself whether it is `good`.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    count = -(-len(rows) // columns)
    figure, axes = plt.subplots(count, columns, figsize=(columns * 1.9, count * 2.6), squeeze=False)
    for place in axes.flat:
        place.set_axis_off()
    for place, row in zip(axes.flat, rows):
        given, right = row["text"], row["answer"]
        good = row.get("good", given.strip().lower() == right.lower())
        place.imshow(open_picture(row["image"]))
        place.set_title("\n".join(textwrap.wrap(row["prompt"], 26)[:6]), fontsize=7, loc="left")
        said = f"✓ {given}" if good else f"✗ {given} (right: {right})"
        place.text(
            0,
            1.0,
            "\n".join(textwrap.wrap(said, 26)[:5]),
            transform=place.transAxes,
            fontsize=8,
            color="tab:green" if good else "tab:red",
            va="top",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    part = out.with_name(f".{out.name}.part")
    figure.savefig(part, format="png", dpi=110)
    part.replace(out)
    plt.close(figure)
