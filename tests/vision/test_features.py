"""Maps for dense prediction: that they are the blocks' own, lie where the picture lies, and carry gradients back."""

import pytest
import torch
import torch.nn.functional as F

from visualrwkv.config import VRWKVConfig
from visualrwkv.vision import VRWKV, FeaturePyramid, Features
from visualrwkv.vision.features import blocks, rescale

FOUR = VRWKVConfig(depth=4, width=16, patch_size=8, image_size=32, pos_grid=4)
POST = VRWKVConfig(6, 16, 8, 32, 4, post_norm=True, layer_scale=0.7, classes=3)
SIX = VRWKVConfig(4, 16, 8, 32, 4, kind="vrwkv6", head_size=8)


@pytest.fixture
def make(randomise):
    def net(config):
        torch.manual_seed(0)
        return randomise(VRWKV(config))

    return net


def pictures(*shape):
    return torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(2))


def after_blocks(net, images):
    """What each block gives while the encoder runs as it always does: (B, P, D)."""
    seen = []
    hooks = [layer.register_forward_hook(lambda m, i, out: seen.append(out)) for layer in net.layers]
    net(images)
    for hook in hooks:
        hook.remove()
    return seen


SIZES = [(32, 32), (64, 24), (35, 20), (8, 41), (3, 5), (97, 130)]


@pytest.mark.parametrize(("H", "W"), SIZES)
def test_a_map_at_each_stride_for_any_size(make, H, W):
    maps = Features(make(FOUR))(pictures(H, W))
    assert [tuple(m.shape) for m in maps] == [(2, 16, -(-H // s), -(-W // s)) for s in (2, 4, 8, 16)]


@pytest.mark.parametrize("config", [FOUR, POST, SIX], ids=["pre", "post", "six"])
@pytest.mark.parametrize(("H", "W"), [(32, 32), (21, 50)])
def test_at_the_patches_stride_a_map_is_what_its_block_gives(make, config, H, W):
    net, images, chosen = make(config), pictures(H, W), (0, 2, -1)
    wanted = [after_blocks(net, images)[n] for n in chosen]
    maps = Features(net, out_indices=chosen)(images)
    for found, patches in zip(maps, wanted, strict=True):
        torch.testing.assert_close(found.flatten(2).transpose(1, 2), patches, rtol=0, atol=1e-6)
        assert patches.std() > 0.1


def test_coarser_maps_are_maxima_and_finer_ones_stay_in_their_patch(make):
    net, images = make(FOUR), pictures(21, 50)
    deepest = after_blocks(net, images)[3].transpose(1, 2).unflatten(2, (3, 7))
    features = Features(net)
    coarse = features(images)[3]
    padded = F.pad(deepest, (0, 1, 0, 1), value=-torch.inf)
    torch.testing.assert_close(coarse, padded.unflatten(3, (4, 2)).unflatten(2, (2, 2)).amax((3, 5)), rtol=0, atol=1e-6)

    finest, x = features.levels[0], torch.randn(1, 16, 3, 4)
    changed = x.clone()
    changed[:, :, 1, 2] += 1
    moved = (finest(changed) - finest(x)).abs().amax((0, 1)) > 1e-6
    assert moved[4:8, 8:12].all()
    assert moved.sum() == 16


def test_what_hangs_over_the_edge_of_a_picture_is_cut(make):
    features, images = Features(make(FOUR)), pictures(21, 50)
    whole = features(F.pad(images, (0, 6, 0, 3)))
    for found, full in zip(features(images), whole, strict=True):
        torch.testing.assert_close(found, full[..., : found.shape[-2], : found.shape[-1]])


def test_feature_info_is_timms(make):
    info = Features(make(FOUR)).feature_info
    assert (info.channels(), info.reduction()) == ([16] * 4, [2, 4, 8, 16])
    assert info.module_name() == ["layers.0", "layers.1", "layers.2", "layers.3"]
    some = Features(make(POST), out_indices=(1, 4), strides=(4, 8))
    assert (some.feature_info.reduction(), some.feature_info.module_name()) == ([4, 8], ["layers.1", "layers.4"])
    assert len(some.encoder.layers) == 5  # the last block is behind the last map
    assert [m.shape[-1] for m in some(pictures(32, 40))] == [10, 5]


def test_which_blocks():
    assert blocks(12, None) == (2, 5, 8, 11)
    assert blocks(24, None) == (5, 11, 17, 23)
    assert blocks(2, None) == (0, 1)
    assert blocks(12, 3) == (9, 10, 11)
    assert blocks(12, (0, -1)) == (0, 11)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"out_indices": (0, 4)}, r"out_indices is \(0, 4\); of 4 blocks"),
        ({"out_indices": (2, 1)}, "rising"),
        ({"out_indices": 5}, "out_indices is 5"),
        ({"out_indices": ()}, r"out_indices is \(\)"),
        ({"strides": (2, 4, 8)}, "3 for 4 maps"),
        ({"strides": (2, 4, 8, 12)}, "a stride is 12; with patches of 8"),
        ({"strides": (0, 4, 8, 16)}, "a stride is 0"),
        ({"strides": (8, 4, 8, 16)}, "deeper maps must not be finer"),
    ],
)
def test_blocks_and_strides_that_cannot_be(make, options, words):
    with pytest.raises(ValueError, match=words):
        Features(make(FOUR), **options)


@pytest.mark.parametrize("stride", [1, 2, 4, 8, 16, 32])
def test_scaling_by_powers_of_two(stride):
    assert rescale(16, 8, stride)(torch.randn(1, 16, 4, 6)).shape[2:] == (-(-4 * 8 // stride), -(-6 * 8 // stride))


def test_gradients_reach_every_parameter_under_mask_rcnn(make):
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    torch.manual_seed(0)
    features = Features(make(FOUR))
    pyramid = FeaturePyramid(features, out_channels=8)
    assert list(pyramid(pictures(21, 50))) == ["0", "1", "2", "3", "pool"]
    anchors = AnchorGenerator(((6,), (10,), (16,), (24,), (32,)), ((1.0,),) * 5)
    net = MaskRCNN(pyramid, num_classes=3, min_size=32, max_size=48, rpn_anchor_generator=anchors).train()
    masks = torch.zeros(1, 32, 40, dtype=torch.uint8)
    masks[:, 4:16, 8:24] = 1
    target = {"boxes": torch.tensor([[8.0, 4, 24, 16]]), "labels": torch.tensor([1]), "masks": masks}
    sum(net([torch.rand(3, 32, 40)], [target]).values()).backward()
    without = [name for name, p in features.encoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_the_last_map_normed_is_what_the_encoder_gives(make):
    net, images = make(POST), pictures(32, 32)
    wanted, norm = net(images), net.ln1
    found = Features(net, out_indices=1)(images)[0].flatten(2).transpose(1, 2)
    torch.testing.assert_close(norm(found), wanted, rtol=0, atol=1e-6)
