"""The plan: every record once an epoch, within the budget, the same for any number of ranks, from any step on."""

import random
from itertools import pairwise

import pytest

from visualrwkv.training.packing import Plan, pack, plan_epoch

LENGTHS = [7, 30, 12, 5, 5, 19, 3, 28, 44, 9, 16, 21, 2, 11, 60, 8, 13]
BUDGET = 40


def test_an_epoch_holds_every_record_once_within_the_budget():
    for epoch in range(5):
        batches = plan_epoch(LENGTHS, BUDGET, 3, epoch)
        assert sorted(i for batch in batches for i in batch) == list(range(len(LENGTHS)))
        for batch in batches:
            assert sum(LENGTHS[i] for i in batch) <= BUDGET or len(batch) == 1
        for one, two in pairwise(batches):
            assert sum(LENGTHS[i] for i in (*one, two[0])) > BUDGET, "a batch is filled up"


def test_the_order_is_given_by_seed_and_epoch():
    assert plan_epoch(LENGTHS, BUDGET, 3, 1) == plan_epoch(LENGTHS, BUDGET, 3, 1)
    orders = {tuple(plan_epoch(LENGTHS, BUDGET, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (1, 3), (2, 1), (2, 2), (4, 1)])
def test_a_run_goes_on_at_any_step(world, accumulate):
    plan = Plan(LENGTHS, BUDGET, 3, world, accumulate)
    for rank in range(world):
        whole = list(plan.shares(rank, 0, 30))  # several epochs
        assert len(whole) == 30
        for start in range(30):
            assert list(plan.shares(rank, start, 30)) == whole[start:]


@pytest.mark.parametrize(("world", "accumulate"), [(1, 3), (2, 1), (2, 2), (4, 1)])
def test_ranks_share_the_plan_of_one(world, accumulate):
    size = world * accumulate
    single = [share.batches[0] for share in Plan(LENGTHS, BUDGET, 3).shares(0, 0, 12 * size)]
    ranks = [list(Plan(LENGTHS, BUDGET, 3, world, accumulate).shares(rank, 0, 12)) for rank in range(world)]
    for step in range(12):
        group = single[step * size : (step + 1) * size]
        assert all(len(shares[step].batches) == accumulate for shares in ranks)
        assert sorted(b for shares in ranks for b in shares[step].batches) == sorted(group)
        assert {shares[step].samples for shares in ranks} == {sum(map(len, group))}


def test_epochs_follow_without_a_gap():
    seen = [i for share in Plan(LENGTHS, BUDGET, 3).shares(0, 0, 40) for b in share.batches for i in b]
    for epoch in range(3):
        part = seen[epoch * len(LENGTHS) : (epoch + 1) * len(LENGTHS)]
        assert sorted(part) == list(range(len(LENGTHS)))


def test_steps_of_some_epochs():
    batches = len(plan_epoch(LENGTHS, BUDGET, 3, 0))
    assert Plan(LENGTHS, BUDGET, 3).steps(1) == batches
    assert Plan(LENGTHS, BUDGET, 3, world=2, accumulate=2).steps(2) == -(-batches * 2 // 4)
    assert Plan([5], BUDGET, 3, world=8).steps(0.1) == 1


# Looking ahead -------------------------------------------------------------------------------------------------------


def lengths_like_llava(count: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [min(2048, 577 * (rng.random() > 0.06) + 10 + int(rng.lognormvariate(5, 0.8))) for _ in range(count)]


@pytest.mark.parametrize("look_ahead", [2, 7, 256, 10_000])
@pytest.mark.parametrize("seed", range(3))
def test_looking_ahead_keeps_every_record_once_within_the_budget(look_ahead, seed):
    lengths = lengths_like_llava(500, seed)
    batches = plan_epoch(lengths, 2500, seed, 0, look_ahead)
    assert sorted(i for batch in batches for i in batch) == list(range(500))
    assert all(sum(lengths[i] for i in batch) <= 2500 for batch in batches)
    assert batches == plan_epoch(lengths, 2500, seed, 0, look_ahead)


def test_no_record_waits_longer_than_the_window():
    lengths = lengths_like_llava(3000, 0)
    left = set(range(3000))
    for batch in pack(range(3000), lengths, 2500, 64):
        assert batch[0] == min(left), "the oldest opens a batch"
        assert max(batch) < 3000 - len(left) + 64, "none is taken from beyond the window"
        left -= set(batch)
    assert not left


def test_the_longest_that_fits_is_taken_until_none_does():
    lengths = lengths_like_llava(600, 2)
    left = list(range(600))
    for batch in pack(range(600), lengths, 2500, 64):
        window, room = left[:64], 2500
        for place, index in enumerate(batch):
            longest = max((lengths[i] for i in window if lengths[i] <= room), default=0)
            assert index == window[0] if place == 0 else lengths[index] == longest
            window.remove(index)
            left.remove(index)
            room -= lengths[index]
        assert all(lengths[i] > room for i in window)


def test_the_window_fills_what_the_order_alone_leaves_empty():
    lengths = lengths_like_llava(20_000, 1)
    for budget in (8192, 16384):
        plain, ahead = (len(plan_epoch(lengths, budget, 0, 0, look)) for look in (1, 1024))
        assert sum(lengths) / (ahead * budget) > 0.97
        assert ahead < plain


def test_records_without_a_length_are_left_out():
    lengths = [5, 0, 7, 0]
    assert sorted(i for b in plan_epoch(lengths, 10, 0, 0, 4) for i in b) == [0, 2]
    assert sorted(i for b in plan_epoch(lengths, 10, 0, 0, 4, [0, 0, 1, 2]) for i in b) == [0, 0, 2]
