"""Boxes and masks from files in COCO's format: read, and checked before anything is learned from them.

    {"images": [{"id", "file_name", "width", "height"}], "categories": [{"id", "name"}],
     "annotations": [{"id", "image_id", "category_id", "bbox": [x, y, w, h], "segmentation": polygons or run lengths}]}

Crowds (`iscrowd`) are left out. Classes are counted from 1 in the order of the categories' ids; 0 is the background.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from visualrwkv.files import read_json
from visualrwkv.vision.processor import open_picture

SLACK = 0.5
"""Pixels by which a box may leave its picture: annotators' tools round."""

FINER = 4
"""How many times finer than a picture polygons are drawn, before pixels are in that they cover by half."""


@dataclass(frozen=True)
class Labelled:
    """A picture's file, its size, and what was marked in it."""

    file: Path
    width: int
    height: int
    things: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Target:
    """What is to be found in a picture: n boxes (n, 4) as left, top, right, bottom in pixels, classes (n,) from 1, masks
    (n, H, W) bool."""

    boxes: Tensor
    labels: Tensor
    masks: Tensor

    def classes(self) -> Tensor:
        """The class of each pixel (H, W), 0 where nothing was marked; later things lie over earlier ones."""
        found = torch.zeros(self.masks.shape[1:], dtype=torch.int64)
        for label, mask in zip(self.labels, self.masks):
            found[mask] = label
        return found


class LabelledPictures:
    """The pictures of a COCO file and what is in them.

    FileNotFoundError or ValueError with the item's place and reason: a box outside its picture or without area, a picture
    or category that is not listed, no segmentation.
    """

    def __init__(self, path: Path, images: Path | None = None):
        data, folder = read_json(path), images or path.parent
        for part in ("images", "annotations", "categories"):
            if not isinstance(data.get(part), list):
                raise ValueError(f"{path} has no list {part!r}; COCO's format has images, annotations and categories")
        for part, keys in (("images", ("id", "file_name", "width", "height")), ("categories", ("id", "name"))):
            for number, entry in enumerate(data[part]):
                if lacking := [key for key in keys if key not in entry]:
                    raise ValueError(f"{path}: number {number} of its {part} has no {lacking[0]!r}")
        order = sorted(data["categories"], key=lambda category: category["id"])
        self.names = [str(category["name"]) for category in order]
        self.number = {category["id"]: n for n, category in enumerate(order, 1)}
        items = {i["id"]: Labelled(folder / i["file_name"], i["width"], i["height"]) for i in data["images"]}
        for thing in data["annotations"]:
            where = f"{path}, annotation {thing.get('id')}"
            if thing.get("image_id") not in items:
                raise ValueError(f"{where} is of picture {thing.get('image_id')}, which is not among the images")
            if not thing.get("iscrowd"):
                item = items[thing["image_id"]]
                check(thing, item, f"{where} in {item.file.name}", self.number)
                item.things.append(thing)
        self.items = list(items.values())
        if not self.items:
            raise ValueError(f"{path} lists no pictures")
        if absent := next((item.file for item in self.items if not item.file.is_file()), None):
            raise FileNotFoundError(f"{absent}: there is no such picture")

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        """A picture (3, H, W) uint8 and its target."""
        item = self.items[index]
        picture = open_picture(item.file)
        if picture.size != (item.width, item.height):
            raise ValueError(f"{item.file} has {picture.size} pixels, and its file says {item.width, item.height}")
        masks = [mask_of(thing["segmentation"], item.height, item.width) for thing in item.things]
        corners = [(x, y, x + w, y + h) for x, y, w, h in (thing["bbox"] for thing in item.things)]
        limits = torch.tensor([item.width, item.height] * 2)
        target = Target(
            boxes=torch.tensor(corners, dtype=torch.float32).view(-1, 4).clamp(min=0).minimum(limits),
            labels=torch.tensor([self.number[thing["category_id"]] for thing in item.things], dtype=torch.int64),
            masks=torch.from_numpy(np.stack(masks) if masks else np.zeros((0, item.height, item.width), bool)),
        )
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1), target


def check(thing: dict[str, Any], item: Labelled, where: str, numbers: dict[Any, int]) -> None:
    """ValueError in one sentence, beginning with `where`, unless a thing can be learned from."""
    size = f"{item.width} x {item.height} pixels"
    box = thing.get("bbox")
    if not (isinstance(box, list) and len(box) == 4 and all(isinstance(v, (int, float)) for v in box)):
        raise ValueError(f"{where}: its bbox is {box!r}; it must be [x, y, width, height] in pixels")
    x, y, w, h = box
    if not (w > 0 and h > 0):
        raise ValueError(f"{where}: its box {box} has no area")
    if x < -SLACK or y < -SLACK or x + w > item.width + SLACK or y + h > item.height + SLACK:
        raise ValueError(f"{where}: its box {box} lies outside the picture of {size}")
    if thing.get("category_id") not in numbers:
        raise ValueError(f"{where}: its category is {thing.get('category_id')}, which is not among the categories")
    drawn = thing.get("segmentation")
    if isinstance(drawn, dict):
        counts, wanted = drawn.get("counts"), [item.height, item.width]
        if not isinstance(counts, list):
            raise ValueError(f"{where}: its run lengths are {type(counts).__name__}; they must be a list of numbers")
        if list(drawn.get("size", [])) != wanted or sum(counts) != item.height * item.width:
            raise ValueError(f"{where}: its run lengths are not those of a picture of {size}")
    elif not drawn or any(len(polygon) < 6 for polygon in drawn):
        raise ValueError(f"{where}: it has no segmentation, neither polygons of three corners nor run lengths")


def mask_of(segmentation: dict[str, Any] | Sequence[Sequence[float]], height: int, width: int) -> np.ndarray:
    """Polygons, as x, y, x, y …, or run lengths -> (height, width) bool."""
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T
    fine = Image.new("L", (width * FINER, height * FINER))
    for polygon in segmentation:
        corners = [(x * FINER - 0.5, y * FINER - 0.5) for x, y in zip(polygon[::2], polygon[1::2])]
        ImageDraw.Draw(fine).polygon(corners, fill=255)
    return np.asarray(fine.reduce(FINER)) >= 128


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """The inverse of `mask_of`: how many pixels are out, in, out …, column after column."""
    flat = mask.T.reshape(-1)
    turns = np.flatnonzero(np.diff(flat, prepend=False))
    return {"size": list(mask.shape), "counts": np.diff(turns, prepend=0, append=flat.size).tolist()}
