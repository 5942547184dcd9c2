"""Mask videos: lossless and on time, read alike by others, and never wrong in silence."""

from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from av.video.reformatter import ColorRange
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.inference.errors import InvalidMedia
from shared.inference.mask_video import MaskVideo, MaskVideoWriter, read_header, read_masks
from tests.unit.inference.mask_videos import (
    MILLISECONDS,
    VIDEO_CLOCK,
    Mask,
    Size,
    assert_holds,
    blobs,
    copy_packets,
    noise,
    write,
)

# --- what goes in comes out ----------------------------------------------------------------------------------------


@given(st.integers(1, 70), st.integers(1, 70), st.integers(0, 1000), st.booleans())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_masks_come_back_bit_for_bit(tmp_path: Path, width: int, height: int, seed: int, noisy: bool) -> None:
    make = noise if noisy else blobs
    masks = [make((width, height), seed + number) for number in range(3)]
    path = write(tmp_path / "masks.mkv", masks)
    assert_holds(path, masks)
    assert read_header(path) == MaskVideo((width, height), MILLISECONDS)


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 288), (2, 1), (353, 1), (2, 1000), (353, 289), (1918, 1079), (3840, 2160), (8192, 4097)]
)
def test_no_size_is_too_odd(tmp_path: Path, size: Size) -> None:
    masks = [blobs(size, 1), blobs(size, 2)]
    assert_holds(write(tmp_path / "masks.mkv", masks), masks)


def test_a_mask_that_is_a_view_of_another_array_is_written_as_it_looks(tmp_path: Path) -> None:
    mask = noise((60, 40), 1).T[::2, ::-1]
    assert_holds(write(tmp_path / "masks.mkv", [mask]), [mask])


def test_the_same_masks_make_the_same_file(tmp_path: Path) -> None:
    masks = [blobs((400, 300), number) for number in range(3)]
    one = write(tmp_path / "one.mkv", masks).read_bytes()
    assert write(tmp_path / "other.mkv", masks).read_bytes() == one
    assert write(tmp_path / "threads.mkv", masks, threads=2).read_bytes() == one
    assert_holds(tmp_path / "threads.mkv", masks)


@pytest.mark.parametrize(
    ("time_base", "times"),
    [
        (VIDEO_CLOCK, [0, 3003, 3004, 3005, 90000, 90001]),
        (VIDEO_CLOCK, [10**12, 10**12 + 1, 3 * 10**12]),
        (VIDEO_CLOCK, [-6006, -1, 0, 3003]),
        (Fraction(1001, 30000), [7, 8, 1000, 10**9]),
        (Fraction(1, 10**9), [1, 2, 2**61]),
        (Fraction(1), [0, 2**32]),
    ],
)
def test_times_are_kept_to_the_tick(tmp_path: Path, time_base: Fraction, times: list[int]) -> None:
    masks = [noise((8, 6), number) for number in range(len(times))]
    path = write(tmp_path / "masks.mkv", masks, times, time_base=time_base)
    assert [pts for pts, _ in read_masks(path)] == times
    assert read_header(path).time_base == time_base


# --- others --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 16), (256, 2), (37, 53), (640, 360)])
def test_opencv_reads_the_same_ids(tmp_path: Path, size: Size) -> None:
    ids = np.resize(np.arange(256, dtype=np.uint8), size[::-1])
    masks = [ids, ids[::-1], blobs(size, 1)]
    capture = cv2.VideoCapture(str(write(tmp_path / "masks.mkv", masks)), cv2.CAP_FFMPEG)
    for mask in masks:
        found, picture = capture.read()
        assert found
        assert np.array_equal(picture, np.repeat(mask[:, :, None], 3, axis=2))
    assert not capture.read()[0]


def test_pyav_reads_the_same_ids_and_the_time_to_the_millisecond(tmp_path: Path) -> None:
    ids = np.arange(256, dtype=np.uint8).reshape(16, 16)
    path = write(tmp_path / "masks.mkv", [ids, ids.T], [0, 3003], time_base=VIDEO_CLOCK)
    with av.open(path) as container:
        one, other = container.decode(video=0)
        assert one.format.name == "gray"
        assert (one.time, other.time) == (0, 0.033)
        assert np.array_equal(one.to_ndarray(), ids)
        assert np.array_equal(other.to_ndarray(), ids.T)


def test_the_file_says_full_range_and_no_rate(tmp_path: Path) -> None:
    path = write(tmp_path / "masks.mkv", [blobs((40, 30), number) for number in range(3)], [0, 10, 500])
    with av.open(path) as container:
        assert container.streams.video[0].codec_context.color_range == ColorRange.JPEG
        assert container.duration == 500_000


def test_every_frame_stands_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "masks.mkv", [blobs((40, 30), number) for number in range(4)])
    with av.open(path) as container:
        assert [packet.is_keyframe for packet in container.demux() if packet.size] == [True] * 4


