"""Files that are written entry by entry, and pictures that are written once."""

import json

import pytest
from folder import Folder


@pytest.mark.parametrize("entries", [[{"a": "ü"}], [{"a": 1}, {"a": 2}, {"a": "\u2028"}]])
def test_a_listing_is_the_json_of_its_entries(entries, tmp_path):
    folder = Folder(tmp_path)
    for listing in (folder.entries("a.json"), folder.entries("in/b.json", "data", {"n": 1}), folder.lines("c.jsonl")):
        with listing:
            for entry in entries:
                listing.add(entry)
    assert json.loads((tmp_path / "a.json").read_text()) == entries
    assert json.loads((tmp_path / "in/b.json").read_text()) == {"data": entries, "n": 1}
    assert [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().split("\n")[:-1]] == entries


def test_a_listing_without_entries_is_no_file(tmp_path):
    with Folder(tmp_path).entries("a.json"):
        pass
    assert not (tmp_path / "a.json").exists()


@pytest.mark.parametrize(
    ("named", "wanted"),
    [({"name": "x.jpg"}, "x.jpg"), ({"stem": "x"}, "x.png"), ({}, "cff5c63190e55fed1985.png")],
)
def test_a_picture_is_written_once_as_it_is(named, wanted, tmp_path):
    folder, image = Folder(tmp_path), {"bytes": b"\x89PNG and so on", "path": None}
    name = folder.picture(image, "images", **named)
    assert (tmp_path / "images" / name).read_bytes() == image["bytes"]
    (tmp_path / "images" / name).unlink()
    assert folder.picture(image, "images", **named) == name
    assert not (tmp_path / "images" / name).exists()
    assert name == wanted


@pytest.mark.parametrize("image", [None, {"bytes": None, "path": "x.jpg"}])
def test_a_picture_that_is_not_there_is_said(image, tmp_path):
    with pytest.raises(ValueError, match="a row has no picture"):
        Folder(tmp_path).picture(image, "images")


@pytest.mark.parametrize(
    ("kind", "end"),
    [("JPEG", "jpg"), ("PNG", "png"), ("GIF", "gif"), ("WEBP", "webp"), ("BMP", "bmp"), ("TIFF", "tif")],
)
def test_the_suffix_is_the_contents(kind, end, column, tmp_path):
    assert Folder(tmp_path).picture(column("red", kind), "images", stem="x") == f"x.{end}"
