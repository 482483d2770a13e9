"""Dense prediction: both nets learn, through the door, what they are measured by, and what is said of bad data."""

import json
import sys
from functools import partial

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from visualrwkv.commandline import run
from visualrwkv.config import VRWKVConfig
from visualrwkv.training import dense, scene_masks
from visualrwkv.training.coco import LabelledPictures
from visualrwkv.training.dense import IGNORED, DenseRecipe, Detector, Segmenter, filled
from visualrwkv.training.dense_nets import mask_rcnn, preset_of, upernet
from visualrwkv.vision import VRWKV, vrwkv

pytestmark = pytest.mark.xdist_group("dense")  # trained once

STEPS = 16


def words(options):
    """A command line."""
    return ["dense", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("dense") / "data"
    scene_masks.write(out, train=16, test=5, size=32)
    return out


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """trained(task) -> the directory that a short run leaves, and what it printed."""

    def go(task, capsys, monkeypatch):
        out = tmp_path_factory.getbasetemp() / f"dense-{task}"
        if not out.exists():
            recipe = {"steps": STEPS, "batch": 4, "size": 32, "channels": 16, "lr": 1e-2}
            options = {"task": task, "vision": "vrwkv_nano", "data": data, "out": out}
            options |= {f"recipe.{name}": value for name, value in recipe.items()}
            monkeypatch.setattr(sys, "argv", words(options))
            dense.main()
            (out / "said").write_text(capsys.readouterr().out)
        return out

    return go


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_a_few_steps_lower_the_loss_and_leave_a_whole_run(trained, task, capsys, monkeypatch):
    out = trained(task, capsys, monkeypatch)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == STEPS
    first, last = (sum(row["loss"] for row in part) / 4 for part in (rows[:4], rows[-4:]))
    assert last < 0.8 * first
    result = json.loads((out / "result.json").read_text())
    figures = json.loads((out / "said").read_text().splitlines()[-1])
    assert figures.items() <= result.items()
    assert result["recipe"]["channels"] == 16
    with Image.open(out / "predictions.png") as picture:
        assert picture.width > 500
    assert not list(out.glob(".*"))


def test_the_detector_opens_again(trained, data, capsys, monkeypatch):
    out = trained("detect", capsys, monkeypatch)
    net = mask_rcnn(vrwkv("vrwkv_nano"), 6, 16, 32).eval()
    weights = load_file(out / "model.safetensors")
    net.load_state_dict(weights)
    assert weights["backbone.features.encoder.pos_embed"].abs().sum() > 0  # it was trained as well: it begins at zero
    found = net([LabelledPictures(data / "test.json")[0][0].float() / 255])[0]
    assert set(found) == {"boxes", "labels", "scores", "masks"}


def test_the_segmenter_opens_again_with_transformers(trained, data, capsys, monkeypatch):
    from transformers import UperNetForSemanticSegmentation

    out = trained("segment", capsys, monkeypatch)
    net = UperNetForSemanticSegmentation.from_pretrained(out).eval()
    assert [net.config.id2label[n] for n in (0, 1, 6)] == ["background", "circle", "digit"]
    weights = load_file(out / "model.safetensors")
    torch.testing.assert_close(net.state_dict(), weights)
    assert weights["backbone._backbone.encoder.pos_embed"].abs().sum() > 0
    assert net(torch.randn(1, 3, 40, 24)).logits.shape == (1, 7, 40, 24)


def test_upernet_starts_from_the_encoder_that_it_is_given(randomise):
    encoder = randomise(vrwkv("vrwkv_nano"))
    wanted = {k: v.clone() for k, v in encoder.state_dict().items() if not k.startswith("ln1")}
    _, features = upernet(encoder, ["cat"], 16)
    torch.testing.assert_close(features.encoder.state_dict(), wanted)
    assert features.feature_info.reduction() == [2, 4, 8, 16]
    with pytest.raises(ValueError, match="2 blocks of width 16 and patches of 8, which is no preset's size"):
        upernet(VRWKV(VRWKVConfig(2, 16, 8, 32, 4)), ["cat"])


def test_a_preset_is_known_whatever_its_classifier():
    assert preset_of(vrwkv("vrwkv_nano").config) == "vrwkv_nano"
    assert preset_of(VRWKVConfig(12, 192, classes=5, crop=1.0, image_size=512)) == "vrwkv_t"
    assert preset_of(VRWKVConfig(12, 384, post_norm=True, layer_scale=0.5)) == "vrwkv_s"
    assert preset_of(VRWKVConfig(12, 384, post_norm=True, layer_scale=0.5, kind="vrwkv6")) == "vrwkv6_s"
    with pytest.raises(ValueError, match="no preset's size"):
        preset_of(VRWKVConfig(12, 384))


@pytest.mark.parametrize("task", [Detector, Segmenter])
def test_gradients_reach_the_whole_encoder(task, data):
    torch.manual_seed(0)
    pictures = LabelledPictures(data / "train.json")
    made = task(vrwkv("vrwkv_nano"), pictures.names, DenseRecipe(size=32, channels=16))
    made.net.train()
    loss, _ = made.loss([pictures[n] for n in range(3)])
    loss.backward()
    dead = [name for name, p in made.encoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


@pytest.mark.parametrize("task", [Detector, Segmenter])
def test_pictures_of_any_size_come_back_at_their_own(task):
    torch.manual_seed(0)
    made = task(vrwkv("vrwkv_nano"), ["cat", "dog"], DenseRecipe(size=24, channels=16))
    made.net.eval()
    sizes = [(33, 60), (24, 24), (70, 31)]
    with torch.no_grad():
        found = made.predict([torch.randint(256, (3, *size), dtype=torch.uint8) for size in sizes])
    for one, (height, width) in zip(found, sizes, strict=True):
        if task is Segmenter:
            assert one.shape == (height, width)
        else:
            assert one["masks"].shape[1:] == (height, width)
            assert (one["boxes"] <= torch.tensor([width, height] * 2)).all()


def test_who_finds_all_that_is_there_has_full_marks(data):
    pictures = LabelledPictures(data / "train.json")
    truths = iter([pictures[n][1] for n in range(len(pictures))] * 2)

    class Told:
        names, net = pictures.names, torch.nn.Identity()

    def boxes(shown):
        for truth in (next(truths) for _ in shown):
            yield {
                "boxes": truth.boxes,
                "labels": truth.labels,
                "masks": truth.masks,
                "scores": torch.ones(len(truth.labels)),
            }

    Told.predict = lambda self, shown: list(boxes(shown))
    figures = Detector.figures(Told(), pictures, 3)
    assert figures == {"boxes": {"AP50": 1.0, "AP": 1.0}, "masks": {"AP50": 1.0, "AP": 1.0}}

    Told.predict = lambda self, shown: [next(truths).classes() for _ in shown]
    figures = Segmenter.figures(Told(), pictures, 3)
    assert (figures["mIoU"], figures["pixels"]) == (1.0, 1.0)
    assert list(figures["IoU"]) == ["background", *pictures.names]

    Told.names = [*pictures.names, "moon"]  # which is nowhere
    truths = iter([pictures[n][1] for n in range(len(pictures))])
    figures = Segmenter.figures(Told(), pictures, 3)
    assert (figures["mIoU"], figures["IoU"]["moon"]) == (1.0, None)


def test_what_lies_beside_a_smaller_picture_is_not_asked():
    small, large = torch.ones(1, 2, 3, dtype=torch.int64), torch.ones(1, 4, 2, dtype=torch.int64)
    both = filled([small, large], IGNORED)
    assert both.shape == (2, 1, 4, 3)
    assert both[0, 0, 2:].eq(IGNORED).all()
    assert both[1, 0, :, 2].eq(IGNORED).all()
    assert both.eq(1).sum() == 6 + 8


def test_bad_data_is_said_in_one_sentence(data, tmp_path, monkeypatch, capsys):
    def refused(**changed):
        options = {"task": "detect", "vision": "vrwkv_nano", "data": tmp_path, "out": tmp_path / "out"} | changed
        monkeypatch.setattr(sys, "argv", words(options))
        with pytest.raises(SystemExit) as stop:
            run(dense.main)
        assert stop.value.code == 1
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1
        return said[0]

    write = partial(json.dumps, indent=0)
    (tmp_path / "images").symlink_to(data / "images")
    for name in ("train", "test"):
        (tmp_path / f"{name}.json").write_text((data / f"{name}.json").read_text())
    train = json.loads((data / "train.json").read_text())
    train["annotations"][2]["bbox"] = [20, 20, 20, 5]
    (tmp_path / "train.json").write_text(write(train))
    assert refused().endswith("its box [20, 20, 20, 5] lies outside the picture of 32 x 32 pixels")
    assert "train.json, annotation 2 in 00000" in refused()

    (tmp_path / "train.json").write_text((data / "train.json").read_text())
    test = json.loads((data / "test.json").read_text())
    test["categories"][0]["name"] = "moon"
    (tmp_path / "test.json").write_text(write(test))
    assert "test.json ['moon'" in refused()
    test["annotations"], test["categories"] = [], train["categories"]
    (tmp_path / "test.json").write_text(write(test))
    assert refused().endswith("test.json: nothing is marked in any picture")
    assert "nowhere: there is no such model" in refused(data=data, vision="nowhere")
    assert "there is no such file" in refused(data=tmp_path / "images")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="batch is 1; it must be at least 2"):
        DenseRecipe(batch=1)
