"""A small model as our own classes and as transformers' open it."""

import pytest

pytest.importorskip("transformers")

from transformers import AutoModelForImageTextToText, AutoProcessor

import visualrwkv.hf  # noqa: F401  (registers the classes)
from visualrwkv.chat import load
from visualrwkv.checkpoint import save_model


@pytest.fixture(scope="session")
def place(tiny_model, tmp_path_factory):
    """A directory of ours."""
    place = tmp_path_factory.mktemp("hf") / "model"
    save_model(tiny_model(), place)
    return place


@pytest.fixture(scope="session")
def vlm(place):
    return load(place)


@pytest.fixture(scope="session")
def model(place):
    return AutoModelForImageTextToText.from_pretrained(place)


@pytest.fixture(scope="session")
def processor(place):
    return AutoProcessor.from_pretrained(place)


@pytest.fixture(scope="session")
def asked(processor):
    """asked((pictures, text), ...): the model's inputs for questions asked side by side."""

    def make(*questions):
        chats = [
            [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": p} for p in ps] + [{"type": "text", "text": text}],
                }
            ]
            for ps, text in questions
        ]
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
        return processor.apply_chat_template(chats, processor_kwargs={"padding": True}, **options)

    return make
