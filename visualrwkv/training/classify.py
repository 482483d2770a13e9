"""Trains a network to tell classes of pictures apart, by the papers' recipe; what scripts/train_vrwkv.sh calls.

A run is a directory: `best` and `last`, the network where its accuracy was best and at the end, each as an encoder's
directory; `recipe.json`, `metrics.jsonl`, `predictions.png`; `result.json` once it is finished, and until then
`checkpoint.pt`, from which the same command goes on exactly as if it had not stopped: no random number depends on another.
B pictures, K classes.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visualrwkv.commandline import parse
from visualrwkv.config import choose, preset
from visualrwkv.files import write_whole
from visualrwkv.training.checkpoints import hold, put
from visualrwkv.training.classifiers import Classifier, make_classifier
from visualrwkv.training.classify_recipes import CLASSIFY_RECIPES, OF_MODEL, ClassifyRecipe
from visualrwkv.training.draws import STEP, Drawn, alterations, in_turn, load, order, plain, seed_all
from visualrwkv.training.engine import Interrupt
from visualrwkv.training.labelled import Part, Pictures, open_pictures
from visualrwkv.training.log import rows_before
from visualrwkv.training.progress import Bar
from visualrwkv.training.sheet import contact_sheet

SHOWN, COLUMNS = 32, 8  # predictions on the contact sheet
FREE = ("workers",)  # settings that may change within a run: nothing follows from them


@dataclass(frozen=True)
class Said:
    """What a network says of a part's pictures: classes (n,), how sure it is (n,), and its mean loss."""

    classes: Tensor
    sure: Tensor
    loss: float
    right: Tensor  # (n,) bool

    @property
    def accuracy(self) -> float:
        return float(self.right.double().mean())


