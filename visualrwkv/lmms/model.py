"""Our models as lmms-eval's tasks ask them: a text, the pictures of a document, and settings; back comes the answer.

This module needs lmms-eval (`pip install lmms-eval`) and is imported by it alone.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from lmms_eval.api.model import lmms
from PIL import Image

from visualrwkv.chat import load
from visualrwkv.config import IMAGE_POSITIONS, choose
from visualrwkv.generate import prefill
from visualrwkv.text.prompt import IMAGE_TAG
from visualrwkv.text.tokenizer import encode

MOST_TOKENS = 1024
"""Of an answer to a task that sets no limit."""

Settings = tuple[int, float, float, tuple[str, ...]]
"""How an answer is generated: at most so many tokens, temperature, top_p, and the texts that end it."""


class LmmsModel(lmms):
    """`--model visualrwkv`. model_args: pretrained (as `vr.load` takes it), vision, dtype, image_position."""

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        vision: str | None = None,
        dtype: str = "float32",
        image_position: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | str | None = None,
        **others: Any,
    ):
        if others:
            known = "pretrained, vision, dtype, image_position, device, batch_size"
            raise ValueError(f"{', '.join(others)}: there is no such model argument; there are {known}")
        if image_position is not None:
            choose("image_position", image_position, IMAGE_POSITIONS)
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be a whole number from 1")
        self.pretrained = pretrained
        super().__init__()
        self.batch_size = int(batch_size)
        self.image_position: Any = image_position
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # lmms-eval gathers what the ranks found through this
            from accelerate import Accelerator

            self.accelerator = Accelerator()
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
            self.device = self.accelerator.device
        self.vlm = load(pretrained, vision, str(self.device), dtype)

    def document(self, task: str, split: str, name: Any) -> Any:
        """A task's document; lmms-eval fills `task_dict`."""
        return self.task_dict[task][split][name]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answers, in batches of questions with the same settings."""
        answers = [""] * len(requests)
        groups: dict[Settings, list[int]] = defaultdict(list)
        for at, request in enumerate(requests):
            groups[read_settings(request.args[1])].append(at)
        for (limit, temperature, top_p, ends), members in groups.items():
            for start in range(0, len(members), self.batch_size):
                batch = members[start : start + self.batch_size]
                asked = []
                for at in batch:
                    text, _, show, name, task, split = requests[at].args
                    pictures = read_pictures(show(self.document(task, split, name)), task)
                    asked.append((pictures, fit_tags(text, len(pictures))))
                sampling = {"temperature": temperature, "top_p": top_p} if temperature else {}
                texts = self.vlm.answer_batch(asked, self.image_position, limit, **sampling)
                for at, text in zip(batch, texts):
                    answers[at] = cut(text, ends)
                    context, wishes = requests[at].args[:2]
                    self.cache_hook.add_partial("generate_until", (context, wishes), answers[at])
        return answers

    @torch.inference_mode()
    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Each continuation's mean loss, of which lmms-eval takes the lowest, and whether greedy decoding would give it."""
        found = []
        for request in requests:
            text, target, show, name, task, split = request.args
            document = self.document(task, split, name)
            pictures = read_pictures(show(document), task)
            said = target if isinstance(target, str) else target(document)
            prompt = self.vlm.prompt(len(pictures), fit_tags(text, len(pictures)), self.image_position)
            ids = encode(f" {said.strip()}")
            model = self.vlm.model
            first, state = prefill(model, [prompt], self.vlm.pixels(pictures))
            logits = first[:, None]
            if len(ids) > 1:
                rest, _ = model(torch.tensor([ids[:-1]], device=model.device), state=state)
                logits = torch.cat((logits, rest), 1)
            wanted = torch.tensor(ids, device=logits.device)
            loss = torch.nn.functional.cross_entropy(logits[0].float(), wanted)
            found.append((float(loss), bool((logits[0].argmax(-1) == wanted).all())))
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("tasks of several rounds are not supported; visualrwkv answers single questions")


def read_settings(wishes: Mapping[str, Any]) -> Settings:
    """A task's generation settings. Beams are not searched: what is not sampled is greedy."""
    ends = wishes.get("until") or ()
    sampled = wishes.get("do_sample", True) and wishes.get("temperature")
    return (
        int(wishes.get("max_new_tokens") or MOST_TOKENS),
        float(wishes["temperature"]) if sampled else 0.0,
        float(wishes.get("top_p") or 1.0),
        (ends,) if isinstance(ends, str) else tuple(ends),
    )


def read_pictures(shown: Any, task: str) -> list[Image.Image]:
    """A document's pictures; ValueError for a video or a sound."""
    shown = [] if shown is None else shown if isinstance(shown, (list, tuple)) else [shown]
    for item in shown:
        if not isinstance(item, Image.Image):
            raise ValueError(f"{task} shows a {type(item).__name__}; visualrwkv looks at pictures only")
    return list(shown)


def fit_tags(text: str, pictures: int) -> str:
    """The text with one tag a picture where its tags say so; else without, and the pictures are placed as usual."""
    return text if text.count(IMAGE_TAG) == pictures else text.replace(IMAGE_TAG, "").strip()


def cut(text: str, ends: Iterable[str]) -> str:
    """The text before the first of these."""
    for end in filter(None, ends):
        text = text.split(end)[0]
    return text.strip()
