"""Trains a Vision-RWKV encoder under Mask R-CNN or UperNet, to find things in pictures or to name every pixel.

    python -m visualrwkv.training.dense --task detect --vision runs/quickstart/encoder --data DIR --out OUT

DATA holds train.json and test.json in COCO's format (`visualrwkv.training.scene_masks` draws such). OUT gets the weights, the
figures of test.json as result.json, metrics.jsonl, and predictions.png, what was found in some pictures.

B pictures, C classes beside the background.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from visualrwkv.checkpoint import load_vision
from visualrwkv.config import VISION_PRESETS, VRWKVConfig
from visualrwkv.files import write_whole
from visualrwkv.training.coco import LabelledPictures, Target
from visualrwkv.training.dense_nets import mask_rcnn, upernet
from visualrwkv.training.precision import Found, average_precision, box_overlaps, class_overlaps, mask_overlaps
from visualrwkv.training.progress import Bar
from visualrwkv.vision.vrwkv import VRWKV, vrwkv

Task = Literal["detect", "segment"]
Sample = tuple[Tensor, Target]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IGNORED = 255
"""The class of pixels that no loss asks for: those beside a picture smaller than others of its batch."""


@dataclass(frozen=True)
class DenseRecipe:
    """How dense prediction is trained; the defaults suit the drawn scenes and one core."""

    steps: int = 700
    batch: int = 8
    lr: float = 1e-3  # of all that is fresh
    encoder_lr: float = 3e-4
    weight_decay: float = 0.01
    clip: float = 5.0  # of the gradient's norm
    channels: int = 64  # width of the heads
    size: int = 64  # pixels that the shorter side of a picture is scaled to
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch", 2), ("channels", 1), ("size", 8)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")


class Detector:
    """Mask R-CNN as it is trained and measured here."""

    def __init__(self, encoder: VRWKV, names: Sequence[str], recipe: DenseRecipe):
        self.net = mask_rcnn(encoder, len(names), recipe.channels, recipe.size).to(DEVICE)
        self.encoder, self.names = encoder, names

    def loss(self, samples: list[Sample]) -> tuple[Tensor, dict[str, float]]:
        """The loss over a batch, and its parts."""
        wanted = ({"boxes": t.boxes, "labels": t.labels, "masks": t.masks.byte()} for _, t in samples)
        targets = [{name: x.to(DEVICE) for name, x in one.items()} for one in wanted]
        parts = self.net([picture.to(DEVICE).float() / 255 for picture, _ in samples], targets)
        return sum(parts.values()), {k.removeprefix("loss_"): float(v.detach()) for k, v in parts.items()}

    def predict(self, pictures: list[Tensor]) -> list[dict[str, Tensor]]:
        """Boxes, labels, scores and masks (n, H, W) bool of each picture (3, H, W) uint8."""
        found = self.net([picture.to(DEVICE).float() / 255 for picture in pictures])
        return [{k: v.cpu() for k, v in one.items()} | {"masks": (one["masks"][:, 0] >= 0.5).cpu()} for one in found]

    def figures(self, pictures: LabelledPictures, batch: int) -> dict[str, Any]:
        """Average precision of boxes and masks over all pictures."""
        boxes, masks = [], []
        for (_, truth), found in predictions(self, pictures, batch, "measure"):
            scores, classes, true = (x.numpy() for x in (found["scores"], found["labels"], truth.labels))
            boxes.append(Found(scores, classes, true, box_overlaps(found["boxes"], truth.boxes)))
            masks.append(Found(scores, classes, true, mask_overlaps(found["masks"], truth.masks)))
        count = len(self.names)
        return {"boxes": average_precision(boxes, count), "masks": average_precision(masks, count)}


class Segmenter:
    """UperNet as it is trained and measured here."""

    def __init__(self, encoder: VRWKV, names: Sequence[str], recipe: DenseRecipe):
        self.config: VRWKVConfig = encoder.config
        self.net, features = upernet(encoder, names, recipe.channels)
        self.net.to(DEVICE)
        self.encoder, self.names, self.size = features.encoder, names, recipe.size

    def batch(self, pictures: list[Tensor]) -> Tensor:
        """Pictures (3, H, W) uint8 scaled, normalised and, where they differ, filled up on the right and below -> (B, 3, …)."""
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.config.mean, self.config.std))
        scaled = (self.scaled(picture.float() / 255, "bilinear") for picture in pictures)
        return filled([(picture - mean) / std for picture in scaled], 0.0).to(DEVICE)

    def scaled(self, x: Tensor, mode: str) -> Tensor:
        """A picture (C, H, W) with its shorter side at the size that the net is trained at."""
        factor = self.size / min(x.shape[-2:])
        if factor == 1:
            return x
        sides = [round(side * factor) for side in x.shape[-2:]]
        return F.interpolate(x[None], sides, mode=mode)[0]

    def loss(self, samples: list[Sample]) -> tuple[Tensor, dict[str, float]]:
        """The loss over a batch, and the share of pixels named rightly."""
        wanted = [self.scaled(truth.classes()[None].float(), "nearest").long() for _, truth in samples]
        labels = filled(wanted, IGNORED)[:, 0].to(DEVICE)
        out = self.net(self.batch([picture for picture, _ in samples]), labels=labels)
        asked = labels != IGNORED
        return out.loss, {"pixels": float((out.logits.argmax(1) == labels)[asked].float().mean())}

    def predict(self, pictures: list[Tensor]) -> list[Tensor]:
        """The class of each pixel (H, W) of each picture (3, H, W) uint8."""
        logits = self.net(self.batch(pictures)).logits.cpu()
        found = []
        for picture, each in zip(pictures, logits):
            h, w = self.scaled(picture.float(), "nearest").shape[-2:]
            found.append(F.interpolate(each[None, :, :h, :w], picture.shape[-2:], mode="bilinear")[0].argmax(0))
        return found

    def figures(self, pictures: LabelledPictures, batch: int) -> dict[str, Any]:
        """Intersection over union of each class, None where it neither occurs nor is said, and their mean, over all pixels."""
        count = len(self.names) + 1
        confusion = torch.zeros(count * count, dtype=torch.int64)
        for (_, truth), found in predictions(self, pictures, batch, "measure"):
            confusion += torch.bincount((truth.classes() * count + found).flatten(), minlength=count * count)
        found = zip(("background", *self.names), class_overlaps(confusion.view(count, count)))
        each = {name: None if math.isnan(v) else v for name, v in found}
        known = [v for v in each.values() if v is not None]
        right = confusion.view(count, count).diagonal().sum() / confusion.sum()
        return {"mIoU": sum(known) / len(known), "pixels": float(right), "IoU": each}


TASKS: dict[str, Callable[..., Detector | Segmenter]] = {"detect": Detector, "segment": Segmenter}


def filled(maps: list[Tensor], value: float) -> Tensor:
    """Maps (C, H, W) of any sizes, filled up on the right and below -> (B, C, H, W)."""
    H, W = (max(x.shape[axis] for x in maps) for axis in (-2, -1))
    return torch.stack([F.pad(x, (0, W - x.shape[-1], 0, H - x.shape[-2]), value=value) for x in maps])


def predictions(task: Detector | Segmenter, pictures: LabelledPictures, batch: int, title: str):
    """Each picture with its truth, and what the net finds in it."""
    task.net.eval()
    with Bar(title, len(pictures)) as bar, torch.no_grad():
        for start in range(0, len(pictures), batch):
            samples = [pictures[n] for n in range(start, min(start + batch, len(pictures)))]
            yield from zip(samples, task.predict([picture for picture, _ in samples]), strict=True)
            bar.advance(len(samples))


def fit(task: Detector | Segmenter, pictures: LabelledPictures, recipe: DenseRecipe) -> list[dict[str, float]]:
    """Train; returns the loss and its parts at each step."""
    mine = {id(p) for p in task.encoder.parameters()}
    fresh = [p for p in task.net.parameters() if id(p) not in mine]
    groups = [
        {"params": list(task.encoder.parameters()), "peak": recipe.encoder_lr},
        {"params": fresh, "peak": recipe.lr},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, weight_decay=recipe.weight_decay)
    order = torch.Generator().manual_seed(recipe.seed)
    queue = torch.empty(0, dtype=torch.int64)
    rows: list[dict[str, float]] = []
    warm = max(min(50, recipe.steps // 10), 1)
    task.net.train()
    with Bar("train", recipe.steps) as bar:
        for step in range(recipe.steps):
            for group in optimizer.param_groups:
                group["lr"] = (
                    group["peak"] * min(1, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
                )
            while len(queue) < recipe.batch:
                queue = torch.cat((queue, torch.randperm(len(pictures), generator=order)))
            index, queue = queue[: recipe.batch].tolist(), queue[recipe.batch :]
            loss, parts = task.loss([pictures[n] for n in index])
            if not loss.isfinite():
                raise ValueError(f"the loss is {float(loss)} at step {step}; try a lower --recipe.lr")
            loss.backward()
            nn.utils.clip_grad_norm_(task.net.parameters(), recipe.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            rows.append({"step": step, "loss": float(loss.detach()), **parts})
            bar.advance(notes={k: f"{v:.3f}" for k, v in rows[-1].items() if k != "step"})
    return rows


def start(vision: str, seed: int) -> VRWKV:
    """The encoder of a directory or file, or a fresh one of a preset's name; ValueError unless it is a Vision-RWKV."""
    torch.manual_seed(seed)
    encoder = vrwkv(vision) if vision in VISION_PRESETS else load_vision(vision)
    if not isinstance(encoder, VRWKV):
        raise ValueError(f"{vision} is a {encoder.config.kind} encoder; dense prediction is for Vision-RWKV")
    return encoder


