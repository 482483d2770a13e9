"""One request under way: its news, its deadline, and its client, who may go away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence

from starlette.requests import Request
from torch import Tensor

from visualrwkv.generate import Answer
from visualrwkv.rwkv.state import State
from visualrwkv.serve.engine import Engine, Job, News
from visualrwkv.serve.errors import ApiError

LOOK = 0.5  # seconds between two looks whether the client is still there


class Gone(Exception):
    """The client went away."""


class Asking:
    """A prompt given to the engine, and its answer as it comes."""

    def __init__(
        self,
        engine: Engine,
        prompt: Sequence[int],
        pixels: Tensor | None,
        answer: Answer,
        start: State | None,
        keep: bool,
    ):
        self.engine, self.prompt_tokens, self.answer = engine, len(prompt), answer
        self.state: State | None = None
        self._news: asyncio.Queue[News] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(news: News) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(self._news.put_nowait, news)

        self.job = Job(prompt, pixels, start, answer, tell, keep)

    async def pieces(self, request: Request, seconds: float) -> AsyncGenerator[str, None]:
        """The answer as it grows. However this ends, the slot is free afterwards."""
        clock = asyncio.get_running_loop().time
        end = clock() + seconds
        looked = clock()
        self.engine.submit(self.job)
        try:
            while True:
                if clock() - looked > LOOK:
                    looked = clock()
                    if await request.is_disconnected():
                        raise Gone
                if (left := end - clock()) <= 0:
                    raise ApiError(504, f"the answer was not complete within {seconds:g} s", code="timeout")
                try:
                    news = await asyncio.wait_for(self._news.get(), min(left, LOOK))
                except (asyncio.TimeoutError, TimeoutError):
                    continue
                if news.error is not None:
                    closing = "shutting down" in str(news.error)
                    raise ApiError(503 if closing else 500, str(news.error) if closing else "the model failed")
                if news.text:
                    yield news.text
                if news.ended:
                    self.state = news.state
                    return
        finally:
            self.engine.cancel(self.job)

    def usage(self, names: tuple[str, str] = ("prompt_tokens", "completion_tokens")) -> dict[str, int]:
        """What was read and said, in tokens."""
        read, said = self.prompt_tokens, len(self.answer.ids)
        return {names[0]: read, names[1]: said, "total_tokens": read + said}
