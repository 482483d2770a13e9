"""Records in every form that data sets come in, as turns and pictures."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from visualrwkv.training.data import Conversations
from visualrwkv.training.records import read_record
from visualrwkv.training.sources import open_source
from visualrwkv.training.tables import Cell


def source_of(folder, records):
    (folder / "data.json").write_text(json.dumps(records))
    return open_source(folder / "data.json", folder)


def values(record):
    return [(turn["from"], turn["value"]) for turn in record.turns]


PAIR = [("human", "<image>\nWhat?"), ("gpt", "A cat")]


@pytest.mark.parametrize(
    "record",
    [
        {
            "image": "a.png",
            "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat"}],
        },
        {
            "images": ["a.png"],
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "A cat"}]},
            ],
        },
        {
            "images": ["a.png"],
            "messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat"}],
        },
        {"images": ["a.png"], "texts": [{"user": "What?", "assistant": "A cat", "source": "somewhere"}]},
    ],
)
def test_all_forms_say_the_same(tmp_path, record):
    found = read_record(source_of(tmp_path, [record]), 0)
    assert values(found) == PAIR
    assert found.pictures == (tmp_path / "a.png",)


def test_a_system_message_opens_the_first_question(tmp_path):
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
    ]
    assert values(read_record(source_of(tmp_path, [{"messages": messages}]), 0))[0] == ("human", "Be short.\nHello")


@pytest.mark.parametrize("tag", ["<image>", "<video>"])
def test_a_video_is_a_folder_of_frames(tmp_path, tag):
    (tmp_path / "film").mkdir()
    for i in range(10):
        Image.new("RGB", (8, 8)).save(tmp_path / f"film/{i:02}.jpg")
    (tmp_path / "film/notes.txt").touch()
    turns = [{"from": "human", "value": f"Look: {tag}\nWhat happens?"}, {"from": "gpt", "value": "Nothing"}]
    source = source_of(tmp_path, [{"video": "film", "conversations": turns}])
    found = read_record(source, 0, frames=4)
    assert [p.name for p in found.pictures] == ["00.jpg", "03.jpg", "06.jpg", "09.jpg"]
    assert found.turns[0]["value"] == "Look: " + "\n".join(["<image>"] * 4) + "\nWhat happens?"
    assert len(read_record(source, 0, frames=64).pictures) == 10


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"messages": [{"role": "robot", "content": "x"}]}, "'robot'"),
        ({"messages": [{"role": "user", "content": 5}]}, "without a 'content'"),
        ({"texts": []}, "has no conversations"),
        ({"video": "empty", "conversations": [{"from": "human", "value": "<video>"}]}, "directory without pictures"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, record, words):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"data\.json, record 0") as caught:
        read_record(source_of(tmp_path, [record]), 0)
    assert words in str(caught.value)


def png(colour):
    file = io.BytesIO()
    Image.new("RGB", (12, 10), colour).save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize("stored", ["saved", "parquet", "file"])
def test_a_hugging_face_data_set(tmp_path, tiny_model, stored):
    datasets = pytest.importorskip("datasets")
    rows = {
        "id": ["a", "b", "c"],
        "images": [[Image.new("RGB", (12, 10), "red")], [], [Image.new("RGB", (12, 10), c) for c in ("blue", "red")]],
        "texts": [[{"user": f"Question {i}", "assistant": f"Answer {i}"}] for i in range(3)],
    }
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "images": datasets.Sequence(datasets.Image()),
            "texts": [{"user": datasets.Value("string"), "assistant": datasets.Value("string")}],
        }
    )
    table = datasets.Dataset.from_dict(rows, features=features)
    place = tmp_path / "set"
    if stored == "saved":
        table.save_to_disk(str(place))
    else:
        place.mkdir()
        table.to_parquet(str(place / "part.parquet"))
        place = place / "part.parquet" if stored == "file" else place
    data = Conversations(place, tmp_path, tiny_model(image_tokens=4, vocab_size=300).config)
    index = data.prepare()
    assert (index.lengths > 0).all()
    record = read_record(data.source, 2)
    assert [type(p) for p in record.pictures] == [Cell, Cell]
    assert values(record) == [("human", "<image>\n<image>\nQuestion 2"), ("gpt", "Answer 2")]
    batch = data.pack([2, 0, 1])
    assert batch.images.shape[0] == 3
    blue, red = data.processor(png("blue")), data.processor(png("red"))
    for found, wanted in zip(batch.images, (blue, red, red)):
        assert (found - wanted).abs().max() == 0
    assert len(set(batch.pictures)) == 3


def test_a_table_without_conversations_is_refused(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(str(tmp_path / "x.parquet"))
    with pytest.raises(ValueError, match="one of them must be conversations, messages or texts"):
        open_source(tmp_path / "x.parquet", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="it holds no parquet or arrow file"):
        open_source(tmp_path / "empty", tmp_path)


def test_a_name_on_the_hub_is_fetched(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def fetch(name, split):
        asked.append((name, split))
        if name != "owner/talks":
            raise ConnectionError("no network")
        return datasets.Dataset.from_dict({"texts": [[{"user": "Hello", "assistant": "Hi"}]]})

    monkeypatch.setattr(datasets, "load_dataset", fetch)
    monkeypatch.chdir(tmp_path)
    source = open_source(Path("owner/talks"), tmp_path)
    assert values(read_record(source, 0)) == [("human", "Hello"), ("gpt", "Hi")]
    with pytest.raises(FileNotFoundError, match=r"owner/none: .*the Hub gave no data set \(no network\)"):
        open_source(Path("owner/none"), tmp_path)
    (tmp_path / "owner").mkdir()
    with pytest.raises(FileNotFoundError, match="there is no such data file"):
        open_source(Path("owner/none"), tmp_path)
    assert asked == [("owner/talks", "train"), ("owner/none", "train")]
