"""Features on disk: what the encoder says of each picture, computed once, refused for another encoder."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from visualrwkv.training.data import Conversations
from visualrwkv.training.features import Features
from visualrwkv.training.objective import Objective
from visualrwkv.training.recipes import Recipe
from visualrwkv.training.shelf import Shelf, encoder_mark, fill, missing


def world(rank=0, size=1):
    return SimpleNamespace(rank=rank, size=size, chief=rank == 0, device=torch.device("cpu"))


@pytest.fixture
def data(tmp_path, tiny_model):
    """Records about five pictures, some shown twice, one in a pair; and a text."""
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "One"}]
    records = [{"image": f"{i % 4}.png", "conversations": turns} for i in range(7)]
    records.append({"conversations": [{"from": "human", "value": "Hi"}, turns[1]]})
    two = [{"from": "human", "value": "<image>\n<image>\nBoth?"}, turns[1]]
    records.append({"image": ["4.png", "0.png"], "conversations": two})
    for i in range(5):
        Image.new("RGB", (20, 20), (50 * i, 99, 7)).save(tmp_path / f"{i}.png")
    (tmp_path / "data.json").write_text(json.dumps(records))
    data = Conversations(tmp_path / "data.json", tmp_path, tiny_model(image_tokens=4).config, bad="skip")
    data.prepare()
    return data


def test_the_shelf_holds_what_the_encoder_says(data, tiny_model, tmp_path):
    model = tiny_model(image_tokens=4)
    model.vit.requires_grad_(False)
    shelf = Shelf(tmp_path / "shelf", encoder_mark(model))
    fill(model, data, shelf, world(), 0, False)
    shelf.refresh()
    assert len(shelf.places) == 5
    data.read = features = Features(0, shelf)
    batch, plain = data.pack([8, 2, 7]), Conversations(data.path, data.path.parent, model.config).pack([8, 2, 7])
    assert batch.unread == ()
    assert batch.images is None
    assert plain.images.shape[0] == 3
    from_disk = Objective(model, Recipe(), features=features)(batch)
    torch.testing.assert_close(from_disk, Objective(model, Recipe())(plain), rtol=1e-6, atol=0)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_share_the_work_and_go_on_after_a_cut(data, tiny_model, tmp_path, ranks):
    model = tiny_model(image_tokens=4)
    shelf = Shelf(tmp_path / "shelf", encoder_mark(model))
    todo = [[str(p) for _, p in missing(data, shelf, rank, ranks)] for rank in range(ranks)]
    assert sorted(name for part in todo for name in part) == [str(tmp_path / f"{i}.png") for i in range(5)]
    fill(model, data, shelf, world(0, ranks), 0, False)
    shelf.refresh()
    assert sorted(shelf.places) == sorted(todo[0])
    fill(model, data, Shelf(tmp_path / "shelf", encoder_mark(model)), world(), 0, False)
    again = Shelf(tmp_path / "shelf", encoder_mark(model))
    assert len(again.places) == 5
    assert list(missing(data, again, 0, 1)) == []


def test_another_encoders_shelf_is_refused(data, tiny_model, tmp_path):
    Shelf(tmp_path / "shelf", encoder_mark(tiny_model(image_tokens=4)))
    with pytest.raises(ValueError, match=r"shelf holds features of another encoder \(encoder"):
        Shelf(tmp_path / "shelf", encoder_mark(tiny_model(image_tokens=4, seed=1)))
    with pytest.raises(ValueError, match="image_tokens 4, not 16"):
        Shelf(tmp_path / "shelf", encoder_mark(tiny_model(image_tokens=16)))


def test_a_broken_picture_is_named_or_left_out(data, tiny_model, tmp_path):
    (tmp_path / "2.png").write_text("words")
    model = tiny_model(image_tokens=4)
    shelf = Shelf(tmp_path / "shelf", encoder_mark(model))
    fill(model, data, shelf, world(), 0, False)
    assert len(Shelf(tmp_path / "shelf", encoder_mark(model)).places) == 4
    data.bad = "error"
    with pytest.raises(ValueError, match=r"record 2: .*2\.png cannot be read as a picture"):
        fill(model, data, shelf, world(), 0, False)
