"""What a user holds: a VLM (model, tokenizer and image processor together) and a Session (a conversation that owns a state)."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from visualrwkv.checkpoint import load_model
from visualrwkv.config import ImagePosition
from visualrwkv.files import fingerprint
from visualrwkv.generate import Answer, answer_all, close_turns, prefill, prefill_shared, stream
from visualrwkv.model import Encoded, VisualRWKV
from visualrwkv.rwkv.state import State
from visualrwkv.sampling import Sampling
from visualrwkv.saved import History, Question, Snapshot, Turn, load_snapshot, save_snapshot
from visualrwkv.task import load_task
from visualrwkv.text.prompt import IMAGE_TAG, as_typed, encode_conversation, literal
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


def name_of(picture: Picture) -> Hashable:
    """What two mentions of the same picture share: its path, its bytes, or that it is the same object."""
    return id(picture) if isinstance(picture, Image.Image) else picture if isinstance(picture, bytes) else str(picture)


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
        """The ids of a question up to "Assistant:".

        Tags in the text are the pictures', as in LLaVA's files, where there are as many; else they are text like any other,
        and the pictures come where `image_position` wants them. `literal(text)` makes them text always.
        """
        tags = text.count(IMAGE_TAG)
        value = text if tags and tags == pictures else f"{IMAGE_TAG}\n" * pictures + literal(text)
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
        **sampling: Any,
    ) -> str:
        """One answer. image: path, PIL picture, bytes, a list of them, or None; sampling: the fields of `Sampling`."""
        return "".join(self.stream(image, text, image_position, max_new_tokens, **sampling)).strip()

    def stream(
        self,
        image: Pictures,
        text: str,
        image_position: ImagePosition | None = None,
        max_new_tokens: int = 256,
        **sampling: Any,
    ) -> Iterator[str]:
        """The answer as it grows, never a broken character."""
        return self.session().stream(text, image, image_position, max_new_tokens, **sampling)

    def answer_batch(
        self,
        questions: Sequence[tuple[Pictures, str]],
        image_position: ImagePosition | None = None,
        max_new_tokens: int = 256,
        **sampling: Any,
    ) -> list[str]:
        """Answers to several (pictures, text), read side by side; each is the same as when asked alone.

        A picture that several ask about is opened and encoded once, and read once where the prompts begin with it.
        """
        if not questions:
            return []
        pictures = [as_list(image) for image, _ in questions]
        prompts = [self.prompt(len(p), text, image_position) for p, (_, text) in zip(pictures, questions)]
        places: dict[Hashable, int] = {}
        numbers = [[places.setdefault(name_of(p), len(places)) for p in asked] for asked in pictures]
        distinct = dict(zip((n for ns in numbers for n in ns), (p for ps in pictures for p in ps)))
        pixels = self.pixels([distinct[n] for n in range(len(places))])
        start = self.starts(len(prompts))
        with torch.inference_mode():
            if pixels is None:
                logits, state = prefill(self.model, prompts, None, start)
            else:
                encoded = Encoded(self.model.encode(pixels))
                logits, state = prefill_shared(self.model, prompts, numbers, encoded, start)
        answers = answer_all(self.model, logits, state, max_new_tokens, make_sampling(sampling))
        return [answer.text for answer in answers]

    def ask_many(
        self,
        image: Pictures,
        questions: Sequence[str],
        image_position: ImagePosition | None = None,
        max_new_tokens: int = 256,
        **sampling: Any,
    ) -> list[str]:
        """Answers to several questions about the same pictures, which are encoded once; as `answer_batch`.

        `sharing` says whether the questions share the state after the pictures as well.
        """
        return self.answer_batch([(image, text) for text in questions], image_position, max_new_tokens, **sampling)

    def sharing(self, image_position: ImagePosition | None = None) -> str:
        """What `ask_many` shares among its questions: "state" where pictures come first, else their "features"."""
        first = self.model.config.template == "world" or (image_position or self.model.config.image_position) == "first"
        return "state" if first else "features"

    def session(self, image: Pictures = None) -> Session:
        """A new conversation, with pictures to be shown with its first question."""
        return Session(self, as_list(image))

    def resume(self, path: str | Path) -> Session:
        """A conversation that `Session.save` wrote, here or elsewhere; ValueError where another model's."""
        session = Session(self)
        session._now = load_snapshot(path, self.fingerprint, self.model.device, self.model.config.rwkv)
        return session

    @cached_property
    def fingerprint(self) -> str:
        """Twelve hex digits that name the model by its numbers."""
        return fingerprint(self.model)


