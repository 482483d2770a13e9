"""A server under load for minutes, every answer checked: `python benchmarks/soak.py` (some seven minutes).

Starts `visualrwkv serve` and asks it first one by one, then by 64 clients at once, each about a picture of its own: to describe
it and a question by /v1/chat/completions, a question and a follow-up by /v1/responses. All answers are greedy and streamed, and
each must be the one that the same server gave before, so that what is another client's would be seen. Up to one in eight is
broken off in mid-stream. A 429 is counted apart and asked again after Retry-After; everything else that
is not a whole answer is an error, as are slots that are not free at the end, and a traceback in the server's log.

Times are the clients', who share the cores with the server: between two pieces of an answer, and to its first. Memory and CPU
are the server's process's, each second; growth compares the last tenth of the time with what came after its first fifth,
the time in which every client has come by. Exit status 1 on any error or wrong answer.

Writes benchmarks/results/<machine>/soak.json.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import httpx
import measure
import psutil

DESCRIBE = "Describe every object."
LONGEST = 48  # tokens of an answer
BROKEN_OFF = 1 / 8  # of the visits, where the answer is long enough
GOODBYE = 40  # seconds that the server has to end in
NAME = "soaked"


# What is asked -------------------------------------------------------------------------------------------------------


@dataclass
class Client:
    """Somebody with a picture and questions about it; `right` holds the answers that the server gave one by one."""

    number: int
    picture: str
    questions: tuple[str, str]
    right: dict[str, str] = field(default_factory=dict)

    def completion(self, text: str) -> tuple[str, dict[str, Any]]:
        parts = [{"type": "image_url", "image_url": {"url": self.picture}}, {"type": "text", "text": text}]
        body = {"messages": [{"role": "user", "content": parts}], "max_completion_tokens": LONGEST}
        return "/v1/chat/completions", {"model": NAME, "stream": True} | body

    def response(self, text: str, after: str | None = None) -> tuple[str, dict[str, Any]]:
        """A question about the picture, or after a response one without it."""
        parts: list[dict[str, Any]] = [{"type": "input_text", "text": text}]
        if after is None:
            parts.insert(0, {"type": "input_image", "image_url": self.picture, "detail": "auto"})
        body = {"input": [{"role": "user", "content": parts}], "max_output_tokens": LONGEST}
        return "/v1/responses", {"model": NAME, "stream": True, "previous_response_id": after} | body


def clients_of(data: Path, count: int) -> list[Client]:
    """Clients with the first so many pictures of the test split about which there are two questions."""
    found: list[Client] = []
    for record in json.loads((data / "test.json").read_text()):
        texts = [t["value"].replace("<image>\n", "") for t in record["conversations"] if t["from"] == "human"]
        if len(texts) > 1 and len(found) < count:
            coded = base64.b64encode((data / record["image"]).read_bytes()).decode()
            found.append(Client(len(found), f"data:image/png;base64,{coded}", (texts[0], texts[1])))
    return found


# Asking --------------------------------------------------------------------------------------------------------------


class Failed(Exception):
    """No whole answer; the words say of what kind."""


@dataclass
class Tally:
    """What happened."""

    counts: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    wrong: list[dict[str, Any]] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)


def piece_of(event: dict[str, Any]) -> tuple[str, bool, str | None]:
    """A server-sent event -> its text, whether the answer is over, and a response's id; `Failed` where it tells of an error."""
    if event.get("error") or event.get("type") == "response.failed":
        raise Failed(f"error in a stream: {event.get('error') or event['response']['error']}")
    if "choices" in event:
        choice = event["choices"][0] if event["choices"] else {"delta": {}, "finish_reason": None}
        return choice["delta"].get("content") or "", choice["finish_reason"] is not None, None
    over = event["type"] in ("response.completed", "response.incomplete")
    text = event["delta"] if event["type"] == "response.output_text.delta" else ""
    return text, over, event["response"]["id"] if over else None


