"""lmms-eval's door against a stand-in for what of lmms-eval it touches: the base class, its cache hook, the manifest."""

import abc
import importlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image

from visualrwkv.checkpoint import save_model

ROOT = Path(__file__).parents[2]


class Base(abc.ABC):
    """lmms_eval.api.model.lmms of its main branch: what the evaluator relies on."""

    is_simple = True

    def __init__(self):
        self._rank, self._world_size = 0, 1
        self.cache_hook = SimpleNamespace(add_partial=lambda *told: self.told.append(told))
        self.told = []
        self.task_dict = {}

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...

    @classmethod
    def create_from_arg_string(cls, text, more):
        given = dict(pair.split("=") for pair in text.split(","))
        return cls(**given, **{k: v for k, v in more.items() if v is not None})


@dataclass(frozen=True)
class Manifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = field(default=())


@pytest.fixture
def door(monkeypatch):
    """The module `visualrwkv.lmms.model`, imported with the stand-in."""
    names = ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model", "lmms_eval.models", "lmms_eval.models.registry_v2")
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["lmms_eval.api.model"].lmms = Base
    sys.modules["lmms_eval.models.registry_v2"].ModelManifest = Manifest
    monkeypatch.delitem(sys.modules, "visualrwkv.lmms.model", raising=False)
    yield importlib.import_module("visualrwkv.lmms.model")
    sys.modules.pop("visualrwkv.lmms.model", None)


@pytest.fixture
def model(door, tiny_model, tmp_path):
    save_model(tiny_model(), tmp_path / "model")
    made = door.LmmsModel.create_from_arg_string(
        f"pretrained={tmp_path}/model,image_position=first",
        {"batch_size": "2", "max_batch_size": None, "device": "cpu"},
    )
    pictures = [Image.new("RGB", (40, 30), colour) for colour in ("red", "green", "blue", "white", "black")]
    made.task_dict = {"task": {"test": [{"shown": [picture]} for picture in pictures]}}
    made.task_dict["task"]["test"].append({"shown": []})
    return made


def request(context, third, at, middle=lambda document: document["shown"]):
    return SimpleNamespace(args=(context, third, middle, at, "task", "test"))


def test_the_entry_point_names_a_class_that_the_registry_takes(door):
    from visualrwkv.lmms.plugin import manifest

    found = manifest()
    assert found.model_id == "visualrwkv"
    module, name = found.simple_class_path.rsplit(".", 1)
    assert getattr(importlib.import_module(module), name) is door.LmmsModel
    assert issubclass(door.LmmsModel, Base)
    assert door.LmmsModel.is_simple
    assert '[project.entry-points."lmms_eval.models"]\nvisualrwkv = "visualrwkv.lmms.plugin:manifest"' in (
        ROOT / "pyproject.toml"
    ).read_text(encoding="utf-8")


def test_answers_are_those_of_asking_alone(model):
    wishes = {"max_new_tokens": 6, "temperature": 0, "do_sample": False, "num_beams": 1, "until": ["\n\n"]}
    asked = [
        request("What is <image>?" if at % 2 else "What?", dict(wishes, max_new_tokens=3 + at % 2), at)
        for at in range(6)
    ]
    answers = model.generate_until(asked)
    for at, answer in enumerate(answers):
        pictures = model.task_dict["task"]["test"][at]["shown"]
        text = asked[at].args[0] if pictures else "What is ?"
        assert answer == model.vlm.answer(pictures, text, "first", 3 + at % 2)
    assert len({context for _, (context, _), _ in model.told}) == 2
    assert len(model.told) == 6


def test_losses_are_those_of_the_whole_text(model):
    from visualrwkv.text.tokenizer import encode

    for target in ("yes", "a red circle"):
        (loss, greedy), (same, _) = model.loglikelihood(
            [request("Which?", target, 0), request("Which?", lambda _, said=target: said, 0)]
        )
        prompt, ids = model.vlm.prompt(1, "Which?", "first"), encode(f" {target}")
        pixels = model.vlm.pixels(model.task_dict["task"]["test"][0]["shown"])
        logits, _ = model.vlm.model(torch.tensor([prompt + ids]), pixels)
        wanted = torch.nn.functional.cross_entropy(logits[0, len(prompt) - 1 : -1], torch.tensor(ids))
        assert loss == pytest.approx(wanted.item(), rel=1e-4)
        assert same == loss
        assert not greedy


def test_greedy_is_seen(door, model, monkeypatch):
    from visualrwkv.generate import prefill, stream

    vlm, shown = model.vlm, model.task_dict["task"]["test"][0]["shown"]
    logits, state = prefill(vlm.model, [vlm.prompt(1, "Which?", "first")], vlm.pixels(shown))
    ids = [token for token, _ in stream(vlm.model, logits, state, 3)]
    monkeypatch.setattr(door, "encode", lambda text: ids)
    assert model.loglikelihood([request("Which?", "anything", 0)])[0][1]
    ids[-1] += 1
    assert not model.loglikelihood([request("Which?", "anything", 0)])[0][1]


@pytest.mark.parametrize(
    ("wishes", "settings"),
    [
        ({}, (1024, 0.0, 1.0, ())),
        ({"temperature": 0.2, "do_sample": False}, (1024, 0.0, 1.0, ())),
        ({"temperature": 0.2, "top_p": None, "until": "\n"}, (1024, 0.2, 1.0, ("\n",))),
        ({"max_new_tokens": 16, "temperature": None, "until": ["a", "b"]}, (16, 0.0, 1.0, ("a", "b"))),
    ],
)
def test_settings(door, wishes, settings):
    assert door.read_settings(wishes) == settings


def test_ends_tags_and_pictures(door):
    assert door.cut("yes. no; maybe", [";", "", "."]) == "yes"
    assert door.fit_tags("see <image> and <image>", 2) == "see <image> and <image>"
    assert door.fit_tags("<image>\nsee", 2) == "see"
    assert door.read_pictures(None, "t") == []
    with pytest.raises(ValueError, match="videos shows a str"):
        door.read_pictures(["film.mp4"], "videos")


@pytest.mark.parametrize(
    ("given", "words"),
    [({"batch_size": "auto"}, "batch_size"), ({"conv": "x"}, "conv"), ({"image_position": "above"}, "above")],
)
def test_wrong_arguments_are_named(door, given, words):
    with pytest.raises(ValueError, match=words):
        door.LmmsModel("nowhere", **given)


def test_several_rounds_are_refused(model):
    with pytest.raises(NotImplementedError, match="rounds"):
        model.generate_until_multi_round([])
