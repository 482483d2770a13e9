"""What bad requests and lost clients get: the API's own error with what was wrong, and the next request is answered."""

import asyncio
import base64
import io
import json
import struct
import threading
import time
import zlib

import httpx
import openai
import pytest
import torch
from PIL import Image

from visualrwkv.chat import VLM
from visualrwkv.serve.engine import Engine
from visualrwkv.serve.errors import ApiError
from visualrwkv.serve.limits import Limits
from visualrwkv.serve.pictures import Fetcher, is_public
from visualrwkv.text.tokenizer import encode

SIX = {"model": "tiny", "max_tokens": 6}
LONG = {"model": "tiny", "max_tokens": 4000, "temperature": 1.0}


def uri(data, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def huge(width, height):
    """A PNG that says it is so large."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 9999)) + chunk(b"IEND", b"")
    )


def cut_jpeg():
    held = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(held, "JPEG")
    return held.getvalue()[:300]


PICTURES = {
    "300 megapixels": (uri(huge(20000, 15000)), "more than 50 million"),
    "a bomb": (uri(huge(2**30, 2**30)), "more than 50 million pixels"),
    "no pixels behind the head": (uri(huge(4000, 4000)), "a picture is broken"),
    "a broken file": (uri(cut_jpeg(), "jpeg"), "a picture is"),
    "a PDF": (uri(b"%PDF-1.7\n%%EOF"), "a picture is none of PNG, JPEG"),
    "nothing": (uri(b""), "a picture is none of"),
    "no base64": ("data:image/png;base64,%%%", "not valid base64"),
    "no picture": ("data:text/html;base64,AAAA", "data URI begins data:image"),
    "too many bytes": (uri(b"\0" * 17_000_000), "larger than 16 MB"),
    "a URL": ("http://example.com/a.png", "without --allow-urls"),
    "a file": ("file:///etc/passwd", "as data URIs only"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_bad_pictures(client, name):
    url, words = PICTURES[name]
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
    with pytest.raises(openai.BadRequestError, match=words) as error:
        client.chat.completions.create(messages=messages, **SIX)
    assert error.value.param == "image_url"
    assert error.value.type == "invalid_request_error"


def hello(**more):
    return {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], **more}


BODIES = {
    "no JSON": (b"{", 400, "JSON"),
    "no messages": ({"model": "tiny"}, 400, "messages: "),
    "empty messages": (hello(messages=[]), 400, "messages: "),
    "a role": (hello(messages=[{"role": "king", "content": "a"}]), 400, "messages.0.role"),
    "a part": (hello(messages=[{"role": "user", "content": [{"type": "sound"}]}]), 400, "'sound' is not supported"),
    "the assistant last": (hello(messages=[{"role": "assistant", "content": "a"}]), 400, "must be the user's"),
    "no words": (hello(messages=[{"role": "user", "content": " "}]), 400, "with text or a picture"),
    "a model": (hello(model="gpt"), 404, "there is no model 'gpt' here; there is 'tiny'"),
    "temperature": (hello(temperature=-1), 400, "temperature: "),
    "top_p": (hello(top_p=0), 400, "top_p: "),
    "stop": (hello(stop=[""]), 400, "stop is ['']"),
    "many stops": (hello(stop=["a"] * 17), 400, "16 are allowed"),
    "tokens": (hello(max_tokens=10**6), 400, "must be between 1 and 4096"),
    "n": (hello(n=2), 400, "n is not supported"),
    "tools": (hello(tools=[{"type": "function"}]), 400, "tools is not supported"),
    "a million tokens": (hello(messages=[{"role": "user", "content": "why " * 1_000_000}]), 400, "32768 are allowed"),
    "endless text": (hello(messages=[{"role": "user", "content": "a" * 5_000_000}]), 400, "the prompt has more tokens"),
}


@pytest.mark.parametrize("name", BODIES)
def test_bad_bodies(served, name):
    body, status, words = BODIES[name]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    address = f"{served[1]}/v1/chat/completions"
    found = httpx.post(address, content=content, headers={"Content-Type": "application/json"}, timeout=60)
    assert found.status_code == status, found.text
    error = found.json()["error"]
    assert words in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_an_unknown_handle_and_an_unknown_place(served, client):
    with pytest.raises(openai.NotFoundError, match="there is no response 'resp_x'") as error:
        client.responses.create(model="tiny", input="Hello", previous_response_id="resp_x")
    assert error.value.code == "previous_response_not_found"
    assert httpx.get(f"{served[1]}/v1/songs").json()["error"]["message"] == "Not Found"


def test_too_many_pictures_and_too_much_body(start, picture, as_uri):
    with start(pictures=1, body_mb=1) as (_, address, client):
        part = {"type": "image_url", "image_url": {"url": as_uri(picture())}}
        with pytest.raises(openai.BadRequestError, match="2 pictures; 1 are allowed"):
            client.chat.completions.create(messages=[{"role": "user", "content": [part, part]}], **SIX)
        large = json.dumps(hello(user="x" * 1_100_000)).encode()
        for content in (large, (large[at : at + 9999] for at in range(0, len(large), 9999))):  # the second is chunked
            found = httpx.post(f"{address}/v1/chat/completions", content=content)
            assert found.status_code == 413
            assert "larger than 1 MB" in found.json()["error"]["message"]
        assert client.chat.completions.create(**hello(max_tokens=2))


# Clients -------------------------------------------------------------------------------------------------------------


def quiet(engine):
    return lambda: engine.load == {"running": 0, "waiting": 0}


@pytest.fixture(scope="module")
def talker(tiny_model):
    """A model that never ends an answer."""
    model = tiny_model(seed=2)
    with torch.no_grad():
        model.rwkv.ln_out.weight.zero_()
        model.rwkv.ln_out.bias.fill_(1)
        model.rwkv.head.weight.zero_()
        model.rwkv.head.weight[encode("a")] = 9
    return VLM(model)


def test_a_client_that_goes_away_frees_its_slot(start, talker, eventually):
    with start(talker, slots=1) as (app, address, client):
        stream = client.chat.completions.create(**hello(stream=True) | LONG)
        for _ in range(3):
            next(iter(stream))
        assert app.state.engine.load["running"] == 1
        stream.close()
        eventually(quiet(app.state.engine))
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{address}/v1/chat/completions", json=hello() | LONG, timeout=0.5)
        eventually(quiet(app.state.engine))
        assert client.chat.completions.create(**hello(max_tokens=2)).usage.completion_tokens == 2


def test_a_full_house_says_so(start, talker, eventually):
    with start(talker, slots=1, queue=1) as (app, _, client):
        streams = [client.chat.completions.create(**hello(stream=True) | LONG) for _ in range(2)]
        eventually(lambda: app.state.engine.load == {"running": 1, "waiting": 1})
        with pytest.raises(openai.RateLimitError, match="2 requests are under way, and no more fit") as error:
            client.chat.completions.create(**hello(max_tokens=2))
        assert error.value.response.headers["retry-after"] == "1"
        for stream in streams:
            stream.close()
        eventually(quiet(app.state.engine))
        assert client.chat.completions.create(**hello(max_tokens=2))


def test_an_answer_that_takes_too_long(start, talker, eventually):
    with start(talker, timeout_s=0.5) as (app, _, client):
        with pytest.raises(openai.InternalServerError, match="not complete within"):
            client.chat.completions.create(**hello() | LONG)
        with pytest.raises(openai.APIError, match="not complete within"):
            list(client.chat.completions.create(**hello(stream=True) | LONG))
        eventually(quiet(app.state.engine))


def test_a_model_that_fails_fails_one_request(start, talker, monkeypatch):
    with start(talker) as (_, _, client):
        with monkeypatch.context() as patch:
            patch.setattr("visualrwkv.serve.engine.prefill", None)
            with pytest.raises(openai.InternalServerError, match="the model failed"):
                client.chat.completions.create(**hello(max_tokens=2))
        assert client.chat.completions.create(**hello(max_tokens=2)).usage.completion_tokens == 2


def test_a_server_that_is_told_to_stop_finishes_what_it_does(start, talker):
    """Those under way are answered to their last token."""
    said = []
    with start(talker) as (app, address, _):

        def ask():
            with openai.OpenAI(base_url=f"{address}/v1", api_key="-") as client:
                said.append(client.chat.completions.create(**hello() | LONG | {"max_tokens": 150}))

        thread = threading.Thread(target=ask)
        thread.start()
        while not app.state.engine.load["running"]:
            time.sleep(0.01)
        time.sleep(0.05)
    thread.join()
    assert said[0].usage.completion_tokens == 150


def test_a_closed_engine_takes_nothing(vlm):
    engine = Engine(vlm.model)
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(None)


# URLs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.215.14", True),
        ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", True),
        *((ip, False) for ip in ("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0")),
        *((ip, False) for ip in ("100.64.0.1", "224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1%eth0", "fd00::1")),
        *((ip, False) for ip in ("::ffff:127.0.0.1", "2002:7f00:1::", "64:ff9b::a00:1")),
    ],
)
def test_addresses(address, public):
    assert is_public(address) == public


NAMES = {"public.test": ["93.184.215.14"], "inside.test": ["10.0.0.1"], "both.test": ["93.184.215.14", "127.0.0.1"]}


@pytest.fixture
def web(picture):
    """A fetcher whose internet is a table; `reached` are the addresses that it connected to."""
    reached = []
    held = io.BytesIO()
    picture(0).save(held, "PNG")

    async def sent(data):
        yield data

    def answer(request):
        reached.append((request.url.host, request.headers["Host"], request.extensions["sni_hostname"]))
        path = request.url.path
        if path.startswith("/to/"):
            return httpx.Response(302, headers={"Location": path.removeprefix("/to/").replace("_", "//")})
        if path == "/large":
            return httpx.Response(200, content=sent(b"\0" * 2_000_000))
        return httpx.Response(200, content=sent(held.getvalue())) if path == "/a.png" else httpx.Response(404)

    async def resolver(host, port):
        return NAMES[host] if host in NAMES else [host.strip("[]")]

    return Fetcher(Limits(picture_mb=1), httpx.MockTransport(answer), resolver), reached


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://127.0.0.1/a.png", "not at a public address"),
        ("http://[::1]/a.png", "not at a public address"),
        ("http://169.254.169.254/latest/meta-data", "not at a public address"),
        ("http://inside.test/a.png", "not at a public address"),
        ("http://both.test/a.png", "not at a public address"),
        ("http://public.test/to/http:_inside.test/a.png", "inside.test/a.png is not at a public address"),
        ("http://public.test/to/file:_etc/passwd", "no http or https URL"),
        ("http://public.test/to/to/to/to/to/a.png", "could not be fetched|status 404|redirects"),
        ("http://public.test/large", "larger than 1 MB"),
        ("http://public.test/none", "status 404"),
        ("ftp://public.test/a.png", "no http or https URL"),
    ],
)
def test_urls_that_are_refused(web, url, words):
    fetcher, reached = web
    with pytest.raises(ApiError, match=words):
        asyncio.run(fetcher.get(url))
    assert all(host == "93.184.215.14" for host, _, _ in reached)


def test_a_public_url_is_fetched_at_the_address_that_was_checked(start, web, vlm, picture):
    fetcher, reached = web
    part = {"type": "image_url", "image_url": {"url": "https://public.test/to/https:_public.test/a.png"}}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]
    with start(allow_urls=True, fetcher=fetcher) as (_, _, client):
        done = client.chat.completions.create(messages=messages, **SIX)
    assert done.choices[0].message.content == vlm.answer(picture(0), "What?", max_new_tokens=6)
    assert reached == [("93.184.215.14", "public.test", "public.test")] * 2
