"""Conversations that are kept: in memory, on disk, in a file for another process, and what is refused."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from visualrwkv.chat import VLM, load
from visualrwkv.checkpoint import save_model
from visualrwkv.generate import prefill
from visualrwkv.saved import KEPT, Shelved

ROOT = Path(__file__).parents[1]
SETTINGS = {"max_new_tokens": 4}


@pytest.fixture(scope="module")
def vlm(tiny_model):
    return VLM(tiny_model())


def same(a, b):
    torch.testing.assert_close(vars(a), vars(b), rtol=0, atol=0)


def next_logits(vlm, state):
    return prefill(vlm.model, [vlm.prompt(0, "So?")], state=state)[0][0]


def test_undo_goes_back_past_what_is_in_memory(vlm, picture):
    session = vlm.session(picture(0))
    states = []
    for number in range(KEPT + 4):
        states.append(session.state)
        session.ask(f"Question {number}?", picture(number) if number % 3 == 1 else None, **SETTINGS)
    shelved = [item for item in session._before._items if isinstance(item, Shelved)]
    assert len(shelved) == 3, "the eight last and the first, which has no state, are in memory"
    place = Path(session._before._directory.name)
    assert len(list(place.iterdir())) == 3
    del shelved
    fork = session.fork()
    answers = session.turns
    for number in reversed(range(KEPT + 4)):
        session.undo()
        assert session.turns == answers[:number]
        if number:
            same(session.state, states[number])
        again = session.fork()
        assert again.ask(f"Question {number}?", picture(number) if number % 3 == 1 else None, **SETTINGS)
        assert again.turns == answers[: number + 1]
    assert session.ask("Question 0?", **SETTINGS) == answers[0][1], "its picture waits again"
    assert len(list(place.iterdir())) == 3, "the fork still needs them"
    for _ in range(KEPT + 2):
        fork.undo()
    assert fork.regenerate() == answers[1][1], "a picture that was put away is shown again"
    del fork, session, again
    gc.collect()
    assert not place.exists()


def test_regenerate(vlm, picture):
    session = vlm.session(picture(0))
    with pytest.raises(ValueError, match="no answer to regenerate"):
        session.regenerate()
    session.ask("What?", **SETTINGS)
    before = session.state
    session.ask("And this?", picture(1), temperature=1.0, seed=1, **SETTINGS)
    assert session.regenerate() == session.turns[1][1]
    other = session.regenerate(seed=2)
    assert session.turns[1] == ("And this?", other)
    wanted = vlm.session(picture(0))
    wanted.ask("What?", **SETTINGS)
    assert wanted.ask("And this?", picture(1), temperature=1.0, seed=2, **SETTINGS) == other
    same(session.state, wanted.state)
    for _ in session.regenerating(seed=3):
        break
    assert session.turns[1] == ("And this?", other), "broken off, the old answer stays"
    session.undo()
    same(session.state, before)


def test_a_saved_conversation_goes_on_elsewhere(vlm, picture, tmp_path):
    """In another process, from another file of the same weights, with the same next token."""
    save_model(vlm.model, tmp_path / "model")
    session = load(tmp_path / "model").session(picture(0))
    session.ask("What is this?", **SETTINGS)
    session.ask("And this?", picture(1), **SETTINGS)
    session.save(tmp_path / "s.safetensors")
    with safe_open(tmp_path / "s.safetensors", "pt") as file:
        about = file.metadata()
    assert about["version"] == "1"
    assert len(about["model"]) == 12
    assert len(about["prompt"].split(",")) == session.tokens
    code = """if True:
        import sys, torch, visualrwkv as vr
        session = vr.load(sys.argv[1]).resume(sys.argv[2])
        print(session.turns)
        print(session.ask("Why?", max_new_tokens=4))
        session.undo()
        session.save(sys.argv[3])
        """
    line = [sys.executable, "-c", code, tmp_path / "model", tmp_path / "s.safetensors", tmp_path / "t.safetensors"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, encoding="utf-8", check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    turns, _, answer = done.stdout.partition("\n")
    assert turns == str(session.turns)
    resumed = vlm.resume(tmp_path / "t.safetensors")
    same(resumed.state, session.state)
    torch.testing.assert_close(next_logits(vlm, resumed.state), next_logits(vlm, session.state), rtol=0, atol=0)
    assert (resumed.turns, resumed.tokens) == (session.turns, session.tokens)
    assert session.ask("Why?", **SETTINGS) == answer.rstrip("\n")
    with pytest.raises(ValueError, match="no turn to undo"):
        resumed.undo()


def test_the_prompt_of_a_file_is_what_its_state_has_read(vlm, picture):
    session = vlm.session(picture(0))
    session.ask("What?", max_new_tokens=3)
    session.ask("Why?", stop=("a", "e", "i", "o", "u"), **SETTINGS)
    ids = [i for turn in session._now.turns for i in turn.ids]
    with torch.no_grad():
        _, wanted = vlm.model(torch.tensor([ids]), torch.stack([vlm.processor(picture(0))]))
    torch.testing.assert_close(vars(session.state), vars(wanted), rtol=1e-3, atol=1e-4)


def test_a_picture_that_waits_is_saved(vlm, picture, tmp_path):
    session = vlm.session([picture(0), picture(1)])
    session.save(tmp_path / "s.safetensors")
    resumed = vlm.resume(tmp_path / "s.safetensors")
    assert resumed.state is None
    assert resumed.ask("Which?", **SETTINGS) == session.ask("Which?", **SETTINGS)


def test_what_is_refused(vlm, tiny_model, picture, tmp_path):
    file = tmp_path / "s.safetensors"
    session = vlm.session(picture(0))
    session.ask("What?", **SETTINGS)
    session.save(file)
    with pytest.raises(ValueError, match=r"s\.safetensors belongs to another model .* load the model"):
        VLM(tiny_model(seed=1)).resume(file)
    with safe_open(file, "pt") as held:
        about, tensors = held.metadata(), load_file(file)
    wrong = {
        "no saved conversation; Session.save writes one": (tensors, {}),
        "format version 9": (tensors, about | {"version": "9"}),
        "damaged conversation .KeyError: 'wkv'": ({k: v for k, v in tensors.items() if k != "wkv"}, about),
        "is damaged: its state is": (tensors | {"wkv": tensors["wkv"][:1]}, about),
        "not finite": (tensors | {"wkv": tensors["wkv"] * torch.nan}, about),
    }
    for words, (parts, said) in wrong.items():
        save_file({k: v.contiguous() for k, v in parts.items()}, file, metadata=said)
        with pytest.raises(ValueError, match=words):
            vlm.resume(file)
    file.write_bytes(b"not a table")
    with pytest.raises(ValueError, match="is no saved conversation"):
        vlm.resume(file)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        vlm.resume(tmp_path / "none")


def test_a_fingerprint_is_of_the_numbers(vlm, tiny_model):
    assert VLM(tiny_model()).fingerprint == vlm.fingerprint != VLM(tiny_model(seed=1)).fingerprint
