"""What the CUDA kernels of WKV-6 and WKV-7 share, emulated on the CPU: packed rows, states, order, memory."""

from ctypes import c_int64
from itertools import pairwise

import pytest
import torch

from tests.ops.recurrences import BOTH, WKV6, WKV7, assert_close, assert_same
from visualrwkv.ops import library
from visualrwkv.ops.sequences import KEPT

EACH = pytest.mark.parametrize("op", [WKV6, WKV7], ids=("wkv6", "wkv7"))


@pytest.fixture(
    params=[(op, plain) for op in (WKV6, WKV7) for plain in (False, True)],
    ids=lambda p: f"{p[0].name}-{'plain' if p[1] else 'tiles'}",
)
def way(request, emulated):
    """Each op by both ways of its kernels."""
    op, plain = request.param
    switch = getattr(emulated, f"visualrwkv_cuda_{op.name}_plain")
    switch(c_int64(plain))
    yield op
    switch(c_int64(0))


@BOTH
def test_packed_sequences_stand_alone(way, dtype):
    lengths = (1, 16, 67, 3)
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    inputs = way.make(1, sum(lengths), 2, way.size, dtype, sequences=len(lengths))
    found = way.run(inputs, torch.tensor(starts, dtype=torch.int32))
    assert_close(found, way.true(inputs, torch.tensor(starts)), limits=way.limits[dtype])
    for i, (a, b) in enumerate(pairwise(starts)):
        rows = {name: x[:, a:b] for name, x in zip(way.inputs, inputs) if name in (*way.rows, "dy")}
        states = {name: x[i : i + 1] for name, x in zip(way.inputs, inputs) if name in ("state", "dS")}
        alone = way.run([(rows | states).get(name, x) for name, x in zip(way.inputs, inputs)])
        alone.pop("du", None)  # a sum over sequences
        part = {name: x[:, a:b] if name in way.per_token else x[i : i + 1] for name, x in found.items()}
        assert_same(part, alone)


@BOTH
@pytest.mark.parametrize("cut", [1, 40, 64])
def test_two_halves_are_the_whole(way, dtype, cut):
    inputs = way.make(2, 70, 1, way.size, dtype)
    count = len(way.rows)
    *values, state, dy, dS = inputs
    first = [x[:, :cut] for x in values[:count]] + values[count:]
    second = [x[:, cut:] for x in values[:count]] + values[count:]
    y_first, middle, states_first = way.forward(*first, state, None, True)
    y_second, S, states_second = way.forward(*second, middle, None, True)
    late = dict(zip(way.gradients, way.backward(*second, middle, None, states_second, dy[:, cut:], dS)))
    early = dict(zip(way.gradients, way.backward(*first, state, None, states_first, dy[:, :cut], late["dstate"])))
    found = {"y": torch.cat((y_first, y_second), 1), "S": S}
    for name in way.gradients:
        found[name] = torch.cat((early[name], late[name]), 1) if name in way.per_token else early[name] + late[name]
    found["dstate"] = early["dstate"]
    assert_close(found, way.true(inputs), limits=way.limits[dtype])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    ("op", "name"),
    [(op, name) for op in (WKV6, WKV7) for name in (*op.rows, "state", "dy")],
    ids=lambda x: getattr(x, "name", x),
)
def test_a_value_that_is_not_finite_stays_in_its_head(emulated, op, name, value):
    inputs = op.make(2, 20, 2, op.size, torch.bfloat16)
    clean = op.run(inputs)
    at = op.inputs.index(name)
    inputs[at] = inputs[at].clone()
    inputs[at][(0, 1, 3, 5) if name == "state" else (0, 10, 1, 5)] = value
    found = op.run(inputs)
    clean.pop("du", None)  # a sum over sequences
    for n in clean:
        assert torch.equal(found[n][1], clean[n][1]), n
    for n in op.per_token:
        assert torch.equal(found[n][0, :, 0], clean[n][0, :, 0]), n
    if name != "w":  # an infinite raw w is a decay of 0 or 1
        assert not all(x.isfinite().all() for x in found.values())


@BOTH
@EACH
@pytest.mark.parametrize(("N", "splits", "T"), [(64, 1, 90), (64, 2, 33), (64, 4, 33), (48, 1, 20)])
def test_any_order_of_warps_gives_the_same(emulated, split, op, dtype, N, splits, T):
    split(splits)
    inputs = op.make(1, T, 1, N, dtype)
    first = op.run(inputs)
    for order in (1, 2):
        emulated.schedule(order)
        assert_same(op.run(inputs), first)


def test_states_are_kept_only_on_demand(way):
    *values, dy, dS = way.make(1, 130, 1, way.size, torch.float32)
    y, S, states = way.forward(*values, None, False)
    assert states.numel() == 0
    y_kept, S_kept, states = way.forward(*values, None, True)
    assert torch.equal(y, y_kept)
    assert torch.equal(S, S_kept)
    assert torch.equal(states[0], values[-1][0])
    for chunk in (1, 2):
        exact = [x.double() for x in values]
        early = [x[:, : chunk * KEPT] for x in exact[: len(way.rows)]]
        _, wanted = way.reference(*early, *exact[len(way.rows) :])
        torch.testing.assert_close(states[chunk].double(), wanted[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="keep=True"):
        way.backward(*values, None, values[-1].new_empty(0), dy, dS)


def test_absent_states_are_zeros(way):
    *values, state, dy, dS = way.make(2, 20, 1, way.size, torch.float32)
    state.zero_()
    y, S, states = way.forward(*values, state, None, True)
    y_null, S_null = torch.empty_like(y), torch.empty_like(S)
    library.launch(f"{way.name}_forward", 0, 1, 2, 20, None, 1, way.size, *values, None, y_null, S_null, None)
    assert torch.equal(y, y_null)
    assert torch.equal(S, S_null)
    with_zeros = way.backward(*values, state, None, states, dy, torch.zeros_like(dS))
    without = way.backward(*values, state, None, states, dy, None)
    assert all(torch.equal(a, b) for a, b in zip(with_zeros, without, strict=True))


def test_any_memory_layout(way):
    """Rows that do not lie side by side, and ones that begin between two 16-byte addresses."""
    inputs = way.make(2, 20, 2, way.size, torch.bfloat16)
    wanted = way.run(inputs)
    sliced = [torch.stack((x, torch.full_like(x, 9)), -1)[..., 0] for x in inputs]
    unaligned = [torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape) for x in inputs]
    assert any(x.data_ptr() % 16 for x in unaligned)
    assert_same(way.run(sliced), wanted)
    assert_same(way.run(unaligned), wanted)
