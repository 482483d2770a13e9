"""Records by index from a mapped file, a table or a mixture: the same as reading the file whole."""

import json
import pickle
import random

import pytest

from visualrwkv.training import places
from visualrwkv.training.sources import JsonRecords, Mixture, open_source


def awkward(rng: random.Random) -> object:
    """A record whose text is full of what structures JSON."""
    pieces = ['"', "\\", "{", "}", "[", "]", ",", ":", "\n", "é", "中", "\u2028", " ", "a", '\\"', "},{"]
    text = "".join(rng.choices(pieces, k=rng.randint(0, 30)))
    return {
        "id": text,
        "conversations": [{"from": "human", "value": text[::-1]}] * rng.randint(0, 3),
        "n": [1, [2, {}]],
    }


@pytest.mark.parametrize("window", [7, 64, 1 << 24])
@pytest.mark.parametrize("style", [{}, {"indent": 1}, {"ensure_ascii": False}, {"separators": (",", ":")}])
def test_a_list_is_found_record_by_record(tmp_path, monkeypatch, window, style):
    monkeypatch.setattr(places, "WINDOW", window)
    rng = random.Random(window)
    records = [awkward(rng) for _ in range(40)] + ["a text", 5, None, [1, 2], {}]
    file = tmp_path / "data.json"
    file.write_text("\n " + json.dumps(records, **style) + "\n", encoding="utf-8")
    source = JsonRecords(file, tmp_path)
    assert [source[i] for i in range(len(source))] == records
    again = pickle.loads(pickle.dumps(source))
    assert again[3] == records[3]


@pytest.mark.parametrize("window", [7, 1 << 24])
def test_lines_are_found_with_or_without_a_last_end(tmp_path, monkeypatch, window):
    monkeypatch.setattr(places, "WINDOW", window)
    rng = random.Random(0)
    records = [awkward(rng) for _ in range(20)]
    lines = [json.dumps(r, ensure_ascii=False) for r in records]
    file = tmp_path / "data.jsonl"
    for text in ("\n".join(lines), "\n".join(lines) + "\n", "\r\n".join(lines), "\n\n \n".join(lines)):
        file.write_bytes(text.encode())
        source = open_source(file, tmp_path)
        assert [source[i] for i in range(len(source))] == records


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[", "does not end"),
        ('[{"a": "]}', "does not end"),
        ("[1] 2", "text follows"),
        ("[1][2]", "text follows"),
        ("", "not valid JSON"),
        ("[ ]", "it holds []"),
    ],
)
def test_a_broken_file_is_one_sentence(tmp_path, text, words):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(ValueError, match=r"data\.json") as caught:
        open_source(tmp_path / "data.json", tmp_path)
    assert words in str(caught.value)


def test_a_broken_record_is_named(tmp_path):
    (tmp_path / "data.json").write_text('[{"id": 1}, {"id": 2,}, {"id": 3}]')
    source = open_source(tmp_path / "data.json", tmp_path)
    assert (source[0], source[2]) == ({"id": 1}, {"id": 3})
    with pytest.raises(ValueError, match=r"data\.json is not valid JSON at record 1"):
        source[1]


def write(folder, name, count):
    (folder / name).write_text(json.dumps([{"id": f"{name}{i}", "conversations": []} for i in range(count)]))


def test_a_mixture_gives_each_source_its_weight(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub", "a.json", 10)
    write(tmp_path, "b.json", 6)
    parts = [{"data": "sub/a.json", "weight": 0.5}, {"data": "b.json", "images": "photos", "weight": 2}]
    (tmp_path / "mix.json").write_text(json.dumps({"mixture": parts}))
    mixture = open_source(tmp_path / "mix.json", tmp_path)
    assert isinstance(mixture, Mixture)
    assert len(mixture) == 16
    assert [mixture[i]["id"] for i in (0, 9, 10, 15)] == ["a.json0", "a.json9", "b.json0", "b.json5"]
    assert (mixture.images(0), mixture.images(10)) == (tmp_path / "sub", tmp_path / "photos")
    assert mixture.name(11) == f"{tmp_path / 'b.json'}, record 1 (id b.json1)"
    epochs = [mixture.order(epoch) for epoch in range(2)]
    assert [sum(i < 10 for i in order) for order in epochs] == [5, 5]
    assert sorted(i for order in epochs for i in order if i < 10) == list(range(10))
    assert all(sorted(i for i in order if i >= 10) == sorted([*range(10, 16)] * 2) for order in epochs)


@pytest.mark.parametrize(
    ("mixture", "words"),
    [
        ([], "has no list of data sets"),
        ([{"images": "x"}], "a part has a path 'data'"),
        ([{"data": "a.json", "weigth": 2}], "weigth"),
        ([{"data": "a.json", "weight": -1}], "weight -1"),
        ([{"data": "none.json"}], "none.json: there is no such data file"),
    ],
)
def test_a_wrong_mixture_is_one_sentence(tmp_path, mixture, words):
    write(tmp_path, "a.json", 1)
    (tmp_path / "mix.json").write_text(json.dumps({"mixture": mixture}))
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        open_source(tmp_path / "mix.json", tmp_path)
    assert words in str(caught.value)
