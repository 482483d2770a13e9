"""One thread that runs the model: prompts that wait are read together, answers grow side by side."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from visualrwkv.generate import Answer, Slots, close_turns, prefill
from visualrwkv.model import VisualRWKV
from visualrwkv.rwkv.state import State

log = logging.getLogger(__name__)
READ_AT_ONCE = 2048
"""Prompt tokens between two steps, so that one long prompt after another does not stop the answers that grow."""


@dataclass(frozen=True)
class News:
    """What became of a job since the last news: text, at last why it ended, the state to go on from; or what went wrong."""

    text: str = ""
    ended: str | None = None
    state: State | None = None
    error: Exception | None = None


@dataclass(eq=False)
class Job:
    """A prompt to be answered. tell is called from the engine's thread; keep: whether the state after the turn is wanted."""

    prompt: Sequence[int]
    pixels: Tensor | None
    start: State | None
    answer: Answer
    tell: Callable[[News], None]
    keep: bool = False
    cancelled: bool = False


class Engine:
    """Continuous batching: a job begins as soon as a slot is free, whatever the others are doing."""

    def __init__(self, model: VisualRWKV, slots: int = 64):
        self._model, self._most = model, slots
        self._waiting: deque[Job] = deque()
        self._running: dict[Answer, Job] = {}
        self._slots = Slots(model)
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def load(self) -> dict[str, int]:
        """How many answers grow, and how many wait."""
        return {"running": len(self._running), "waiting": len(self._waiting)}

    def submit(self, job: Job) -> None:
        """Take a job on; its news follow."""
        with self._wake:
            if self._closing:
                raise RuntimeError("the engine is closed")
            self._waiting.append(job)
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """Nobody waits for this any more: its slot is free before the next step."""
        with self._wake:
            job.cancelled = True
            self._wake.notify()

    def close(self) -> None:
        """Stop; jobs that are not done get an error."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._waiting or self._running or self._closing):
                    self._wake.wait()
                if self._closing:
                    break
                new = self._next()
            for job in [job for job in self._running.values() if job.cancelled]:
                self._slots.leave(job.answer)
                del self._running[job.answer]
            if new:
                try:
                    self._begin(new)
                except Exception as error:  # whatever it was, the others and the next request get their chance
                    self._lose([job for job in new if job.answer not in self._slots.answers], error)
            try:
                self._step()
            except Exception as error:
                self._slots = Slots(self._model)
                self._lose(list(self._running.values()), error)
        for job in [*self._running.values(), *self._waiting]:
            job.tell(News(error=RuntimeError("the server is shutting down")))

    def _lose(self, jobs: list[Job], error: Exception) -> None:
        log.error("the model failed", exc_info=error)
        for job in jobs:
            self._running.pop(job.answer, None)
            job.tell(News(error=error))

    def _next(self) -> list[Job]:
        """Jobs to begin now: as many as have a slot, and not too many tokens."""
        new: list[Job] = []
        tokens = 0
        while self._waiting and len(self._running) + len(new) < self._most:
            job = self._waiting[0]
            if new and tokens + len(job.prompt) > READ_AT_ONCE:
                break
            self._waiting.popleft()
            if not job.cancelled:
                new.append(job)
                tokens += len(job.prompt)
        return new

    def _begin(self, jobs: list[Job]) -> None:
        config, device = self._model.config.rwkv, self._model.device
        pixels = [job.pixels for job in jobs if job.pixels is not None]
        starts = None
        if any(job.start is not None for job in jobs):
            starts = State.cat([State.zeros(config, 1, device) if j.start is None else j.start for j in jobs])
        images = torch.cat(pixels) if pixels else None
        logits, state = prefill(self._model, [job.prompt for job in jobs], images, starts)
        for row, job in enumerate(jobs):
            job.pixels = None
            if job.keep or job.answer.sampler.sampling.stop:
                job.answer.state = job.answer.start = state.select([row])
            if job.answer.ended:
                self._done([job])
            else:
                self._running[job.answer] = job
        self._slots.join([job.answer for job in jobs], logits, state)

    def _step(self) -> None:
        ended = []
        for answer, text in self._slots.step():
            job = self._running[answer]
            if answer.ended:
                ended.append((job, text))
            elif text:
                job.tell(News(text))
        for job, _ in ended:
            del self._running[job.answer]
        for job, text in ended:
            if text:
                job.tell(News(text))
        self._done([job for job, _ in ended])

    def _done(self, jobs: list[Job]) -> None:
        kept = [job for job in jobs if job.keep and not job.cancelled]
        states = close_turns(self._model, [job.answer for job in kept]) if kept else None
        for job in jobs:
            state = None if states is None or job not in kept else states.select([kept.index(job)])
            job.tell(News(ended=job.answer.ended, state=state))
