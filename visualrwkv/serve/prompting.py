"""From messages to what the model reads. What people wrote is text, whatever it says."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image
from torch import Tensor

from visualrwkv.chat import VLM
from visualrwkv.serve.errors import bad
from visualrwkv.serve.limits import Limits
from visualrwkv.serve.pictures import Fetcher, decode_picture, from_data_uri
from visualrwkv.serve.schema import Message, Part
from visualrwkv.text.prompt import IMAGE_TAG, encode_conversation, literal
from visualrwkv.text.tokenizer import encode

LONGEST = 128  # bytes of a token


@dataclass
class Said:
    """A turn: who, what, and the pictures' URLs."""

    role: str
    text: str = ""
    urls: list[str] = field(default_factory=list)


def turns_of(messages: Sequence[Message]) -> list[Said]:
    """Messages -> turns that alternate; a system message opens the user's next turn."""
    turns: list[Said] = []
    for number, message in enumerate(messages):
        said = Said("gpt" if message.role == "assistant" else "human")
        parts = [Part(type="text", text=message.content)] if isinstance(message.content, str) else message.content or []
        texts = []
        for part in parts:
            where = f"messages[{number}].content"
            if part.type in ("text", "input_text", "output_text") and part.text is not None:
                texts.append(part.text)
            elif part.type in ("image_url", "input_image"):
                url = part.image_url.get("url") if isinstance(part.image_url, dict) else part.image_url
                if not isinstance(url, str) or message.role != "user":
                    raise bad("a picture needs an image_url, in a message of the user", where)
                said.urls.append(url)
            else:
                raise bad(f"a part of type {part.type!r} is not supported; there are text and image_url", where)
        said.text = "\n".join(texts)
        if turns and turns[-1].role == said.role:
            turns[-1].text = "\n".join(filter(None, (turns[-1].text, said.text)))
            turns[-1].urls += said.urls
        else:
            turns.append(said)
    if turns[-1].role != "human" or not (turns[-1].text.strip() or turns[-1].urls):
        raise bad("the last message must be the user's, with text or a picture", "messages")
    return turns


class Reader:
    """Makes prompts and pixels, within the limits, off the event loop."""

    def __init__(self, vlm: VLM, limits: Limits, allow_urls: bool = False, fetcher: Fetcher | None = None):
        self.vlm, self.limits = vlm, limits
        self._fetcher = (fetcher or Fetcher(limits)) if allow_urls else None
        self._doors = asyncio.Semaphore(2)  # so many pictures are decoded at once, however many are sent

    async def read(self, messages: Sequence[Message]) -> tuple[list[int], Tensor | None]:
        """The ids of a conversation up to "Assistant:", and its pictures (I, 3, H, W)."""
        turns = turns_of(messages)
        urls = [url for turn in turns for url in turn.urls]
        if len(urls) > self.limits.pictures:
            raise bad(f"{len(urls)} pictures; {self.limits.pictures} are allowed", "messages")
        if urls and self.vlm.processor is None:
            raise bad("this model has no vision encoder; it answers text only", "messages")
        if sum(len(turn.text) for turn in turns) > self.limits.prompt_tokens * LONGEST:
            raise self._too_long("more")
        prompt = await asyncio.to_thread(self._prompt, turns)
        if len(prompt) > self.limits.prompt_tokens:
            raise self._too_long(str(len(prompt)))
        pictures = [await self._picture(url) for url in urls]
        return prompt, await asyncio.to_thread(self.vlm.pixels, pictures)

    def _too_long(self, count: str) -> Exception:
        words = f"the prompt has {count} tokens; {self.limits.prompt_tokens} are allowed"
        return bad(words, "messages", "context_length_exceeded")

    def _prompt(self, turns: list[Said]) -> list[int]:
        config = self.vlm.model.config
        ids: list[int] = []
        for turn in turns:
            if turn.role == "gpt" and not turn.text.strip():  # an answer of no words, closed as any
                ids += [*encode("Assistant:"), config.end_of_turn]
                continue
            value = f"{IMAGE_TAG}\n" * len(turn.urls) + literal(turn.text)
            said = [{"from": turn.role, "value": value}]
            ids += encode_conversation(said, config.template, config.image_position, config.image_tokens)[0]
        ids += encode("Assistant:")
        return ids

    async def _picture(self, url: str) -> Image.Image:
        if url[:5].lower() == "data:":
            data = from_data_uri(url, self.limits)
        elif self._fetcher is None:
            raise bad("pictures are taken as data URIs only; the server was started without --allow-urls", "image_url")
        else:
            data = await self._fetcher.get(url)
        async with self._doors:
            return await asyncio.to_thread(decode_picture, data, self.limits)
