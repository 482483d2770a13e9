"""What a user holds: a VLM (model, tokenizer and image processor together) and a Session (a conversation that owns a state)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from visualrwkv.checkpoint import load_model
from visualrwkv.config import ImagePosition
from visualrwkv.generate import Sampling, generate, prefill, step, stream
from visualrwkv.model import VisualRWKV
from visualrwkv.rwkv.state import State
from visualrwkv.task import load_task
from visualrwkv.text.prompt import IMAGE_TAG, encode_conversation
from visualrwkv.text.tokenizer import END, END_OF_TURN, StreamDecoder, decode
from visualrwkv.vision.processor import Picture, make_processor

Pictures = Picture | Sequence[Picture] | None


def load(
    path: str | Path,
    vision: str | Path | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    task: str | Path | None = None,
    **overrides: Any,
) -> VLM:
    """Open a model together with its tokenizer and image processor; formats, overrides and errors as `load_model`.

    task: a file that state tuning made, to start from (`VLM.use`).
    """
    vlm = VLM(load_model(path, device, dtype, vision=vision, **overrides))
    vlm.use(task)
    return vlm


def as_list(pictures: Pictures) -> list[Picture]:
    """None, one picture or several -> a list."""
    if pictures is None:
        return []
    return [pictures] if isinstance(pictures, (str, Path, bytes, Image.Image)) else list(pictures)


class VLM:
    """Ask pictures questions. Without a vision encoder it answers text only."""

    def __init__(self, model: VisualRWKV):
        self.model = model.eval()
        self.processor = make_processor(model.config.vision) if model.config.vision else None
        self.start: State | None = None  # what a conversation remembers before its first word, one row

    def use(self, task: str | Path | None) -> None:
        """Let later sessions and answers start from a task's state, or from nothing (None); sessions that exist keep theirs.

        FileNotFoundError or ValueError in one sentence where the file is none, or was made for another model; then all
        stays as it was.
        """
        self.start = None if task is None else load_task(task, self.model.rwkv)

    def starts(self, rows: int) -> State | None:
        """What so many conversations start from."""
        return None if self.start is None else self.start.select([0] * rows)

    def prompt(self, pictures: int, text: str, image_position: ImagePosition | None = None) -> list[int]:
        """The ids of a question up to "Assistant:"; tags may be written in the text, else the pictures come first."""
        tags = text.count(IMAGE_TAG)
        if tags and tags != pictures:
            raise ValueError(f"the question has {tags} {IMAGE_TAG} tags for {pictures} pictures")
        value = text if tags else f"{IMAGE_TAG}\n" * pictures + text
        turns = [{"from": "human", "value": value}, {"from": "gpt", "value": ""}]
        config = self.model.config
        position = image_position or config.image_position
        return encode_conversation(turns, config.template, position, config.image_tokens)[0]

    def pixels(self, pictures: Sequence[Picture]) -> Tensor | None:
        """Pictures in any form -> (I, 3, H, W), or None if there are none."""
        if not pictures:
            return None
        if self.processor is None:
            raise ValueError("this model has no vision encoder; it answers text only")
        return torch.stack([self.processor(p) for p in pictures])

    def next_token_logits(self, image: Pictures, text: str, image_position: ImagePosition | None = None) -> Tensor:
        """What may open the answer: (V,) fp32, after the full prompt template."""
        pictures = as_list(image)
        prompt = self.prompt(len(pictures), text, image_position)
        logits, _ = prefill(self.model, [prompt], self.pixels(pictures), self.start)
        return logits[0].float()

    def answer(
        self,
        image: Pictures,
        text: str,
        image_position: ImagePosition | None = None,
        max_new_tokens: int = 256,
        **sampling: float,
    ) -> str:
        """One answer. image: path, PIL picture, bytes, a list of them, or None; sampling: temperature, top_p, seed."""
        return "".join(self.stream(image, text, image_position, max_new_tokens, **sampling)).strip()

    def stream(
        self,
        image: Pictures,
        text: str,
        image_position: ImagePosition | None = None,
        max_new_tokens: int = 256,
        **sampling: float,
    ) -> Iterator[str]:
        """The answer as it grows, never a broken character."""
        return self.session().stream(text, image, image_position, max_new_tokens, **sampling)

    def answer_batch(
        self,
        questions: Sequence[tuple[Pictures, str]],
        image_position: ImagePosition | None = None,
        max_new_tokens: int = 256,
        **sampling: float,
    ) -> list[str]:
        """Answers to several (pictures, text), read side by side; each is the same as when asked alone."""
        pictures = [as_list(image) for image, _ in questions]
        prompts = [self.prompt(len(p), text, image_position) for p, (_, text) in zip(pictures, questions)]
        pixels = self.pixels([p for ps in pictures for p in ps])
        logits, state = prefill(self.model, prompts, pixels, self.starts(len(prompts)))
        answers = generate(self.model, logits, state, max_new_tokens, make_sampling(sampling))
        return [decode(ids).strip() for ids in answers]

    def session(self, image: Pictures = None) -> Session:
        """A new conversation, with pictures to be shown with its first question."""
        return Session(self, as_list(image))


def make_sampling(values: dict) -> Sampling:
    """Keyword arguments to Sampling; an unknown one is a ValueError that names it."""
    known = ("temperature", "top_p", "seed")
    for name in values:
        if name not in known:
            raise ValueError(f"{name} is no sampling setting; there are {', '.join(known)}")
    return Sampling(**values)


@dataclass(frozen=True)
class Snapshot:
    """A conversation between two turns; a value."""

    state: State | None
    waiting: tuple[Picture, ...]
    turns: tuple[tuple[str, str], ...] = ()


class Session:
    """A conversation that owns a state: each turn reads only its own tokens, however long the conversation."""

    def __init__(self, vlm: VLM, pictures: Sequence[Picture] = ()):
        self.vlm = vlm
        self._now = Snapshot(vlm.start, tuple(pictures))
        self._before: list[Snapshot] = []

    @property
    def turns(self) -> tuple[tuple[str, str], ...]:
        """The questions and answers so far."""
        return self._now.turns

    @property
    def state(self) -> State | None:
        """All that the model remembers; before the first question what a task brought, or None."""
        return self._now.state

    def ask(self, text: str, image: Pictures = None, **settings) -> str:
        """The answer to the next question; `settings` as `stream`."""
        return "".join(self.stream(text, image, **settings)).strip()

    def stream(
        self,
        text: str,
        image: Pictures = None,
        image_position: ImagePosition | None = None,
        max_new_tokens: int = 256,
        **sampling: float,
    ) -> Iterator[str]:
        """The answer as it grows. A turn that is broken off before its end leaves the conversation as it was."""
        model = self.vlm.model
        options = make_sampling(sampling)
        pictures = [*self._now.waiting, *as_list(image)]
        prompt = self.vlm.prompt(len(pictures), text, image_position)
        logits, state = prefill(model, [prompt], self.vlm.pixels(pictures), self._now.state)
        decoder, ids, lead = StreamDecoder(), [], True
        for token, before in stream(model, logits, state, max_new_tokens, options):
            state = before
            ids.append(token)
            if token in (END, model.config.end_of_turn):
                break
            piece = decoder.push(token)
            piece, lead = (piece.lstrip(), lead and not piece.strip()) if lead else (piece, False)
            if piece:
                yield piece
        if rest := decoder.flush():
            yield rest
        self._close(text, ids, state)

    def _close(self, text: str, ids: list[int], state: State) -> None:
        """Let the state read the end of the turn, as in training, and make it the conversation's."""
        end = self.vlm.model.config.end_of_turn
        answer = [i for i in ids if i not in (END, end)]
        unread = [ids[-1]] if ids and ids[-1] not in (END, end) else []  # the last token was not read yet
        if end != END_OF_TURN or not decode(answer).endswith("\n\n"):
            unread.append(end)
        for token in unread:
            _, state = step(self.vlm.model, torch.tensor([token], device=self.vlm.model.device), state)
        self._before.append(self._now)
        self._now = Snapshot(state, (), (*self._now.turns, (text, decode(answer).strip())))

    def undo(self) -> None:
        """Forget the last turn; ValueError if there is none."""
        if not self._before:
            raise ValueError("there is no turn to undo")
        self._now = self._before.pop()

    def fork(self) -> Session:
        """A second conversation that goes on from here; neither changes the other."""
        other = Session(self.vlm)
        other._now, other._before = replace(self._now), list(self._before)
        return other


__all__ = ["VLM", "Session", "load"]
