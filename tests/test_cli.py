"""The command, as a user starts it."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import openai
import pytest
import torch

from visualrwkv.chat import load
from visualrwkv.checkpoint import save_model, save_vision
from visualrwkv.config import VRWKVConfig
from visualrwkv.files import fingerprint
from visualrwkv.ops import library
from visualrwkv.rwkv.state import State
from visualrwkv.task import save_task
from visualrwkv.vision.vrwkv import VRWKV

ROOT = Path(__file__).parents[1]


def command(*arguments, stdin=""):
    line = [sys.executable, "-m", "visualrwkv.cli", *map(str, arguments)]
    quiet = {} if library.COMPILED else {"VISUALRWKV_KERNELS": "0"}  # without kernels a log line would say so
    settings = {"cwd": ROOT, "env": os.environ | quiet, "encoding": "utf-8", "timeout": 120}
    return subprocess.run(line, input=stdin, capture_output=True, **settings)


@pytest.fixture(scope="module")
def place(tiny_model, picture, tmp_path_factory):
    """A directory with a model, a language model, an encoder and two pictures."""
    place = tmp_path_factory.mktemp("cli")
    model = tiny_model()
    save_model(model, place / "model")
    save_vision(model.vit, place / "vit")
    torch.save(model.rwkv.state_dict(), place / "lm.pth")
    picture(0).save(place / "a.png")
    picture(1).save(place / "b.png")
    (place / "words.png").write_text("these are words")
    return place


def answers(vlm, *turns, images=None):
    """What a conversation prints: (question, pictures) after one another."""
    session = vlm.session(images)
    return "".join("".join(session.stream(text, new, max_new_tokens=6)) + "\n" for text, new in turns)


def test_chat_about_pictures(place):
    a, b = place / "a.png", place / "b.png"
    said = f"What is this?\n\n/undo\nWhat colour?\n/image {b}\nAnd this?\nSure?\n/exit\nnot read\n"
    done = command("chat", "--model", place / "model", "--image", a, "--max-new-tokens", 6, stdin=said)
    assert (done.returncode, done.stderr) == (0, "")
    vlm = load(place / "model")
    wanted = answers(vlm, ("What is this?", None), images=a)
    turns = ("What colour?", None), ("And this?", b), ("Sure?", None)
    assert done.stdout == wanted + answers(vlm, *turns, images=a)


def test_chat_with_a_language_model(place):
    done = command("chat", "--model", place / "lm.pth", "--max-new-tokens", 6, stdin="Hello\nWhy?")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == answers(load(place / "lm.pth"), ("Hello", None), ("Why?", None))


def test_chat_with_a_task(place, tiny_model):
    model = tiny_model()
    wkv = 3 * torch.randn(State.zeros(model.config.rwkv).wkv[:, 0].shape, generator=torch.Generator().manual_seed(0))
    save_task(place / "task.safetensors", wkv, model.config.rwkv, fingerprint(model.rwkv))
    say = {"stdin": "Hello\n"}
    options = "--model", place / "model", "--task", place / "task.safetensors", "--max-new-tokens", 6
    done = command("chat", *options, **say)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == answers(load(place / "model", task=place / "task.safetensors"), ("Hello", None))
    assert done.stdout != answers(load(place / "model"), ("Hello", None))
    done = command("chat", "--model", place / "model", "--task", place / "lm.pth", **say)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "is no task for a model of 4 layers" in done.stderr


@pytest.mark.parametrize("model", ["model", "rwkv6-nano"])
def test_bench(place, model):
    settings = ("--prompt", 20, "--tokens", 3, "--batch", 2, "--dtype", "int8")
    done = command("bench", "--model", place / model if model == "model" else model, *settings)
    assert (done.returncode, done.stderr) == (0, "")
    facts = dict(line.split(maxsplit=1) for line in done.stdout.replace("first token", "first_token").splitlines())
    assert facts["weights"].startswith("int8")
    assert facts["first_token"].endswith("ms after 2 prompts of 20 tokens")
    assert float(facts["tokens/s"].split()[0]) > 0


def test_compose(place):
    done = command("compose", "--lm", place / "lm.pth", "--vision", place / "vit", place / "new")
    assert (done.returncode, done.stderr) == (0, "")
    assert load(place / "new").model.config.image_tokens == 16  # what the nano preset asks for


def test_convert_for_transformers(place):
    done = command("convert", place / "model", place / "for_hf", "--hf")
    assert (done.returncode, done.stderr) == (0, "")
    assert {"modeling_visualrwkv.py", "chat_template.jinja", "config.json"} <= {
        p.name for p in (place / "for_hf").iterdir()
    }
    assert load(place / "for_hf").model.config == load(place / "model").model.config


def test_compose_with_too_coarse_an_encoder(place, tmp_path):
    save_vision(VRWKV(VRWKVConfig(depth=1, width=8, patch_size=16, image_size=32, pos_grid=2)), tmp_path / "vit")
    done = command("compose", "--lm", place / "lm.pth", "--vision", tmp_path / "vit", tmp_path / "new")
    assert done.returncode == 1
    assert "image_tokens is 16, more than the 4 patches" in done.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["sing"],
            "there is no command 'sing'; there are bench, chat, check-data, compose, convert, info, kernels, merge, serve",
        ),
        (["chat", "--colour", "red"], "--colour"),
        (["chat"], "--model"),
        (
            ["bench", "--model", "rwkv6-nano", "--tokens", "0"],
            "tokens is 0; prompt, tokens and batch must be at least 1",
        ),
        (["kernels", "fly"], "kernels takes build or info, got fly"),
        (["chat", "--model", "nothing/at/all"], "nothing/at/all: there is no such model file"),
        (["chat", "--model", "MODEL", "--image", "words.png"], "words.png cannot be read as a picture"),
        (["chat", "--model", "lm.pth", "--image", "a.png"], "no vision encoder; it answers text only"),
        (["merge", "--model", "MODEL", "--adapter", "nothing", "out"], "nothing: there is no adapter here"),
    ],
)
def test_mistakes_are_one_line(place, arguments, words):
    names = {"MODEL": place / "model", "lm.pth": place / "lm.pth", "a.png": place / "a.png"}
    names["words.png"] = place / "words.png"
    done = command(*(names.get(a, a) for a in arguments), stdin="What is this?\n")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr


def test_help():
    for arguments in ([], ["--help"]):
        done = command(*arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert "bench,chat,check-data,compose,convert,info,kernels,merge,serve" in done.stdout
    done = command("chat", "--help")
    assert done.returncode == 0
    assert "--max-new-tokens" in done.stdout


def test_serve_until_told_to_stop(place, tmp_path):
    """As a user starts it, with a key from a file; told to stop, it ends in peace."""
    (tmp_path / "key").write_text("secret\n")
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    line = [sys.executable, "-m", "visualrwkv.cli", "serve", "--model", place / "model", "--port", port]
    line += ["--api-key-file", tmp_path / "key"]
    quiet = os.environ | ({} if library.COMPILED else {"VISUALRWKV_KERNELS": "0"})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*map(str, line)], cwd=ROOT, env=quiet, encoding="utf-8", **pipes) as server:
        assert server.stdout.readline() == f"serving model on http://127.0.0.1:{port}/v1\n"
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="secret", max_retries=9) as client:
            said = client.responses.create(model="model", input="Hello", max_output_tokens=6).output_text
        server.terminate()
        _, errors = server.communicate(timeout=60)
    assert said == load(place / "model").answer(None, "Hello", max_new_tokens=6)
    assert (server.returncode, errors) in ((0, ""), (-15, ""))


def test_serve_with_an_empty_key_file(place, tmp_path):
    (tmp_path / "key").write_text("\n")
    done = command("serve", "--model", place / "model", "--api-key-file", tmp_path / "key")
    assert done.returncode == 1
    assert "holds no key in its first line" in done.stderr
