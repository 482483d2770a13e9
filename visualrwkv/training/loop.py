"""The training loop: one stage of one model under DeepSpeed, the same on a laptop's CPU and on many GPUs.

A run is a directory: the model as soon as it is trained, `recipe.json`, `deepspeed.json`, `metrics.jsonl`, `loss.png`, and
`checkpoints/` from which the same command goes on.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import signal
import socket
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from visualrwkv.checkpoint import WEIGHTS, save_model
from visualrwkv.model import VisualRWKV
from visualrwkv.training.data import Batch, Conversations, Plan, load_batches
from visualrwkv.training.features import Features
from visualrwkv.training.loss import distinct_rows, packed_loss, wake_head
from visualrwkv.training.memory import trim_memory
from visualrwkv.training.optim import freeze, learning_rate, make_optimizer
from visualrwkv.training.progress import Bar
from visualrwkv.training.recipes import Recipe, Stage
from visualrwkv.training.watch import Watch


@dataclass(frozen=True)
class Run:
    """What is trained on what, and where it goes. `source` names the starting weights, to tell runs apart."""

    stage: Stage
    data: Path
    images: Path
    out: Path
    source: str = ""


class Objective(nn.Module):
    """The model and its loss as one module, so that one forward is one training step's.

    With `rows` (`distinct_rows`), these rows of the head are trained as a parameter of their own, `few`, and with `words`
    (U,), the ids that occur, rising, these rows of the embedding (text alone): gradients and optimizer states of the many
    others would cost a third of a small model's step. `spread` puts them back.
    """

    def __init__(
        self,
        model: VisualRWKV,
        bf16: bool,
        rows: Tensor | None = None,
        words: Tensor | None = None,
        features: Features | None = None,
    ):
        super().__init__()
        self.model, self.bf16, self.rows, self.words = model, bf16, rows, words
        self.features = features or Features(0)
        head, emb = model.rwkv.head.weight, model.rwkv.emb.weight
        self.few = None if rows is None else nn.Parameter(head.detach()[rows], requires_grad=head.requires_grad)
        self.alike = 1 if rows is None else len(head) - len(rows) + 1
        self.known = None if words is None else nn.Parameter(emb.detach()[words])
        if rows is not None:
            head.requires_grad_(False)
        if words is not None:
            emb.requires_grad_(False)

    def forward(self, batch: Batch) -> Tensor:
        """A packed batch -> the sum over its samples of their mean loss."""
        device = self.model.device
        batch = batch.to(device)
        head = self.model.rwkv.head.weight if self.few is None else self.few
        with torch.autocast(device.type, torch.bfloat16) if self.bf16 else nullcontext():
            if self.known is None or self.words is None:
                images = self.features.of(self.model, batch)
                hidden = self.model.hidden(batch.ids[None], images, cu_seqlens=batch.cu_seqlens)[0][0]
            else:
                x = nn.functional.embedding(torch.searchsorted(self.words, batch.ids), self.known)
                hidden = self.model.rwkv(x, batch.cu_seqlens, None, None)[0]
            loss = packed_loss(hidden, head, batch.labels, batch.cu_seqlens, self.rows, self.alike)
            if not batch.pictures and self.model.proj is not None and self.model.config.vision is not None:
                # the projector takes part in every batch, else its gradients are missing where others wait for them
                loss = loss + 0 * self.model.proj(hidden.new_zeros(1, self.model.config.vision.width)).sum()
        return loss

    @torch.no_grad()
    def spread(self) -> None:
        """Write the trained rows into the model's head and embedding."""
        head, emb = self.model.rwkv.head.weight, self.model.rwkv.emb.weight
        if self.few is not None and self.rows is not None:
            head.copy_(self.few[-1].expand_as(head))
            head[self.rows[:-1]] = self.few[:-1]
        if self.known is not None and self.words is not None:
            emb[self.words] = self.known


def deepspeed_config(recipe: Recipe, world: int) -> dict[str, Any]:
    """DeepSpeed's settings, generated so that each number lives once."""
    return {
        "train_micro_batch_size_per_gpu": 1,  # one packed row
        "gradient_accumulation_steps": recipe.accumulate,
        "train_batch_size": recipe.accumulate * world,
        "gradient_clipping": recipe.clip,
        "zero_optimization": {"stage": recipe.zero},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,  # the bar and metrics.jsonl say it
    }


def join_world() -> None:
    """Join the launcher's processes; started without a launcher, be a world of one."""
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if sys.prefix != sys.base_prefix:  # what DeepSpeed compiles is this environment's; another's would be compiled anew
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it says that there is no GPU
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints what it builds
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    dist.barrier()
    # Now that all ranks have opened one another's shared memory its names can go: DeepSpeed would leave 69 MB a rank behind.
    mine = f"deepspeed_allreduce_buffer_{os.getuid()}_{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}_{dist.get_rank()}"
    Path("/dev/shm", mine).unlink(missing_ok=True)


