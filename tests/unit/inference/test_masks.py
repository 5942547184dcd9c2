"""Mask files and pictures: lossless, readable by others, and coloured by their label space."""

import io
import zlib
from collections.abc import Callable

import av
import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from shared.inference.errors import InvalidMedia
from shared.inference.labels import ADE20K, DEMO, VOC
from shared.inference.masks import class_areas, colour, decode_mask, encode_mask, encode_png, overlay


def blobs(height: int, width: int, seed: int) -> NDArray[np.uint8]:
    """A map of regions, as a model gives, with every id possible."""
    rng = np.random.default_rng(seed)
    grid = Image.fromarray(rng.integers(0, 256, (5, 7), dtype=np.uint8))
    return np.array(grid.resize((width, height), Image.Resampling.NEAREST))


@given(st.integers(1, 70), st.integers(1, 70), st.integers(0, 1000), st.booleans())
@settings(max_examples=80, deadline=None)
def test_a_mask_comes_back_bit_for_bit(height: int, width: int, seed: int, noisy: bool) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 256, (height, width), dtype=np.uint8) if noisy else blobs(height, width, seed)
    data = encode_mask(labels)
    assert np.array_equal(decode_mask(data), labels)
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "L", (width, height))
        assert np.array_equal(np.asarray(image), labels)


def read_with_opencv(data: bytes) -> NDArray[np.generic]:
    labels = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_UNCHANGED)
    assert labels is not None
    return labels


def read_with_pillow(data: bytes) -> NDArray[np.generic]:
    with Image.open(io.BytesIO(data)) as image:
        return np.array(image)


def read_with_pyav(data: bytes) -> NDArray[np.generic]:
    with av.open(io.BytesIO(data), "r") as container:
        [frame] = container.decode(video=0)
        assert frame.format.name == "gray"
        return frame.to_ndarray()


@pytest.mark.parametrize("read", [read_with_opencv, read_with_pillow, read_with_pyav])
@pytest.mark.parametrize("size", [(16, 16), (256, 1), (1, 256), (257, 31), (1, 1)])
def test_others_read_the_same_ids(read: Callable[[bytes], NDArray[np.generic]], size: tuple[int, int]) -> None:
    labels = np.resize(np.arange(256, dtype=np.uint8), size)
    found = read(encode_mask(labels))
    assert found.dtype == np.uint8
    assert np.array_equal(found, labels)


def test_a_mask_that_is_a_view_of_another_array_is_encoded_as_it_looks() -> None:
    labels = blobs(40, 60, 1)
    assert np.array_equal(decode_mask(encode_mask(labels.T[::2, ::-1])), labels.T[::2, ::-1])


def test_the_file_of_a_typical_mask_is_small() -> None:
    labels = blobs(1000, 1000, 2)
    assert len(encode_mask(labels)) < labels.size / 100


@pytest.mark.parametrize(
    "labels", [np.zeros((2, 2), dtype=np.int64), np.zeros((2, 2, 1), dtype=np.uint8), np.zeros((0, 4), dtype=np.uint8)]
)
def test_only_a_plane_of_bytes_is_a_mask(labels: NDArray[np.uint8]) -> None:
    with pytest.raises(ValueError, match="uint8"):
        encode_mask(labels)


def test_a_palette_or_rgb_png_is_no_mask() -> None:
    for mode in ("P", "RGB", "1", "LA"):
        buffer = io.BytesIO()
        Image.new(mode, (4, 4)).save(buffer, "PNG")
        with pytest.raises(InvalidMedia, match=mode):
            decode_mask(buffer.getvalue())


def test_a_damaged_mask_is_invalid_media() -> None:
    data = bytearray(encode_mask(blobs(30, 30, 3)))
    data[data.index(b"IDAT") + 8] ^= 0xFF
    for broken in (bytes(data), b"", b"no PNG", bytes(data[:40])):
        with pytest.raises(InvalidMedia):
            decode_mask(broken)


def test_the_chunks_carry_valid_checksums() -> None:
    data = encode_mask(blobs(9, 9, 4))
    place = 8
    while place < len(data):
        length = int.from_bytes(data[place : place + 4])
        body = data[place + 4 : place + 8 + length]
        assert zlib.crc32(body) == int.from_bytes(data[place + 8 + length : place + 12 + length])
        place += 12 + length


def test_areas_count_every_pixel_once() -> None:
    labels = blobs(1300, 17, 5)
    areas = class_areas(labels)
    assert sum(areas.values()) == labels.size
    assert list(areas) == sorted(set(labels.ravel().tolist()))
    assert all(int((labels == class_id).sum()) == pixels for class_id, pixels in areas.items())


@pytest.mark.parametrize("space", [VOC, ADE20K, DEMO], ids=lambda space: str(space.name))
def test_every_class_is_painted_in_its_own_colour(space: type(VOC)) -> None:  # type: ignore[valid-type]
    ids = np.arange(len(space.classes), dtype=np.uint8)[None]
    assert [tuple(pixel) for pixel in colour(ids, space)[0].tolist()] == list(space.palette)


def test_an_id_beyond_the_label_space_is_not_painted_over() -> None:
    with pytest.raises(IndexError):
        colour(np.full((2, 2), 21, dtype=np.uint8), VOC)


def test_an_overlay_tints_classes_and_leaves_the_background() -> None:
    image = np.full((2, 2, 3), 100, dtype=np.uint8)
    labels = np.array([[0, 1], [1, 0]], dtype=np.uint8)
    mixed = overlay(image, labels, VOC, opacity=0.5)
    assert mixed[0, 0].tolist() == [100, 100, 100]
    assert mixed[0, 1].tolist() == [114, 50, 50]


def test_opacity_runs_from_the_image_to_the_colour() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (700, 9, 3), dtype=np.uint8)
    labels = rng.integers(1, 10, (700, 9), dtype=np.uint8)
    assert np.array_equal(overlay(image, labels, DEMO, opacity=0), image)
    assert np.array_equal(overlay(image, labels, DEMO, opacity=1), colour(labels, DEMO))
    with pytest.raises(ValueError, match="opacity"):
        overlay(image, labels, DEMO, opacity=1.5)
    with pytest.raises(ValueError, match="mask"):
        overlay(image, labels[1:], DEMO)


def test_a_preview_is_an_rgb_png() -> None:
    image = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    with Image.open(io.BytesIO(encode_png(image))) as read:
        assert np.array_equal(np.asarray(read), image)
