"""From pictures to image tokens: processor, encoder, pooling, projector, scan orders."""

from visualrwkv.vision.vrwkv import VRWKV, vrwkv

__all__ = ["VRWKV", "vrwkv"]