class Interrupt:
    """Ctrl-C and termination end the step that runs, not the process; all ranks agree on it."""

    def __init__(self, world: int):
        self.world, self.asked = world, False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, *_: object) -> None:
        self.asked = True

    def __call__(self, device: torch.device) -> bool:
        if self.world == 1:
            return self.asked
        flag = torch.tensor(int(self.asked), device=device)
        dist.all_reduce(flag)
        return bool(flag)


def train(model: VisualRWKV, run: Run, recipe: Recipe, watch: Watch | None = None) -> bool:
    """Train one stage; True when it is finished, False when it was interrupted and left a checkpoint.

    `watch` looks at the model now and then; its figures are logged with a step's metrics.
    """
    import deepspeed

    rank, world = dist.get_rank(), dist.get_world_size()
    chief = rank == 0
    data = Conversations(run.data, run.images, model.config, recipe.image_position)
    plan = Plan(data.lengths, recipe.tokens, recipe.seed, world, recipe.accumulate)
    total = recipe.steps or plan.steps(recipe.epochs)
    if chief:
        claim(run, recipe)
    dist.barrier()
    if (run.out / WEIGHTS).exists():
        if chief:
            print(f"{run.out} is finished; set OUT to train again beside it", file=sys.stderr)
        return True

    freeze(model, run.stage)
    wake_head(model.rwkv.head.weight, data.answers)
    about = table(model, run.stage)
    rows = distinct_rows(model.rwkv.head.weight, data.answers)
    few_words = run.stage == "language" and len(data.words) < 0.9 * model.config.rwkv.vocab_size
    words = torch.tensor(sorted(data.words), device=model.device) if few_words else None
    # With ZeRO 3 each part of the encoder is gathered when it runs: a rank that leaves it out would let the others wait.
    features = Features(recipe.features_gb * 1e9 if recipe.zero < 3 else 0)
    objective = Objective(model, recipe.bf16, rows, words, features)
    data.read = features  # workers have a copy that stays empty: they open every picture
    settings = deepspeed_config(recipe, world)
    engine, optimizer, _, _ = deepspeed.initialize(
        model=objective,
        optimizer=make_optimizer(objective, recipe),
        config=settings,
        dist_init_required=False,
    )
    if world == 1 and recipe.zero == 0:
        engine.enable_backward_allreduce = False  # alone there is nothing to reduce; it would copy every gradient
    checkpoints = run.out / "checkpoints"
    start = resume(engine, checkpoints)
    log = Log(run.out, start) if chief else None
    if chief:
        (run.out / "deepspeed.json").write_text(json.dumps(settings, indent=2) + "\n")
        print(about, file=sys.stderr)

    interrupted = Interrupt(world)
    shares = list(plan.shares(rank, start, total))
    batches = load_batches(data, shares, recipe.workers)
    engine.train()
    looked: dict[str, str] = {}
    with Bar(run.stage, total, start, chief) as bar:
        for step, share in enumerate(shares, start):
            began = time.monotonic()
            lr = learning_rate(recipe, step, total)
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)
            loss = torch.zeros((), device=engine.device)
            tokens = 0
            for _ in share.batches:
                try:
                    batch = next(batches)
                except (ValueError, OSError):
                    if world == 1 and step > start:  # other ranks would wait for each other
                        keep(engine, checkpoints, step, chief)
                    raise
                # DeepSpeed takes the mean over ranks and accumulated batches; the loss is the mean over samples
                part = engine(batch) / share.samples
                engine.backward(part * (world * recipe.accumulate))
                engine.step()
                loss += part.detach()
                tokens += len(batch.ids)
            if world > 1:
                dist.all_reduce(loss)
            if log:
                seconds = time.monotonic() - began
                seen: dict[str, float] = {}
                if watch and watch.due(step):
                    objective.spread()
                    seen = watch()
                rate = log.add(step, loss=float(loss), lr=lr, tokens=tokens * world, seconds=seconds, **seen)
                looked |= {k: f"{v:.2f}" for k, v in seen.items()}
                bar.advance(notes={"loss": f"{log.smooth:.3f}", "tokens/s": f"{rate:,.0f}", **looked})
            if step % 8 == 0:
                trim_memory()
            stop = interrupted(engine.device)
            if stop or ((step + 1) % recipe.save_every == 0 and step + 1 < total):
                keep(engine, checkpoints, step + 1, chief)
            if stop and step + 1 < total:
                if chief:
                    print(
                        f"stopped at step {step + 1} of {total}; the same command goes on from there", file=sys.stderr
                    )
                return False
    with gathered(objective, recipe.zero):
        if chief:
            objective.spread()
            save_model(model, run.out)
    if log:
        log.draw(run.stage)
        shutil.rmtree(checkpoints, ignore_errors=True)
    dist.barrier()
    return True


