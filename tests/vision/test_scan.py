"""A scan is a permutation: its orders, its inverse, and what it leaves where it is."""

import pytest
import torch

from visualrwkv.rwkv.network import Order
from visualrwkv.vision.scan import read_order, scan_orders

ROWS = list(range(9))
COLUMNS = [0, 3, 6, 1, 4, 7, 2, 5, 8]


@pytest.mark.parametrize(
    ("kind", "orders"),
    [("uni", [ROWS]), ("bi", [ROWS, ROWS[::-1]]), ("multi", [ROWS, ROWS[::-1], COLUMNS, COLUMNS[::-1]])],
)
def test_orders_of_a_grid(kind, orders):
    found = scan_orders(kind, 3)
    assert found[0] is None, "the first order is the row as it stands"
    assert [ROWS if order is None else order.tolist() for order in found] == orders


def test_unknown_scan():
    with pytest.raises(ValueError, match="scan is 'spiral'; allowed are uni, bi, multi"):
        scan_orders("spiral", 3)


# t: text, then pictures of four tokens; the second and third stand side by side
ROW = torch.tensor([c == "i" for c in "ttiiiittiiiiiiiit"])


@pytest.mark.parametrize("order", [[3, 2, 1, 0], [0, 2, 1, 3], [3, 1, 2, 0], [1, 3, 0, 2]])
def test_each_picture_is_read_in_order_and_text_stays(order):
    read, back = read_order(ROW, torch.tensor(order))
    wanted = list(range(len(ROW)))
    for start in (2, 8, 12):
        wanted[start : start + 4] = [start + i for i in order]
    assert read.tolist() == wanted
    x = torch.randn(len(ROW), 3)
    assert torch.equal(x[read][back], x)
    assert torch.equal(x[back][read], x)


def test_bi_is_the_references_flip_of_the_span_in_odd_blocks(tiny_model, pixels):
    model = tiny_model(scan="bi", vocab_size=300).requires_grad_(False)
    ids = torch.tensor([5, 6, 7, *[65535] * 16, 8, 9])
    x, is_image = model.splice(ids, pixels(1))
    bounds = torch.tensor([0, len(ids)])
    found, _ = model.rwkv(x, bounds, orders=model.orders(is_image))
    for i, block in enumerate(model.rwkv.blocks):
        y = x.clone()
        if i % 2:
            y[3:19] = y[3:19].flip(0)
        x = block(y, bounds, None)[0]
        if i % 2:
            x = torch.cat([x[:3], x[3:19].flip(0), x[19:]])
    torch.testing.assert_close(found, model.rwkv.ln_out(x), rtol=0, atol=1e-6)


def test_multi_reads_four_orders_in_turn(tiny_model, pixels):
    model = tiny_model(scan="multi", vocab_size=300).requires_grad_(False)
    ids = torch.tensor([5, *[65535] * 16, 8, *[65535] * 16, 9])
    x, is_image = model.splice(ids, pixels(2))
    bounds = torch.tensor([0, len(ids)])
    found, _ = model.rwkv(x, bounds, orders=model.orders(is_image))
    grid = torch.arange(16).view(4, 4)
    orders = [grid.flatten(), grid.flatten().flip(0), grid.T.flatten(), grid.T.flatten().flip(0)]
    for block, order in zip(model.rwkv.blocks, orders):
        read = torch.cat([torch.tensor([0]), 1 + order, torch.tensor([17]), 18 + order, torch.tensor([34])])
        x = block(x[read], bounds, None)[0][read.argsort()]
    torch.testing.assert_close(found, model.rwkv.ln_out(x), rtol=0, atol=1e-6)


def test_scans_differ(tiny_model, pixels):
    ids = torch.tensor([[5, *[65535] * 16, 8]])
    logits = []
    for scan in ("uni", "bi", "multi"):
        with torch.no_grad():
            logits.append(tiny_model(scan=scan, vocab_size=300)(ids, pixels(1))[0][0, -1])
    assert (logits[0] - logits[1]).abs().max() > 0.01
    assert (logits[1] - logits[2]).abs().max() > 0.01
    assert (logits[0] - logits[2]).abs().max() > 0.01


def test_a_row_without_pictures_needs_no_order(tiny_model):
    model = tiny_model(scan="multi", vocab_size=300)
    assert model.orders(torch.zeros(5, dtype=torch.bool)) is None
    assert isinstance(model.orders(torch.ones(16, dtype=torch.bool))[1], Order)
