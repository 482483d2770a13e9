"""Every version of RWKV against an independent numpy form of its equations, in parts, packed and in other orders."""

import numpy as np
import pytest
import torch

from tests.rwkv.equations import Weights, language_model
from visualrwkv.config import RWKVConfig
from visualrwkv.model import LANGUAGE_MODELS
from visualrwkv.rwkv.network import Order
from visualrwkv.rwkv.state import State

CONFIGS = [
    RWKVConfig(3, 32, 16, 70, version=5),
    RWKVConfig(4, 32, 16, 70, mix_rank=4, decay_rank=6),
    RWKVConfig(3, 32, 16, 70, version=7, decay_rank=6, rate_rank=4, value_rank=3, gate_rank=5),
]


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda config: f"rwkv{config.version}")
def config(request):
    return request.param


@pytest.fixture(scope="module")
def net(randomise, config):
    torch.manual_seed(0)
    return randomise(LANGUAGE_MODELS[config.version](config)).double().requires_grad_(False)


@pytest.fixture
def single(net, config):
    """The same model in single precision."""
    model = LANGUAGE_MODELS[config.version](config)
    model.load_state_dict(net.state_dict())
    return model


@pytest.fixture(scope="module")
def equations(net, config):
    """equations(ids, start=None): the hidden states (T, C) of one sequence."""
    weights = Weights({k: v.numpy() for k, v in net.state_dict().items()})
    return lambda ids, start=None: language_model(weights["emb.weight"][ids.numpy()], weights, config, start)


