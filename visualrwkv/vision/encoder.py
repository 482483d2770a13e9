"""The vision encoders by their configs: Vision-RWKV, CLIP and SigLIP, and the three of HD, UHD and v7.00 side by side.

An encoder has `config` (a VisionConfig), `grid(pixels)`, the patches down and across, and `forward`: what its processor
made of B pictures -> patches (B, P, D) row-major, followed by its class token where the config says so.
"""

from __future__ import annotations

from visualrwkv.config import TowersConfig, VisionConfig, VRWKVConfig
from visualrwkv.vision.towers import Towers
from visualrwkv.vision.vit import ViT
from visualrwkv.vision.vrwkv import VRWKV

Encoder = VRWKV | ViT | Towers


def make_encoder(config: VisionConfig) -> Encoder:
    """A freshly initialised encoder of that config."""
    if isinstance(config, VRWKVConfig):
        return VRWKV(config)
    return Towers(config) if isinstance(config, TowersConfig) else ViT(config)
