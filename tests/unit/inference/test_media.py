"""What customers send: every kind of sound image becomes upright RGB, everything else one of two clear errors."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from shared.inference.errors import InvalidMedia, MediaLimit
from shared.inference.media import read_image

LIMIT = 64_000_000
ORIENTATION = 0x0112
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def save(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def corners() -> Image.Image:
    """40×24 with a red, a green, a blue and a white quarter: every turn and flip of it is another picture."""
    pixels = np.empty((24, 40, 3), dtype=np.uint8)
    pixels[:12, :20], pixels[:12, 20:] = RED, GREEN
    pixels[12:, :20], pixels[12:, 20:] = BLUE, WHITE
    return Image.fromarray(pixels)


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def quarters(pixels: NDArray[np.uint8]) -> list[tuple[int, ...]]:
    """The colours in the middles of the four quarters, row by row, rounded to pure ones."""
    height, width = pixels.shape[:2]
    spots = [(height // 4, width // 4), (height // 4, 3 * width // 4)]
    spots += [(3 * height // 4, width // 4), (3 * height // 4, 3 * width // 4)]
    return [tuple(255 * (int(value) > 127) for value in pixels[y, x]) for y, x in spots]


UPRIGHT = {
    # How a viewer shows the stored picture R G / B W under each orientation of the EXIF standard.
    1: [RED, GREEN, BLUE, WHITE],
    2: [GREEN, RED, WHITE, BLUE],
    3: [WHITE, BLUE, GREEN, RED],
    4: [BLUE, WHITE, RED, GREEN],
    5: [RED, BLUE, GREEN, WHITE],
    6: [BLUE, RED, WHITE, GREEN],
    7: [WHITE, GREEN, BLUE, RED],
    8: [GREEN, WHITE, RED, BLUE],
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_photo_with_an_exif_orientation_comes_out_upright(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"exif": exif} | ({"quality": 95} if kind in ("JPEG", "WEBP") else {})
    pixels = read_image(save(corners(), kind, **options), max_pixels=LIMIT)
    assert pixels.shape == ((24, 40, 3) if orientation < 5 else (40, 24, 3))
    assert quarters(pixels) == UPRIGHT[orientation]


@pytest.mark.parametrize("orientation", [0, 9, 99, 65535])
def test_an_orientation_that_does_not_exist_is_ignored(orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    pixels = read_image(save(corners(), "JPEG", exif=exif, quality=95), max_pixels=LIMIT)
    assert quarters(pixels) == UPRIGHT[1]


def test_broken_exif_does_not_spoil_a_sound_photo() -> None:
    broken = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\xff" * 40
    pixels = read_image(save(corners(), "JPEG", exif=broken, quality=95), max_pixels=LIMIT)
    assert quarters(pixels) == UPRIGHT[1]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
def test_every_listed_format_gives_rgb_bytes(kind: str) -> None:
    pixels = read_image(save(corners(), kind), max_pixels=LIMIT)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert quarters(pixels) == UPRIGHT[1]


def test_a_path_and_an_open_file_read_like_bytes(tmp_path: Path) -> None:
    data = save(corners(), "PNG")
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    expected = read_image(data, max_pixels=LIMIT)
    assert np.array_equal(read_image(path, max_pixels=LIMIT), expected)
    assert np.array_equal(read_image(str(path), max_pixels=LIMIT), expected)
    with path.open("rb") as file:
        assert np.array_equal(read_image(file, max_pixels=LIMIT), expected)


def test_a_missing_path_is_the_callers_error_and_not_bad_media(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "nothing.png", max_pixels=LIMIT)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_gray_is_scaled_and_not_clipped(kind: str) -> None:
    levels = np.array([[0, 128, 129, 256, 32768, 65407, 65535]], dtype=np.uint16)
    pixels = read_image(save(Image.fromarray(levels), kind), max_pixels=LIMIT)
    assert pixels[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255, 255]
    assert np.array_equal(pixels[..., 0], pixels[..., 2])


def test_32_bit_integers_in_the_16_bit_range_are_read_as_16_bit() -> None:
    levels = np.array([[0, 32768, 65535]], dtype=np.int32)
    assert read_image(save(Image.fromarray(levels), "TIFF"), max_pixels=LIMIT)[0, :, 1].tolist() == [0, 128, 255]


@pytest.mark.parametrize("level", [np.array([[70_000]], dtype=np.int32), np.array([[0.5]], dtype=np.float32)])
def test_images_without_an_agreed_brightness_range_are_refused(level: NDArray[np.generic]) -> None:
    with pytest.raises(InvalidMedia, match="brightness range"):
        read_image(save(Image.fromarray(level), "TIFF"), max_pixels=LIMIT)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_is_turned_into_the_colours_that_were_meant(kind: str) -> None:
    # Pillow, like Photoshop, writes the JPEG inverted under an Adobe marker; cyan must still come out cyan.
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    red, green, blue = read_image(save(cyan, kind), max_pixels=LIMIT)[8, 8]
    assert red < 10
    assert green > 245
    assert blue > 245


def test_a_palette_without_transparency_keeps_its_colours() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    assert read_image(save(image, "PNG"), max_pixels=LIMIT)[0, 0].tolist() == [10, 20, 30]


@pytest.mark.parametrize(
    ("transparency", "expected"), [(1, [255, 255, 255]), (b"\xff\x80", [132, 137, 142]), (0, [10, 20, 30])]
)
def test_a_palette_with_transparency_is_laid_on_white(transparency: int | bytes, expected: list[int]) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    data = save(image, "PNG", transparency=transparency)
    assert read_image(data, max_pixels=LIMIT)[0, 0].tolist() == expected


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("1", (4, 4), 1), [255, 255, 255]),
        (Image.new("1", (4, 4), 0), [0, 0, 0]),
        (Image.new("L", (4, 4), 90), [90, 90, 90]),
        (Image.new("LA", (4, 4), (0, 128)), [127, 127, 127]),
        (Image.new("LA", (4, 4), (7, 255)), [7, 7, 7]),
        (Image.new("RGBA", (4, 4), (200, 0, 0, 0)), [255, 255, 255]),
        (Image.new("RGBA", (4, 4), (200, 0, 0, 255)), [200, 0, 0]),
    ],
    ids=lambda value: f"{value.mode}" if isinstance(value, Image.Image) else str(value),
)
def test_gray_one_bit_and_alpha_become_rgb(image: Image.Image, expected: list[int]) -> None:
    assert read_image(save(image, "PNG"), max_pixels=LIMIT)[1, 1].tolist() == expected


def test_a_phone_photo_with_a_second_picture_behind_it_gives_the_photo() -> None:
    photo = corners()
    data = save(photo, "MPO", save_all=True, append_images=[Image.new("RGB", (20, 12))], quality=95)
    assert quarters(read_image(data, max_pixels=LIMIT)) == UPRIGHT[1]


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_animations_and_several_pages_are_refused_in_clear_words(kind: str) -> None:
    data = save(corners(), kind, save_all=True, append_images=[corners().rotate(180)])
    with pytest.raises(InvalidMedia, match="more than one picture"):
        read_image(data, max_pixels=LIMIT)


@pytest.mark.parametrize("kind", ["EPS", "GIF", "PPM", "ICO"])
def test_formats_that_are_not_listed_are_refused(kind: str) -> None:
    with pytest.raises(InvalidMedia, match="known format"):
        read_image(save(corners(), kind), max_pixels=LIMIT)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00",
        b"just some words\n" * 50,
        b"<!doctype html><title>404</title>",
        b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg>&x;</svg>',
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        b"RIFF\x00\x00\x00\x00WEBP",
        b"II*\x00\xff\xff\xff\xff",
    ],
)
def test_what_is_no_image_is_refused_whatever_its_name(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "holiday.jpg"
    path.write_bytes(data)
    with pytest.raises(InvalidMedia):
        read_image(path, max_pixels=LIMIT)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_a_file_cut_short_is_refused(kind: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    data = save(Image.fromarray(noise), kind)
    with pytest.raises(InvalidMedia):
        read_image(data[: int(len(data) * share)], max_pixels=LIMIT)


def test_a_png_with_a_damaged_chunk_is_refused() -> None:
    data = bytearray(save(corners(), "PNG"))
    data[data.index(b"IDAT") + 6] ^= 0xFF
    with pytest.raises(InvalidMedia):
        read_image(bytes(data), max_pixels=LIMIT)


@pytest.mark.parametrize(("width", "height"), [(100_000, 100_000), (2**31 - 1, 1), (10_000, 10_000), (8001, 8000)])
def test_a_header_that_declares_too_many_pixels_is_a_limit_and_costs_no_memory(width: int, height: int) -> None:
    with pytest.raises(MediaLimit, match="pixels"):
        read_image(png_header(width, height), max_pixels=LIMIT)


def test_the_limit_itself_is_still_taken() -> None:
    data = save(corners(), "PNG")
    assert read_image(data, max_pixels=40 * 24).shape == (24, 40, 3)
    with pytest.raises(MediaLimit, match="40×24"):
        read_image(data, max_pixels=40 * 24 - 1)


@pytest.mark.parametrize(("width", "height"), [(0, 0), (0, 5), (5, 0)])
def test_an_image_without_pixels_is_refused(width: int, height: int) -> None:
    with pytest.raises(InvalidMedia):
        read_image(png_header(width, height), max_pixels=LIMIT)


@given(st.sampled_from(["JPEG", "PNG", "WEBP", "TIFF", "BMP"]), st.integers(0, 2**32 - 1), st.integers(1, 12))
@settings(max_examples=150, deadline=None)
def test_damage_never_raises_anything_but_the_two_errors(kind: str, seed: int, wounds: int) -> None:
    rng = np.random.default_rng(seed)
    data = bytearray(save(corners(), kind))
    for place in rng.integers(0, len(data), wounds):
        data[place] = rng.integers(256)
    try:
        pixels = read_image(bytes(data), max_pixels=1_000_000)
    except (InvalidMedia, MediaLimit):
        return
    assert pixels.ndim == 3