async def ask(
    http: httpx.AsyncClient, tally: Tally, request: tuple[str, dict[str, Any]], break_off: int = 0
) -> tuple[str, str | None] | None:
    """The whole answer, as its pieces make it, and the response's id; None where it was broken off after so many pieces."""
    while True:
        tally.counts["requests"] += 1
        sent = time.perf_counter()
        async with http.stream("POST", request[0], json=request[1]) as reply:
            if reply.status_code == 429:
                tally.counts["429, asked again"] += 1
                await asyncio.sleep(float(reply.headers["Retry-After"]))
                continue
            if reply.status_code != 200:
                raise Failed(f"status {reply.status_code}: {(await reply.aread()).decode()[:200]}")
            pieces: list[str] = []
            ended, name, last = False, None, sent
            async for line in reply.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                text, over, found = piece_of(json.loads(line[6:]))
                ended, name = ended or over, found or name
                if text:
                    now = time.perf_counter()
                    (tally.between if pieces else tally.first).append(now - last)
                    last = now
                    pieces.append(text)
                    if len(pieces) == break_off:
                        tally.counts["broken off"] += 1
                        return None
            if not ended:
                raise Failed("a stream without an end")
            tally.counts["answers"] += 1
            return "".join(pieces), name


async def visit(http: httpx.AsyncClient, tally: Tally, client: Client, act: str, break_off: int) -> None:
    """One thing that a client does; its answers are compared, or kept where it is the first time."""

    def check(what: str, answer: str) -> None:
        if client.right.setdefault(what, answer) != answer:
            tally.wrong.append({"client": client.number, "asked": what, "got": answer, "right": client.right[what]})

    if act in ("describe", "question"):
        text = DESCRIBE if act == "describe" else client.questions[0]
        said = await ask(http, tally, client.completion(text), break_off)
        if said:
            check(act, said[0])
        return
    said = await ask(http, tally, client.response(client.questions[0]))
    assert said is not None
    check("response", said[0])
    more = await ask(http, tally, client.response(client.questions[1], said[1]), break_off)
    if more:
        check("follow-up", more[0])
    if client.number % 2:  # the others leave their states to the server
        gone = await http.delete(f"/v1/responses/{said[1]}")
        if gone.status_code != 200:
            raise Failed(f"status {gone.status_code} of a DELETE")


async def come_again(http: httpx.AsyncClient, tally: Tally, client: Client, end: float) -> None:
    """A client's visits until the time is over."""
    rng = random.Random(client.number)
    while time.perf_counter() < end:
        act = rng.choice(("describe", "question", "conversation"))
        break_off = rng.randint(1, 6) if rng.random() < BROKEN_OFF else 0
        try:
            await visit(http, tally, client, act, break_off)
        except Failed as error:
            tally.errors[str(error)] += 1
        except httpx.HTTPError as error:
            tally.errors[type(error).__name__] += 1
            await asyncio.sleep(0.1)


# The server ----------------------------------------------------------------------------------------------------------


