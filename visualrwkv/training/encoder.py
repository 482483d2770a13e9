"""Trains a small vision encoder on `scenes` with dense supervision: each image token says what it shows.

It stands in for a pretrained encoder. Without it a small model sits at its blind score for a long time: answers alone teach
an encoder little. Three kinds of pictures keep shape and colour apart, so that neither is guessed from the other:

- recoloured ones, whose channels are mixed at random, teach shapes in any colour;
- ones with the pixels of each patch shuffled teach colours in any shape;
- plain ones teach both, but only against what occurs in training: that there is no green square is not a thing to learn.

B pictures, P patches, M image tokens, D width.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from visualrwkv.checkpoint import save_vision
from visualrwkv.config import VISION_PRESETS, VRWKVConfig, preset
from visualrwkv.training.progress import Bar
from visualrwkv.training.recipes import EncoderRecipe
from visualrwkv.training.scene_questions import COLOURS, KINDS, SEEN
from visualrwkv.vision.pool import pool
from visualrwkv.vision.vrwkv import VRWKV

NOTHING = 0
"""The class of a token without an object; kinds, colours and digits are counted from 1."""


OCCURS = torch.ones(len(KINDS) + 1, len(COLOURS) + 1, dtype=torch.bool)
"""[kind, colour]: whether the pair is in the training pictures; a token without an object may be thought anything."""
OCCURS[1:, 1:] = torch.tensor([[(kind, colour) in SEEN for colour in COLOURS] for kind in KINDS])


def token_targets(objects: list[dict], size: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """One picture's objects -> (M, 4) classes (kind, colour, digit, centre) and (M, 3) places, for side² image tokens.

    An object belongs to the token in whose cell its centre lies; a place is x, y and twice the extent, of the picture's
    size (pixels).
    """
    classes, places = np.zeros((side, side, 4), np.int64), np.zeros((side, side, 3), np.float32)
    for thing in objects:
        row, column = (min(int(thing[a] * side / size), side - 1) for a in ("y", "x"))
        digit = NOTHING if thing["digit"] is None else thing["digit"] + 1
        classes[row, column] = (KINDS.index(thing["kind"]) + 1, COLOURS.index(thing["colour"]) + 1, digit, 1)
        places[row, column] = (thing["x"] / size, thing["y"] / size, thing["extent"] / size * 2)
    return classes.reshape(-1, 4), places.reshape(-1, 3)


def mean(x: Tensor) -> Tensor:
    """The mean of x (n,), or 0 where a batch has nothing of the kind."""
    return x.sum() / max(len(x), 1)


class DenseHead(nn.Module):
    """A linear reading of each image token; it is thrown away after training."""

    def __init__(self, width: int):
        super().__init__()
        self.sizes = (len(KINDS) + 1, len(COLOURS) + 1, 11, 2, 3)
        self.read = nn.Linear(width, sum(self.sizes))

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """(B, M, D) -> logits of kind, colour, digit, centre, and the place."""
        return self.read(tokens).split(self.sizes, -1)

    def loss(
        self, tokens: Tensor, classes: Tensor, places: Tensor, plain: Tensor, shuffled: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """Image tokens (B, M, D), classes (B, M, 4), places (B, M, 3), which pictures (B,) are plain and which shuffled
        -> the loss, and accuracies on the tokens of objects that count."""
        *logits, place = self(tokens)
        shown = classes[..., 0] != NOTHING
        total, figures = tokens.new_zeros(()), {}
        for i, name in enumerate(("kind", "colour", "digit", "centre")):
            used = (plain | shuffled if name == "colour" else ~shuffled)[:, None].expand_as(shown)
            said, truth, important = logits[i], classes[..., i][used], shown[used]
            if name in ("kind", "colour"):
                occurs = OCCURS.T[classes[..., 1]] if name == "kind" else OCCURS[classes[..., 0]]
                said = said.masked_fill(plain[:, None, None] & ~occurs, -30.0)
            if name == "digit":
                important = truth != NOTHING
            said = said[used]
            each = F.cross_entropy(said, truth, reduction="none")
            total = total + 0.6 * mean(each[important]) + 0.4 * mean(each[~important])
            figures[name] = float(mean((said.argmax(-1) == truth)[important].float()))
        used = shown & ~shuffled[:, None]
        off = F.smooth_l1_loss(place[used], places[used], beta=0.05)
        return total + 5 * off, figures | {"place": float((place.detach() - places)[used].abs().mean())}


def recolour(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture (B, 3, H, W) fp32 with its channels mixed at random: a shape must be known in any colour."""
    mix = torch.rand(len(pictures), 3, 3, generator=generator).pow(3)
    return torch.einsum("bij,bjhw->bihw", mix / mix.sum(-1, keepdim=True), pictures)


