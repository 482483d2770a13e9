"""What a run says of itself: a table of what is trained, metrics.jsonl, TensorBoard's events, the loss curve, and an alarm."""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from pathlib import Path
from typing import Any

from visualrwkv.model import VisualRWKV
from visualrwkv.training.recipes import Stage


def table(model: VisualRWKV, stage: Stage) -> str:
    """What is trained and what is frozen, with numbers of parameters; of adapters and of a state on lines of their own."""
    rows = [f"{stage}: parameters       trained        frozen"]
    parts = {"vit": model.vit, "proj": model.proj, "rwkv.emb": model.rwkv.emb, "rwkv.blocks": model.rwkv.blocks}
    parts |= {"rwkv.ln_out": model.rwkv.ln_out, "rwkv.head": model.rwkv.head}
    for name, part in parts.items():
        if part is None:
            continue
        own = [p for key, p in part.named_parameters() if ".lora_" not in key]
        counts = [sum(p.numel() for p in own if p.requires_grad is flag) for flag in (True, False)]
        rows.append(f"  {name:<16}{counts[0]:>14,}{counts[1]:>14,}")
    if adapters := sum(p.numel() for key, p in model.named_parameters() if ".lora_" in key):
        rows.append(f"  {'adapters':<16}{adapters:>14,}{0:>14,}")
    if stage == "state":
        sizes = model.config.rwkv
        rows.append(f"  {'initial state':<16}{sizes.n_layer * sizes.n_embd * sizes.head_size:>14,}{0:>14,}")
    return "\n".join(rows)


class Alarm:
    """Whether a loss is one to stop at: no number, or far above what it was.

    Far: more than `spike` times the median of the last 64, and at least 1 above it; 0 takes no loss for far.
    """

    def __init__(self, spike: float):
        self.spike, self.recent = spike, deque(maxlen=64)  # type: ignore[var-annotated]

    def __call__(self, loss: float) -> str | None:
        """What is wrong with this loss, or None."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        usual = statistics.median(self.recent) if len(self.recent) >= 16 else math.inf
        if self.spike and loss > self.spike * usual and loss > usual + 1:
            return f"the loss is {loss:.3g}, {loss / usual:.0f} times what it was"
        self.recent.append(loss)
        return None


def rows_before(path: Path, start: int) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl up to the step that a run goes on from; the others are dropped from the file."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("}\n")]  # a kill may have cut the last
    rows = [row for row in whole if row["step"] < start]
    part = path.with_name(".metrics.part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    part.replace(path)
    return rows


class Log:
    """metrics.jsonl, one line a step, and the same for TensorBoard; lines after the step that a run goes on from are dropped."""

    def __init__(self, out: Path, start: int):
        self.path, self.out, self.smooth = out / "metrics.jsonl", out, 0.0
        self.rows = rows_before(self.path, start)
        self.recent: list[tuple[int, float]] = []
        self.board = self._board(start)

    def _board(self, start: int) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:  # it is no part of what training needs
            return None
        return SummaryWriter(str(self.out / "tensorboard"), purge_step=start)

    def add(self, step: int, loss: float, tokens: int, seconds: float, **more: float) -> float:
        """Write a step's figures; returns tokens per second over the last steps."""
        self.recent = [*self.recent[-19:], (tokens, seconds)]
        rate = sum(t for t, _ in self.recent) / sum(s for _, s in self.recent)
        self.smooth = loss if not self.rows else 0.9 * (self.smooth or loss) + 0.1 * loss
        row = {"step": step, "loss": loss, "tokens": tokens, "seconds": seconds, "tokens_per_second": rate, **more}
        self.rows.append(row)
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")
        if self.board:
            for name, value in row.items():
                if name != "step":
                    self.board.add_scalar(name, value, step)
        return rate

    def picture(self, name: str, file: Path, step: int) -> None:
        """Show TensorBoard a picture as well."""
        if self.board:
            import numpy as np
            from PIL import Image

            self.board.add_image(name, np.asarray(Image.open(file).convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        if self.board:
            self.board.close()

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
