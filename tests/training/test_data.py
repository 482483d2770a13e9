"""From records to batches: nothing lost, nothing twice, and a bad record is named before training begins."""

import dataclasses
import json

import pytest
import torch
from PIL import Image

from visualrwkv.text.prompt import encode_conversation
from visualrwkv.training.data import Conversations, load_batches
from visualrwkv.training.packing import Plan


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


def read(folder, records, config, position="middle", **more):
    file = folder / "data.json"
    file.write_text(records if isinstance(records, str) else json.dumps(records))
    data = Conversations(file, folder / "images", config, position, **more)
    data.prepare()
    return data


def test_turns_are_written_as_the_model_reads_them(folder, config):
    world = dataclasses.replace(config, template="world")
    wanted = encode_conversation(GOOD[0]["conversations"], "world", image_tokens=4)
    assert read(folder, GOOD, world).encode(0)[:2] == wanted
    assert read(folder, GOOD, config).encode(0)[:2] != wanted


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


# Cutting, mixing, leaving out ----------------------------------------------------------------------------------------

LONG = {
    "id": "l",
    "image": ["red.png", "blue.png"],
    "conversations": [
        *talk("<image>\nWhat is this?", "Red"),
        *talk("And then?", "More of it, and more."),
        *talk("<image>\nAnd this?", "Blue"),
    ],
}


def test_a_long_record_is_cut_after_an_answer(folder, config):
    whole = read(folder, [LONG], config)
    ids, labels, pictures, cut = whole.encode(0)
    assert (len(pictures), cut) == (2, False)
    ends = [len(encode_conversation(LONG["conversations"][: 2 * n], image_tokens=4)[0]) for n in (1, 2, 3)]
    assert ends[-1] == len(ids)
    for longest in range(ends[0], ends[2] + 2):
        data = read(folder, [LONG], config, longest=longest)
        end = max(e for e in ends if e <= longest)
        assert data.lengths == [end]
        assert data.encode(0) == (ids[:end], labels[:end], pictures[: 1 if end < ends[2] else 2], end < ends[2])
        assert data.index.cut.tolist() == [end < ends[2]]
        assert len(data.pack([0]).pictures) == (1 if end < ends[2] else 2)
    with pytest.raises(ValueError, match=rf"needs {ends[0]} tokens .* more than the budget of {ends[0] - 1}"):
        read(folder, [LONG], config, longest=ends[0] - 1)


def test_mixed_positions_are_first_and_middle_by_halves(folder, config):
    records = [{**GOOD[0], "id": i} for i in range(200)]
    data = read(folder, records, config, "mixed")
    forms = [
        encode_conversation(GOOD[0]["conversations"], image_position=p, image_tokens=4) for p in ("first", "middle")
    ]
    found = [forms.index(data.encode(i)[:2]) for i in range(200)]
    assert 70 < sum(found) < 130
    assert found == [forms.index(data.encode(i)[:2]) for i in range(200)]
    assert found != [forms.index(read(folder, records, config, "mixed", seed=1).encode(i)[:2]) for i in range(200)]


def test_bad_records_are_left_out_where_one_asks_for_it(folder, config):
    bad = [record for record, _ in BAD.values()]
    broken = {"id": "w", "image": "words.png", "conversations": talk("<image>\nq", "a")}
    data = read(folder, [bad[0], *GOOD, *bad[1:], broken], config, bad="skip")
    assert [place for place, _ in data.index.problems] == [0, *range(5, 4 + len(bad))]
    assert [bool(n) for n in data.lengths] == [False, *[True] * 4, *[False] * (len(bad) - 1), True]
    last = len(data) - 1
    batch = data.pack([1, last, 2])
    assert batch.records == (1, 2)
    assert batch.samples == 2
    assert len(batch.skipped) == 1
    assert "words.png cannot be read as a picture" in batch.skipped[0]
    plain = data.pack([1, 2])
    assert torch.equal(batch.ids, plain.ids)
    assert torch.equal(batch.images, plain.images)
    with pytest.raises(ValueError, match=r"none of the records of a batch can be read; the first: .*words"):
        data.pack([last])


def test_a_set_with_nothing_to_learn_is_refused(folder, config):
    silent = [{"id": i, "conversations": talk("q", " ")} for i in range(3)]
    with pytest.raises(ValueError, match=r"record 0 \(id 0\) has no answer to learn from; 2 more records fail"):
        read(folder, silent, config)
    with pytest.raises(ValueError, match=r"has no record with an answer to learn from; the first of them"):
        read(folder, silent, config, bad="skip")


# The index -----------------------------------------------------------------------------------------------------------


def test_many_processes_find_what_one_finds(folder, config):
    records = [{**GOOD[i % 4], "id": i} for i in range(700)]
    records[300] = {"id": 300}
    data = read(folder, records, config, bad="skip")
    one, many = data.prepare(workers=1), data.prepare(workers=2)
    assert one.problems == many.problems == [(300, data.name(300) + " has no conversations")]
    for name in ("lengths", "cut", "words", "answers"):
        assert (getattr(one, name) == getattr(many, name)).all(), name
    used = {i for k in range(4) for i in data.encode(k)[0]}
    assert set(one.words.nonzero()[0].tolist()) == used


def test_an_index_is_kept_for_the_same_records_alone(folder, config, monkeypatch):
    data = read(folder, GOOD, config)
    data.keep(folder / "index.npz")
    assert data.kept(folder / "index.npz")
    monkeypatch.setattr(Conversations, "measure", lambda *_: pytest.fail("looked again"))
    again = Conversations(folder / "data.json", folder / "images", config)
    assert again.prepare(folder / "index.npz").mark() == data.index.mark()
    assert again.lengths == data.lengths
    for change in ({"longest": 90}, {"image_position": "first"}, {"bad": "skip"}):
        assert not Conversations(folder / "data.json", folder / "images", config, **change).kept(folder / "index.npz")
    (folder / "data.json").write_text(json.dumps(GOOD[:3]))
    assert not Conversations(folder / "data.json", folder / "images", config).kept(folder / "index.npz")