# --- damage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [0x01, 0x80])
def test_a_flipped_byte_is_noticed_or_does_no_harm(tmp_path: Path, flip: int) -> None:
    masks = [blobs((9, 7), number) for number in range(2)]
    path = write(tmp_path / "masks.mkv", masks, [1, 3004], time_base=VIDEO_CLOCK)
    sound = path.read_bytes()
    noticed = 0
    for place in range(len(sound)):
        path.write_bytes(sound[:place] + bytes([sound[place] ^ flip]) + sound[place + 1 :])
        try:
            found = list(read_masks(path))
        except InvalidMedia:
            noticed += 1
            continue
        assert [pts for pts, _ in found] == [1, 3004], place
        assert np.array_equal([mask for _, mask in found], masks), place
    assert noticed > 100


def test_a_file_cut_short_is_noticed_or_lacks_no_mask(tmp_path: Path) -> None:
    masks = [blobs((40, 30), number) for number in range(3)]
    path = write(tmp_path / "masks.mkv", masks)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        try:
            assert_holds(path, masks)
        except InvalidMedia:
            continue
        assert length > len(whole) * 0.8


@pytest.mark.parametrize("missing", [0, 1, 2, 3, 4])
def test_a_missing_frame_is_noticed(tmp_path: Path, missing: int) -> None:
    parts = [write(tmp_path / f"{number}.mkv", [noise((9, 7), number)] * 3, [number, 5, 9]) for number in range(2)]
    path = copy_packets(parts[:1], tmp_path / "first.mkv", without=missing) if missing < 3 else parts[0]
    if missing >= 3:
        late = write(tmp_path / "late.mkv", [noise((9, 7), 1)] * 2, [10, 11])
        path = copy_packets([parts[0], late], tmp_path / "joined.mkv", without=missing)
    with pytest.raises(InvalidMedia, match="missing"):
        list(read_masks(path))


def test_a_writer_left_by_an_exception_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    path = tmp_path / "masks.mkv"
    masks = [noise((9, 7), 0), noise((9, 7), 1), noise((7, 9), 2)]
    with pytest.raises(ValueError, match="uint8"):
        write(path, masks)
    with pytest.raises(InvalidMedia):
        list(read_masks(path))


@pytest.mark.parametrize("data", [b"", b"no video", b"\x89PNG\r\n\x1a\n" + bytes(100), b"\x1a\x45\xdf\xa3" + bytes(99)])
def test_what_is_no_video_is_invalid_media(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "masks.mkv"
    path.write_bytes(data)
    for read in (read_header, lambda path: list(read_masks(path))):
        with pytest.raises(InvalidMedia):
            read(path)


def test_a_video_without_a_mask_is_invalid_media(tmp_path: Path) -> None:
    with MaskVideoWriter(tmp_path / "masks.mkv", (9, 7), MILLISECONDS):
        pass
    with pytest.raises(InvalidMedia):
        list(read_masks(tmp_path / "masks.mkv"))


@pytest.mark.parametrize("pixel_format", ["gray", "bgr0"])
def test_a_video_of_others_is_no_mask_video(tmp_path: Path, pixel_format: str) -> None:
    path = tmp_path / "video.mkv"
    with av.open(path, "w") as container:
        stream = container.add_stream("ffv1", rate=25, width=16, height=16, pix_fmt=pixel_format)
        container.mux(stream.encode(av.VideoFrame(16, 16, pixel_format)))
    with pytest.raises(InvalidMedia):
        list(read_masks(path))


def test_a_path_that_leads_nowhere_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        list(read_masks(tmp_path / "masks.mkv"))
    with pytest.raises(FileNotFoundError):
        MaskVideoWriter(tmp_path / "nowhere" / "masks.mkv", (9, 7), MILLISECONDS)


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mask", [np.zeros((7, 9), np.int64), np.zeros((9, 7), np.uint8), np.zeros((7, 9, 1), np.uint8)]
)
def test_only_a_plane_of_bytes_of_the_size_is_a_mask(tmp_path: Path, mask: Mask) -> None:
    with (
        MaskVideoWriter(tmp_path / "masks.mkv", (9, 7), MILLISECONDS) as video,
        pytest.raises(ValueError, match="uint8"),
    ):
        video.write(mask, 0)


@pytest.mark.parametrize("time", [5, 4, -1, 2**32 * 1000 + 1, 2**64])
def test_times_ascend_and_stay_within_reach(tmp_path: Path, time: int) -> None:
    with MaskVideoWriter(tmp_path / "masks.mkv", (9, 7), MILLISECONDS) as video:
        video.write(noise((9, 7), 0), 5)
        with pytest.raises(ValueError, match="time"):
            video.write(noise((9, 7), 0), time)
    assert [pts for pts, _ in read_masks(tmp_path / "masks.mkv")] == [5]


@pytest.mark.parametrize("time_base", [Fraction(0), Fraction(-1, 25), Fraction(1, 2**31)])
def test_a_time_base_is_positive_and_has_31_bits(tmp_path: Path, time_base: Fraction) -> None:
    with pytest.raises(ValueError, match="time base"):
        MaskVideoWriter(tmp_path / "masks.mkv", (9, 7), time_base)


@pytest.mark.parametrize("size", [(0, 7), (9, 0), (-1, 7), (1, 289), (40000, 40000)])
def test_a_size_that_cannot_be_coded_is_refused_at_once(tmp_path: Path, size: Size) -> None:
    with pytest.raises(ValueError, match="masks of"):
        MaskVideoWriter(tmp_path / "masks.mkv", size, MILLISECONDS)
