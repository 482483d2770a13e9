"""The three encoders of HD, UHD and v7.00: sizes of the released files, SAM against transformers', channels in their order."""

import pytest
import torch

from visualrwkv.config import TowersConfig
from visualrwkv.vision.processor import make_processor

pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

from visualrwkv.vision.towers import Towers, sizes  # noqa: E402

TINY = TowersConfig(3, 64, 2, 72, 80, 4, 64, 24, image_size=112, sam_size=256)


@pytest.fixture(scope="module")
def net(randomise):
    return randomise(Towers(TINY), deviation=0.05).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def row():
    """What the processor might make of two pictures."""
    length = sum(c * h * w for c, h, w in sizes(TINY))
    return torch.randn(2, length, generator=torch.Generator().manual_seed(0))


def test_names_and_sizes_are_those_of_the_released_files():
    with torch.device("meta"):
        net = Towers(TowersConfig())
    weights = net.state_dict()
    for name, tensors, parameters in (
        ("dino_featurizer", 343, 304_017_408),
        ("siglip_featurizer", 342, 428_565_440),
        ("sam_featurizer", 177, 89_670_912),
    ):
        part = {k: v for k, v in weights.items() if k.startswith(f"{name}.")}
        assert (len(part), sum(v.numel() for v in part.values())) == (tensors, parameters)
    assert TowersConfig().width == 3200
    assert TowersConfig(tiles=True).width == 6400
    shapes = {
        "dino_featurizer.pos_embed": (1, 1024, 1024),
        "dino_featurizer.reg_token": (1, 4, 1024),
        "dino_featurizer.blocks.23.ls2.gamma": (1024,),
        "siglip_featurizer.pos_embed": (1, 1024, 1152),
        "siglip_featurizer.blocks.26.mlp.fc1.weight": (4304, 1152),
        "siglip_featurizer.attn_pool.latent": (1, 1, 1152),
        "sam_featurizer.pos_embed": (1, 64, 64, 768),
        "sam_featurizer.blocks.0.attn.rel_pos_h": (27, 64),
        "sam_featurizer.blocks.11.attn.rel_pos_w": (127, 64),
        "sam_featurizer.blocks.11.mlp.lin1.weight": (3072, 768),
        "sam_featurizer.neck.2.weight": (256, 256, 3, 3),
    }
    assert {k: tuple(weights[k].shape) for k in shapes} == shapes


def test_channels_are_dino_siglip_sam(net, row):
    dino, siglip, sam = (
        x.view(-1, *size) for x, size in zip(row.split([c * h * w for c, h, w in sizes(TINY)], 1), sizes(TINY))
    )
    found = net(row)
    assert found.shape == (2, 64, TINY.width)
    for part, model, pixels in (
        (found[..., :64], net.dino_featurizer, dino),
        (found[..., 64:136], net.siglip_featurizer, siglip),
    ):
        tokens = []
        hook = model.blocks[-2].register_forward_hook(lambda module, inputs, output, kept=tokens: kept.append(output))
        model(pixels)
        hook.remove()
        torch.testing.assert_close(part, tokens[0][:, -64:], rtol=0, atol=1e-5)  # no class token, no registers
    maps = net.sam_featurizer.forward_features(sam)  # (2, 24, 16, 16)
    wanted = torch.stack([maps[:, c, dy::2, dx::2] for c in range(24) for dy in (0, 1) for dx in (0, 1)], 1)
    torch.testing.assert_close(found[..., 136:], wanted.flatten(2).transpose(1, 2), rtol=0, atol=1e-5)


def test_sam_equals_transformers(net, row):
    """SAM's encoder by another hand: windows, decomposed relative positions and neck."""
    from transformers.models.sam.modeling_sam import SamVisionConfig, SamVisionModel

    config = SamVisionConfig(
        hidden_size=64,
        output_channels=24,
        num_hidden_layers=4,
        num_attention_heads=1,
        image_size=256,
        patch_size=16,
        hidden_act="gelu",
        window_size=14,
        global_attn_indexes=[2],
        mlp_ratio=4.0,
    )
    theirs = SamVisionModel(config).eval().requires_grad_(False)
    renamed = {
        "patch_embed.proj": "patch_embed.projection",
        "blocks.": "layers.",
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
        "neck.0": "neck.conv1",
        "neck.1": "neck.layer_norm1",
        "neck.2": "neck.conv2",
        "neck.3": "neck.layer_norm2",
    }
    weights = {}
    for name, tensor in net.sam_featurizer.state_dict().items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        weights[f"vision_encoder.{name}"] = tensor
    theirs.load_state_dict(weights)
    pixels = row[:, -3 * 256 * 256 :].view(2, 3, 256, 256)
    wanted = theirs(pixels).last_hidden_state
    torch.testing.assert_close(net.sam_featurizer.forward_features(pixels), wanted, rtol=0, atol=1e-5)


def test_tiles_stand_beside_the_whole_at_half_their_grid(net):
    tiled = Towers(TowersConfig(**{**vars(TINY), "tiles": True})).requires_grad_(False).eval()
    tiled.load_state_dict(net.state_dict())
    length = sum(c * h * w for c, h, w in sizes(TINY))
    views = torch.randn(2, 5, length, generator=torch.Generator().manual_seed(1))
    found = tiled(views.flatten(1)).view(2, 8, 8, 2, TINY.width)
    torch.testing.assert_close(found[:, :, :, 0], net(views[:, 0]).view(2, 8, 8, -1), rtol=0, atol=1e-5)
    for tile, (top, left) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4)]):
        alone = net(views[:, 1 + tile]).view(2, 4, 2, 4, 2, -1).mean((2, 4))
        torch.testing.assert_close(found[:, top : top + 4, left : left + 4, 1], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tiles", [False, True])
def test_the_processor_squashes_for_each(picture, tiles):
    """As timm's transform of each encoder, with a resize to the square; quarters of an odd picture lose their last row."""
    from timm.data import create_transform

    image = picture().resize((301, 200))
    row = make_processor(TowersConfig(**{**vars(TINY), "tiles": tiles}))(image)
    boxes = [(0, 0, 301, 200)]
    if tiles:
        boxes += [(0, 0, 150, 100), (150, 0, 300, 100), (0, 100, 150, 200), (150, 100, 300, 200)]
    wanted = []
    for box in boxes:
        for size, kind in ((112, "dino"), (112, "siglip"), (256, "dino")):
            mean, std = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if kind == "dino" else ((0.5,) * 3, (0.5,) * 3)
            transform = create_transform(
                (3, size, size), interpolation="bicubic", mean=mean, std=std, crop_pct=1.0, crop_mode="squash"
            )
            wanted.append(transform(image.crop(box)).flatten())
    torch.testing.assert_close(row, torch.cat(wanted), rtol=0, atol=1e-5)


def test_sizes_that_give_two_grids():
    with pytest.raises(ValueError, match="image_size 112 and sam_size 128 do not give one grid"):
        TowersConfig(image_size=112, sam_size=128)
