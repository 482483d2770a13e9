"""From a picture in any form to the normalised tensor that the encoder reads."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from visualrwkv.config import VisionConfig

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
    """Squash to the encoder's square, scale to 0..1, normalise with the encoder's mean and deviation."""

    def __init__(self, config: VisionConfig):
        self.size = config.image_size
        self.mean = torch.tensor(config.mean).view(3, 1, 1)
        self.std = torch.tensor(config.std).view(3, 1, 1)

    def __call__(self, source: Picture) -> Tensor:
        """A picture in any form -> (3, size, size) fp32."""
        picture = open_picture(source)
        if picture.size != (self.size, self.size):
            picture = picture.resize((self.size, self.size), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
        return (pixels - self.mean) / self.std
