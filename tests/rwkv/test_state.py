"""The state is a value: selected, joined, compared with nothing read."""

import torch

from visualrwkv.config import RWKVConfig
from visualrwkv.rwkv.rwkv6 import RWKV6
from visualrwkv.rwkv.state import State

CONFIG = RWKVConfig(n_layer=3, n_embd=32, head_size=16, vocab_size=50, mix_rank=4, decay_rank=4)


def some(sequences, seed):
    g = torch.Generator().manual_seed(seed)
    return State(*(torch.randn(t.shape, generator=g) for t in vars(State.zeros(CONFIG, sequences)).values()))


def test_select_takes_rows_in_any_order_and_repeats_them():
    state = some(3, 0)
    chosen = state.select([2, 0, 2])
    assert len(chosen) == 3
    for name, tensor in vars(chosen).items():
        whole = getattr(state, name)
        assert torch.equal(tensor, torch.stack([whole[:, 2], whole[:, 0], whole[:, 2]], 1)), name


def test_select_is_a_copy():
    state = some(2, 0)
    before = state.wkv.clone()
    state.select([0, 1]).wkv.zero_()
    assert torch.equal(state.wkv, before)


def test_cat_is_the_inverse_of_select():
    a, b = some(2, 0), some(1, 1)
    joined = State.cat([a, b])
    assert len(joined) == 3
    torch.testing.assert_close(vars(joined.select([0, 1])), vars(a), rtol=0, atol=0)
    torch.testing.assert_close(vars(joined.select(torch.tensor([2]))), vars(b), rtol=0, atol=0)


def test_zeros_is_the_state_before_anything_was_read(randomise):
    net = randomise(RWKV6(CONFIG)).requires_grad_(False)
    ids, bounds = torch.tensor([3, 1, 4, 1, 5]), torch.tensor([0, 2, 5])
    fresh, _ = net(net.emb(ids), bounds)
    given, _ = net(net.emb(ids), bounds, State.zeros(CONFIG, 2))
    assert torch.equal(fresh, given)


def test_what_has_read_nothing_but_remembers():
    wkv = torch.randn(3, 2, 16, 16)
    state = State.starting(wkv, 4)
    assert len(state) == 4
    assert {k: v.shape for k, v in vars(state).items()} == {k: v.shape for k, v in vars(State.zeros(CONFIG, 4)).items()}
    assert not state.att_shift.any()
    assert not state.ffn_shift.any()
    assert all(torch.equal(state.wkv[:, row], wkv) for row in range(4))


def test_nbytes():
    assert State.zeros(CONFIG, 2).nbytes() == 4 * 3 * 2 * (32 + 32 + 2 * 16 * 16)
