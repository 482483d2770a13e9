"""/v1/responses: what goes over the wire."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request

from visualrwkv.serve.asking import Asking, Gone
from visualrwkv.serve.completions import line
from visualrwkv.serve.errors import ApiError
from visualrwkv.serve.schema import Respond
from visualrwkv.serve.store import Store


class Response:
    """A response and the state that is kept under its name."""

    def __init__(self, asking: Asking, asked: Respond, model: str, store: Store):
        self.asking, self.asked, self.model, self.store = asking, asked, model, store
        self.id, self.item = f"resp_{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}"
        self.made = int(time.time())

    def body(self, status: str, text: str = "", error: ApiError | None = None) -> dict[str, Any]:
        """The response as it stands."""
        over = status in ("completed", "incomplete")
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.made,
            "status": status,
            "model": self.model,
            "output": [self.message(status, text)] if over else [],
            "error": error and {"code": "server_error", "message": error.message},
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": self.asked.instructions,
            "max_output_tokens": self.asked.max_output_tokens,
            "metadata": self.asked.metadata or {},
            "parallel_tool_calls": False,
            "previous_response_id": self.asked.previous_response_id,
            "store": self.asked.store is not False,
            "temperature": self.asked.temperature or 0.0,
            "tool_choice": "none",
            "tools": [],
            "top_p": self.asked.top_p or 1.0,
            "usage": self.usage() if over else None,
        }

    def usage(self) -> dict[str, Any]:
        """Tokens read and said; what the state remembered was not read again."""
        details = {"input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}}
        return self.asking.usage(("input_tokens", "output_tokens")) | details

    def message(self, status: str, text: str) -> dict[str, Any]:
        """The output item."""
        content = [] if status == "in_progress" else [part(text)]
        return {"id": self.item, "type": "message", "role": "assistant", "status": status, "content": content}

    def keep(self) -> str:
        """Put the state into the store -> the status."""
        if self.asking.state is not None:
            self.store.put(self.id, self.asking.state)
        return "completed" if self.asking.answer.ended == "stop" else "incomplete"

    async def whole(self, request: Request, seconds: float) -> dict[str, Any]:
        """The response in one piece."""
        text = "".join([piece async for piece in self.asking.pieces(request, seconds)])
        return self.body(self.keep(), text)

    async def events(self, request: Request, seconds: float) -> AsyncIterator[str]:
        """The response as server-sent events."""
        number = -1

        def event(kind: str, **data: Any) -> str:
            nonlocal number
            number += 1
            return line({"type": f"response.{kind}", "sequence_number": number, **data}, f"response.{kind}")

        at = {"item_id": self.item, "output_index": 0, "content_index": 0}
        try:
            yield event("created", response=self.body("in_progress"))
            yield event("in_progress", response=self.body("in_progress"))
            yield event("output_item.added", output_index=0, item=self.message("in_progress", ""))
            yield event("content_part.added", **at, part=part(""))
            text = ""
            async with aclosing(self.asking.pieces(request, seconds)) as pieces:
                async for piece in pieces:
                    text += piece
                    yield event("output_text.delta", **at, delta=piece, logprobs=[])
            status = self.keep()
            yield event("output_text.done", **at, text=text, logprobs=[])
            yield event("content_part.done", **at, part=part(text))
            yield event("output_item.done", output_index=0, item=self.message(status, text))
            yield event(status, response=self.body(status, text))
        except ApiError as error:
            yield event("failed", response=self.body("failed", error=error))
        except Gone:
            return


def part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
