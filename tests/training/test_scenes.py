"""The embedded data set: files, pictures and splits, checked from what was written. Its questions: test_scene_questions.py."""

from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("sklearn")

from tests.training.written_scenes import SPLITS, load, pairs_in
from visualrwkv.training import scenes
from visualrwkv.training.scene_questions import HELD_OUT, PAIRS

pytestmark = pytest.mark.xdist_group("scenes")  # made once

PAINT = {
    "red": (222, 48, 42),
    "green": (48, 182, 70),
    "blue": (58, 104, 238),
    "yellow": (246, 222, 50),
    "purple": (166, 66, 206),
    "orange": (246, 138, 28),
    "white": (240, 240, 240),
}


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


# Writing -------------------------------------------------------------------------------------------------------------


def test_same_seed_same_bytes_whatever_the_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, "CHUNK", 7)  # several jobs a split
    small = {"train": 16, "val": 5, "test": 9, "retell": 4, "language": 10}
    scenes.write(tmp_path / "a", seed=5, workers=1, **small)
    scenes.write(tmp_path / "b", seed=5, workers=3, **small)
    scenes.write(tmp_path / "c", seed=6, workers=1, **small)
    a, b, c = (tree(tmp_path / name) for name in "abc")
    assert len(a) == 16 + 5 + 9 + 9 + 13  # the last thirteen: lists of dialogues, captions, objects; parameters
    assert a == b
    assert a["images/train/000000.png"] != c["images/train/000000.png"]
    assert a["train.json"] != c["train.json"]
    assert len({a[name] for name in a if name.endswith(".png")}) == 16 + 5 + 9 + 9  # chunks and splits do not repeat
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]  # nothing partial stays behind


def test_an_existing_directory_is_kept_or_refused(tmp_path):
    small = {"train": 3, "val": 2, "test": 2, "retell": 2, "language": 2, "workers": 1}
    out = tmp_path / "out"
    scenes.write(out, **small)
    (out / "train.json").write_text("mine")
    scenes.write(out, **small)
    assert (out / "train.json").read_text() == "mine"  # complete: nothing was done
    with pytest.raises(ValueError, match="'seed': 1"):
        scenes.write(out, seed=1, **small)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="not a scenes data set"):
        scenes.write(other, **small)
    with pytest.raises(ValueError, match="train must be at least 1, not 0"):
        scenes.write(tmp_path / "none", train=0)


def test_a_failed_run_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(scenes, "draw", fail)
    with pytest.raises(OSError, match="disk full"):
        scenes.write(tmp_path / "out", train=2, val=2, test=2, retell=2, language=2, workers=1)
    assert list(tmp_path.iterdir()) == []


# Pictures ------------------------------------------------------------------------------------------------------------


def test_pictures_are_readable_and_show_what_the_objects_say(scenes_data):
    for split in SPLITS:
        objects = load(scenes_data, f"{split}.objects")
        assert list(objects) == [record["image"] for record in load(scenes_data, split)]
        for path, things in list(objects.items())[:60]:
            picture = Image.open(scenes_data / path)
            assert (picture.mode, picture.size, picture.format) == ("RGB", (64, 64), "PNG")
            pixels = np.asarray(picture, dtype=float)
            bright = pixels.max(-1) > 128
            for thing in things:
                low = [max(0, round(v - thing["extent"] / 2)) for v in (thing["y"], thing["x"])]
                box = tuple(slice(v, round(v + thing["extent"])) for v in low)
                rows, columns = np.nonzero(bright[box])
                assert thing["extent"] - max(np.ptp(rows), np.ptp(columns)) < 5
                # The tone of the object's clearest pixels is nearest to the paint its name says: thin strokes are pale.
                inside = pixels[box][bright[box]]
                tone = inside[inside.max(-1) >= np.quantile(inside.max(-1), 0.7)].mean(0)
                nearest = min(PAINT, key=lambda colour, tone=tone: np.abs(tone - PAINT[colour]).sum())
                assert nearest == thing["colour"], path
            for thing in things:  # nothing bright lies outside the objects
                low = [max(0, int(v - thing["extent"] / 2) - 2) for v in (thing["y"], thing["x"])]
                bright[tuple(slice(v, int(v + thing["extent"]) + 5) for v in low)] = False
            assert not bright.any(), path


def test_objects_keep_apart(scenes_data):
    sizes = Counter()
    for things in load(scenes_data, "train.objects").values():
        sizes[len(things)] += 1
        assert len({(t["kind"], t["colour"]) for t in things}) == len(things)
        assert sum(t["kind"] == "digit" for t in things) <= 1
        for i, a in enumerate(things):
            assert min(a["x"], a["y"]) - a["extent"] / 2 >= 0
            assert max(a["x"], a["y"]) + a["extent"] / 2 <= 64
            for b in things[:i]:
                assert max(abs(a["x"] - b["x"]), abs(a["y"] - b["y"])) >= (a["extent"] + b["extent"]) / 2 + 1.95
    assert set(sizes) == {1, 2, 3, 4}


def test_another_size_scales_the_picture():
    scene = scenes.arrange(Random(0), 4, True, size=128)
    assert scenes.draw(scene, Random(0)).size == (128, 128)
    assert max(t.x for t in scene.things) > 64
    assert all(24 <= t.extent <= 52 for t in scene.things)


# Splits --------------------------------------------------------------------------------------------------------------


def test_held_out_pairs_occur_only_in_test_unseen(scenes_data):
    held = set(HELD_OUT)
    assert len(held) == 12
    for split in ("train", "val", "test"):
        pairs = {(t["kind"], t["colour"]) for things in load(scenes_data, f"{split}.objects").values() for t in things}
        assert len(pairs) == 42 - 12
        assert not pairs & held
    pairs = {(t["kind"], t["colour"]) for things in load(scenes_data, "test_unseen.objects").values() for t in things}
    assert pairs == held
    # What is said about pictures keeps to the same pairs, "is there" with the answer no too; text alone names all.
    allowed = {name: set(PAIRS) - held for name in ("train", "val", "test", "captions", "mix")}
    for name, pairs in (allowed | {"test_unseen": held, "language": set(PAIRS)}).items():
        said = [m["value"] for r in load(scenes_data, name) for m in r["conversations"]]
        mentioned = {pair for text in said for pair in pairs_in(text)}
        assert mentioned <= pairs, name
        assert name == "val" or len(mentioned) >= 0.9 * len(pairs), name


def test_handwriting_is_split_between_train_and_test(scenes_data):
    from sklearn.datasets import load_digits

    labels = load_digits().target
    used = {}
    for split in SPLITS:
        things = [t for things in load(scenes_data, f"{split}.objects").values() for t in things]
        assert all((t["kind"] == "digit") == (t["digit"] is not None) == (t["glyph"] is not None) for t in things)
        assert all(labels[t["glyph"]] == t["digit"] for t in things if t["kind"] == "digit")
        used[split] = {t["glyph"] for t in things} - {None}
        assert len(used[split]) > (80 if split == "val" else 200)
    assert not (used["train"] | used["val"]) & (used["test"] | used["test_unseen"])