def row(*lengths):
    """Random ids of several sequences and their bounds."""
    ids = torch.randint(70, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    return ids, torch.tensor([0, *lengths]).cumsum(0)


@pytest.mark.parametrize("length", [1, 2, 19])
def test_equals_the_equations(net, equations, length):
    ids, bounds = row(length)
    hidden, _ = net(net.emb(ids), bounds)
    wanted = equations(ids)
    np.testing.assert_allclose(hidden.numpy(), wanted, atol=1e-9)
    np.testing.assert_allclose(net.head(hidden).numpy(), wanted @ net.head.weight.T.numpy(), atol=1e-9)
    assert wanted.std() > 0.05


def test_single_precision_is_close(net, single, equations):
    ids, bounds = row(19)
    hidden, state = single(single.emb(ids), bounds)
    np.testing.assert_allclose(hidden.detach().numpy(), equations(ids), atol=5e-5)
    assert {t.dtype for t in (state.att_shift, state.ffn_shift, state.wkv)} == {torch.float32}


def test_autocast_trains(net, single):
    """Products in bf16, parameters in fp32: every gradient points where the one in double precision does."""
    ids, bounds = row(9, 30)
    exact = LANGUAGE_MODELS[net.config.version](net.config).double()
    exact.load_state_dict(net.state_dict())
    slope = torch.randn(39, 32, generator=torch.Generator().manual_seed(2))
    exact(exact.emb(ids), bounds)[0].backward(slope.double())
    with torch.autocast("cpu", torch.bfloat16):
        hidden, state = single(single.emb(ids), bounds)
    hidden.backward(slope)
    assert (hidden.dtype, state.wkv.dtype) == (torch.float32, torch.float32)
    for (name, found), (_, want) in zip(single.named_parameters(), exact.named_parameters(), strict=True):
        if name == "head.weight":
            continue  # the caller's
        assert found.grad.dtype is torch.float32
        assert torch.cosine_similarity(found.grad.flatten().double(), want.grad.flatten(), 0) > 0.98, name


def test_packed_equals_the_equations_of_each(net, equations):
    lengths = (7, 1, 12, 2)
    ids, bounds = row(*lengths)
    hidden, state = net(net.emb(ids), bounds)
    assert len(state) == 4
    for i, (part, found) in enumerate(zip(ids.split(lengths), hidden.split(lengths))):
        np.testing.assert_allclose(found.numpy(), equations(part), atol=1e-9)
        _, alone = net(net.emb(part), torch.tensor([0, len(part)]))
        torch.testing.assert_close(vars(state.select([i])), vars(alone), rtol=0, atol=1e-6)


@pytest.mark.parametrize("cut", [1, 8, 18])
def test_two_parts_with_the_state_between_equal_the_whole(single, cut):
    ids, bounds = row(19)
    whole, end = single(single.emb(ids), bounds)
    first, middle = single(single.emb(ids[:cut]), torch.tensor([0, cut]))
    second, last = single(single.emb(ids[cut:]), torch.tensor([0, 19 - cut]), middle)
    torch.testing.assert_close(torch.cat([first, second]), whole, rtol=0, atol=5e-5)
    torch.testing.assert_close(vars(last), vars(end), rtol=1e-4, atol=5e-5)


def test_the_given_state_is_not_changed(net):
    ids, bounds = row(5, 6)
    _, state = net(net.emb(ids), bounds)
    before = {k: v.clone() for k, v in vars(state).items()}
    _, after = net(net.emb(ids), bounds, state)
    torch.testing.assert_close(vars(state), before, rtol=0, atol=0)
    assert not torch.equal(after.wkv, state.wkv)


def random_start(config, seed=0):
    """Matrices (L, H, N, N) to start from, [value, key]."""
    H, N = config.n_head, config.head_size
    return torch.randn(config.n_layer, H, N, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ours(start, config):
    """The same as a `State` has them."""
    return start if config.version == 7 else start.transpose(-1, -2)


def test_every_sequence_of_a_row_starts_from_what_is_given(net, equations, config):
    lengths, start = (7, 1, 12), random_start(config)
    ids, bounds = row(*lengths)
    hidden, _ = net(net.emb(ids), bounds, State.starting(ours(start, config), 3))
    for part, found in zip(ids.split(lengths), hidden.split(lengths)):
        np.testing.assert_allclose(found.numpy(), equations(part, start.numpy()), atol=1e-9)
    assert not np.allclose(hidden[:7].numpy(), equations(ids[:7]), atol=1e-2)


def test_the_gradient_of_the_initial_state(single, equations, config):
    """Summed over the sequences of a packed row, in fp32, against differences of the equations in float64."""
    lengths, step = (7, 1, 12), 1e-5
    ids, bounds = row(*lengths)
    start, way = random_start(config), random_start(config, 1)
    reader = torch.randn(20, config.n_embd, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def total(at):
        read = zip(ids.split(lengths), reader.split(lengths))
        return sum((equations(part, at.numpy()) * weights.numpy()).sum() for part, weights in read)

    wkv = ours(start, config).float().requires_grad_()
    hidden, _ = single(single.emb(ids), bounds, State.starting(wkv, 3))
    (hidden * reader.float()).sum().backward()
    gradient = ours(wkv.grad.double(), config)
    for layer in range(config.n_layer):  # along a direction that only this layer takes
        only = torch.zeros_like(way)
        only[layer] = way[layer]
        slope = (total(start + step * only) - total(start - step * only)) / (2 * step)
        assert abs(slope) > 1e-2
        assert (gradient * only).sum().item() == pytest.approx(slope, rel=2e-3, abs=2e-3)


@pytest.mark.parametrize("first", [False, True])
def test_a_block_reads_in_its_order_and_gives_back_in_the_rows(net, first):
    ids, bounds = row(9)
    read = torch.tensor([0, 1, 5, 4, 3, 2, 6, 7, 8])  # its own inverse
    order = Order(read, read)
    found, _ = net(net.emb(ids), bounds, orders=[order, None] if first else [None, order])
    x, v_first = net.emb(ids), None
    for i, block in enumerate(net.blocks):
        turned = read if (i % 2 == 0) == first else torch.arange(9)
        x, _, values = block(x[turned], bounds, None, None if v_first is None else v_first[turned])
        x, v_first = x[turned], None if values is None else values[turned]
    torch.testing.assert_close(found, net.ln_out(x), rtol=0, atol=1e-12)
    assert not torch.allclose(found, net(net.emb(ids), bounds)[0])


def test_every_parameter_learns(single):
    ids, bounds = row(6, 9)
    hidden, _ = single(single.emb(ids), bounds)
    single.head(hidden).square().mean().backward()
    assert [n for n, p in single.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
