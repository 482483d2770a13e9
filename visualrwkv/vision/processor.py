"""From a picture in any form to the normalised tensor that the encoder reads."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from visualrwkv.config import IMAGENET, TowersConfig, VisionConfig, ViTConfig, VRWKVConfig

Picture = str | Path | bytes | Image.Image


def open_picture(source: Picture) -> Image.Image:
    """The picture as a person sees it, in RGB.

    EXIF rotation is applied, transparency is laid over white, 16-bit grey keeps its range, an animation gives its first
    frame. A path that does not exist is a FileNotFoundError, a file that is no picture a ValueError; both name it.
    """
    name = "the picture" if isinstance(source, (bytes, Image.Image)) else str(source)
    try:
        if isinstance(source, bytes):
            picture: Image.Image = Image.open(io.BytesIO(source))
        elif isinstance(source, Image.Image):
            picture = source
        else:
            picture = Image.open(source)
        picture.seek(0)
        picture.load()
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: there is no such picture") from None
    except IsADirectoryError:
        raise ValueError(f"{name} is a directory, not a picture") from None
    except (UnidentifiedImageError, OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} cannot be read as a picture ({error})") from error
    return to_rgb(ImageOps.exif_transpose(picture))


def to_rgb(picture: Image.Image) -> Image.Image:
    """Any mode to RGB, as a viewer would show it."""
    if picture.mode.startswith("I") or picture.mode == "F":
        values = np.asarray(picture, dtype=np.float64)
        top = 65535.0 if values.max(initial=0) > 255 else 255.0  # "I" and "F" say nothing of their range
        if picture.mode.startswith("I;16"):
            top = 65535.0
        picture = Image.fromarray(np.clip(values / top * 255 + 0.5, 0, 255).astype(np.uint8))
    if "A" in picture.getbands() or "a" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


class ImageProcessor:
    """The whole picture squashed to the encoder's square, or its middle; scaled to 0..1, normalised as the encoder asks."""

    def __init__(self, config: VRWKVConfig | ViTConfig):
        self.size, self.crop = config.image_size, config.crop
        self.mean, self.std = config.mean, config.std

    def __call__(self, source: Picture) -> Tensor:
        """A picture in any form -> (3, size, size) fp32."""
        picture = open_picture(source)
        if self.crop:
            picture = middle(picture, self.size, round(self.size / self.crop))
        return normalised(picture, self.size, self.mean, self.std)


class TowersProcessor:
    """A picture as DINOv2, SigLIP and SAM want it, squashed to their squares; with tiles, its four quarters as well."""

    def __init__(self, config: TowersConfig):
        self.tiles = config.tiles
        half = (0.5, 0.5, 0.5)
        self.wanted = (
            (config.image_size, IMAGENET["mean"], IMAGENET["std"]),
            (config.image_size, half, half),
            (config.sam_size, IMAGENET["mean"], IMAGENET["std"]),  # the releases were trained so, not with SAM's own
        )

    def __call__(self, source: Picture) -> Tensor:
        """A picture in any form -> one row: three pictures of each view, one after the other, fp32."""
        picture = open_picture(source)
        views = [picture]
        if self.tiles:
            w, h = picture.width // 2, picture.height // 2
            if not w or not h:
                raise ValueError(f"a picture of {picture.width} x {picture.height} pixels has no four quarters")
            views += [picture.crop((x, y, x + w, y + h)) for y in (0, h) for x in (0, w)]
        return torch.cat([normalised(view, *wanted).flatten() for view in views for wanted in self.wanted])


Processor = ImageProcessor | TowersProcessor


def make_processor(config: VisionConfig) -> Processor:
    """What makes pictures into that encoder's input."""
    return TowersProcessor(config) if isinstance(config, TowersConfig) else ImageProcessor(config)


def middle(picture: Image.Image, size: int, shorter: int) -> Image.Image:
    """The size × size middle of the picture, after its shorter side was scaled to `shorter` pixels."""
    w, h = picture.size
    scaled = (shorter, max(shorter, shorter * h // w)) if w <= h else (max(shorter, shorter * w // h), shorter)
    if picture.size != scaled:
        picture = picture.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (scaled[0] - size) // 2, (scaled[1] - size) // 2
    return picture.crop((left, top, left + size, top + size))


def normalised(picture: Image.Image, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """An RGB picture squashed to size × size -> (3, size, size) fp32."""
    if picture.size != (size, size):
        picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
