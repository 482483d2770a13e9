"""Vision-RWKV in timm: registered where asked for, and the same network as ours."""

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import visualrwkv.vision.timm_models  # noqa: F401
from visualrwkv.config import VISION_PRESETS
from visualrwkv.vision import Features, vrwkv

ROOT = Path(__file__).parents[2]


def said(code: str) -> str:
    """What a fresh process prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_registered_by_importing_our_module_and_not_before():
    code = """
import sys
import visualrwkv.vision
assert "timm" not in sys.modules
import timm
assert not timm.list_models("vrwkv*")
import visualrwkv.vision.timm_models
print(timm.list_models("vrwkv*"))
print([tuple(m.shape) for m in timm.create_model("vrwkv_nano", features_only=True)(__import__("torch").zeros(1, 3, 40, 64))])
"""
    names, shapes = said(code).splitlines()
    assert names == str(sorted(VISION_PRESETS))
    assert shapes == str([(1, 128, 20, 32), (1, 128, 10, 16), (1, 128, 5, 8), (1, 128, 3, 4)])


def test_registered_by_itself_where_timm_is_there_already():
    assert said("import timm, visualrwkv.vision; print(timm.is_model('vrwkv6_b'))") == "True"


def test_the_classifier_is_ours(tmp_path):
    torch.manual_seed(0)
    ours = vrwkv("vrwkv_t").eval()
    torch.save({"state_dict": {f"backbone.{k}": v for k, v in ours.state_dict().items()}}, tmp_path / "official.pth")
    there = {"file": str(tmp_path / "official.pth")}
    images = torch.randn(2, 3, 64, 40)
    theirs = timm.create_model("vrwkv_t", pretrained=True, pretrained_cfg_overlay=there).eval()
    maps = timm.create_model("vrwkv_t", pretrained=True, pretrained_cfg_overlay=there, features_only=True).eval()
    ten = timm.create_model("vrwkv_t", pretrained=True, pretrained_cfg_overlay=there, num_classes=10).eval()
    with torch.no_grad():
        patches = ours(images)
        torch.testing.assert_close(theirs(images), ours.forward_head(patches))
        torch.testing.assert_close(theirs.forward_features(images), patches)
        assert ten(images).shape == (2, 10)
        torch.testing.assert_close(ten.forward_features(images), patches)
        same = Features(ours)
        for number in (2, 3):  # the finer ones begin fresh
            torch.testing.assert_close(maps(images)[number], same(images)[number])


def test_the_head_is_timms():
    torch.manual_seed(0)
    net = timm.create_model("vrwkv_s", num_classes=10).eval()
    images = torch.randn(2, 3, 48, 32)
    patches = net.forward_features(images)
    assert patches.shape == (2, 6, 384)
    assert net.num_features == net.head_hidden_size == 384
    torch.testing.assert_close(net.forward_head(patches, pre_logits=True), patches.mean(1))
    torch.testing.assert_close(net(images), net.get_classifier()(patches.mean(1)))
    net.reset_classifier(0)
    torch.testing.assert_close(net(images), patches.mean(1))
    net.reset_classifier(4)
    assert net(images).shape == (2, 4)
    net.reset_classifier(4, global_pool="")
    assert net(images).shape == (2, 6, 4)
    with pytest.raises(ValueError, match="global_pool is 'max'"):
        net.reset_classifier(4, global_pool="max")
    with pytest.raises(ValueError, match="no gradient checkpointing"):
        net.set_grad_checkpointing()


def test_the_large_head_keeps_its_hidden_layer():
    with torch.device("meta"):
        net = timm.create_model("vrwkv_l", num_classes=5)
        bare = timm.create_model("vrwkv_l", num_classes=0)
    assert net.forward_head(torch.empty(2, 6, 1024, device="meta"), pre_logits=True).shape == (2, 3072)
    assert net.forward_head(torch.empty(2, 6, 1024, device="meta")).shape == (2, 5)
    assert bare.forward_head(torch.empty(2, 6, 1024, device="meta")).shape == (2, 1024)


def test_what_timm_knows_of_a_model():
    from timm.data import resolve_model_data_config
    from timm.optim import create_optimizer_v2

    net = timm.create_model("vrwkv_nano", num_classes=3, in_chans=1)
    assert net(torch.randn(1, 1, 30, 50)).shape == (1, 3)
    about = resolve_model_data_config(timm.create_model("vrwkv_t"))
    assert (about["input_size"], about["crop_pct"], about["mean"]) == ((3, 224, 224), 0.875, (0.485, 0.456, 0.406))
    scales = {group["lr_scale"] for group in create_optimizer_v2(net, "adamw", lr=1.0, layer_decay=0.5).param_groups}
    assert len(scales) == 4 + 2  # the blocks, what comes before them, and what comes after


def test_drop_path_is_the_published_one_unless_asked_for():
    assert timm.create_model("vrwkv_s").config.drop_path == 0.3
    model = timm.create_model("vrwkv_s", drop_path_rate=0.1)
    assert [block.drop_path for block in (model.layers[0], model.layers[-1])] == [0.0, 0.1]
