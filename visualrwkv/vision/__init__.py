"""From pictures to image tokens: processor, encoder, pooling, projector, scan orders; and maps for dense prediction."""

import sys

from visualrwkv.vision.features import FeaturePyramid, Features
from visualrwkv.vision.vrwkv import VRWKV, vrwkv

__all__ = ["VRWKV", "FeaturePyramid", "Features", "vrwkv"]

if "timm" in sys.modules:  # who uses it finds our names there; nobody else waits for it
    import visualrwkv.vision.timm_models  # noqa: F401