def gathered(model: nn.Module, zero: int) -> Any:
    """Whole parameters on every rank while they are written (ZeRO 3 holds only parts)."""
    if zero < 3:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(model.parameters()))


def claim(run: Run, recipe: Recipe) -> None:
    """Make the directory this run's; ValueError if it is another's."""
    mine = {
        "stage": run.stage,
        "data": str(run.data),
        "images": str(run.images),
        "source": run.source,
        **asdict(recipe),
    }
    file = run.out / "recipe.json"
    if file.exists():
        theirs = json.loads(file.read_text())
        changed = [k for k in mine if theirs.get(k) != mine[k]]
        if changed:
            k = changed[0]
            raise ValueError(
                f"{run.out} holds a run with {k} {theirs.get(k)!r}, not {mine[k]!r}; set OUT to another place"
            )
    elif run.out.exists() and any(run.out.iterdir()):
        raise ValueError(f"{run.out} exists and is no training run; set OUT to another place")
    run.out.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(mine, indent=2) + "\n")
    part.replace(file)


def keep(engine: Any, checkpoints: Path, step: int, chief: bool) -> None:
    """Save a checkpoint, then drop the older ones: `latest` moves only when the new one is whole."""
    engine.save_checkpoint(
        str(checkpoints), tag=f"step-{step}", client_state={"step": step}, exclude_frozen_parameters=True
    )
    if chief:
        for old in checkpoints.glob("step-*"):
            if old.name != f"step-{step}":
                shutil.rmtree(old)


def resume(engine: Any, checkpoints: Path) -> int:
    """The step to go on from; 0 without a checkpoint."""
    if not (checkpoints / "latest").exists():
        return 0
    _, client = engine.load_checkpoint(str(checkpoints), load_module_strict=False)  # frozen parts are not in it
    return int(client["step"])


def table(model: VisualRWKV, stage: Stage) -> str:
    """What is trained and what is frozen, with numbers of parameters."""
    rows = [f"{stage}: parameters       trained        frozen"]
    parts = {"vit": model.vit, "proj": model.proj, "rwkv.emb": model.rwkv.emb, "rwkv.blocks": model.rwkv.blocks}
    parts |= {"rwkv.ln_out": model.rwkv.ln_out, "rwkv.head": model.rwkv.head}
    for name, part in parts.items():
        if part is None:
            continue
        counts = [sum(p.numel() for p in part.parameters() if p.requires_grad is flag) for flag in (True, False)]
        rows.append(f"  {name:<16}{counts[0]:>14,}{counts[1]:>14,}")
    return "\n".join(rows)


class Log:
    """metrics.jsonl, one line a step; lines after the step that a run goes on from are dropped."""

    def __init__(self, out: Path, start: int):
        self.path, self.out, self.smooth = out / "metrics.jsonl", out, 0.0
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.rows = [row for row in map(json.loads, lines) if row["step"] < start]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        self.recent: list[tuple[int, float]] = []

    def add(self, step: int, loss: float, tokens: int, seconds: float, **more: float) -> float:
        """Write a step's figures; returns tokens per second over the last steps."""
        self.recent = [*self.recent[-19:], (tokens, seconds)]
        rate = sum(t for t, _ in self.recent) / sum(s for _, s in self.recent)
        self.smooth = loss if not self.rows else 0.9 * (self.smooth or loss) + 0.1 * loss
        row = {"step": step, "loss": loss, "tokens": tokens, "seconds": seconds, "tokens_per_second": rate, **more}
        self.rows.append(row)
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")
        return rate

    def draw(self, title: str) -> None:
        """The loss curve, as loss.png."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        steps, losses = [r["step"] for r in self.rows], [r["loss"] for r in self.rows]
        smooth, value = [], losses[0]
        for loss in losses:
            value = 0.95 * value + 0.05 * loss
            smooth.append(value)
        figure, axes = plt.subplots(figsize=(7, 4))
        axes.plot(steps, losses, color="0.8", linewidth=0.8)
        axes.plot(steps, smooth, color="tab:blue")
        axes.set(title=title, xlabel="step", ylabel="loss (mean over samples)", yscale="log")
        figure.tight_layout()
        figure.savefig(self.out / "loss.png", dpi=120)
        plt.close(figure)
