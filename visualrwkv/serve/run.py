"""The server as a process."""

from __future__ import annotations

from pathlib import Path

import uvicorn

from visualrwkv.chat import load
from visualrwkv.serve.app import make_app
from visualrwkv.serve.limits import Limits

LONGEST_GOODBYE = 30  # seconds that answers have left to finish when the server is told to stop


def serve(
    model: str,
    name: str,
    host: str,
    port: int,
    device: str,
    dtype: str,
    key: str | None,
    allow_urls: bool,
    limits: Limits,
    task: Path | None = None,
) -> None:
    """Serve until told to stop; then no new requests are taken, and those under way are finished."""
    app = make_app(load(model, device=device, dtype=dtype, task=task), name, limits, key, allow_urls)
    print(f"serving {name} on http://{host}:{port}/v1", flush=True)
    uvicorn.run(
        app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=LONGEST_GOODBYE, server_header=False
    )
