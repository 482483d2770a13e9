"""The drawn data set with boxes and masks: its masks are where the paint is."""

import json
from random import Random

import numpy as np
import pytest
from PIL import Image

from visualrwkv.training import scene_masks
from visualrwkv.training.coco import LabelledPictures
from visualrwkv.training.scene_questions import KINDS
from visualrwkv.training.scenes import Scene, Thing, draw_with_masks


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("masks") / "data"
    scene_masks.write(out, seed=2, train=60, test=20)
    return out


def test_masks_are_where_the_paint_is(data):
    """Every paint is brighter in one channel than any background."""
    right = total = 0
    for picture, truth in LabelledPictures(data / "train.json"):
        painted = picture.amax(0) > 120
        marked = truth.masks.any(0)
        right += int((painted & marked).sum())
        total += int((painted | marked).sum())
    assert total > 20_000
    assert right / total > 0.9  # what is left are edges, covered in part


def test_boxes_bound_their_masks_and_classes_are_kinds(data):
    pictures = LabelledPictures(data / "train.json")
    assert pictures.names == list(KINDS)
    seen = set()
    for _, truth in pictures:
        assert not (truth.masks.sum(0) > 1).any()
        for box, mask in zip(truth.boxes.int().tolist(), truth.masks.numpy(), strict=True):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            assert box == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        seen |= set(truth.labels.tolist())
    assert seen == {1, 2, 3, 4, 5, 6}


def test_squares_fill_their_boxes_and_crosses_do_not(data):
    filled = {kind: [] for kind in KINDS}
    for _, truth in LabelledPictures(data / "train.json"):
        for box, mask, label in zip(truth.boxes, truth.masks, truth.labels, strict=True):
            filled[KINDS[label - 1]].append(float(mask.sum() / (box[2:] - box[:2]).prod()))
    share = {kind: np.mean(values) for kind, values in filled.items()}
    assert share["square"] > share["circle"] > share["triangle"] > share["star"]
    assert share["circle"] == pytest.approx(np.pi / 4, abs=0.04)


def test_what_is_drawn_later_lies_over_what_was_drawn_before():
    big, small = Thing("square", "red", None, None, 32, 32, 24), Thing("circle", "blue", None, None, 32, 32, 12)
    picture, (under, over) = draw_with_masks(Scene(64, (big, small)), Random(0))
    pixels = np.asarray(picture).astype(int)
    assert over.sum() == pytest.approx(np.pi * 36, rel=0.1)
    assert not (under & over).any()
    assert (pixels[under][:, 0] > pixels[under][:, 2]).mean() > 0.97  # red, and what it hides is not marked
    assert (pixels[over][:, 2] > pixels[over][:, 0]).mean() > 0.97


def test_same_seed_same_bytes(data, tmp_path):
    scene_masks.write(tmp_path / "again", seed=2, train=60, test=20)
    for name in ("train.json", "test.json", "images/train/000059.png", "images/test/000003.png"):
        assert (tmp_path / "again" / name).read_bytes() == (data / name).read_bytes()
    scene_masks.write(tmp_path / "other", seed=3, train=1, test=1)
    assert (tmp_path / "other/images/test/000000.png").read_bytes() != (data / "images/test/000000.png").read_bytes()
    with Image.open(data / "images/train/000000.png") as picture:
        assert picture.size == (64, 64)


def test_a_directory_of_something_else_is_left_alone(data, tmp_path):
    scene_masks.write(data, seed=2, train=60, test=20)  # there already
    with pytest.raises(ValueError, match="choose another directory"):
        scene_masks.write(data, seed=4, train=60, test=20)
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(ValueError, match="not a scenes data set"):
        scene_masks.write(tmp_path, train=1, test=1)
    with pytest.raises(ValueError, match="size must be at least 32, not 8"):
        scene_masks.write(tmp_path / "new", size=8)
    assert json.loads((data / "scene_masks.json").read_text())["seed"] == 2
