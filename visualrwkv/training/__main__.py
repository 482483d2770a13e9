"""`python -m visualrwkv.training`: one stage of training from files on disk; what scripts/pretrain.sh and finetune.sh call."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from visualrwkv.commandline import parse, run
from visualrwkv.config import RWKV_PRESETS, ModelConfig, preset
from visualrwkv.training.memory import keep_freed_memory, share_one_heap
from visualrwkv.training.recipes import RECIPES, Recipe, Stage, meeting


@dataclass(frozen=True)
class Options:
    """Train one stage of a model on LLaVA-format data. Further options override the preset's recipe."""

    stage: Stage
    data: Path  # LLaVA JSON or JSONL, a mixture of such, or a Hugging Face data set (a directory, or owner/name)
    out: Path  # the run's directory
    model: str | None = None  # where to start; in stage language also a preset's name, for fresh weights
    lm: str | None = None  # or: a language model …
    vision: str | None = None  # … and a vision encoder, to compose a new model
    images: Path | None = None  # what the records' pictures are relative to; default: the data file's directory
    watch: Path | None = None  # LLaVA JSON whose opening questions are asked now and then, with and without pictures
    watch_every: int = 100  # optimiser steps between two looks
    samples: bool = False  # leave what was answered at each look under OUT/answers, as JSONL and as a picture
    best: bool = False  # keep the model that saw best in OUT/best
    deepspeed: Path | None = None  # DeepSpeed's JSON, to override what is made from the recipe
    features: Path | None = (
        None  # a directory to keep what the frozen encoder makes of the pictures, for later epochs and runs
    )
    preset: str = "nano"


def main() -> None:
    arguments = sys.argv[1:]
    if "--help" in arguments or "-h" in arguments:
        arguments = ["--help"]
    options, rest = parse(Options, arguments, return_unknown_args=True)
    defaults = preset(preset(RECIPES, options.preset, "preset"), options.stage, "stage")
    recipe = parse(Recipe, [a for a in rest if not a.startswith("--local_rank")], default=defaults)
    if bool(options.model) == bool(options.lm and options.vision):
        raise ValueError("give either a model, or a language model (LM) and a vision encoder (VISION) to compose one")
    if options.stage == "state" and not options.model:
        raise ValueError("stage state needs a whole model (MODEL): its file will be for that one alone")
    if options.watch and recipe.zero == 3:
        raise ValueError(
            "--watch asks one rank's model, and with --zero 3 no rank has a whole one: leave one of them out"
        )
    if options.watch is None and (options.samples or options.best):
        raise ValueError("--samples and --best need --watch, the questions to ask")
    if recipe.streaming and options.features:
        raise ValueError(
            "--features goes over all pictures before the first step, --streaming over none; give one of them"
        )
    if options.watch_every < 1:
        raise ValueError(f"watch_every is {options.watch_every}; it must be at least 1")
    share_one_heap()  # before torch starts its threads
    keep_freed_memory()
    import torch

    from visualrwkv.checkpoint import compose, load_model, model_hash
    from visualrwkv.model import VisualRWKV
    from visualrwkv.training.checkpoints import Run
    from visualrwkv.training.engine import join_world, leave_world
    from visualrwkv.training.loop import train
    from visualrwkv.training.sources import on_hub
    from visualrwkv.training.watch import Watch

    if not options.data.exists() and not on_hub(options.data):
        raise FileNotFoundError(f"{options.data}: there is no such data file")
    torch.manual_seed(recipe.seed)
    if options.stage == "language" and options.model in RWKV_PRESETS:
        model = VisualRWKV(ModelConfig(RWKV_PRESETS[options.model]))
    elif options.model:
        model = load_model(options.model)
    else:
        model = compose(options.lm, options.vision, meeting(options.preset))
    starts = [p for p in (options.model, options.lm, options.vision) if p]
    source = " + ".join(f"{p} {model_hash(p)}" if Path(p).exists() else p for p in starts)
    images = options.images or (options.data if options.data.is_dir() else options.data.parent)
    watch = None
    if options.watch:
        kept = options.out / "answers" if options.samples else None, options.out / "best" if options.best else None
        watch = Watch(model, options.watch, options.watch.parent, options.watch_every, 128, *kept)
    join_world()
    run = Run(options.stage, options.data, images, options.out, source, options.deepspeed, options.features)
    finished = train(model, run, recipe, watch)
    leave_world(0 if finished else 130)


if __name__ == "__main__":
    try:
        run(main)
    except SystemExit as stop:
        if "pyarrow" not in sys.modules:
            raise
        sys.stdout.flush()  # its threads, if one still reads ahead, would abort an ending interpreter: apache/arrow#45214
        sys.stderr.flush()
        os._exit(stop.code if isinstance(stop.code, int) else int(stop.code is not None))
