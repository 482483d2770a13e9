"""Features of the frozen encoder, kept between steps: the same loss, each picture read once, within the memory given."""

import pytest
import torch

from visualrwkv.text.prompt import encode_conversation
from visualrwkv.training.data import Batch
from visualrwkv.training.features import Features
from visualrwkv.training.objective import Objective
from visualrwkv.training.recipes import Recipe


@pytest.fixture
def model(tiny_model):
    net = tiny_model(image_tokens=4)
    net.vit.requires_grad_(False)
    return net


@pytest.fixture
def read(model, monkeypatch):
    """How many pictures the encoder has read, call by call."""
    counts, encode = [], type(model).encode
    monkeypatch.setattr(type(model), "encode", lambda self, images: counts.append(len(images)) or encode(self, images))
    return counts


def batch(pixels, pictures, known=()):
    """A conversation about each picture; pictures are named by their numbers."""
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "One."}]
    ids, labels = encode_conversation(turns, image_tokens=4)
    count = len(pictures)
    unread = tuple(dict.fromkeys(p for p in pictures if p not in known))
    images = torch.stack([pixels(1, seed=int(p))[0] for p in unread]) if unread else None
    bounds = torch.arange(0, count * len(ids) + 1, len(ids))
    return Batch(torch.tensor(ids * count), torch.tensor(labels * count), bounds, images, pictures, unread)


def test_a_picture_is_read_once_and_the_loss_stays(model, pixels, read):
    features = Features(1e6)
    objective = Objective(model, Recipe(), features=features)
    plain = Objective(model, Recipe())
    first = objective(batch(pixels, ("0", "1", "1")))
    assert read == [2]
    assert "1" in features
    assert "2" not in features
    again = objective(batch(pixels, ("2", "1", "0"), known=features))
    assert read == [2, 1]
    torch.testing.assert_close(first, plain(batch(pixels, ("0", "1", "1"))), rtol=1e-6, atol=0)
    torch.testing.assert_close(again, plain(batch(pixels, ("2", "1", "0"))), rtol=1e-6, atol=0)
    objective(batch(pixels, ("2", "0"), known=features))
    assert read[2:] == [2, 3]  # of the plain one's
    again.backward()
    assert model.proj.o_proj.weight.grad.abs().sum() > 0


def test_no_more_is_kept_than_there_is_room_for(model, pixels, read):
    one = 4 * model.config.vision.width * 4
    features = Features(2 * one + 1)
    objective = Objective(model, Recipe(), features=features)
    for _ in range(2):
        objective(batch(pixels, ("0", "1", "2"), known=features))
    assert sorted(features.kept) == ["0", "1"]
    assert features.bytes == 2 * one
    assert read == [3, 1]


def test_an_encoder_that_learns_is_not_remembered(model, pixels, read):
    model.vit.requires_grad_(True)
    features = Features(1e6)
    Objective(model, Recipe(), features=features)(batch(pixels, ("0", "1"))).backward()
    assert features.kept == {}
    assert model.vit.pos_embed.grad.abs().sum() > 0


def test_text_alone_needs_none(model):
    ids = torch.tensor([1, 2, 3])
    assert Features(1e6).of(model, Batch(ids, ids, torch.tensor([0, 3]), None)) is None
