"""A server of a tiny random model, as a client meets it: over a socket."""

import base64
import contextlib
import io
import threading
import time

import openai
import pytest
import uvicorn

from visualrwkv.chat import VLM
from visualrwkv.serve.app import make_app
from visualrwkv.serve.limits import Limits


@contextlib.contextmanager
def running(app):
    """The app in a thread; gives its address."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def vlm(tiny_model):
    return VLM(tiny_model())


@pytest.fixture(scope="session")
def start(vlm):
    """start(limits..., **options): a context manager that serves and gives app, address and an openai client."""

    @contextlib.contextmanager
    def serving(model=None, key=None, allow_urls=False, fetcher=None, **limits):
        app = make_app(model or vlm, "tiny", Limits(**limits), key, allow_urls, fetcher)
        with (
            running(app) as address,
            openai.OpenAI(base_url=f"{address}/v1", api_key=key or "-", max_retries=0) as client,
        ):
            yield app, address, client

    return serving


@pytest.fixture(scope="session")
def served(start):
    with start() as (app, address, client):
        yield app, address, client


@pytest.fixture(scope="session")
def client(served):
    return served[2]


@pytest.fixture(scope="session")
def as_uri():
    """as_uri(picture): its data URI."""

    def make(picture):
        held = io.BytesIO()
        picture.save(held, "PNG")
        return "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()

    return make


@pytest.fixture(scope="session")
def eventually():
    """eventually(condition): waits until it holds."""

    def wait(condition, seconds=10):
        end = time.time() + seconds
        while not condition():
            assert time.time() < end
            time.sleep(0.02)

    return wait
