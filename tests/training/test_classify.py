"""Training a classifier, through its door: it learns, goes on exactly where it stopped, and says what is wrong with its pictures."""

import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from visualrwkv import config, vision
from visualrwkv.checkpoint import class_names, compose, load_vision, save_model
from visualrwkv.config import ModelConfig, RWKVConfig, VRWKVConfig
from visualrwkv.model import VisualRWKV
from visualrwkv.training import classifiers, classify
from visualrwkv.training.classifiers import make_classifier
from visualrwkv.training.classify_recipes import CLASSIFY_RECIPES, OF_MODEL
from visualrwkv.training.draws import PICTURE, Drawn, alterations, order, plain, seed_all
from visualrwkv.training.labelled import open_pictures
from visualrwkv.vision.processor import ImageProcessor

ROOT = Path(__file__).parents[2]
CLASSES = ("bars", "discs", "rings")
TINY = VRWKVConfig(depth=2, width=32, patch_size=4, image_size=16, pos_grid=4)
FEW = ["--preset", "nano", "--batch", "16", "--warmup", "1", "--workers", "0"]


def drawn(kind: str, chance: np.random.Generator) -> Image.Image:
    """A noisy picture of 20 × 20 pixels of one of the classes, in any two colours."""
    y, x = np.mgrid[:20, :20] - chance.uniform(7, 12, 2)[:, None, None]
    far = np.hypot(x, y)
    inside = {"bars": abs(x) < 2, "discs": far < 5, "rings": abs(far - 6) < 1.2}[kind]
    dark, light = chance.uniform(0, 90, 3), chance.uniform(150, 255, 3)
    pixels = np.where(inside[..., None], light, dark) + chance.normal(0, 8, (20, 20, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_pictures(folder: Path, counts: dict[str, int], seed: int = 0) -> Path:
    chance = np.random.default_rng(seed)
    for kind, count in counts.items():
        (folder / kind).mkdir(parents=True)
        for i in range(count):
            drawn(kind, chance).save(folder / kind / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    write_pictures(folder / "train", dict.fromkeys(CLASSES, 40), seed=1)
    write_pictures(folder / "val", dict.fromkeys(CLASSES, 20), seed=2)
    return folder


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(config.VISION_PRESETS, "vrwkv_nano", TINY)
    monkeypatch.setattr(classify, "SHOWN", 4)  # drawing is slow
    monkeypatch.setattr(
        classifiers, "VIT_NANO", classifiers.VIT_NANO | {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2}
    )


@pytest.fixture
def door(monkeypatch, capsys):
    """door(*words): what it printed last; or its error."""

    def call(data: Path, out: Path, *words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["classify", "--data", str(data), "--out", str(out), *FEW, *words])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            classify.main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return capsys.readouterr().out.strip()

    return call


def metrics(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


# It learns -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "wanted"), [("vrwkv_nano", 0.8), ("vit_nano", 0.5)])
def test_it_learns_and_leaves_what_others_open(shapes, tmp_path, door, model, wanted):
    out = tmp_path / "run"
    said = door(shapes, out, "--model", model, "--epochs", "8", "--randaugment", "", "--flip", "0.5", "--lr", "0.005")
    result = json.loads((out / "result.json").read_text())
    assert result["accuracy"] > wanted
    assert said.startswith(f"accuracy {result['accuracy']:.4f}: {result['right']} of 60 pictures")
    assert len(result["wrong"]) == 60 - result["right"]
    rows = metrics(out)
    assert [row["step"] for row in rows] == list(range(60))
    accuracies = [row["accuracy"] for row in rows if "accuracy" in row]
    assert len(accuracies) == 8
    assert max(accuracies) == result["best"]["accuracy"]
    assert accuracies[-1] == result["accuracy"]
    rates = [row["lr"] for row in rows]
    assert rates[0] == pytest.approx(5e-6)
    assert np.diff(rates[:8]).min() > 0
    assert np.diff(rates[8:]).max() < 0
    assert rates[-1] < 1e-4
    assert Image.open(out / "predictions.png").width > 800
    assert not (out / "checkpoint.pt").exists()

    pictures = open_pictures(shapes)
    right = 0
    if model == "vit_nano":
        import timm

        net = timm.create_model(f"local-dir:{out / 'last'}", pretrained=True).eval()
        assert net.pretrained_cfg["label_names"] == list(CLASSES)
        logits, process = net, plain(timm_preparation(net))
    else:
        net = load_vision(out / "last").eval()
        assert class_names(out / "last") == list(CLASSES)
        logits, process = lambda x: net.forward_head(net(x)), lambda picture: ImageProcessor(net.config)(picture)
    with torch.no_grad():
        for place in range(len(pictures.check)):
            picture = pictures.check.source.open(place)
            right += int(logits(process(picture)[None]).argmax()) == pictures.check.labels[place]
    assert abs(right - result["right"]) <= 1  # alone and in fp32: a picture between two classes may turn


def timm_preparation(net) -> dict:
    """How pictures are prepared for a network, as timm reads it in its directory."""
    from timm.data import resolve_model_data_config

    settings = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    return {k: v for k, v in resolve_model_data_config(net).items() if k in settings}


def test_an_encoder_goes_into_a_language_model_and_on_to_other_classes(shapes, tmp_path, door):
    out = tmp_path / "run"
    door(shapes, out, "--epochs", "2")
    torch.manual_seed(0)
    sizes = {"mix_rank": 4, "decay_rank": 4}
    save_model(VisualRWKV(ModelConfig(RWKVConfig(1, 32, head_size=16, vocab_size=300, **sizes))), tmp_path / "language")
    whole = compose(tmp_path / "language", out / "best", "nano")
    assert whole.encode(torch.zeros(1, 3, 16, 16)).shape == (1, 16, 32)
    opened = vision.vrwkv("vrwkv_nano", weights=out / "best")
    assert opened.config.classes == 3

    recipe = replace(CLASSIFY_RECIPES["nano"], drop_path=0.2, seed=1)
    same = make_classifier(str(out / "best"), list(CLASSES), recipe).state_dict()
    other = make_classifier(str(out / "best"), ["a", "b"], recipe).state_dict()
    for name, x in opened.state_dict().items():
        assert torch.equal(same[f"net.{name}"], x)
        if not name.startswith("head."):
            assert torch.equal(other[f"net.{name}"], x)
    assert other["net.head.fc.weight"].shape == (2, 32)
    assert make_classifier(str(out / "best"), ["a", "b"], recipe).net.config.drop_path == 0.2


# It goes on ----------------------------------------------------------------------------------------------------------


def test_it_goes_on_as_if_it_had_not_stopped(shapes, tmp_path, door, monkeypatch):
    """With all that is drawn: augmentation, mixup, drop path; and a mean of the weights."""
    stop_at = 9
    how = [
        "--epochs",
        "2",
        "--mixup",
        "0.8",
        "--cutmix",
        "1.0",
        "--drop-path",
        "0.3",
        "--ema",
        "0.99",
        "--together",
        "10",
    ]
    door(shapes, tmp_path / "whole", *how)
    step = classify.Trainer.step

    def stopping(self, pixels, labels, number):
        if number == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, pixels, labels, number)

    with monkeypatch.context() as patch:
        patch.setattr(classify.Trainer, "step", stopping)
        assert door(shapes, tmp_path / "parts", *how) == ""
    assert len(metrics(tmp_path / "parts")) == stop_at + 1
    assert not (tmp_path / "parts" / "result.json").exists()
    with pytest.raises(ValueError, match=r"holds a run with lr 0\.001, not 0\.1; set OUT to another place"):
        door(shapes, tmp_path / "parts", *how, "--lr", "0.1")
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as file:
        file.write('{"step": 12, "loss": 9}\n{"step"')  # what a killed run leaves
    torch.manual_seed(77)
    said = door(shapes, tmp_path / "parts", *how, "--workers", "1")
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    for name in ("best", "last"):
        one, two = (load_vision(tmp_path / run / name).state_dict() for run in ("whole", "parts"))
        assert all(torch.equal(one[k], two[k]) for k in one)
    assert door(shapes, tmp_path / "parts", *how) == said, "a finished run says it again"


def test_every_epoch_has_every_picture_once():
    keys = [key for batch in order(10, 4, 7, 0, 5) for key in batch]
    assert [epoch for epoch, _ in keys] == [0] * 10 + [1] * 10
    first, second = [place for _, place in keys[:10]], [place for _, place in keys[10:]]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert list(order(10, 4, 7, 3, 5)) == list(order(10, 4, 7, 0, 5))[3:]


# The recipe ----------------------------------------------------------------------------------------------------------


def test_presets_are_the_papers():
    t, s, b = (CLASSIFY_RECIPES[size] for size in "tsb")
    for recipe in (t, s, b):
        assert (recipe.epochs, recipe.batch, recipe.lr, recipe.lr_final, recipe.warmup) == (300, 1024, 1e-3, 1e-5, 20)
        assert (recipe.weight_decay, recipe.clip, recipe.smoothing, recipe.erase) == (0.05, 5.0, 0.1, 0.25)
    assert (t.mixes, t.drop_path) == (False, 0)
    assert (s.mixup, s.cutmix, s.mix_prob, s.cutmix_prob, s.drop_path, b.drop_path) == (0.8, 1.0, 1.0, 0.5, 0.3, 0.5)
    assert set(OF_MODEL.values()) <= set(CLASSIFY_RECIPES)


def test_norms_and_biases_alone_are_not_decayed():
    recipe = replace(CLASSIFY_RECIPES["nano"], layer_decay=0.5)
    config.VISION_PRESETS["vrwkv_nano"] = replace(TINY, layer_scale=0.1)  # put back by the fixture
    model = make_classifier("vrwkv_nano", ["a", "b"], recipe)
    names = {id(p): name for name, p in model.net.named_parameters()}
    for how in (recipe, replace(recipe, layer_decay=1.0)):
        groups = model.groups(how)
        free = {names[id(p)] for g in groups if not g["weight_decay"] for p in g["params"]}
        every = [names[id(p)] for g in groups for p in g["params"]]
        assert sorted(every) == sorted(names.values())
        assert free == {n for n in every if n.endswith("bias") or ".ln" in n or n.startswith("ln1")}
        assert {"pos_embed", "layers.0.att.spatial_decay", "layers.1.gamma1", "layers.0.ffn.spatial_mix_k"} <= set(
            every
        ) - free
    scales = {names[id(p)]: g["lr_scale"] for g in model.groups(recipe) for p in g["params"]}
    wanted = {"head.fc.weight": 1, "ln1.weight": 0.5, "layers.1.att.key.weight": 0.5, "layers.0.att.key.weight": 0.25}
    assert {k: scales[k] for k in wanted} == wanted | {"ln1.weight": scales["ln1.weight"]}
    assert scales["patch_embed.projection.weight"] == scales["layers.0.ln0.weight"] == scales["pos_embed"] == 0.125


def test_pictures_are_checked_as_the_encoder_will_see_them(shapes):
    """In training altered, for the same seed and epoch in the same way; in checking as `ImageProcessor` prepares them."""
    part = open_pictures(shapes).train
    for crop in (0.0, 0.875):
        config.VISION_PRESETS["vrwkv_nano"] = replace(TINY, crop=crop)
        model = make_classifier("vrwkv_nano", ["a", "b"], CLASSIFY_RECIPES["nano"])
        picture = part.source.open(3).resize((31, 22))
        torch.testing.assert_close(plain(model.preparation)(picture), ImageProcessor(model.net.config)(picture))
    altered = alterations(CLASSIFY_RECIPES["nano"], model.preparation)
    once, again, later = (Drawn(part, altered, seed=5)[key][0] for key in ((0, 3), (0, 3), (1, 3)))
    assert torch.equal(once, again)
    assert not torch.equal(once, later)
    seed_all(5, PICTURE, 0, 3)
    assert torch.equal(altered(part.source.open(3)), once)


# Where pictures come from --------------------------------------------------------------------------------------------


def test_a_share_of_each_class_is_kept_to_check_with(tmp_path):
    data = write_pictures(tmp_path / "data", {"bars": 20, "discs": 2, "rings": 9})
    (data / ".cache").mkdir()
    found = open_pictures(data, held_out=0.25)
    assert found.classes == list(CLASSES)
    assert np.bincount(found.train.labels).tolist() == [15, 1, 7]
    assert np.bincount(found.check.labels).tolist() == [5, 1, 2]
    assert not set(found.train.rows) & set(found.check.rows)
    assert open_pictures(data, held_out=0.25).check.rows.tolist() == found.check.rows.tolist()


@pytest.fixture(scope="module")
def table():
    """table(labels, names): rows with pictures of these classes."""
    datasets = pytest.importorskip("datasets")

    def make(labels, column="label", named=True, broken=None):
        chance = np.random.default_rng(0)
        rows = []
        for i, label in enumerate(labels):
            file = io.BytesIO()
            drawn(CLASSES[label], chance).save(file, "PNG")
            rows.append({"path": None, "bytes": file.getvalue()[: 60 if i == broken else None]})
        kind = datasets.ClassLabel(names=list(CLASSES)) if named else datasets.Value("string")
        values = labels if named else [CLASSES[label] for label in labels]
        features = datasets.Features({"image": datasets.Image(), column: kind})
        return datasets.Dataset.from_dict({"image": rows, column: values}, features=features)

    return make


def test_a_data_set_is_read_with_its_classes(table, tmp_path, door, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    whole = datasets.DatasetDict({"test": table([2, 1, 0]), "train": table([0, 1, 2] * 4)})
    whole.save_to_disk(tmp_path / "set")
    found = open_pictures(tmp_path / "set")
    assert (len(found.train), found.check.labels.tolist(), found.classes) == (12, [2, 1, 0], list(CLASSES))
    assert found.train.source.open(1).size == (20, 20)
    door(tmp_path / "set", tmp_path / "run", "--epochs", "2", "--batch", "6")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["checked"] == 3

    (tmp_path / "files" / "data").mkdir(parents=True)
    table([0, 2] * 3).to_parquet(tmp_path / "files" / "data" / "train-00000-of-00001.parquet")
    for place in (tmp_path / "files", tmp_path / "files" / "data" / "train-00000-of-00001.parquet"):
        found = open_pictures(place)
        assert (found.classes, np.bincount(found.train.labels).tolist()) == (["bars", "rings"], [2, 2])

    table([0, 1, 2] * 3, column="kind", named=False, broken=4).save_to_disk(tmp_path / "other")
    with pytest.raises(
        ValueError, match=r"other has no column label or .* of labels; name one of image, kind with --label-column"
    ):
        open_pictures(tmp_path / "other")
    found = open_pictures(tmp_path / "other", columns=("image", "kind"))
    assert found.classes == list(CLASSES)
    with pytest.raises(ValueError, match=r"other, train, row 4: the picture cannot be read as a picture"):
        found.train.source.open(4)


# What is wrong is said in a sentence ---------------------------------------------------------------------------------


def test_what_is_wrong_with_a_folder_is_said(tmp_path, door):
    def said(data: Path, *words: str) -> str:
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            door(data, tmp_path / "run", *words)
        return str(error.value)

    drawn("bars", np.random.default_rng(0)).save((tmp_path / "flat").mkdir() or tmp_path / "flat" / "a.png")
    assert said(tmp_path / "flat").startswith(
        f"{tmp_path / 'flat'} has no classes: it must hold a directory of pictures"
    )
    assert "nowhere: there is no such directory" in said(tmp_path / "nowhere")
    one = write_pictures(tmp_path / "one", {"bars": 5})
    assert "one has a single class, 'bars'" in said(one)
    lonely = write_pictures(tmp_path / "lonely", {"bars": 5, "discs": 1})
    assert "the class 'discs' has a single picture; each needs two at least" in said(lonely)
    (lonely / "rings").mkdir()
    assert "the class 'rings' has no picture" in said(lonely)
    split = tmp_path / "split"
    write_pictures(split / "train", {"bars": 5, "discs": 5})
    write_pictures(split / "val", {"bars": 5, "rings": 5})
    assert "there are pictures of the class 'rings' to check with, but none to train on" in said(split)
    assert not (tmp_path / "run").exists()


def test_a_broken_picture_is_named_and_the_run_goes_on_once_it_is_whole(tmp_path, door):
    data = write_pictures(tmp_path / "data", {"bars": 8, "discs": 8})
    picture = data / "bars" / "003.png"
    whole = picture.read_bytes()
    how = ["--epochs", "2", "--batch", "2", "--held-out", "0.2"]
    door(data, tmp_path / "wanted", *how)
    for workers in ("0", "1"):
        picture.write_bytes(whole[:200])
        with pytest.raises(ValueError, match=r"bars/003\.png cannot be read as a picture"):
            door(data, tmp_path / workers, *how, "--workers", workers)
        picture.write_bytes(whole)
        door(data, tmp_path / workers, *how)
        assert metrics(tmp_path / workers) == metrics(tmp_path / "wanted")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "vrwkv_huge"], "model is 'vrwkv_huge'; it may be vrwkv_nano, .*a name of timm's"),
        (["--preset", "huge"], "preset is 'huge'; allowed are nano, digits, t, s, b"),
        (["--batch", "15", "--mixup", "0.8"], "batch is 15; pictures are mixed in pairs"),
        (["--erase", "2"], "erase is 2.0; it must be from 0 to 1"),
        (["--drop-path", "1"], "drop_path is 1.0; it must be at least 0 and below 1"),
        (["--scale", "0.5", "0.2"], "scale is .*; it must be two rising numbers"),
        (["--epochs", "1"], "warmup is 1.0 epochs of 1.0"),
        (["--image-size", "30"], "image_size 30 is not a multiple of patch_size 4"),
        (["--epoch", "3"], "--epoch"),
        (["--randaugment", "rand-q3"], "randaugment is 'rand-q3'"),
        (["--device", "tpu9"], "device is 'tpu9'"),
    ],
)
def test_wrong_options_are_refused(shapes, tmp_path, door, words, message):
    with pytest.raises(ValueError, match=message):
        door(shapes, tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()


def test_a_model_without_a_preset_asks_for_one(shapes, tmp_path, monkeypatch):
    line = ["classify", "--data", str(shapes), "--out", str(tmp_path / "run"), "--model", "resnet18"]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(
        ValueError, match="no preset is meant for resnet18; give --preset, one of nano, digits, t, s, b"
    ):
        classify.main()


def test_help_lists_options_and_recipe(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["classify", "--help"])
    classify.main()
    said = capsys.readouterr().out
    assert "--label-column" in said
    assert "--randaugment" in said


# The script ----------------------------------------------------------------------------------------------------------


def test_the_script_takes_its_paths_and_passes_options_on(tmp_path):
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "train_vrwkv.sh").write_text((ROOT / "scripts/train_vrwkv.sh").read_text())
    (scripts / "setup.sh").write_text(f"set -euo pipefail\nexport PATH={tmp_path}/bin:$PATH\n")
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text('#!/usr/bin/env bash\necho "$@"\n')
    python.chmod(0o755)

    def lines(*words: str, **paths: str) -> list[str]:
        line = ["bash", str(scripts / "train_vrwkv.sh"), *words]
        bare = {k: v for k, v in os.environ.items() if k not in ("MODEL", "DATA", "OUT")}
        return subprocess.run(line, env=bare | paths, capture_output=True, text=True, check=True).stdout.splitlines()

    made, trained = lines("--seed", "1")
    assert made == "-m visualrwkv.training.digits --out runs/digits"
    assert trained == (
        "-m visualrwkv.training.classify --model vrwkv_nano --data runs/digits --out runs/vrwkv_nano-digits --preset digits --seed 1"
    )
    (only,) = lines("--epochs", "9", MODEL="vit_nano", DATA="a/b c", OUT="o")
    assert only == "-m visualrwkv.training.classify --model vit_nano --data a/b c --out o --epochs 9"


def test_the_digits_are_written_once_and_whole(tmp_path):
    pytest.importorskip("sklearn")
    from visualrwkv.training.digits import write

    write(tmp_path / "digits")
    found = open_pictures(tmp_path / "digits")
    assert (len(found.train), len(found.check)) == (1438, 359)
    assert found.classes == [str(i) for i in range(10)]
    assert found.train.source.open(0).size == (64, 64)
    (tmp_path / "digits" / "train" / "0" / "0000.png").unlink()
    write(tmp_path / "digits")
    assert not (tmp_path / "digits" / "train" / "0" / "0000.png").exists()
