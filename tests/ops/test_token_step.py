"""A whole token in one call, against the module: versions, dtypes, batches, shapes that fill no tile, changed weights."""

import pytest
import torch
from torch import nn

from visualrwkv.config import RWKVConfig
from visualrwkv.model import LANGUAGE_MODELS
from visualrwkv.ops import library, token_step
from visualrwkv.ops.token_step import TokenStep, packed_step, without_library
from visualrwkv.rwkv.state import State

compiled = pytest.mark.skipif(not library.COMPILED, reason="no compiled kernels here")
RANKS = {"mix_rank": 20, "decay_rank": 33, "rate_rank": 17, "value_rank": 9, "gate_rank": 40}
SIZES = [(96, 32, 200), (128, 64, 448)]  # channels, head size, channel-mix width
VOCABULARY = 203
LIMITS = {"bfloat16": 3e-5, "int8": 0.04, "int4": 0.06}
"""Of the norm. Integers: where a rounding of the two falls on two sides of a half, a vector's entry is one step off."""


@pytest.fixture(scope="module")
def make(randomise):
    """make(version, size): a random language model in bf16."""

    def language_model(version=6, size=SIZES[0]):
        C, N, F = size
        torch.manual_seed(0)
        net = LANGUAGE_MODELS[version](RWKVConfig(3, C, N, VOCABULARY, F, version=version, **RANKS))
        return randomise(net).bfloat16().requires_grad_(False).eval()

    return language_model


def walk(step, net, batch, tokens=4):
    """Logits of each step and the last state's arrays. step: a TokenStep, or a module."""
    state = State.zeros(net.config, batch)
    said = []
    for t in range(tokens):
        ids = torch.randint(VOCABULARY, (batch,), generator=torch.Generator().manual_seed(t))
        if isinstance(step, TokenStep):
            logits, arrays = step(net.emb(ids), (state.att_shift, state.ffn_shift, state.wkv))
            state = State(*arrays)
        else:
            hidden, state = step(step.emb(ids), torch.arange(batch + 1), state)
            logits = step.head(hidden)
        said.append(logits)
    return torch.stack(said), vars(state).values()


def assert_same(found, wanted, limit):
    for mine, theirs in zip((found[0], *found[1]), (wanted[0], *wanted[1]), strict=True):
        assert mine.shape == theirs.shape
        assert (mine - theirs).norm() <= limit * theirs.norm()


@compiled
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("version", [5, 6, 7])
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 19])
def test_bf16_is_the_module_in_fp32(make, version, size, batch):
    net = make(version, size)
    module = make(version, size).float()  # the same bf16 numbers
    assert_same(walk(TokenStep(net, "bfloat16"), net, batch), walk(module, net, batch), LIMITS["bfloat16"])


@compiled
@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_integers_are_the_form_without_a_library(make, version, dtype, batch):
    net = make(version)
    wanted = walk(without_library(net, dtype), net, batch)
    assert_same(walk(TokenStep(net, dtype), net, batch), wanted, LIMITS[dtype])
    exact = walk(net.float(), net, batch)[0]
    assert (wanted[0] - exact).norm() > 1e-4 * exact.norm(), "rounding shows"


VARIANTS = ["_baseline", "_avx2", "_avx512", "_avx512vnni"]


@compiled
@pytest.mark.parametrize("version", [6, 7])
def test_every_instruction_set_computes_the_same(make, version, monkeypatch):
    best = library.variant()
    net = make(version)
    module = make(version).float()
    for variant in VARIANTS[: VARIANTS.index(best) + 1] if best else [""]:
        monkeypatch.setattr(library, "variant", lambda variant=variant: variant)
        library.function.cache_clear()
        for batch in (1, 3):
            assert_same(walk(TokenStep(net, "bfloat16"), net, batch), walk(module, net, batch), LIMITS["bfloat16"])
            for dtype in ("int8", "int4"):
                wanted = walk(without_library(net, dtype), net, batch)
                assert_same(walk(TokenStep(net, dtype), net, batch), wanted, LIMITS[dtype])
    library.function.cache_clear()


@compiled
def test_threads_do_not_change_a_bit(make):
    """More threads than cores, too, whose barriers must not hang."""
    net = make()
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            found += [(batch, walk(TokenStep(net, "bfloat16"), net, batch)[0]) for batch in (1, 4)]
    finally:
        torch.set_num_threads(before)
    for batch in (1, 4):
        first, *others = [logits for b, logits in found if b == batch]
        assert all(torch.equal(first, other) for other in others)


@compiled
def test_the_state_given_is_not_changed(make):
    net = make()
    step = TokenStep(net, "bfloat16")
    x = net.emb(torch.tensor([3, 4]))
    _, state = step(x, (torch.rand(3, 2, 96), torch.rand(3, 2, 96), torch.rand(3, 2, 3, 32, 32)))
    kept = [t.clone() for t in state]
    step(x, state)
    assert all(torch.equal(a, b) for a, b in zip(state, kept, strict=True))


@compiled
def test_bytes_are_the_weights(make):
    net = make(6, SIZES[1])
    one = TokenStep(net, "bfloat16").nbytes()
    matrices = [p for n, p in net.named_parameters() if n != "emb.weight" and (p.ndim > 1 and min(p.shape[-2:]) > 16)]
    assert sum(p.numel() for p in matrices) * 2 <= one < 1.3 * sum(p.numel() for p in matrices) * 2
    assert TokenStep(net, "int4").nbytes() < TokenStep(net, "int8").nbytes() < one


# Which form a module gets -----------------------------------------------------------------------------------------------


@compiled
def test_a_step_is_made_once_and_again_when_weights_change(make):
    net = make()
    step = packed_step(net)
    assert packed_step(net) is step
    assert packed_step(net, "int8") is not step
    step = packed_step(net)
    net.blocks[1].att.key.weight.mul_(2)
    changed = packed_step(net)
    assert changed is not step
    twin = make().float()
    twin.blocks[1].att.key.weight.mul_(2)
    assert_same(walk(changed, net, 1), walk(twin, net, 1), LIMITS["bfloat16"])
    net.float()
    assert packed_step(net) is None
    net.bfloat16()
    assert isinstance(packed_step(net), TokenStep)


@compiled
def test_a_module_that_adapters_changed_is_left_to_itself(make):
    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base
            self.weight = base.weight

        def forward(self, x):
            return self.base(x) * 2

    net = make()
    assert isinstance(packed_step(net), TokenStep)
    net.blocks[-1].ffn.value = Adapted(net.blocks[-1].ffn.value)
    assert packed_step(net) is None


def test_without_a_library(make, monkeypatch):
    monkeypatch.setattr(token_step.library, "COMPILED", False)
    net = make()
    assert packed_step(net) is None
    twin = packed_step(net, "int4")
    assert isinstance(twin, nn.Module)
    assert packed_step(net, "int4") is twin
    assert net.head.weight.dtype == torch.bfloat16, "the module itself stays as it is"