def shuffle_patches(pictures: Tensor, patch: int, generator: torch.Generator) -> Tensor:
    """Pictures (B, 3, H, W) with the pixels of each patch in one random order: a colour must be known in any shape."""
    order = torch.randperm(patch * patch, generator=generator)
    tiles = F.unfold(pictures, patch, stride=patch).unflatten(1, (3, patch * patch))[:, :, order].flatten(1, 2)
    return F.fold(tiles, pictures.shape[-2:], patch, stride=patch)


def load_pictures(folder: Path, names: list[str]) -> Tensor:
    """PNG files of one size -> (n, 3, H, W) uint8."""
    return torch.stack([torch.from_numpy(np.array(Image.open(folder / n))).permute(2, 0, 1) for n in names])


def normalise(pictures: Tensor, config: VRWKVConfig) -> Tensor:
    """Pictures (B, 3, H, W), 0 to 255 -> what `ImageProcessor` gives."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.mean, config.std))
    return (pictures.float() / 255 - mean) / std


def train_encoder(data: Path, out: Path, recipe: EncoderRecipe) -> dict[str, float]:
    """Train on `data`/train.objects.json and its pictures; writes the encoder's directory, returns the last accuracies."""
    torch.manual_seed(recipe.seed)
    config = preset(VISION_PRESETS, recipe.preset, "vision preset")
    scenes = json.loads((data / "train.objects.json").read_text())
    names = list(scenes)
    pictures = load_pictures(data, names)
    side = math.isqrt(recipe.image_tokens)
    dense = [token_targets(scenes[n], config.image_size, side) for n in names]
    classes, places = (torch.from_numpy(np.stack(part)) for part in zip(*dense))

    vit, head = VRWKV(config), DenseHead(config.width)
    parameters = [*vit.parameters(), *head.parameters()]
    groups = [
        {"params": [p for p in parameters if p.squeeze().dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.squeeze().dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98), fused=True)
    order = torch.Generator().manual_seed(recipe.seed)
    rows: list[dict[str, float]] = []
    queue = torch.empty(0, dtype=torch.int64)
    with Bar("encoder", recipe.steps) as bar:
        for step in range(recipe.steps):
            warm = min(1.0, (step + 1) / 30)
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * warm * 0.5 * (1 + math.cos(math.pi * step / recipe.steps)) + 1e-6
            if len(queue) < recipe.batch:
                queue = torch.randperm(len(names), generator=order)
            index, queue = queue[: recipe.batch], queue[recipe.batch :]
            began = time.monotonic()
            part = torch.arange(recipe.batch) * 4 // recipe.batch
            shown, plain, shuffled = pictures[index].float(), part < 1, part >= 3
            shown[~plain & ~shuffled] = recolour(shown[~plain & ~shuffled], order)
            shown[shuffled] = shuffle_patches(shown[shuffled], config.patch_size, order)
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
                patches = vit(normalise(shown, config))
            tokens = pool(patches.float(), (config.grid, config.grid), side)
            loss, figures = head.loss(tokens, classes[index], places[index], plain, shuffled)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            rows.append({"step": step, "loss": float(loss.detach()), "seconds": time.monotonic() - began, **figures})
            bar.advance(
                notes={
                    "loss": f"{rows[-1]['loss']:.3f}",
                    **{k: f"{figures[k]:.2f}" for k in ("kind", "colour", "digit")},
                }
            )
    save_vision(vit, out)
    (out / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    last = rows[-20:]
    return {k: sum(r[k] for r in last) / len(last) for k in ("kind", "colour", "digit", "centre", "place")}


def main() -> None:
    from visualrwkv.commandline import parse

    @dataclass(frozen=True)
    class Options:
        """Train a small vision encoder on scenes."""

        data: Path  # a directory written by visualrwkv.training.scenes
        out: Path
        recipe: EncoderRecipe = field(default_factory=EncoderRecipe)

    options = parse(Options)
    figures = train_encoder(options.data, options.out, options.recipe)
    print(
        "encoder: accuracy on the tokens of objects "
        + ", ".join(f"{k} {v:.3f}" for k, v in figures.items() if k != "place")
    )


if __name__ == "__main__":
    from visualrwkv.commandline import run

    run(main)
