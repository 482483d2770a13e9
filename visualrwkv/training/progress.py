"""Progress of long work: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

EVERY = 15.0
"""Seconds between lines where there is no terminal."""


class Bar:
    """`with Bar("finetune", 400) as bar: bar.advance(notes={"loss": "0.31"})`: rate, time left and the given notes."""

    def __init__(self, title: str, total: int, done: int = 0, shown: bool = True):
        self.title, self.total, self.done, self.start = title, total, done, done
        self.shown = shown
        self.terminal = shown and sys.stderr.isatty()
        self.notes = ""

    def __enter__(self) -> Bar:
        self.began = self.said = time.monotonic()
        if self.terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[notes]}"),
                TimeRemainingColumn(),
            )
            self.bar = Progress(*columns, console=Console(stderr=True))
            self.bar.start()
            self.task = self.bar.add_task(self.title, total=self.total, completed=self.done, notes="")
        return self

    def advance(self, by: int = 1, notes: dict[str, str] | None = None) -> None:
        """So much more is done; notes are shown beside it."""
        self.done += by
        if notes:
            self.notes = "  ".join(f"{k} {v}" for k, v in notes.items())
        if self.terminal:
            self.bar.update(self.task, completed=self.done, notes=self.notes)
        elif self.shown and (time.monotonic() - self.said > EVERY or self.done == self.total):
            self.said = time.monotonic()
            self._say()

    def _say(self) -> None:
        spent = time.monotonic() - self.began
        rate = (self.done - self.start) / max(spent, 1e-9)
        left = (self.total - self.done) / max(rate, 1e-9)
        print(
            f"{self.title}: {self.done}/{self.total}  {rate:.1f}/s  {left:.0f} s left  {self.notes}".rstrip(),
            file=sys.stderr,
            flush=True,
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.terminal:
            self.bar.stop()
