"""A contact sheet of dense predictions: each picture beside itself with what was found in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from visualrwkv.training.coco import Target


def sheet(
    shown: Sequence[tuple[Tensor, Target]], found: Sequence[Any], names: Sequence[str], out: Path, least: float = 0.5
) -> None:
    """Draw pictures, what is in them and what was found: boxes, masks and names with scores from `least` on, or classes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    tints = [plt.get_cmap("tab10")(n)[:3] for n in range(10)]
    across = 3
    rows = -(-len(shown) // across)
    figure, axes = plt.subplots(rows, 3 * across, figsize=(across * 5.1, rows * 1.85 + 0.5), squeeze=False)
    for place in axes.flat:
        place.set_axis_off()
    for number, ((picture, truth), said) in enumerate(zip(shown, found)):
        row, column = divmod(number, across)
        one, two, three = axes[row, 3 * column : 3 * column + 3]
        pixels = picture.permute(1, 2, 0).numpy()
        one.imshow(pixels)
        two.imshow(tinted(pixels, truth.classes().numpy(), tints))
        if isinstance(said, Tensor):
            three.imshow(tinted(pixels, said.numpy(), tints))
        else:
            sure = said["scores"] >= least
            boxes, labels, masks, scores = (said[k][sure] for k in ("boxes", "labels", "masks", "scores"))
            three.imshow(tinted(pixels, Target(boxes, labels, masks).classes().numpy(), tints))
            for box, label, score in zip(boxes.tolist(), labels.tolist(), scores.tolist()):
                frame = {"fill": False, "edgecolor": tints[(label - 1) % 10], "linewidth": 1}
                three.add_patch(plt.Rectangle((box[0] - 0.5, box[1] - 0.5), box[2] - box[0], box[3] - box[1], **frame))
                three.text(box[0], box[1] - 1, f"{names[label - 1]} {score:.2f}", fontsize=5, color="white")
        if row == 0:
            for place, title in ((one, "picture"), (two, "there"), (three, "found")):
                place.set_title(title, fontsize=7)
    patches = [Patch(color=tints[n % 10], label=name) for n, name in enumerate(names)]
    figure.legend(handles=patches, loc="lower center", ncols=min(len(names), 10), fontsize=7, frameon=False)
    figure.tight_layout(rect=(0, 0.03, 1, 1), pad=0.3)
    figure.savefig(out, format="png", dpi=75)
    plt.close(figure)


def tinted(pixels: np.ndarray, classes: np.ndarray, tints: Sequence[tuple[float, ...]]) -> np.ndarray:
    """A picture (H, W, 3) uint8 in grey, with its classes (H, W) from 1 in their tints -> (H, W, 3), 0 to 1."""
    grey = pixels.mean(2, keepdims=True) / 255
    out = np.repeat(grey * 0.6, 3, 2)
    for label in np.unique(classes[classes > 0]):
        where = classes == label
        out[where] = 0.25 * grey[where] + 0.75 * np.array(tints[(label - 1) % len(tints)])
    return out
