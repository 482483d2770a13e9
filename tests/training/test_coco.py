"""Files in COCO's format: what is read of them, and what is said where they are wrong."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from visualrwkv.training.coco import LabelledPictures, mask_of, run_lengths

SQUARE = [[2, 1, 6, 1, 6, 5, 2, 5]]


def thing(**changed):
    whole = {"id": 7, "image_id": 3, "category_id": 9, "bbox": [2, 1, 4, 4], "segmentation": SQUARE, "iscrowd": 0}
    return {**whole, **changed}


@pytest.fixture
def write(tmp_path):
    """write(annotations) -> a file about one picture of 10 x 8 pixels."""
    Image.fromarray(np.arange(240, dtype=np.uint8).reshape(8, 10, 3)).save(tmp_path / "cat.png")

    def made(annotations, **changed):
        data = {
            "images": [{"id": 3, "file_name": "cat.png", "width": 10, "height": 8}],
            "annotations": annotations,
            "categories": [{"id": 9, "name": "cat"}, {"id": 4, "name": "ant"}],
        }
        (tmp_path / "my.json").write_text(json.dumps(data | changed))
        return tmp_path / "my.json"

    return made


def test_a_picture_and_what_is_in_it(write):
    mask = np.zeros((8, 10), bool)
    mask[5:, 7:] = True
    lengths = thing(id=8, category_id=4, bbox=[7, 5, 3, 3], segmentation=run_lengths(mask))
    pictures = LabelledPictures(write([thing(), thing(id=1, iscrowd=1, bbox=[0, 0, 0, 0]), lengths]))
    assert (pictures.names, len(pictures)) == (["ant", "cat"], 1)
    picture, truth = pictures[0]
    assert picture.permute(1, 2, 0).flatten().tolist() == list(range(240))
    assert truth.boxes.tolist() == [[2, 1, 6, 5], [7, 5, 10, 8]]
    assert truth.labels.tolist() == [2, 1]
    wanted = np.zeros((8, 10), bool)
    wanted[1:5, 2:6] = True
    np.testing.assert_array_equal(truth.masks.numpy(), [wanted, mask])
    torch.testing.assert_close(truth.classes(), torch.from_numpy(2 * wanted + mask).long())


def test_a_picture_with_nothing_in_it(write):
    _, truth = LabelledPictures(write([]))[0]
    assert (truth.boxes.shape, truth.labels.shape, truth.masks.shape) == ((0, 4), (0,), (0, 8, 10))
    assert not truth.classes().any()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"bbox": [7, 1, 4, 4]}, r"its box \[7, 1, 4, 4\] lies outside the picture of 10 x 8 pixels"),
        ({"bbox": [2, -1, 4, 4]}, "lies outside the picture"),
        ({"bbox": [2, 5, 4, 3.6]}, "lies outside the picture"),
        ({"bbox": [2, 1, 0, 4]}, "has no area"),
        ({"bbox": [2, 1, 4]}, "must be"),
        ({"bbox": None}, "must be"),
        ({"category_id": 5}, "its category is 5"),
        ({"segmentation": []}, "no segmentation"),
        ({"segmentation": [[1, 2, 3, 4]]}, "no segmentation"),
        ({"segmentation": {"size": [8, 10], "counts": "abc"}}, "list of numbers"),
        ({"segmentation": {"size": [8, 10], "counts": [1, 2]}}, "not those of a picture of 10 x 8"),
        ({"segmentation": {"size": [10, 8], "counts": [80]}}, "not those of a picture of 10 x 8"),
    ],
)
def test_a_bad_annotation_is_named_with_its_picture(write, changed, words):
    with pytest.raises(ValueError, match=rf"my\.json, annotation 7 in cat\.png.*{words}"):
        LabelledPictures(write([thing(id=1), thing(**changed)]))


def test_boxes_may_be_rounded(write):
    _, truth = LabelledPictures(write([thing(bbox=[6.2, 4.4, 4.1, 3.9])]))[0]
    assert truth.boxes.tolist() == [[pytest.approx(6.2), pytest.approx(4.4), 10, 8]]


def test_other_mistakes(write):
    with pytest.raises(ValueError, match="annotation 7 is of picture 4, which is not among the images"):
        LabelledPictures(write([thing(image_id=4)]))
    with pytest.raises(ValueError, match="no list 'categories'"):
        LabelledPictures(write([], categories=None))
    with pytest.raises(ValueError, match="lists no pictures"):
        LabelledPictures(write([], images=[]))
    other = LabelledPictures(write([], images=[{"id": 3, "file_name": "cat.png", "width": 8, "height": 10}]))
    with pytest.raises(ValueError, match=r"cat\.png has \(10, 8\) pixels"):
        other[0]
    with pytest.raises(FileNotFoundError, match=r"dog\.png"):
        LabelledPictures(write([], images=[{"id": 3, "file_name": "dog.png", "width": 8, "height": 10}]))
    with pytest.raises(ValueError, match=r"my\.json: number 0 of its images has no 'height'"):
        LabelledPictures(write([], images=[{"id": 3, "file_name": "cat.png", "width": 8}]))


@pytest.mark.parametrize("shape", [(7, 5), (1, 9), (4, 4)])
def test_run_lengths_and_back(shape):
    generator = np.random.default_rng(0)
    for mask in (generator.random(shape) > 0.5, np.zeros(shape, bool), np.ones(shape, bool)):
        written = run_lengths(mask)
        assert sum(written["counts"]) == mask.size
        np.testing.assert_array_equal(mask_of(written, *shape), mask)


def test_run_lengths_go_down_the_columns():
    assert run_lengths(np.array([[0, 1], [1, 0]], bool)) == {"size": [2, 2], "counts": [1, 2, 1]}


def test_a_polygon_holds_the_pixels_that_it_covers_by_half():
    half = mask_of([[0, 0, 8, 0, 0, 8]], 8, 8)  # a triangle over the upper left
    area = half.sum()
    assert 28 <= area <= 36
    assert half[np.add.outer(range(8), range(8)) < 7].all()
    assert not half[np.add.outer(range(8), range(8)) > 7].any()
    two = mask_of([[0, 0, 2, 0, 2, 2, 0, 2], [5, 5, 8, 5, 8, 8, 5, 8]], 8, 8)
    assert two.sum() == 4 + 9
