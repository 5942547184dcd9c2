"""Rows 1 to 27 of the catalogue of bad input: images, each with what must become of its job."""

import io
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from tests.acceptance.catalogue.rows import DONE, INVALID, TOO_MUCH, Media, Refused

EMPTY = Refused(422, "invalid_request")
WIDTH, HEIGHT = 40, 24
ORIENTATION = 0x0112
BIG_TEXT_BYTES = 2**28


def list_images() -> Iterator[Media]:
    jpeg, png = save("JPEG"), save("PNG")
    yield Media(1, "nothing", "a.png", b"", EMPTY)
    yield Media(2, "words", "a.png", b"just some words\n" * 50, INVALID)
    yield Media(3, "a page named .jpg", "a.jpg", b"<!doctype html><title>404</title>", INVALID)
    yield Media(4, "half a JPEG", "a.jpg", jpeg[: len(jpeg) // 2], INVALID)
    yield Media(5, "half a PNG", "a.png", png[: len(png) // 2], INVALID)
    yield Media(6, "a PNG with a wrong checksum", "a.png", damage(png, b"IDAT", 6), INVALID)
    yield Media(7, "more pixels than are taken", "a.png", png_of(10_000, 10_000), TOO_MUCH)
    yield Media(8, "a row of two thousand million", "a.png", png_of(2**31 - 1, 1), TOO_MUCH)
    yield Media(9, "no pixels", "a.png", png_of(0, 0), INVALID)
    yield Media(10, "a line of pixels", "a.png", save("PNG", size=(1, 20_000)), DONE)
    yield Media(11, "PostScript", "a.eps", save("EPS"), INVALID)
    yield Media(12, "SVG that names a file", "a.svg", SVG, INVALID)
    yield Media(13, "an animated GIF", "a.gif", animate("GIF", 50), INVALID)
    yield Media(14, "an animated PNG", "a.png", animate("PNG", 5), INVALID)
    yield Media(15, "ten thousand frames of WebP", "a.webp", repeat_frames(animate("WEBP", 2), 10_000), INVALID)
    yield Media(16, "a TIFF in tiles that stand over", "a.tif", tiled_tiff(), DONE)
    yield Media(16, "a TIFF whose tiles lie elsewhere", "a.tif", tiled_tiff(offset=2**31), INVALID)
    yield Media(17, "BigTIFF", "a.tif", save("TIFF", big_tiff=True), DONE)
    yield Media(18, "CMYK", "a.jpg", save("JPEG", mode="CMYK"), DONE)
    yield Media(19, "a palette with transparency", "a.png", save("PNG", mode="P", transparency=0), DONE)
    yield Media(20, "one bit", "a.png", save("PNG", mode="1"), DONE)
    for orientation in (1, 2, 3, 4, 5, 6, 7, 8, 99):
        yield Media(21, f"EXIF orientation {orientation}", "a.jpg", turned(orientation), DONE)
    yield Media(22, "a text of a quarter gigabyte", "a.png", with_chunk(png, b"zTXt", big_text()), INVALID)
    yield Media(23, "a broken colour profile", "a.jpg", save("JPEG", icc_profile=b"no profile" * 20), DONE)
    yield Media(24, "a JPEG that is a script too", "a.jpg", jpeg + b"<script>alert(1)</script>", DONE)
    yield Media(25, "HEIC", "a.heic", ftyp(b"heic"), INVALID)
    yield Media(25, "AVIF", "a.avif", ftyp(b"avif"), INVALID)
    yield Media(25, "JPEG XL", "a.jxl", b"\xff\x0a" + bytes(100), INVALID)
    yield Media(26, "a JPEG that is called PNG", "a.png", jpeg, DONE)
    yield Media(27, "OpenEXR", "a.exr", b"\x76\x2f\x31\x01" + bytes(100), INVALID)


SVG = b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg>&x;</svg>'


def draw(size: tuple[int, int] = (WIDTH, HEIGHT), *, mode: str = "RGB", seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def save(kind: str, *, size: tuple[int, int] = (WIDTH, HEIGHT), mode: str = "RGB", **options: object) -> bytes:
    return _written(lambda file: draw(size, mode=mode).save(file, kind, **options))


def animate(kind: str, frames: int) -> bytes:
    first, *others = (draw(seed=number) for number in range(frames))
    return _written(lambda file: first.save(file, kind, save_all=True, append_images=others))


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return save("JPEG", exif=exif)


def damage(data: bytes, mark: bytes, after: int) -> bytes:
    wounded = bytearray(data)
    wounded[data.index(mark) + after] ^= 0xFF
    return bytes(wounded)


def png_of(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds next to nothing."""
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + _chunk(b"IDAT", zlib.compress(bytes(100))) + _chunk(b"IEND", b"")


def with_chunk(png: bytes, kind: bytes, data: bytes) -> bytes:
    """Before the pixels."""
    place = png.index(b"IDAT") - 4
    return png[:place] + _chunk(kind, data) + png[place:]


def big_text() -> bytes:
    packer, block = zlib.compressobj(1), bytes(2**20)
    packed = [packer.compress(block) for _ in range(BIG_TEXT_BYTES // len(block))]
    return b"Comment\0\0" + b"".join(packed) + packer.flush()


def repeat_frames(webp: bytes, frames: int) -> bytes:
    """An animation whose last frame comes so often."""
    last = webp.rindex(b"ANMF")
    body = webp[8:last] + webp[last:] * frames
    return b"RIFF" + struct.pack("<I", len(body)) + body


def tiled_tiff(*, offset: int | None = None) -> bytes:
    """20×20 gray pixels in four tiles of 16×16, which stand over at two sides; or said to lie at `offset`."""
    side, tile = 20, 16
    tiles = [bytes([60 * number + 20]) * tile * tile for number in range(4)]
    begin = 8
    places = [begin + number * tile * tile for number in range(4)] if offset is None else [offset] * 4
    arrays_at = begin + sum(map(len, tiles))
    arrays = struct.pack("<4I", *places) + struct.pack("<4I", *[tile * tile] * 4)
    short, long = 3, 4
    entries = [
        (256, short, 1, side), (257, short, 1, side), (258, short, 1, 8), (259, short, 1, 1), (262, short, 1, 1),
        (277, short, 1, 1), (322, short, 1, tile), (323, short, 1, tile), (324, long, 4, arrays_at),
        (325, long, 4, arrays_at + 16),
    ]  # fmt: skip
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *each) for each in entries) + bytes(4)
    return struct.pack("<2sHI", b"II", 42, arrays_at + len(arrays)) + b"".join(tiles) + arrays + directory


def ftyp(brand: bytes) -> bytes:
    return struct.pack(">I4s4s4s4s", 20, b"ftyp", brand, bytes(4), brand) + bytes(100)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _written(write: Callable[[io.BytesIO], None]) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()