class Trainer:
    """One run: network, optimizer and log, and the steps."""

    def __init__(self, model: Classifier, pictures: Pictures, out: Path, recipe: ClassifyRecipe, device: str):
        from timm.data import Mixup
        from timm.scheduler import CosineLRScheduler
        from timm.utils import ModelEmaV3

        self.model, self.pictures, self.out, self.recipe = model.to(device), pictures, out, recipe
        self.device = torch.device(device)
        self.altered = alterations(recipe, model.preparation)
        self.plain = plain(model.preparation)
        count = len(pictures.train)
        self.total = max(round(recipe.epochs * count / recipe.batch), 1)
        self.check_steps = max(recipe.check_every * count / recipe.batch, 1.0)
        groups = model.groups(recipe)
        self.optimizer = torch.optim.AdamW(groups, recipe.lr, (recipe.beta1, recipe.beta2), fused=True)
        self.scheduler = CosineLRScheduler(
            self.optimizer,
            self.total,
            lr_min=min(recipe.lr_final, recipe.lr),
            warmup_t=round(recipe.warmup * count / recipe.batch),
            warmup_lr_init=recipe.lr * 1e-3,
            t_in_epochs=False,
        )
        mixing = recipe.mixup, recipe.cutmix, None, recipe.mix_prob, recipe.cutmix_prob, "batch", True, recipe.smoothing
        self.mixup = Mixup(*mixing, num_classes=len(pictures.classes)) if recipe.mixes else None
        self.mean = ModelEmaV3(self.model, recipe.ema, use_warmup=True) if recipe.ema else None
        self.start, self.best, self.best_epoch = 0, -1.0, 0.0
        self.said: Said | None = None  # of the pictures to check with, by the network as it is

    @property
    def result(self) -> Classifier:
        """The network that is checked and saved."""
        return self.mean.module if self.mean else self.model  # type: ignore[return-value]

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    # Going on ----------------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Go on from where the run was left, if it was begun."""
        file = self.out / "checkpoint.pt"
        if file.exists():
            kept = torch.load(file, map_location=self.device, weights_only=True)
            self.model.load_state_dict(kept["model"])
            if self.mean:
                self.mean.load_state_dict(kept["mean"])
            self.optimizer.load_state_dict(kept["optimizer"])
            self.start, (self.best, self.best_epoch) = kept["step"], kept["best"]
        rows_before(self.out / "metrics.jsonl", self.start)

    def keep(self, step: int) -> None:
        """Leave a checkpoint of the run as it is before `step`."""
        kept = {
            "step": step,
            "model": self.model.state_dict(),
            "mean": self.mean.state_dict() if self.mean else {},
            "optimizer": self.optimizer.state_dict(),
            "best": (self.best, self.best_epoch),
        }
        write_whole({self.out / "checkpoint.pt": lambda part: torch.save(kept, part)})

    # The steps ---------------------------------------------------------------------------------------------------

    def steps(self, title: str) -> int:
        """All steps that are left; the signal that ended them early, or 0."""
        recipe, interrupt = self.recipe, Interrupt()
        drawn = Drawn(self.pictures.train, self.altered, recipe.seed)
        keys = order(len(self.pictures.train), recipe.batch, recipe.seed, self.start, self.total)
        batches = load(drawn, keys, recipe.workers, self.device.type == "cuda")
        notes: dict[str, str] = {}
        with Bar(title, self.total, self.start) as bar:
            for step in range(self.start, self.total):
                began = time.monotonic()
                try:
                    pixels, labels = next(batches)
                except (ValueError, OSError):
                    if step > self.start:
                        self.keep(step)
                    raise
                figures = self.step(pixels, labels, step)
                seconds = time.monotonic() - began
                last = step + 1 == self.total
                if last or int((step + 1) / self.check_steps) > int(step / self.check_steps):
                    figures |= self.look(step)
                    notes = {"accuracy": f"{figures['accuracy']:.3f}", "best": f"{self.best:.3f}"}
                self.add({"step": step, "epoch": self.epoch(step), **figures, "seconds": seconds})
                if "accuracy" in figures or interrupt.signal:
                    self.keep(step + 1)
                rate = {"loss": f"{figures['loss']:.3f}", "pictures/s": f"{recipe.batch / seconds:,.0f}"}
                bar.advance(notes=rate | notes)
                if interrupt.signal and not last:
                    words = f"stopped at step {step + 1} of {self.total}; the same command goes on from there"
                    print(words, file=sys.stderr)
                    return interrupt.signal
        return 0

    def epoch(self, step: int) -> float:
        """Epochs that are over after that step."""
        return round((step + 1) * self.recipe.batch / len(self.pictures.train), 3)

    def step(self, pixels: Tensor, labels: Tensor, step: int) -> dict[str, float]:
        """One optimiser step on pixels (B, 3, H, W) and classes (B,); its figures."""
        recipe, model = self.recipe, self.model.train()
        seed_all(recipe.seed, STEP, step)
        pixels, target = (x.to(self.device, non_blocking=True) for x in (pixels, labels))
        smoothing = recipe.smoothing
        if self.mixup:
            pixels, target = self.mixup(pixels, target)  # (B, K), smoothed
            smoothing = 0.0
        self.scheduler.step_update(step)
        loss = torch.zeros((), device=self.device)
        for some, wanted in zip(pixels.split(recipe.together), target.split(recipe.together)):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=recipe.bf16):
                logits = model(some)
            part = F.cross_entropy(logits.float(), wanted, reduction="sum", label_smoothing=smoothing) / len(pixels)
            part.backward()
            loss += part.detach()
        norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.clip or math.inf)
        figures = {"loss": float(loss), "lr": self.optimizer.param_groups[-1]["lr"], "grad_norm": float(norm)}
        if not math.isfinite(figures["loss"] + figures["grad_norm"]):
            raise ValueError(
                f"step {step}: the loss is {figures['loss']:.3g} and the norm of the gradients {figures['grad_norm']:.3g}; take a "
                "lower --lr, and another OUT"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.mean:
            self.mean.update(model, step + 1)
        self.said = None
        return figures

    def look(self, step: int) -> dict[str, float]:
        """Check the network, and save it where it is the best so far."""
        self.said = said = self.check(self.pictures.check)
        if said.accuracy > self.best:
            self.best, self.best_epoch = said.accuracy, self.epoch(step)
            self.result.save(self.out / "best")
        return {"accuracy": said.accuracy, "check_loss": said.loss}

    @torch.no_grad()
    def check(self, part: Part) -> Said:
        """What the network says of a part's pictures."""
        model = self.result.eval()
        rows, loss = [], 0.0
        for pixels, labels in load(
            Drawn(part, self.plain),
            in_turn(len(part), self.recipe.together),
            self.recipe.workers,
            self.device.type == "cuda",
        ):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.bf16):
                logits = model(pixels.to(self.device))
            logits = logits.float().cpu()
            sure, said = logits.softmax(-1).max(-1)
            rows.append((said, sure, said == labels))
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        said, sure, right = (torch.cat(column) for column in zip(*rows))
        return Said(said, sure, loss / len(part), right)

    def add(self, row: dict[str, float]) -> None:
        """Log a step."""
        with open(self.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")

    def finish(self) -> dict[str, Any]:
        """Write what the run leaves; its result."""
        said = self.said or self.check(self.pictures.check)
        self.result.save(self.out / "last")
        draw(said, self.pictures.check, self.pictures.classes, self.out / "predictions.png")
        result = {
            "accuracy": said.accuracy,
            "right": int(said.right.sum()),
            "checked": len(said.right),
            "loss": said.loss,
            "best": {"accuracy": self.best, "epoch": self.best_epoch},
            "parameters": self.parameters,
            "trained on": len(self.pictures.train),
            "steps": self.total,
            "wrong": [self.pictures.check.source.name(int(i)) for i in self.pictures.check.rows[~said.right.numpy()]],
        }
        put(self.out / "result.json", json.dumps(result, indent=2) + "\n")
        (self.out / "checkpoint.pt").unlink(missing_ok=True)
        return result


def draw(said: Said, part: Part, classes: list[str], out: Path) -> None:
    """A contact sheet of what was said of some pictures: wrong ones first, up to half of it, then others from everywhere."""
    wrong, right = (np.flatnonzero(said.right.numpy() == good) for good in (False, True))
    wrong = wrong[: max(SHOWN // 2, SHOWN - len(right))]
    right = right[np.linspace(0, len(right) - 1, min(len(right), SHOWN - len(wrong))).astype(int)]
    rows = [
        {
            "image": part.source.open(int(part.rows[place])),
            "prompt": f"{float(said.sure[place]):.0%} sure",
            "text": classes[int(said.classes[place])],
            "answer": classes[int(part.labels[place])],
            "good": bool(said.right[place]),
        }
        for place in (*wrong, *right)
    ]
    title = f"{int(said.right.sum())} of {len(said.right)} right; wrong ones are shown first"
    contact_sheet(rows, out, COLUMNS, title)


def tell(result: dict[str, Any], out: Path) -> None:
    """The last line that a run prints."""
    best = result["best"]
    print(
        f"accuracy {result['accuracy']:.4f}: {result['right']} of {result['checked']} pictures that were not trained on; best "
        f"{best['accuracy']:.4f} after {best['epoch']:g} epochs; {out}/last and {out}/best"
    )


def device(asked: str) -> str:
    """The device of that name, or the best there is; ValueError names those there are."""
    gpus = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))] if torch.cuda.is_available() else []
    there = *gpus, "cpu"
    choose("device", asked or there[0], there)
    return asked or there[0]


