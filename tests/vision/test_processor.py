"""Pictures of every kind: what a person would see, pixel by pixel."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from visualrwkv.config import VRWKVConfig
from visualrwkv.vision.processor import ImageProcessor, open_picture

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def rows(picture):
    """The pixels as rows of RGB triples."""
    assert picture.mode == "RGB"
    return [[tuple(pixel) for pixel in row] for row in np.asarray(picture).tolist()]


def saved(picture, kind="PNG", **settings):
    file = io.BytesIO()
    picture.save(file, kind, **settings)
    return file.getvalue()


def test_rgb():
    picture = Image.fromarray(np.array([[RED, GREEN], [BLUE, WHITE]], np.uint8))
    assert rows(open_picture(saved(picture))) == [[RED, GREEN], [BLUE, WHITE]]


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey(mode):
    picture = Image.fromarray(np.array([[0, 255]], np.uint8)).convert(mode)
    assert rows(open_picture(saved(picture))) == [[(0, 0, 0), WHITE]]


def test_transparency_lies_over_white():
    values = [[(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 51)]]
    picture = Image.fromarray(np.array(values, np.uint8))
    assert rows(open_picture(saved(picture))) == [[RED, WHITE, (204, 204, 204)]]


def test_grey_with_transparency():
    picture = Image.fromarray(np.array([[(0, 255), (0, 0), (0, 51)]], np.uint8))
    assert rows(open_picture(saved(picture))) == [[(0, 0, 0), WHITE, (204, 204, 204)]]


def test_palette():
    picture = Image.new("P", (3, 1))
    picture.putpalette([*RED, *GREEN, *BLUE])
    picture.putdata([2, 0, 1])
    assert rows(open_picture(saved(picture))) == [[BLUE, RED, GREEN]]
    assert rows(open_picture(saved(picture, transparency=0))) == [[BLUE, WHITE, GREEN]]


def test_one_transparent_colour_of_an_rgb_file():
    picture = Image.fromarray(np.array([[RED, GREEN]], np.uint8))
    assert rows(open_picture(saved(picture, transparency=GREEN))) == [[RED, WHITE]]


def test_cmyk():
    picture = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    found = np.asarray(open_picture(saved(picture, "JPEG", quality=100))).astype(int)
    assert abs(found - RED).max() <= 3


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_of_16_bits_keeps_its_range(kind):
    picture = Image.fromarray(np.array([[0, 257 * 128, 65535, 255]], np.uint16))
    assert rows(open_picture(saved(picture, kind))) == [[(0, 0, 0), (128, 128, 128), WHITE, (1, 1, 1)]]


def test_a_dark_picture_of_16_bits_stays_dark():
    picture = Image.fromarray(np.array([[0, 200]], np.uint16))
    assert rows(open_picture(saved(picture))) == [[(0, 0, 0), (1, 1, 1)]]


def test_integers_and_floats():
    assert rows(open_picture(Image.fromarray(np.array([[0, 65535]], np.int32)))) == [[(0, 0, 0), WHITE]]
    assert rows(open_picture(Image.fromarray(np.array([[0.0, 255.0]], np.float32)))) == [[(0, 0, 0), WHITE]]


@pytest.mark.parametrize(
    ("orientation", "seen"),
    [(1, [[RED, BLUE]]), (2, [[BLUE, RED]]), (3, [[BLUE, RED]]), (6, [[RED], [BLUE]]), (8, [[BLUE], [RED]])],
)
def test_the_cameras_rotation_is_applied(orientation, seen):
    picture = Image.fromarray(np.array([[RED, BLUE]], np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert rows(open_picture(saved(picture, exif=exif))) == seen


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (2, 1), colour) for colour in (RED, GREEN, BLUE)]
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert rows(open_picture(data)) == [[RED, RED]]
    animation = Image.open(io.BytesIO(data))
    animation.seek(2)
    assert rows(open_picture(animation)) == [[RED, RED]]


def test_path_string_bytes_and_picture_are_alike(tmp_path, picture):
    file = tmp_path / "a picture.png"
    picture().save(file)
    wanted = rows(picture())
    for source in (file, str(file), file.read_bytes(), picture(), picture().convert("RGBA")):
        assert rows(open_picture(source)) == wanted


# What cannot be read -------------------------------------------------------------------------------------------------


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png: there is no such picture"):
        open_picture(tmp_path / "nowhere.png")


def test_directory(tmp_path):
    with pytest.raises(ValueError, match="is a directory, not a picture"):
        open_picture(tmp_path)


@pytest.mark.parametrize("end", [0, 4, 60, 1000])
def test_broken_file_is_named(tmp_path, picture, end):
    file = tmp_path / "broken.png"
    file.write_bytes(saved(picture())[:end])
    with pytest.raises(ValueError, match=r"broken\.png cannot be read as a picture"):
        open_picture(file)


def test_broken_bytes():
    with pytest.raises(ValueError, match="the picture cannot be read as a picture"):
        open_picture(b"these are words")


# To the tensor -------------------------------------------------------------------------------------------------------


def test_normalisation():
    process = ImageProcessor(VRWKVConfig(1, 4, patch_size=1, image_size=2, mean=(0.5, 0.25, 0), std=(0.5, 0.25, 2)))
    picture = Image.fromarray(np.array([[RED, GREEN], [BLUE, WHITE]], np.uint8))
    found = process(picture)
    assert found.dtype == torch.float32
    wanted = [[[1, -1], [-1, 1]], [[-1, 3], [-1, 3]], [[0, 0], [0.5, 0.5]]]
    torch.testing.assert_close(found, torch.tensor(wanted).float())


def test_other_sizes_are_squashed_to_the_square(picture):
    process = ImageProcessor(VRWKVConfig(1, 4, patch_size=8, image_size=16, mean=(0, 0, 0), std=(1, 1, 1)))
    found = process(picture())  # 40 × 32
    wanted = np.asarray(picture().resize((16, 16), Image.Resampling.BICUBIC)) / 255
    np.testing.assert_allclose(found.permute(1, 2, 0).numpy(), wanted, atol=1e-6)
    half = Image.fromarray(np.array([[RED] * 30 + [BLUE] * 30] * 20, np.uint8))  # nothing is cropped
    assert process(half)[:, 8, 0].tolist() == [1, 0, 0]
    assert process(half)[:, 8, -1].tolist() == [0, 0, 1]
