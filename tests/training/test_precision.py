"""Average precision and intersection over union, against cases worked out by hand."""

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from visualrwkv.training.precision import (
    Found,
    average_precision,
    box_overlaps,
    class_overlaps,
    mask_overlaps,
    precision_of_class,
)


def found(scores, classes, true_classes, overlaps):
    shape = (len(scores), len(true_classes))
    return Found(np.array(scores), np.array(classes), np.array(true_classes), np.array(overlaps, float).reshape(shape))


def test_a_find_between_two_hits_costs_the_second():
    """Precision 1 up to recall 0.5, 2/3 beyond: 51 and 50 of the 101 recalls."""
    picture = found([0.9, 0.8, 0.7], [1, 1, 1], [1, 1], [[0.9, 0], [0, 0.1], [0, 0.7]])
    assert precision_of_class([picture], 1, 0.5) == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_the_best_precision_at_a_recall_or_beyond_counts():
    """A wrong find first, then two hits: 1/2, then 2/3, which holds for the lower recalls as well."""
    picture = found([0.9, 0.8, 0.7], [1, 1, 1], [1, 1], [[0, 0], [0.8, 0], [0, 0.8]])
    assert precision_of_class([picture], 1, 0.5) == pytest.approx(2 / 3)


def test_a_thing_is_found_once():
    """The second find of one thing is wrong, and the other thing is missed: precision 1 up to recall 0.5, then none."""
    picture = found([0.9, 0.8], [1, 1], [1, 1], [[0.9, 0], [0.95, 0]])
    assert precision_of_class([picture], 1, 0.5) == pytest.approx(51 / 101)


def test_a_find_takes_what_is_free():
    """Both overlap the first thing most; the surer has it, and the other is left with the second."""
    picture = found([0.8, 0.9], [1, 1], [1, 1], [[0.9, 0.6], [0.7, 0.6]])
    assert precision_of_class([picture], 1, 0.5) == pytest.approx(1)
    assert precision_of_class([picture], 1, 0.65) == pytest.approx(51 / 101)


def test_scores_are_compared_over_all_pictures():
    """Sorted together: hit 0.9, wrong 0.8, hit 0.3."""
    one, other = found([0.3, 0.8], [1, 1], [1], [[0.9], [0]]), found([0.9], [1], [1], [[0.6]])
    assert precision_of_class([one, other], 1, 0.5) == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_classes_are_apart_and_thresholds_are_averaged():
    """Class 1 overlaps by 0.6, which is enough for 3 of the 10 thresholds; class 2 is called 1; class 3 occurs nowhere."""
    picture = found([0.9, 0.8, 0.7], [1, 1, 3], [1, 2], [[0.6, 0], [0, 1], [0, 0]])
    assert average_precision([picture], 3) == pytest.approx({"AP50": 0.5, "AP": 0.15})


def test_nothing_found_is_nothing_and_empty_pictures_only_count_wrong_finds():
    assert average_precision([found([], [], [1], [])], 1) == {"AP50": 0, "AP": 0}
    empty = found([0.95], [1], [], [])
    whole = found([0.9], [1], [1], [[1]])
    assert average_precision([whole, empty], 1)["AP50"] == pytest.approx(0.5)


def test_overlaps():
    boxes, others = (
        torch.tensor([[0.0, 0, 4, 4], [2, 2, 6, 3]]),
        torch.tensor([[2.0, 0, 6, 4], [8, 8, 9, 9], [0, 0, 4, 4]]),
    )
    assert box_overlaps(boxes, others)[0].tolist() == pytest.approx([8 / 24, 0, 1])
    np.testing.assert_allclose(box_overlaps(boxes, others), box_iou(boxes, others).numpy(), rtol=1e-6)
    masks = torch.zeros(3, 4, 4, dtype=torch.bool)
    masks[0, :2], masks[1, 1:3] = True, True
    assert mask_overlaps(masks[:2], masks).tolist() == [[1, pytest.approx(1 / 3), 0], [pytest.approx(1 / 3), 1, 0]]
    assert box_overlaps(boxes[:0], others).shape == (0, 3)
    assert mask_overlaps(masks, masks[:0]).shape == (3, 0)


def test_class_overlaps():
    """Of class 0 three pixels, one called 1; of class 1 two, both right; class 2 neither occurs nor is said."""
    each = class_overlaps(torch.tensor([[2, 1, 0], [0, 2, 0], [0, 0, 0]]))
    assert each[:2] == pytest.approx([2 / 3, 2 / 3])
    assert np.isnan(each[2])
