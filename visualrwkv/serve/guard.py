"""What is decided before a request's body is read: its key, its size, and whether there is room."""

from __future__ import annotations

import hmac
import json
from typing import Any

from fastapi import HTTPException

from visualrwkv.serve.errors import ApiError
from visualrwkv.serve.limits import Limits


class Guard:
    """ASGI middleware: 401 without the key, 429 where as many requests are under way as slots and queue hold, 413 for too much."""

    def __init__(self, app: Any, limits: Limits, key: str | None):
        self.app, self.limits = app, limits
        self._key = key.encode() if key else None
        self._under_way = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1"):
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        most, length = self.limits.body_mb * 1_000_000, headers.get(b"content-length", b"0")
        given = headers.get(b"authorization", b"").partition(b" ")[2].strip()
        if self._key and not hmac.compare_digest(given, self._key):
            return await refuse(send, ApiError(401, "the API key is missing or wrong", code="invalid_api_key"))
        if not length.isdigit() or int(length) > most:
            return await refuse(send, self._too_large())
        if scope["method"] != "POST":
            return await self.app(scope, receive, send)
        room = self.limits.slots + self.limits.queue
        if self._under_way >= room:
            words = f"{self._under_way} requests are under way, and no more fit; try again soon"
            return await refuse(send, ApiError(429, words, code="rate_limit_exceeded"))
        read = 0

        async def counted() -> Any:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > most:
                raise HTTPException(413, self._too_large().message)  # the kind that comes through where bodies are read
            return message

        self._under_way += 1
        try:
            await self.app(scope, counted, send)
        finally:
            self._under_way -= 1

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the request's body is larger than {self.limits.body_mb} MB", code="request_too_large")


async def refuse(send: Any, error: ApiError) -> None:
    """An answer without the app."""
    body = json.dumps(error.body()).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **error.headers}
    raw = [(k.lower().encode(), v.encode()) for k, v in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
