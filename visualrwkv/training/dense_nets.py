"""What is trained to find things with a Vision-RWKV encoder: torchvision's Mask R-CNN and transformers' UperNet, small."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from visualrwkv.config import VISION_PRESETS, VRWKVConfig
from visualrwkv.vision.features import FeaturePyramid, Features, blocks
from visualrwkv.vision.vrwkv import VRWKV


def mask_rcnn(encoder: VRWKV, classes: int, channels: int = 64, size: int = 64) -> nn.Module:
    """Mask R-CNN (arXiv 1703.06870) for so many classes beside the background, its heads `channels` wide.

    It takes pictures from 0 to 1 and scales their shorter sides to `size` pixels. Each level has two anchors, of 5 and of 7
    times its stride; few proposals, as small pictures have.
    """
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

    config = encoder.config
    pyramid = FeaturePyramid(Features(encoder), channels)
    strides = [config.patch_size * factor for factor in (0.25, 0.5, 1, 2, 4)]
    anchors = tuple((5 * stride, 5 * math.sqrt(2) * stride) for stride in strides)
    few: dict[str, Any] = {f"rpn_{when}_nms_top_n_{how}": 50 for when in ("pre", "post") for how in ("train", "test")}
    return MaskRCNN(
        pyramid,
        min_size=size,
        max_size=2 * size,
        image_mean=config.mean,
        image_std=config.std,
        rpn_anchor_generator=AnchorGenerator(anchors, ((1.0,),) * len(anchors)),
        rpn_batch_size_per_image=64,
        **few,
        box_head=TwoMLPHead(channels * 7 * 7, 4 * channels),
        box_predictor=FastRCNNPredictor(4 * channels, classes + 1),
        box_batch_size_per_image=32,
        box_detections_per_img=20,
        mask_head=MaskRCNNHeads(channels, (channels, channels), 1),
        mask_predictor=MaskRCNNPredictor(channels, channels, classes + 1),
    )


def upernet(encoder: VRWKV, names: Sequence[str], channels: int = 64) -> tuple[Any, Features]:
    """UperNet (arXiv 1807.10221) for the background and classes of those names, `channels` wide.

    It takes normalised pictures. transformers finds the encoder by its preset's name in timm, so that save_pretrained and
    from_pretrained keep the whole; ValueError where the encoder has no preset's sizes. The second is what it reads: a copy of
    the encoder with its pyramid.
    """
    from transformers import TimmBackboneConfig, UperNetConfig, UperNetForSemanticSegmentation

    import visualrwkv.vision.timm_models  # noqa: F401  by its names transformers asks for the encoder

    config = encoder.config
    maker: Any = TimmBackboneConfig  # its signature hides out_indices behind a property
    backbone = maker(backbone=preset_of(config), out_indices=list(blocks(config.depth, None)))
    labels = dict(enumerate(("background", *names)))
    net: Any = UperNetForSemanticSegmentation(
        UperNetConfig(
            backbone_config=backbone,
            hidden_size=channels,
            auxiliary_channels=channels,
            id2label=labels,
            label2id={name: number for number, name in labels.items()},
        )
    )
    features: Any = net.backbone._backbone
    features.encoder.load_state_dict(Features(encoder).encoder.state_dict())
    return net, features


def preset_of(config: VRWKVConfig) -> str:
    """The name of the preset whose blocks and tables are those of this config, whatever else differs."""

    def shape(c: VRWKVConfig) -> tuple:
        head = c.head_size if c.kind == "vrwkv6" else 0
        sizes = (c.kind, head, c.depth, c.width, c.patch_size, c.pos_grid, c.ffn_rate)
        return (*sizes, c.post_norm, bool(c.layer_scale), c.key_norm)

    for name, other in VISION_PRESETS.items():
        if shape(other) == shape(config):
            return name
    raise ValueError(
        f"the encoder has {config.depth} blocks of width {config.width} and patches of {config.patch_size}, which is no "
        f"preset's size; UperNet is made for {', '.join(VISION_PRESETS)}"
    )
