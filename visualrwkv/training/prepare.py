"""What must be right before a run begins: settings, records, and that the directory is this run's."""

from __future__ import annotations

from typing import Any

from visualrwkv.model import VisualRWKV
from visualrwkv.training.adapt import check_adaptation
from visualrwkv.training.checkpoints import Run, claim
from visualrwkv.training.data import Conversations
from visualrwkv.training.engine import World, deepspeed_config
from visualrwkv.training.packing import Plan
from visualrwkv.training.recipes import Recipe
from visualrwkv.training.stream import Streamed, StreamPlan


def prepare(
    model: VisualRWKV, run: Run, recipe: Recipe, world: World
) -> tuple[Conversations | Streamed, dict[str, Any]]:
    """The records, looked at by one rank of each machine, and DeepSpeed's settings; the run's directory is claimed."""
    error: Exception | None = None
    try:
        check_adaptation(model, run.stage, recipe)
        settings = deepspeed_config(recipe, world.size, run.deepspeed)
        how = (recipe.image_position, recipe.tokens, recipe.bad, recipe.frames, recipe.seed)
        kind = Streamed if recipe.streaming else Conversations
        data = kind(run.data, run.images, model.config, *how)
        file = run.out / data.memory
        known = (run.out / "recipe.json").exists()
        if known and file.exists() and not data.kept(file):
            raise ValueError(f"{run.data} has changed since the run in {run.out} began; set OUT to another place")
        if world.chief and known:
            claim(run, recipe, world.size)
        if world.local_chief:
            data.prepare(file)
        if world.chief and not known:
            claim(run, recipe, world.size)
    except (ValueError, OSError) as caught:
        error = caught
    world.agree(error)
    try:
        if world.local_chief and not file.exists():  # also after a kill between the claim and this
            run.out.mkdir(parents=True, exist_ok=True)
            data.keep(file)
        world.sum()
        data.prepare(file)
    except (ValueError, OSError) as caught:
        error = caught
    world.agree(error)
    marks = world.gather(data.digest())
    if len(set(marks)) > 1:
        other = next(rank for rank, mark in enumerate(marks) if mark != marks[0])
        raise ValueError(
            f"rank {other} has other records ({marks[other]}) under {run.data} than rank 0 ({marks[0]}); "
            "give all machines the same files"
        )
    return data, settings


def make_plan(data: Conversations | Streamed, recipe: Recipe, world: World) -> tuple[Plan | StreamPlan, int]:
    """Which records make which step, and the number of steps."""
    ranks = world.size, recipe.accumulate, recipe.look_ahead
    if isinstance(data, Streamed):
        return StreamPlan(data, recipe.tokens, *ranks, ahead=recipe.workers > 0), recipe.steps
    plan = Plan(data.lengths, recipe.tokens, recipe.seed, *ranks, data.source.order)
    return plan, recipe.steps or plan.steps(recipe.epochs)


def summary(data: Conversations | Streamed, plan: Plan | StreamPlan, total: int) -> str:
    """How the records fill the steps, and what is not as it was written."""
    if isinstance(data, Streamed):
        return f"{data.opening}; {total:,} steps"
    assert isinstance(plan, Plan)
    lengths = data.index.lengths
    batches = plan.epoch(0)
    filled = sum(int(lengths[i]) for batch in batches for i in batch) / (len(batches) * plan.budget)
    words = (
        f"{int((lengths > 0).sum()):,} records, {len(batches):,} batches an epoch, {filled:.1%} filled, {total:,} steps"
    )
    if count := int(data.index.cut.sum()):
        words += f"; {count:,} records are cut to {data.longest:,} tokens"
    if problems := data.index.problems:
        words += f"; {len(problems):,} records are left out, the first: {problems[0][1]}"
    return words
