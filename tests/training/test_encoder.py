"""Dense supervision: what each image token has to say, and that shape and colour are kept apart."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from visualrwkv.checkpoint import load_vision
from visualrwkv.training import encoder
from visualrwkv.training.encoder import NOTHING, DenseHead, EncoderRecipe, recolour, shuffle_patches, token_targets
from visualrwkv.training.scene_questions import COLOURS, HELD_OUT, KINDS


def thing(kind, colour, x, y, digit=None, extent=16.0):
    return {"kind": kind, "colour": colour, "digit": digit, "glyph": None, "x": x, "y": y, "extent": extent}


def test_an_object_belongs_to_the_token_of_its_centre():
    objects = [thing("star", "red", 8, 8), thing("digit", "white", 63.9, 20, digit=0, extent=24)]
    classes, places = token_targets(objects, 64, 4)
    assert classes.shape == (16, 4)
    assert classes[0].tolist() == [KINDS.index("star") + 1, COLOURS.index("red") + 1, NOTHING, 1]
    assert classes[7].tolist() == [KINDS.index("digit") + 1, COLOURS.index("white") + 1, 1, 1]
    assert not np.delete(classes, [0, 7], 0).any()
    assert places[0].tolist() == [0.125, 0.125, 0.5]
    assert places[7] == pytest.approx([63.9 / 64, 20 / 64, 0.75])


def test_plain_pictures_do_not_teach_what_never_occurs():
    """No gradient reaches the logit of a colour that training never shows on a shape, or of a shape in that colour."""
    kind, colour = "square", "red"
    assert (kind, colour) not in HELD_OUT
    classes, places = (torch.from_numpy(part)[None] for part in token_targets([thing(kind, colour, 8, 8)], 64, 4))
    for plain in (True, False):
        head = DenseHead(8)
        torch.nn.init.zeros_(head.read.weight)
        bias = head.read.bias
        torch.nn.init.zeros_(bias)
        shuffled = torch.tensor([False])
        loss, _ = head.loss(torch.randn(1, 16, 8), classes, places, torch.tensor([plain]), shuffled)
        kinds = torch.autograd.grad(loss, bias)[0].split(head.sizes)[0][1:]
        # of the 15 empty tokens every kind gets the same push; of the square, only those seen in red get one more
        seen = [i for i, k in enumerate(KINDS) if (k, colour) not in HELD_OUT and k != kind]
        unseen = [i for i, k in enumerate(KINDS) if (k, colour) in HELD_OUT]
        assert unseen
        gap = kinds[seen].mean() - kinds[unseen].mean()
        assert (gap > 1e-3) == plain


def test_colours_are_asked_of_plain_and_shuffled_pictures_and_shapes_of_all_but_shuffled():
    classes, places = (torch.from_numpy(part)[None] for part in token_targets([thing("star", "red", 8, 8)], 64, 4))
    classes, places = classes.repeat(2, 1, 1), places.repeat(2, 1, 1)
    head = DenseHead(8)
    for plain, shuffled, wanted in (
        ([True, False], [False, True], {"kind": [1, 0], "colour": [1, 1]}),
        ([True, False], [False, False], {"kind": [1, 1], "colour": [1, 0]}),
    ):
        tokens = torch.randn(2, 16, 8, requires_grad=True)
        for name, rows in wanted.items():
            i = ("kind", "colour").index(name)
            only = DenseHead(8)
            only.load_state_dict(head.state_dict())
            low = sum(head.sizes[:i])
            keep = torch.zeros(sum(head.sizes), dtype=torch.bool)
            keep[low : low + head.sizes[i]] = True
            with torch.no_grad():
                only.read.weight[~keep] = 0  # other logits say nothing of the tokens
            loss, _ = only.loss(tokens, classes, places, torch.tensor(plain), torch.tensor(shuffled))
            (slope,) = torch.autograd.grad(loss, tokens)
            assert [int(bool(row.any())) for row in slope] == rows, name


def test_recolouring_keeps_shapes_and_shuffling_keeps_colours():
    draw = torch.Generator().manual_seed(0)
    pictures = torch.rand(3, 3, 16, 16)
    mixed = recolour(pictures, draw)
    grey = torch.ones(1, 3, 1, 1) * pictures[:, :1]
    assert torch.allclose(recolour(grey, draw), grey, atol=1e-6), "each new channel is a mean of the old"
    assert not torch.allclose(mixed, pictures, atol=0.1)

    shuffled = shuffle_patches(pictures, 8, draw)

    def patches(x):
        return x.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).reshape(-1, 64, 3)

    assert not torch.equal(shuffled, pictures)
    for before, after in zip(patches(pictures), patches(shuffled), strict=True):
        assert sorted(before.tolist()) == sorted(after.tolist())


def test_a_short_training_writes_an_encoder(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    scenes = {}
    for i in range(8):
        kind = KINDS[i % 6]
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / f"{i}.png")
        scenes[f"{i}.png"] = [thing(kind, "purple", 20, 40, digit=3 if kind == "digit" else None)]
    (tmp_path / "train.objects.json").write_text(json.dumps(scenes))
    settings = ["--recipe.steps", "3", "--recipe.batch", "8"]
    monkeypatch.setattr(sys, "argv", ["encoder", "--data", str(tmp_path), "--out", str(tmp_path / "vit"), *settings])
    encoder.main()
    assert "accuracy on the tokens of objects kind" in capsys.readouterr().out
    assert load_vision(tmp_path / "vit").config.width == 128
    rows = [json.loads(line) for line in (tmp_path / "vit" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert EncoderRecipe().steps > 100
