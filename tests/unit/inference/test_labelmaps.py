"""Label maps of others are read as ids or refused; they are never guessed at."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared.inference.errors import InvalidMedia
from shared.inference.labelmaps import read_label_map
from shared.inference.labels import VOC

IDS = np.arange(256, dtype=np.uint8).reshape(8, 32)


def test_gray_samples_are_ids(tmp_path: Path) -> None:
    Image.fromarray(IDS).save(tmp_path / "gray.png")
    assert np.array_equal(read_label_map(tmp_path / "gray.png"), IDS)


def test_of_a_palette_the_indices_are_ids_whatever_its_colours(tmp_path: Path) -> None:
    image = Image.fromarray(IDS).convert("L")
    image.putpalette([value for colour in VOC.palette for value in colour] + [0] * (768 - 63))
    image.save(tmp_path / "palette.png")
    with Image.open(tmp_path / "palette.png") as written:
        assert written.mode == "P"
    assert np.array_equal(read_label_map(tmp_path / "palette.png"), IDS)


def test_a_palette_of_few_colours_takes_fewer_bits_and_reads_the_same(tmp_path: Path) -> None:
    image = Image.fromarray(IDS % 4)
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.save(tmp_path / "small.png", bits=2)
    assert (tmp_path / "small.png").read_bytes()[24] == 2
    assert np.array_equal(read_label_map(tmp_path / "small.png"), IDS % 4)


@pytest.mark.parametrize(
    ("mode", "says"),
    [
        ("RGB", "this one colours of 8 bits"),
        ("RGBA", "this one colours and transparency of 8 bits"),
        ("LA", "this one gray and transparency of 8 bits"),
        ("I;16", "this one gray of 16 bits"),
        ("1", "this one gray of 1 bits"),
    ],
)
def test_what_holds_no_ids_is_refused_in_a_sentence(tmp_path: Path, mode: str, says: str) -> None:
    Image.new(mode, (4, 4)).save(tmp_path / "odd.png")
    with pytest.raises(InvalidMedia, match=says):
        read_label_map(tmp_path / "odd.png")


def test_what_is_no_sound_png_is_refused(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (90, 90), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    Image.fromarray(IDS).save(tmp_path / "photo.jpg")
    for content in (b"", b"words", data[:20], data[:30], data[: len(data) // 2], (tmp_path / "photo.jpg").read_bytes()):
        (tmp_path / "broken.png").write_bytes(content)
        with pytest.raises(InvalidMedia):
            read_label_map(tmp_path / "broken.png")
