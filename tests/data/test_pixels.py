import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from lmjax.data.pixels import (
    UnreadablePicture,
    dvae_crop,
    middle_crop,
    read_picture,
    transformer_crop,
)

RED, WHITE = (255, 0, 0), (255, 255, 255)


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def noise(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def as_palette(colors, transparency=None):
    image = Image.new("P", (2, 1))
    image.putpalette([value for color in colors for value in color])
    image.putdata([0, 1])
    return encoded(image, **({} if transparency is None else {"transparency": transparency}))


def as_grey_16():
    return encoded(Image.fromarray(np.array([[0, 0x80FF, 0xFFFF]], np.uint16)))


def as_rgb_16():
    """Which Pillow reads and does not write."""
    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    row = b"\0" + np.array([0xFF12, 0x0034, 0x8056], ">u2").tobytes()
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(row)), (b"IEND", b"")]
    framed = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def as_rgba():
    image = Image.new("RGBA", (3, 1))
    image.putdata([(*RED, 255), (*RED, 0), (*RED, 127)])
    return encoded(image)


@pytest.mark.parametrize(
    "content, pixels",
    [
        (as_palette([RED, WHITE]), [RED, WHITE]),
        (as_palette([RED, (0, 0, 0)], transparency=1), [RED, WHITE]),
        (encoded(Image.new("L", (1, 1), 7)), [(7, 7, 7)]),
        (encoded(Image.new("1", (1, 1), 1)), [WHITE]),
        (encoded(Image.new("LA", (1, 1), (7, 0))), [WHITE]),
        (encoded(Image.new("RGB", (1, 1), RED), transparency=RED), [WHITE]),
        (as_rgba(), [RED, WHITE, (255, 128, 128)]),
        (as_grey_16(), [(0, 0, 0), (128, 128, 128), WHITE]),
        (as_rgb_16(), [(255, 0, 128)]),
        (encoded(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "TIFF"), [RED]),
        (encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100), 8 * [RED]),
    ],
    ids="palette transparent grey bits grey-alpha key rgba grey-16 rgb-16 cmyk cmyk-jpeg".split(),
)
def test_every_kind_of_picture_becomes_rgb_on_white(content, pixels):
    image = read_picture(content)
    assert image.mode == "RGB"
    found = np.asarray(image)[0].astype(int)
    # JPEG is not exact.
    np.testing.assert_allclose(found, pixels, atol=2 if content[:2] == b"\xff\xd8" else 0)


def test_a_picture_is_turned_as_its_camera_says():
    image = noise(6, 4)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned = read_picture(encoded(image, exif=exif))
    np.testing.assert_array_equal(np.asarray(turned), np.asarray(image)[::-1, ::-1])


def test_a_large_jpeg_is_decoded_smaller_but_never_too_small():
    content = encoded(noise(640, 480), "JPEG")
    assert read_picture(content).size == read_picture(content, 256).size == (640, 480)
    assert read_picture(content, 64).size == (320, 240)
    assert read_picture(content, 16).size == (80, 60)


def test_what_cannot_be_read(tmp_path):
    for format in ("PNG", "JPEG", "GIF", "WEBP"):
        content = encoded(noise(50, 50), format)
        for damaged in (content[: len(content) // 2], content[:9], b"", b"no picture at all"):
            with pytest.raises(UnreadablePicture) as caught:
                read_picture(damaged)
            assert "\n" not in str(caught.value) and "0x" not in str(caught.value)
    with pytest.raises(UnreadablePicture, match="No such file"):
        read_picture(tmp_path / "missing.png")
    with pytest.raises(UnreadablePicture, match="floating-point"):
        read_picture(encoded(Image.new("F", (1, 1)), "TIFF"))


@pytest.mark.parametrize("crop", [dvae_crop, transformer_crop, middle_crop])
@pytest.mark.parametrize("size", [(100, 60), (33, 48), (20, 20), (5, 19)])
def test_crops_are_squares_of_the_size_and_the_generators(crop, size):
    image = noise(*size)
    crops = [crop(image, 32, np.random.default_rng(seed)) for seed in (0, *range(10))]
    assert crops[0].shape == (32, 32, 3) and crops[0].dtype == np.uint8
    np.testing.assert_array_equal(crops[0], crops[1])
    is_random = len({pixels.tobytes() for pixels in crops}) > 1
    # In listing 2 nothing is left to choose of a square that is not larger than the crop.
    assert is_random == (crop is dvae_crop or (crop is transformer_crop and size != (20, 20)))


class Given:
    """A generator whose draws are given, and which notes between what it was to draw."""

    def __init__(self, *draws):
        self.draws, self.ranges = list(draws), []

    def integers(self, low, high=None, size=None):
        low, high = (0, low) if high is None else (low, high)
        self.ranges.append((low, high))
        return [self.draws.pop(0) for _ in range(size)] if size else self.draws.pop(0)

    def random(self):
        return self.draws.pop(0)


def test_listing_1():
    image = noise(640, 480)
    rng = Given(100, 0, 300, 17, 23, 0.7)
    found = dvae_crop(image, 256, rng)
    assert rng.ranges == [(0, 161), (0, 1), (288, 385), (0, 300 - 256 + 1)]
    square = image.crop((100, 0, 580, 480)).resize((300, 300), Image.Resampling.BOX)
    expected = np.asarray(square)[23 : 23 + 256, 17 : 17 + 256]
    np.testing.assert_array_equal(found, expected)
    mirrored = dvae_crop(image, 256, Given(100, 0, 300, 17, 23, 0.3))
    np.testing.assert_array_equal(mirrored, expected[:, ::-1])


def test_listing_2():
    image = noise(640, 480)
    rng = Given(70, 0, 270, 3, 14)
    found = transformer_crop(image, 256, rng)
    assert rng.ranges == [(60, 100), (0, 1), (256, 289), (0, 270 - 256 + 1)]
    square = image.crop((70, 0, 550, 480)).resize((270, 270), Image.Resampling.BOX)
    np.testing.assert_array_equal(found, np.asarray(square)[14 : 14 + 256, 3 : 3 + 256])


@pytest.mark.parametrize(
    "crop, draws, ranges",
    [
        (dvae_crop, (0, 0, 72, 0, 0, 0.9), [(72, 73), (0, 9)]),
        (transformer_crop, (0, 0, 70, 0, 0), [(64, 73), (0, 7)]),
    ],
)
def test_emoji_are_hardly_larger_than_what_is_cropped(crop, draws, ranges):
    rng = Given(*draws)
    crop(noise(72, 72), 64, rng)
    assert rng.ranges[2:] == ranges


def test_small_pictures_are_enlarged_smoothly():
    image = Image.new("RGB", (2, 2))
    image.putdata([RED, RED, WHITE, WHITE])
    large = middle_crop(image, 8)
    assert large.shape == (8, 8, 3)
    green = large[:, 0, 1].astype(int)
    assert green[0] == 0 and green[-1] == 255 and len(set(green)) > 2
    with_border = np.asarray(noise(9, 5))
    np.testing.assert_array_equal(
        middle_crop(noise(9, 5), 5), with_border[:, 2:7]
    )  # neither resized nor moved