@dataclass(frozen=True)
class Options:
    """Train a network to tell classes of pictures apart. Further options override the preset's recipe."""

    data: Path  # directories of pictures, one for each class; or a data set of Hugging Face's (a directory, or owner/name)
    out: Path  # the run's directory
    model: str = "vrwkv_nano"  # a preset's name, vit_nano, a name of timm's, or a trained Vision-RWKV to go on from
    preset: str = ""  # of the recipe; empty: the model's
    image_column: str = ""  # of a data set; empty: image, img or picture
    label_column: str = ""  # of a data set; empty: label, labels, class or fine_label
    device: str = ""  # empty: a GPU where there is one


def train(options: Options, recipe: ClassifyRecipe) -> int:
    """Train and say how well it did; the signal that ended it early, or 0."""
    pictures = open_pictures(options.data, recipe.held_out, (options.image_column, options.label_column))
    settings = {k: v for k, v in json.loads(json.dumps(asdict(recipe))).items() if k not in FREE}
    about = {"model": options.model, "data": str(options.data), "pictures": len(pictures.train)}
    model = make_classifier(options.model, pictures.classes, recipe)
    trainer = Trainer(model, pictures, options.out, recipe, device(options.device))
    hold(options.out, about | {"checked": len(pictures.check), "classes": pictures.classes} | settings, {})
    if (options.out / "result.json").exists():
        print(f"{options.out} is finished; set OUT to train again beside it", file=sys.stderr)
        tell(json.loads((options.out / "result.json").read_text()), options.out)
        return 0
    trainer.resume()
    print(
        f"{options.model}: {trainer.parameters:,} parameters; {len(pictures.train):,} pictures of {len(pictures.classes)} classes, "
        f"{len(pictures.check):,} to check with; {trainer.total:,} steps of {recipe.batch} on {trainer.device}",
        file=sys.stderr,
    )
    stopped = trainer.steps(Path(options.model).name)
    if not stopped:
        tell(trainer.finish(), options.out)
    return stopped


def main() -> None:
    if {"--help", "-h"} & set(sys.argv):
        for part in (Options, ClassifyRecipe):
            with contextlib.suppress(SystemExit):
                parse(part, ["--help"])
        return
    options, rest = parse(Options, sys.argv[1:], return_unknown_args=True)
    name = options.preset or OF_MODEL.get(options.model, "")
    if not name:
        raise ValueError(f"no preset is meant for {options.model}; give --preset, one of {', '.join(CLASSIFY_RECIPES)}")
    recipe = parse(ClassifyRecipe, rest, default=preset(CLASSIFY_RECIPES, name, "preset"))
    stopped = train(options, recipe)
    if stopped == signal.SIGINT:
        sys.exit(130)


if __name__ == "__main__":
    from visualrwkv.commandline import run

    run(main)