def train_dense(task: Task, vision: str, data: Path, out: Path, recipe: DenseRecipe) -> dict[str, Any]:
    """Train on `data`/train.json, measure on test.json, write what `out` is to hold; returns the figures."""
    from visualrwkv.training.dense_sheet import sheet

    train, test = (LabelledPictures(data / f"{split}.json") for split in ("train", "test"))
    if train.names != test.names:
        raise ValueError(f"{data}: train.json has the categories {train.names}, test.json {test.names}")
    for split, pictures in (("train", train), ("test", test)):
        if not any(item.things for item in pictures.items):
            raise ValueError(f"{data / split}.json: nothing is marked in any picture")
    encoder = start(vision, recipe.seed)
    made = TASKS[task](encoder, train.names, recipe)
    rows = fit(made, train, recipe)
    figures = made.figures(test, recipe.batch)
    result = {"task": task, "vision": vision, "names": train.names, "recipe": asdict(recipe), **figures}
    shown = [test[n] for n in range(min(12, len(test)))]
    made.net.eval()
    with torch.no_grad():
        found = made.predict([picture for picture, _ in shown])
    weights = {k: v.detach().cpu().contiguous() for k, v in made.net.state_dict().items()}
    writers: dict[Path, Callable[[Path], object]] = {
        out / "model.safetensors": lambda part: save_file(weights, part, metadata={"format": "pt"}),
        out / "result.json": lambda part: part.write_text(json.dumps(result, indent=2) + "\n"),
        out / "metrics.jsonl": lambda part: part.write_text("".join(json.dumps(row) + "\n" for row in rows)),
        out / "predictions.png": lambda part: sheet(shown, found, train.names, part),
    }
    if isinstance(made, Segmenter):  # what from_pretrained reads beside the weights
        writers[out / "config.json"] = lambda part: part.write_text(made.net.config.to_json_string())
    write_whole(writers)
    return figures


def main() -> None:
    from visualrwkv.commandline import parse

    @dataclass(frozen=True)
    class Options:
        """Train a Vision-RWKV encoder to find things (detect) or to name every pixel (segment)."""

        task: Task
        vision: str  # a Vision-RWKV: its directory, an official checkpoint, or a preset's name for a fresh one
        data: Path  # a directory with train.json and test.json in COCO's format
        out: Path
        recipe: DenseRecipe = field(default_factory=DenseRecipe)

    options = parse(Options)
    figures = train_dense(options.task, options.vision, options.data, options.out, options.recipe)
    print(json.dumps(figures))


if __name__ == "__main__":
    from visualrwkv.commandline import run

    run(main)
