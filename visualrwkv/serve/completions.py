"""/v1/chat/completions: what goes over the wire."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request

from visualrwkv.serve.asking import Asking, Gone
from visualrwkv.serve.errors import ApiError
from visualrwkv.serve.schema import Completion


def frame(kind: str, model: str, choice: dict[str, Any] | None, name: str, made: int) -> dict[str, Any]:
    """What a whole answer and a chunk have in common."""
    choices = [] if choice is None else [{"index": 0, "logprobs": None, **choice}]
    return {"id": name, "object": kind, "created": made, "model": model, "choices": choices}


async def whole(asking: Asking, request: Request, seconds: float, model: str) -> dict[str, Any]:
    """The answer in one piece."""
    text = "".join([piece async for piece in asking.pieces(request, seconds)])
    message = {"role": "assistant", "content": text, "refusal": None}
    choice = {"message": message, "finish_reason": asking.answer.ended}
    name, made = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
    return frame("chat.completion", model, choice, name, made) | {"usage": asking.usage()}


async def events(asking: Asking, request: Request, seconds: float, model: str, asked: Completion) -> AsyncIterator[str]:
    """The answer as server-sent events."""
    name, made = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
    with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
    more = {"usage": None} if with_usage else {}

    def chunk(choice: dict[str, Any] | None, **rest: Any) -> str:
        return line(frame("chat.completion.chunk", model, choice, name, made) | more | rest)

    try:
        yield chunk({"delta": {"role": "assistant", "content": ""}, "finish_reason": None})
        async with aclosing(asking.pieces(request, seconds)) as pieces:
            async for piece in pieces:
                yield chunk({"delta": {"content": piece}, "finish_reason": None})
        yield chunk({"delta": {}, "finish_reason": asking.answer.ended})
        if with_usage:
            yield chunk(None, usage=asking.usage())
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield line(error.body())
    except Gone:
        return


def line(data: dict[str, Any], event: str | None = None) -> str:
    """One server-sent event."""
    return (f"event: {event}\n" if event else "") + f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
