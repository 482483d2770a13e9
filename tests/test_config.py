"""Configs: sizes that follow from others, there and back as data, and errors that name the bad value."""

import json

import pytest

from visualrwkv.config import ModelConfig, RWKVConfig, VRWKVConfig, preset

VISION = VRWKVConfig(depth=2, width=16, patch_size=8, image_size=32, pos_grid=4)


def test_sizes_that_follow():
    config = RWKVConfig(n_layer=2, n_embd=144, head_size=16)
    assert (config.n_head, config.dim_ffn) == (9, 480)  # 504, down to a multiple of 32
    assert RWKVConfig(n_layer=2, n_embd=32, head_size=16, dim_ffn=50).dim_ffn == 50
    assert VISION.grid == 4
    assert ModelConfig(config, VISION, image_tokens=9).token_grid == 3


@pytest.mark.parametrize("vision", [None, VISION])
def test_there_and_back_through_json(vision):
    config = ModelConfig(RWKVConfig(2, 32, head_size=16), vision, "gated", 16, "multi", "last")
    assert ModelConfig.from_dict(json.loads(json.dumps({"model_type": "visualrwkv", **config.to_dict()}))) == config


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RWKVConfig(2, 64, version=4), "rwkv version is 4; allowed are 5, 6, 7"),
        (lambda: RWKVConfig(0, 64), "n_layer is 0"),
        (lambda: RWKVConfig(2, 96), "n_embd 96 with head_size 64"),
        (lambda: RWKVConfig(2, 32, head_size=8), "head_size 8"),
        (lambda: VRWKVConfig(2, 18), "vision width is 18"),
        (lambda: VRWKVConfig(2, 16, patch_size=16, image_size=40), "image_size 40 is not a multiple of patch_size 16"),
        (lambda: VRWKVConfig(2, 16, kind="clip"), "vision kind is 'clip'; allowed are vrwkv"),
        (lambda: ModelConfig(RWKVConfig(2, 64), image_tokens=8), "image_tokens is 8; it must be a square"),
        (lambda: ModelConfig(RWKVConfig(2, 64), VISION, image_tokens=25), "more than the 16 patches"),
        (lambda: ModelConfig(RWKVConfig(2, 64), scan="snake"), "scan is 'snake'; allowed are uni, bi, multi"),
        (lambda: ModelConfig(RWKVConfig(2, 64), projector="conv"), "projector is 'conv'; allowed are linear, gated"),
        (lambda: ModelConfig(RWKVConfig(2, 64), image_position="top"), "image_position is 'top'"),
        (lambda: preset({"a": 1, "b": 2}, "c", "preset"), "preset is 'c'; allowed are a, b"),
        (lambda: ModelConfig.from_dict({"rwkv": {"n_layer": 2, "n_embd": 64}, "x": 1}), "has no setting 'x'"),
        (lambda: ModelConfig.from_dict({}), "RWKVConfig lacks 'n_layer'"),
    ],
)
def test_errors_name_the_value(make, words):
    with pytest.raises(ValueError, match=words):
        make()