def start(model: str, log: IO[bytes], more: list[str]) -> tuple[subprocess.Popen[bytes], str]:
    """`visualrwkv serve` at a free port, and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "visualrwkv.cli", "serve", "--model", model, "--name", NAME, "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(measure.ROOT)}
    running = subprocess.Popen([*command, *more], env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            httpx.get(f"{address}/health").raise_for_status()
            return running, address
        except httpx.HTTPError:
            if running.poll() is not None:
                break
            time.sleep(0.1)
    running.kill()
    raise SystemExit("error: the server did not start")


async def watch(server: psutil.Process, samples: list[tuple[float, int, float]]) -> None:
    """Every second: when, resident bytes, seconds of CPU so far."""
    while True:
        used = server.cpu_times()
        samples.append((time.perf_counter(), server.memory_info().rss, used.user + used.system))
        await asyncio.sleep(1)


async def soak(address: str, clients: list[Client], seconds: float, pid: int) -> tuple[Tally, dict[str, Any]]:
    """First one by one, then all at once."""
    samples: list[tuple[float, int, float]] = []
    many = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=120, limits=many) as http:
        for client in clients:
            for act in ("describe", "question", "conversation"):
                await visit(http, Tally(), client, act, 0)
        tally = Tally()
        watching = asyncio.create_task(watch(psutil.Process(pid), samples))
        end = time.perf_counter() + seconds
        await asyncio.gather(*(come_again(http, tally, client, end) for client in clients))
        watching.cancel()
        for _ in range(50):
            load = (await http.get("/health")).json()
            if not load["running"] + load["waiting"]:
                break
            await asyncio.sleep(0.1)
        else:
            tally.errors[f"after all had left, the server was busy: {load}"] += 1
    resident = [bytes_ for _, bytes_, _ in samples]
    after, until = resident[len(resident) // 5 :], max(1, len(resident) // 10)
    begin, finish = statistics.median(after[:until]), statistics.median(resident[-until:])
    (t0, _, used0), (t1, _, used1) = samples[0], samples[-1]
    memory = {"after warm-up": begin, "at the end": finish, "most": max(resident), "growth": finish / begin - 1}
    return tally, {
        "memory": memory,
        "cores": (used1 - used0) / (t1 - t0),
        "resident": resident,
        "states": load["states"],
    }


# The command ---------------------------------------------------------------------------------------------------------


def told(times: list[float]) -> dict[str, float]:
    """Quantiles, in seconds."""
    cuts = statistics.quantiles(times, n=100)
    return {"p50": cuts[49], "p99": cuts[98], "max": max(times), "count": len(times)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/quickstart/finetune")
    parser.add_argument("--data", type=Path, default=Path("runs/quickstart/data"))
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--quick", action="store_true", help="twelve clients for twenty seconds; stores nothing")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="what follows goes to `visualrwkv serve`")
    options = parser.parse_args()
    count, seconds = (12, 20.0) if options.quick else (options.clients, options.seconds)
    clients = clients_of(options.data, count)
    with tempfile.TemporaryFile() as log:
        running, address = start(options.model, log, options.serve)
        try:
            tally, server = asyncio.run(soak(address, clients, seconds, running.pid))
            running.send_signal(signal.SIGTERM)
            try:
                if (code := running.wait(GOODBYE)) not in (0, -signal.SIGTERM):
                    tally.errors[f"the server's exit status was {code}"] += 1
            except subprocess.TimeoutExpired:
                tally.errors[f"the server did not end within {GOODBYE} s"] += 1
        finally:
            running.kill()
            running.wait()
        log.seek(0)
        written = log.read().decode(errors="replace")
        if "Traceback" in written:
            tally.errors["a traceback in the server's log"] += 1
            print(written[-3000:], file=sys.stderr)
    figures = {"between tokens": told(tally.between), "to the first token": told(tally.first)}
    result = {
        "counts": dict(tally.counts) | {"wrong": len(tally.wrong), "errors": sum(tally.errors.values())},
        "errors": dict(tally.errors),
        "wrong": tally.wrong[:20],
        "figures": {name: values | {"unit": "s"} for name, values in figures.items()},
        "server": server,
    }
    shown = {key: result[key] for key in ("counts", "errors", "wrong", "figures")}
    print(json.dumps(shown | {"memory": server["memory"], "cores": server["cores"]}, indent=2, ensure_ascii=False))
    if not options.quick:
        shapes = {"clients": len(clients), "seconds": seconds, "longest answer": LONGEST, "broken off": BROKEN_OFF}
        packages = ("visualrwkv", "torch", "fastapi", "uvicorn", "httpx")
        path = measure.record("soak", {"shapes": shapes, "model": options.model} | result, packages)
        print(json.dumps({"written": str(path.relative_to(measure.ROOT))}))
    return 1 if tally.wrong or tally.errors else 0


if __name__ == "__main__":
    sys.exit(main())