def make_sampling(values: dict) -> Sampling:
    """Keyword arguments to Sampling; an unknown one is a ValueError that names it."""
    known = [field.name for field in fields(Sampling)]
    for name in values:
        if name not in known:
            raise ValueError(f"{name} is no sampling setting; there are {', '.join(known)}")
    return Sampling(**values)


class Session:
    """A conversation that owns a state: each turn reads only its own tokens, however long the conversation."""

    def __init__(self, vlm: VLM, pictures: Sequence[Picture] = ()):
        self.vlm = vlm
        self._now = Snapshot(vlm.start, tuple(pictures))
        self._before = History()

    @property
    def turns(self) -> tuple[tuple[str, str], ...]:
        """The questions and answers so far."""
        return tuple((turn.text, turn.answer) for turn in self._now.turns)

    @property
    def state(self) -> State | None:
        """All that the model remembers; before the first question what a task brought, or None."""
        return self._now.state

    @property
    def tokens(self) -> int:
        """How many tokens the state has read, image tokens included."""
        return sum(len(turn.ids) for turn in self._now.turns)

    def ask(self, text: str, image: Pictures = None, **settings: Any) -> str:
        """The answer to the next question; `settings` as `stream`."""
        return "".join(self.stream(text, image, **settings))

    def stream(
        self,
        text: str,
        image: Pictures = None,
        image_position: ImagePosition | None = None,
        max_new_tokens: int = 256,
        **sampling: Any,
    ) -> Iterator[str]:
        """The answer as it grows. A turn that is broken off before its end leaves the conversation as it was."""
        model, now = self.vlm.model, self._now
        options = make_sampling(sampling)
        pictures = [*now.waiting, *as_list(image)]
        prompt = self.vlm.prompt(len(pictures), text, image_position)
        logits, state = prefill(model, [prompt], self.vlm.pixels(pictures), now.state)
        answer = Answer(options, max_new_tokens, model.config.end_of_turn, start=state)
        for token, before in stream(model, logits, state, max_new_tokens, options):
            answer.state = before
            if piece := answer.push(token):
                yield piece
            if answer.ended:
                break
        if rest := answer.finish():
            yield rest
        asked = Question(text, tuple(as_list(image)), dict(sampling, max_new_tokens=max_new_tokens))
        if image_position:
            asked.settings["image_position"] = image_position
        turn = Turn(as_typed(text), answer.text, (*prompt, *answer.read()))
        state = close_turns(model, [answer])
        self._before.push(replace(now, asked=asked))
        self._now = Snapshot(state, (), (*now.turns, turn))

    def undo(self) -> None:
        """Forget the last turn; ValueError if there is none."""
        if not len(self._before):
            raise ValueError("there is no turn to undo")
        self._now = replace(self._before.pop(), asked=None)

    def regenerate(self, **settings: Any) -> str:
        """Ask the last question again, with other settings where given; as `regenerating`."""
        return "".join(self.regenerating(**settings))

    def regenerating(self, **settings: Any) -> Iterator[str]:
        """The new answer to the last question as it grows; if it is broken off, the old one stays. ValueError without a turn."""
        if not len(self._before):
            raise ValueError("there is no answer to regenerate")
        other = self.fork()
        before = other._before.pop()
        other._now, asked = replace(before, asked=None), before.asked
        assert asked is not None
        yield from other.stream(asked.text, asked.pictures, **asked.settings | settings)
        self._now, self._before = other._now, other._before

    def fork(self) -> Session:
        """A second conversation that goes on from here; neither changes the other."""
        other = Session(self.vlm)
        other._now, other._before = self._now, self._before.copy()
        return other

    def save(self, path: str | Path) -> None:
        """Write the conversation to a safetensors file, for `VLM.resume`; what was undone or can be is not in it."""
        save_snapshot(path, self._now, self.vlm.fingerprint)


__all__ = ["VLM", "Session", "load"]
