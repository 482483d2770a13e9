"""From records to batches: nothing lost, nothing twice, and a bad record is named before training begins."""

import dataclasses
import json
from itertools import pairwise

import pytest
import torch
from PIL import Image

from visualrwkv.text.prompt import encode_conversation
from visualrwkv.training.data import Conversations, Plan, load_batches, plan_epoch

LENGTHS = [7, 30, 12, 5, 5, 19, 3, 28, 44, 9, 16, 21, 2, 11, 60, 8, 13]
BUDGET = 40


def talk(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


GOOD = [
    {"id": "a", "image": "red.png", "conversations": talk("<image>\nWhat is this?", "Red")},
    {"id": "b", "conversations": talk("Hello", "Hi there")},
    {
        "id": "c",
        "image": ["blue.png", "sub/red.png"],
        "conversations": talk("<image>\n<image>\nCompare", "They differ."),
    },
    {"id": 4, "conversations": talk("One?", "1") + talk("Two?", "2")},
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images" / "sub").mkdir(parents=True)
    for name, colour in (("red", "red"), ("blue", "blue"), ("sub/red", "red")):
        Image.new("RGB", (40, 30), colour).save(tmp_path / "images" / f"{name}.png")
    (tmp_path / "images" / "words.png").write_text("these are words")
    return tmp_path


@pytest.fixture(scope="module")
def config(tiny_model):
    return tiny_model(image_tokens=4, vocab_size=300).config


def read(folder, records, config, position="middle"):
    file = folder / "data.json"
    file.write_text(records if isinstance(records, str) else json.dumps(records))
    return Conversations(file, folder / "images", config, position)


def test_turns_are_written_as_the_model_reads_them(folder, config):
    world = dataclasses.replace(config, template="world")
    wanted = encode_conversation(GOOD[0]["conversations"], "world", image_tokens=4)
    assert read(folder, GOOD, world).encode(0) == wanted
    assert read(folder, GOOD, config).encode(0) != wanted


# Packing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", ["first", "middle"])
def test_records_side_by_side(folder, config, position):
    data = read(folder, GOOD, config, position)
    wanted = [encode_conversation(r["conversations"], image_position=position, image_tokens=4) for r in GOOD]
    assert len(data) == 4
    assert data.lengths == [len(ids) for ids, _ in wanted]
    batch = data.pack([2, 0, 3])
    for found, part in ((batch.ids, 0), (batch.labels, 1)):
        assert found.tolist() == wanted[2][part] + wanted[0][part] + wanted[3][part]
    assert batch.cu_seqlens.tolist() == [0, *torch.tensor([data.lengths[i] for i in (2, 0, 3)]).cumsum(0).tolist()]
    assert batch.samples == 3
    red, blue = (data.processor(folder / "images" / f"{name}.png") for name in ("red", "blue"))
    torch.testing.assert_close(batch.images, torch.stack([blue, red, red]), rtol=0, atol=0)
    names = tuple(str(folder / "images" / name) for name in ("blue.png", "sub/red.png", "red.png"))
    assert batch.pictures == batch.unread == names
    assert data.pack([1, 3]).images is None


def test_no_picture_is_opened_twice(folder, config):
    data = read(folder, GOOD, config)
    first = data.pack([2, 0, 2])
    blue, *others = data.pack([2]).pictures
    assert first.pictures == (blue, *others, *data.pack([0]).pictures, blue, *others)
    assert first.unread == tuple(dict.fromkeys(first.pictures))
    data.read = {blue}
    again = data.pack([2, 0, 2])
    assert again.pictures == first.pictures
    assert again.unread == tuple(p for p in first.unread if p != blue)
    torch.testing.assert_close(again.images, first.images[1:], rtol=0, atol=0)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_come_in_the_plans_order(folder, config, workers):
    data = read(folder, GOOD, config)
    shares = list(Plan(data.lengths, 40, seed=0, accumulate=2).shares(0, 0, 3))
    keys = [batch for share in shares for batch in share.batches]
    batches = list(load_batches(data, shares, workers))
    assert [b.ids.tolist() for b in batches] == [data.pack(key).ids.tolist() for key in keys]
    assert len(keys) == 6


# The plan ------------------------------------------------------------------------------------------------------------


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


# What is refused -----------------------------------------------------------------------------------------------------

BAD = {
    "missing picture": ({"id": "x", "image": "no.png", "conversations": talk("<image>\nq", "a")}, "images/no.png"),
    "no conversations": ({"id": "x"}, "has no conversations"),
    "empty conversations": ({"id": "x", "conversations": []}, "has no conversations"),
    "too many tags": (
        {"id": "x", "image": "red.png", "conversations": talk("<image><image>", "a")},
        "2 <image> tags for 1",
    ),
    "no tag": ({"id": "x", "image": "red.png", "conversations": talk("q", "a")}, "0 <image> tags for 1 pictures"),
    "no picture": ({"id": "x", "conversations": talk("<image>\nq", "a")}, "1 <image> tags for 0 pictures"),
    "no answer": ({"id": "x", "conversations": talk("q", " ")}, "has no answer to learn from"),
    "bad role": ({"id": "x", "conversations": [*talk("q", "a"), {"from": "tool", "value": "v"}]}, "'tool'"),
    "a turn without text": (
        {"id": "x", "conversations": [{"from": "human", "value": 3}]},
        "{'from': 'human', 'value': 3}",
    ),
    "a turn that is text": ({"id": "x", "conversations": ["hello"]}, "'hello'"),
    "a number as picture": (
        {"id": "x", "image": 7, "conversations": talk("<image>", "a")},
        "no path or list of paths: 7",
    ),
    "a number in a list": ({"id": "x", "image": [7], "conversations": talk("<image>", "a")}, "list of paths: [7]"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_named(folder, config, name):
    record, words = BAD[name]
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        read(folder, [*GOOD, record], config)
    said = str(caught.value)
    assert said.startswith(f"{folder / 'data.json'}, record 4 (id x)")
    assert words in said
    assert "\n" not in said


def test_a_record_that_is_none(folder, config):
    with pytest.raises(ValueError, match="record 1 has no conversations"):
        read(folder, [GOOD[0], "hello"], config)


def test_an_unreadable_picture_is_named(folder, config):
    record = {"id": "x", "image": "words.png", "conversations": talk("<image>\nq", "a")}
    data = read(folder, [GOOD[0], record], config)
    with pytest.raises(ValueError, match=r"data.json, record 1 \(id x\): .*words.png cannot be read as a picture"):
        data.pack([0, 1])


def test_pictures_for_a_language_model(folder, tiny_model):
    config = tiny_model(vision=None, vocab_size=300, image_tokens=4).config
    with pytest.raises(ValueError, match=r"record 0 \(id a\) has a picture, but the model has no vision encoder"):
        read(folder, GOOD, config)
    assert len(read(folder, [GOOD[1]], config)) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not valid JSON"),
        ("[]", "it holds []"),
        ('{"a": 1}', 'it holds {"a": 1}'),
        ("5", "5"),
        ("null", "null"),
    ],
)
def test_a_file_that_holds_no_records(folder, config, text, words):
    with pytest.raises(ValueError) as caught:
        read(folder, text, config)
    assert words in str(caught.value)
    assert str(folder / "data.json") in str(caught.value)


def test_a_missing_file(folder, config):
    with pytest.raises(FileNotFoundError, match=r"nothing\.json: there is no such data file"):
        Conversations(folder / "nothing.json", folder, config)
