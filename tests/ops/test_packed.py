"""Packed weights: what is rounded and what is not."""

import pytest
import torch

from visualrwkv.ops.packed import GROUP, LINE, ROWS, pack, round_vectors, round_weights, rounded

SHAPES = [(16, 128), (35, 200), (1, 1)]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("M", "K"), SHAPES)
def test_bf16_keeps_every_bit_where_the_tiles_say(M, K):
    w = normal(M, K).bfloat16()
    tiles = pack(w, "bfloat16").data  # (tiles, blocks, 16, 32)
    assert tiles.shape[2:] == (ROWS, LINE // 2)
    whole = tiles.transpose(1, 2).reshape(tiles.shape[0] * ROWS, -1)
    assert torch.equal(whole[:M, :K], w)
    assert whole.count_nonzero() == w.count_nonzero(), "the rest is zero"


@pytest.mark.parametrize(("M", "K"), SHAPES)
@pytest.mark.parametrize(("kind", "limit"), [("int8", 0.01), ("int4", 0.12)])
def test_what_rounding_costs(M, K, kind, limit):
    w = normal(M, K)
    assert (rounded(w, kind) - w).norm() <= limit * w.norm()


def test_steps_are_those_of_the_type():
    w = normal(24, 300)
    w[3] = 0
    for kind, low, high in (("int8", -127, 127), ("int4", -8, 7)):
        q, scales = round_weights(w, kind)
        assert int(q.min()) >= low
        assert int(q.max()) <= high
        assert q[3].count_nonzero() == 0
        assert scales.isfinite().all()
    assert scales.shape == (24, 3)


def test_int4_has_a_scale_for_each_group():
    """One large weight costs its own group its precision, not the row."""
    w = normal(1, 2 * GROUP)
    w[0, 0] = 1000.0
    lost = (rounded(w, "int4") - w).abs()[0]
    assert lost[1:GROUP].mean() > 0.5
    assert lost[GROUP:].mean() < 0.2


def test_packing_takes_what_four_bits_need():
    w = normal(64, 1024)
    assert pack(w, "bfloat16").nbytes() == 64 * 1024 * 2
    assert pack(w, "int8").nbytes() == 64 * 1024 + 64 * 4
    assert pack(w, "int4").nbytes() == 64 * 1024 // 2 + 64 * 1024 // GROUP * 4


def test_vectors_have_a_scale_for_each_group():
    x = normal(3, 300)
    x[1, :GROUP] = 0
    x[2, 5] = 500.0
    near = round_vectors(x)
    assert near.shape == x.shape
    assert torch.equal(near[1, :GROUP], x[1, :GROUP])
    steps = torch.stack([g.abs().amax(1) / 127 for g in x.split(GROUP, 1)], 1).repeat_interleave(GROUP, 1)[:, :300]
    assert bool(((near - x).abs() <= 0.5001 * steps).all())
