"""The routes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from visualrwkv.chat import VLM
from visualrwkv.serve import completions
from visualrwkv.serve.asking import Asking, Gone
from visualrwkv.serve.engine import Engine
from visualrwkv.serve.errors import ApiError, bad
from visualrwkv.serve.guard import Guard
from visualrwkv.serve.limits import Limits
from visualrwkv.serve.pictures import Fetcher
from visualrwkv.serve.prompting import Reader
from visualrwkv.serve.responses import Response as Responding
from visualrwkv.serve.schema import Completion, Message, Respond, Settings
from visualrwkv.serve.store import Store

UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
NOT_OURS = {"n": 1, "logprobs": False, "tools": [], "functions": [], "response_format": {"type": "text"}}


def make_app(
    vlm: VLM,
    name: str,
    limits: Limits | None = None,
    key: str | None = None,
    allow_urls: bool = False,
    fetcher: Fetcher | None = None,
) -> FastAPI:
    """The application that answers with this model, under this name."""
    limits = limits or Limits()
    engine, store = Engine(vlm.model, limits.slots), Store(limits.states)
    reader = Reader(vlm, limits, allow_urls, fetcher)
    began = int(time.time())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(title="VisualRWKV", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.engine, app.state.store = engine, store
    app.add_middleware(Guard, limits=limits, key=key)
    add_errors(app)
    card = {"id": name, "object": "model", "created": began, "owned_by": "visualrwkv"}

    def check_model(asked: Settings) -> None:
        if asked.model != name:
            words = f"there is no model {asked.model[:100]!r} here; there is {name!r}"
            raise ApiError(404, words, "model", "model_not_found")
        asked.refuse(**NOT_OURS)

    async def within(request: Request, work: Any) -> Any:
        """The result of reading a request, unless it takes too long."""
        try:
            return await asyncio.wait_for(work, limits.timeout_s)
        except (asyncio.TimeoutError, TimeoutError):
            raise ApiError(504, f"the prompt was not ready within {limits.timeout_s:g} s", code="timeout") from None

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "model": name, "states": len(store), **engine.load}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{asked:path}")
    async def model(asked: str) -> dict[str, Any]:
        if asked != name:
            raise ApiError(
                404, f"there is no model {asked[:100]!r} here; there is {name!r}", "model", "model_not_found"
            )
        return card

    @app.post("/v1/chat/completions")
    async def complete(asked: Completion, request: Request) -> Response:
        check_model(asked)
        most = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
        answer = asked.answer(most, "max_completion_tokens", limits, vlm.model.config.end_of_turn)
        prompt, pixels = await within(request, reader.read(asked.messages))
        asking = Asking(engine, prompt, pixels, answer, vlm.start, keep=False)
        if asked.stream:
            return as_events(completions.events(asking, request, limits.timeout_s, name, asked))
        return JSONResponse(await completions.whole(asking, request, limits.timeout_s, name))

    @app.post("/v1/responses")
    async def respond(asked: Respond, request: Request) -> Response:
        check_model(asked)
        answer = asked.answer(asked.max_output_tokens, "max_output_tokens", limits, vlm.model.config.end_of_turn)
        start = vlm.start
        if asked.previous_response_id is not None:
            start = store.get(asked.previous_response_id)
            if start is None:
                words = f"there is no response {asked.previous_response_id[:100]!r}, or it was not used for too long"
                raise ApiError(404, words, "previous_response_id", "previous_response_not_found")
        messages = [Message(role="user", content=asked.input)] if isinstance(asked.input, str) else asked.input
        if asked.instructions:
            messages = [Message(role="system", content=asked.instructions), *messages]
        prompt, pixels = await within(request, reader.read(messages))
        asking = Asking(engine, prompt, pixels, answer, start, keep=asked.store is not False and limits.states > 0)
        response = Responding(asking, asked, name, store)
        if asked.stream:
            return as_events(response.events(request, limits.timeout_s))
        return JSONResponse(await response.whole(request, limits.timeout_s))

    @app.delete("/v1/responses/{response}")
    async def forget(response: str) -> dict[str, Any]:
        if not store.remove(response):
            raise ApiError(404, f"there is no response {response[:100]!r}", "response_id")
        return {"id": response, "object": "response", "deleted": True}

    return app


def as_events(lines: AsyncIterator[str]) -> StreamingResponse:
    """Server-sent events, each sent at once."""
    return StreamingResponse(lines, headers=UNBUFFERED, media_type="text/event-stream")


def add_errors(app: FastAPI) -> None:
    """Whatever goes wrong is said in the API's own format."""

    @app.exception_handler(ApiError)
    async def ours(_: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def wrong(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"][1:])
        return await ours(_, bad(f"{param or 'the body'}: {first['msg']}", param or None))

    @app.exception_handler(HTTPException)
    async def plain(_: Request, error: HTTPException) -> JSONResponse:
        return await ours(_, ApiError(error.status_code, f"{error.detail}"))

    @app.exception_handler(Gone)
    async def gone(_: Request, error: Gone) -> JSONResponse:
        return await ours(_, ApiError(499, "the client went away"))

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return await ours(_, ApiError(500, "the server failed; its log says how"))
