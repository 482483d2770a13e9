"""The training loop: one stage of one model under DeepSpeed, the same on a laptop's CPU and on many GPUs.

A run is a directory: the model as soon as it is trained (`adapt.leave`: or the state, and LoRA's `adapter/`), `recipe.json`,
`deepspeed.json`, `metrics.jsonl`, `loss.png`, `tensorboard/`, `index.npz` (what is known of the records; of a stream `stream.json`),
and `checkpoints/` from which the same command goes on.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from visualrwkv.files import fingerprint
from visualrwkv.model import VisualRWKV
from visualrwkv.training.adapt import add_adapters, leave, result_of
from visualrwkv.training.checkpoints import Checkpoints, Run, put
from visualrwkv.training.data import Batch, Conversations, load_batches
from visualrwkv.training.engine import (
    Interrupt,
    World,
    gathered,
    gradient_norms,
    leave_world,
    other_ranks,
    recompute_blocks,
)
from visualrwkv.training.features import Features
from visualrwkv.training.log import Alarm, Log, table
from visualrwkv.training.loss import distinct_rows, wake_head
from visualrwkv.training.memory import trim_memory
from visualrwkv.training.objective import Objective
from visualrwkv.training.optim import freeze, learning_rate, make_optimizer
from visualrwkv.training.packing import Plan
from visualrwkv.training.prepare import make_plan, prepare, summary
from visualrwkv.training.progress import Bar
from visualrwkv.training.recipes import Recipe
from visualrwkv.training.shelf import Shelf, encoder_mark, fill
from visualrwkv.training.stream import Streamed, StreamPlan
from visualrwkv.training.watch import Watch


def train(model: VisualRWKV, run: Run, recipe: Recipe, watch: Watch | None = None) -> bool:
    """Train one stage; True when it is finished, False when it was interrupted and left a checkpoint.

    `watch` looks at the model now and then; its figures are logged with a step's metrics. ValueError or OSError with one
    sentence where data, settings or the loss forbid to go on; other ranks then end with SystemExit.
    """
    world = World()
    data, settings = prepare(model, run, recipe, world)
    plan, total = make_plan(data, recipe, world)
    if (run.out / result_of(run.stage)).exists():
        if world.chief:
            print(f"{run.out} is finished; set OUT to train again beside it", file=sys.stderr)
        return True
    made_for = fingerprint(model.rwkv) if recipe.lora or run.stage == "state" else ""
    freeze(model, run.stage)
    if recipe.lora:
        add_adapters(model, run.stage, recipe)
    if world.chief:
        print(table(model, run.stage), summary(data, plan, total), sep="\n", file=sys.stderr)
    trainer = Trainer(model, run, recipe, world, data, settings, watch, made_for)
    with other_ranks(world.rank):
        finished = trainer.steps(plan, total)
        if finished:
            trainer.finish()
    return finished


class Trainer:
    """One stage: engine, data and log, and the steps."""

    def __init__(
        self,
        model: VisualRWKV,
        run: Run,
        recipe: Recipe,
        world: World,
        data: Conversations | Streamed,
        settings: dict[str, Any],
        watch: Watch | None,
        made_for: str,
    ):
        import deepspeed

        self.model, self.run, self.recipe, self.world, self.data, self.watch = model, run, recipe, world, data, watch
        self.made_for = made_for
        every = set(range(model.config.rwkv.vocab_size))
        answers, words = data.ids() or (every, every)
        wake_head(model.rwkv.head.weight, answers)
        rows = None if recipe.l2wrap else distinct_rows(model.rwkv.head.weight, answers)
        few_words = run.stage == "language" and not recipe.lora and len(words) < 0.9 * len(every)
        known = torch.tensor(sorted(words), device=model.device) if few_words else None
        # With ZeRO 3 each part of the encoder is gathered when it runs: a rank that leaves it out would let the others wait.
        # What comes from a stream has a new name each time.
        again = recipe.zero < 3 and not recipe.streaming
        features = Features(recipe.features_gb * 1e9 if again else 0, self.shelf())
        if recipe.recompute:
            recompute_blocks(model.rwkv, recipe.zero)
        self.objective = Objective(model, recipe, rows, known, features, state_tuning=run.stage == "state")
        data.read = features  # workers have a copy that stays empty: they open every picture
        trained = [p for p in self.objective.parameters() if p.requires_grad]
        own = "optimizer" in settings  # a user's JSON brings its own
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=self.objective,
            model_parameters=trained if own else None,
            optimizer=None if own else make_optimizer(self.objective, recipe),
            config=settings,
            dist_init_required=False,
        )
        if world.size == 1 and recipe.zero == 0:
            self.engine.enable_backward_allreduce = (
                False  # alone there is nothing to reduce; it would copy every gradient
            )
        self.checkpoints = Checkpoints(run.out / "checkpoints", self.engine, world, recipe.keep)
        self.start, self.place = self.checkpoints.resume()
        self.log = Log(run.out, self.start) if world.chief else None
        self.alarm = Alarm(recipe.spike)
        self.left_out = 0
        self.looked: dict[str, str] = {}
        if self.log:
            put(run.out / "deepspeed.json", json.dumps(settings, indent=2) + "\n")
            for row in self.log.rows:
                self.alarm(row["loss"])
                self.left_out = row.get("left_out", 0)

    def shelf(self) -> Shelf | None:
        """The directory of features, filled by all ranks, where the run has one."""
        if self.run.features is None or self.model.vit is None or self.run.stage == "language":
            return None
        assert isinstance(self.data, Conversations), "of a stream nobody knows the pictures"
        error: Exception | None = None
        try:
            if self.world.chief:
                Shelf(self.run.features, encoder_mark(self.model))
        except (ValueError, OSError) as caught:
            error = caught
        self.world.agree(error)
        shelf = Shelf(self.run.features, encoder_mark(self.model))
        try:
            fill(self.model, self.data, shelf, self.world, self.recipe.workers, self.recipe.bf16)
        except (ValueError, OSError) as caught:
            error = caught
        self.world.agree(error)
        shelf.refresh()
        return shelf

    def steps(self, plan: Plan | StreamPlan, total: int) -> bool:
        """All steps that are left; False when a signal ended them."""
        interrupt = Interrupt()
        shares = plan.shares(self.world.rank, self.start, total, self.place)
        batches = load_batches(self.data, shares, self.recipe.workers)
        self.engine.train()
        stopped = False
        with Bar(self.run.stage, total, self.start, self.world.chief) as bar:
            for step in range(self.start, total):
                began = time.monotonic()
                window, samples = self.read(batches, step)
                figures = self.step(window, samples, step, total)
                if self.log:
                    notes = self.tell(step, figures, time.monotonic() - began)
                    bar.advance(notes=notes)
                if step % 8 == 0:
                    trim_memory()
                ctrl_c, term = self.world.sum(interrupt.signal == signal.SIGINT, interrupt.signal == signal.SIGTERM)
                stopped = bool(ctrl_c or term) and step + 1 < total
                if stopped or ((step + 1) % self.recipe.save_every == 0 and step + 1 < total):
                    self.checkpoints.save(step + 1, self.place)
                if stopped:
                    break
        if stopped and self.world.chief:
            words = f"stopped at step {step + 1} of {total}; the same command goes on from there"
            print(words, file=sys.stderr)
        if stopped and not ctrl_c:  # SIGTERM is how a scheduler asks for the machine: all is well
            leave_world(0)
        return not stopped

    def read(self, batches: Iterator[Batch], step: int) -> tuple[list[Batch], int]:
        """This rank's batches of a step, and the samples of all ranks in it."""
        window: list[Batch] = []
        error: Exception | None = None
        try:
            window = [next(batches) for _ in range(self.recipe.accumulate)]
        except (ValueError, OSError) as caught:
            error = caught
        failed, samples = self.world.sum(error is not None, sum(batch.samples for batch in window))
        if failed:
            if step > self.start:
                self.checkpoints.save(step, self.place)
            self.world.end(error)
        self.place = window[-1].place
        for words in (words for batch in window for words in batch.skipped):
            print(f"left out: {words}", file=sys.stderr)
        return window, int(samples)

    def step(self, window: list[Batch], samples: int, step: int, total: int) -> dict[str, float]:
        """One optimiser step over these batches; returns its figures."""
        recipe, engine = self.recipe, self.engine
        lr = learning_rate(recipe, step, total)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        loss = torch.zeros((), device=engine.device)
        figures: dict[str, float] = {}
        for place, batch in enumerate(window, 1):
            # DeepSpeed takes the mean over ranks and accumulated batches; the loss is the mean over samples
            part = engine(batch) / samples
            engine.backward(part * (self.world.size * recipe.accumulate))
            loss += part.detach()
            if place == len(window):
                counts = sum(len(b.ids) for b in window), sum(len(b.skipped) for b in window)
                value, tokens, skipped = self.world.sum(float(loss), *counts)
                self.left_out += int(skipped)
                figures = {"loss": value, "lr": lr, "tokens": int(tokens)}
                wrong = self.alarm(value) if self.log else None  # one rank decides: it knows the run's whole history
                if self.world.sum(bool(wrong))[0]:
                    self.stop(wrong or "", window, step)
            engine.step()
        norm = engine.get_global_grad_norm()
        if norm is not None:
            figures["grad_norm"] = float(norm)
            if not math.isfinite(figures["grad_norm"]):
                self.stop(f"the norm of the gradients is {norm}", window, step)
        if self.data.bad == "skip":
            figures["left_out"] = self.left_out
        return figures

    def stop(self, wrong: str, window: list[Batch], step: int) -> None:
        """End all ranks, with what there is to know about the step; nothing of it is saved."""
        norms = gradient_norms(self.objective, self.recipe.zero)
        records = sorted(i for part in self.world.gather([i for b in window for i in b.records]) for i in part)
        about = ", ".join(f"{part} {norm:.3g}" for part, norm in norms.items())
        latest = self.checkpoints.folder / "latest"
        back = (
            f"the same command goes on from {latest.read_text()}" if latest.exists() else "there is no checkpoint yet"
        )
        error = ValueError(
            f"step {step}: {wrong}; records {', '.join(map(str, records[:64]))}{' …' if len(records) > 64 else ''}; norms of "
            f"the gradients: {about}; {back}; look at the records, lower --lr, or let it pass with --spike 0"
        )
        self.world.end(error if self.world.chief else None)

    def tell(self, step: int, figures: dict[str, float], seconds: float) -> dict[str, str]:
        """Log a step; what the bar shows of it."""
        assert self.log is not None
        seen: dict[str, float] = {}
        if self.watch and self.watch.due(step):
            self.objective.spread()
            seen = self.watch(self.objective.starts(1), partial(leave, self.objective, made_for=self.made_for))
            if self.watch.out:
                self.log.picture("answers", self.watch.draw(step), step)
        rate = self.log.add(step, seconds=seconds, **figures, **seen)  # type: ignore[arg-type]
        self.looked |= {k: f"{v:.2f}" for k, v in seen.items()}
        notes = {"loss": f"{self.log.smooth:.3f}", "tokens/s": f"{rate:,.0f}", **self.looked}
        return notes | ({"left out": str(self.left_out)} if self.left_out else {})

    def finish(self) -> None:
        """Write the model and let the checkpoints go."""
        with gathered(self.objective, self.recipe.zero):
            if self.world.chief:
                leave(self.objective, self.run.out, self.made_for)
        if self.log:
            self.log.draw(self.run.stage)
            self.log.close()
            self.checkpoints.drop()
        self.world.sum()
