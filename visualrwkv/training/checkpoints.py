"""What a run leaves to go on from, whole at every moment: a process may be killed in the middle of writing."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from visualrwkv.training.recipes import Recipe, Stage


@dataclass(frozen=True)
class Run:
    """What is trained on what, and where it goes.

    `source` names the starting weights, to tell runs apart; deepspeed: a user's own settings; features: where to keep what
    the frozen encoder makes of the pictures.
    """

    stage: Stage
    data: Path
    images: Path
    out: Path
    source: str = ""
    deepspeed: Path | None = None
    features: Path | None = None


def claim(run: Run, recipe: Recipe, ranks: int) -> None:
    """Make the directory this run's; ValueError if it is another's. A setting that it was too early to know is as it always was."""
    settings = json.loads(json.dumps(asdict(recipe)))
    mine = {
        "stage": run.stage,
        "data": str(run.data),
        "images": str(run.images),
        "source": run.source,
        "ranks": ranks,
        **settings,
    }
    hold(run.out, mine, json.loads(json.dumps(asdict(Recipe()))))


def hold(out: Path, mine: dict[str, Any], usual: dict[str, Any]) -> None:
    """Make the directory that of a run of these settings; ValueError if it is another's.

    usual: settings as they were where an older run does not say.
    """
    file = out / "recipe.json"
    if file.exists():
        theirs = usual | json.loads(file.read_text())
        changed = [k for k in mine if theirs.get(k) != mine[k]]
        if changed:
            k = changed[0]
            raise ValueError(f"{out} holds a run with {k} {theirs.get(k)!r}, not {mine[k]!r}; set OUT to another place")
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} exists and is no training run; set OUT to another place")
    out.mkdir(parents=True, exist_ok=True)
    put(file, json.dumps(mine, indent=2) + "\n")


def put(file: Path, text: str) -> None:
    """Write a small file whole, on the disk before its name."""
    part = file.with_name(f".{file.name}.part")
    with open(part, "w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    part.replace(file)


class Checkpoints:
    """Weights, optimizer, random numbers and place in the data, every so many steps; the newest few are kept.

    `latest` names the newest whole one: it moves only once all ranks have written theirs.
    """

    def __init__(self, folder: Path, engine: Any, world: Any, keep: int):
        self.folder, self.engine, self.world, self.keep = folder, engine, world, keep

    def save(self, step: int, place: Any = None) -> None:
        """Keep the run as it is before `step`, then drop what is older than the newest `keep`; place: a stream's."""
        client = {"step": step, "random": torch.get_rng_state(), "place": place}
        if torch.cuda.is_available():
            client["random_cuda"] = torch.cuda.get_rng_state()
        name = f"step-{step}"
        if self.world.chief and (self.folder / name).exists():  # left by a process that was killed while it wrote
            shutil.rmtree(self.folder / name)
        self.engine.save_checkpoint(
            str(self.folder), tag=name, client_state=client, save_latest=False, exclude_frozen_parameters=True
        )
        self.world.sum()  # all have written
        if self.world.chief:
            put(self.folder / "latest", name)
            kept = sorted(self.folder.glob("step-*"), key=lambda p: int(p.name.removeprefix("step-")))
            for old in [p for p in kept if p.name != name][: max(len(kept) - self.keep, 0)]:
                shutil.rmtree(old)

    def resume(self) -> tuple[int, Any]:
        """The step to go on from, and a stream's place; 0 and None without a checkpoint."""
        if not (self.folder / "latest").exists():
            return 0, None
        _, client = self.engine.load_checkpoint(
            str(self.folder), load_module_strict=False
        )  # frozen parts are not in it
        torch.set_rng_state(client["random"])
        if "random_cuda" in client:
            torch.cuda.set_rng_state(client["random_cuda"])
        return int(client["step"]), client.get("place")

    def drop(self) -> None:
        """The run is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)
