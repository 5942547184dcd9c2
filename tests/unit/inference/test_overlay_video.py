"""Overlay videos: what a browser plays, on the source's times, joined without decoding."""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from numpy.typing import NDArray

from shared.inference.errors import InvalidMedia
from shared.inference.overlay_video import LONGEST_SIDE, OverlayVideo, OverlayVideoWriter, join_overlays, read_header

Picture = NDArray[np.uint8]

VIDEO_CLOCK = Fraction(1, 90000)
SQUARE = 16


def numbered(number: int, size: tuple[int, int] = (96, 64)) -> Picture:
    """A picture whose number stands in it as eight black or white squares, the lowest bit first."""
    picture = np.full((size[1], size[0], 3), 128, dtype=np.uint8)
    for bit in range(8):
        left = (bit % 4) * SQUARE
        top = (bit // 4) * SQUARE
        picture[top : top + SQUARE, left : left + SQUARE] = 255 * (number >> bit & 1)
    return picture


def read_number(picture: Picture) -> int:
    middles = [picture[(bit // 4) * SQUARE + 8, (bit % 4) * SQUARE + 8].mean() > 128 for bit in range(8)]
    return sum(1 << bit for bit, white in enumerate(middles) if white)


def write(path: Path, pictures: Sequence[Picture], times: Sequence[int], *, time_base: Fraction = VIDEO_CLOCK) -> Path:
    height, width, _ = pictures[0].shape
    with OverlayVideoWriter(path, (width, height), time_base) as video:
        for picture, pts in zip(pictures, times, strict=True):
            video.write(picture, pts)
    return path


def cut(times: Sequence[int], size: int, folder: Path) -> list[Path]:
    """Parts of `size` numbered pictures each."""
    pictures = [numbered(number) for number in range(len(times))]
    return [
        write(folder / f"{start}.mp4", pictures[start : start + size], times[start : start + size])
        for start in range(0, len(times), size)
    ]


def decode(path: Path) -> list[tuple[int, Picture]]:
    """Time on the file's own clock, and RGB."""
    with av.open(path) as container:
        return [
            (frame.pts or 0, frame.to_ndarray(format="rgb24").astype(np.uint8)) for frame in container.decode(video=0)
        ]


def find_boxes(data: bytes) -> list[bytes]:
    """The kinds of the file's outermost boxes, in order."""
    kinds, place = [], 0
    while place < len(data):
        kinds.append(data[place + 4 : place + 8])
        place += int.from_bytes(data[place : place + 4])
    return kinds


# --- times ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 30])
@pytest.mark.parametrize(
    "times",
    [
        [3003 * number for number in range(30)],
        [number * 3000 + number**3 for number in range(30)],
        [-20_000 + 3003 * number for number in range(30)],
        [10**12 + 3003 * number for number in range(30)],
    ],
    ids=["constant", "varying", "from below 0", "from late on"],
)
def test_joined_parts_show_every_picture_at_its_time(tmp_path: Path, times: list[int], size: int) -> None:
    path = tmp_path / "joined.mp4"
    join_overlays(cut(times, size, tmp_path), path)
    found = decode(path)
    assert [read_number(picture) for _, picture in found] == list(range(30))
    assert [read_header(path).first_pts + tick for tick, _ in found] == times


@pytest.mark.parametrize(
    ("time_base", "timescale"),
    [
        (Fraction(1, 90000), 90000),
        (Fraction(1001, 30000), 30000),
        (Fraction(1, 1000), 1000),
        (Fraction(1, 10**6), 10**6),
        (Fraction(1), 1),
        (Fraction(1, 10**9), 90000),
    ],
)
def test_the_clock_of_the_file_is_the_sources_where_the_format_can(
    tmp_path: Path, time_base: Fraction, timescale: int
) -> None:
    times = [5, 6, 8, 11]
    path = write(tmp_path / "overlay.mp4", [numbered(number) for number in range(4)], times, time_base=time_base)
    with av.open(path) as container:
        assert container.streams.video[0].time_base == Fraction(1, timescale)
    seconds = [Fraction(tick, timescale) for tick, _ in decode(path)]
    assert all(
        abs(found - (pts - 5) * time_base) * timescale <= (3 if timescale == 90000 else 0)
        for found, pts in zip(seconds, times, strict=True)
    )


def test_the_last_picture_stays_as_long_as_the_one_before(tmp_path: Path) -> None:
    join_overlays(cut([0, 9000, 27000, 54000], 3, tmp_path), tmp_path / "joined.mp4")
    with av.open(tmp_path / "joined.mp4") as container:
        assert [packet.duration for packet in container.demux() if packet.size] == [9000, 18000, 27000, 27000]


# --- what a browser needs ------------------------------------------------------------------------------------------


def test_it_is_high_profile_h264_of_bt709_with_nothing_to_wait_for(tmp_path: Path) -> None:
    parts = cut([3003 * number for number in range(12)], 5, tmp_path)
    join_overlays(parts, tmp_path / "joined.mp4")
    for path in (*parts, tmp_path / "joined.mp4"):
        assert find_boxes(path.read_bytes()) == [b"ftyp", b"moov", b"free", b"mdat"]
        with av.open(path) as container:
            [stream] = container.streams.video
            context = stream.codec_context
            assert (context.name, context.profile, context.pix_fmt, stream.codec_tag) == (
                "h264",
                "High",
                "yuv420p",
                "avc1",
            )
            assert (context.color_primaries, context.color_trc) == (ColorPrimaries.BT709, ColorTrc.BT709)
            assert (context.colorspace, context.color_range) == (Colorspace.ITU709, ColorRange.MPEG)
            packets = [packet for packet in container.demux() if packet.size]
            assert packets[0].is_keyframe
            assert all(packet.pts == packet.dts for packet in packets)


def test_a_player_can_jump_every_two_seconds(tmp_path: Path) -> None:
    times = [9000 * number for number in range(55)]
    path = write(tmp_path / "overlay.mp4", [numbered(number) for number in range(55)], times)
    with av.open(path) as container:
        keyframes = [packet.pts for packet in container.demux() if packet.size and packet.is_keyframe]
    assert keyframes == [0, 180_000, 360_000]


def test_opencv_shows_every_picture_in_order(tmp_path: Path) -> None:
    join_overlays(cut([3003 * number for number in range(12)], 5, tmp_path), tmp_path / "joined.mp4")
    capture = cv2.VideoCapture(str(tmp_path / "joined.mp4"), cv2.CAP_FFMPEG)
    for number in range(12):
        found, picture = capture.read()
        assert found
        assert read_number(picture.astype(np.uint8)) == number
    assert not capture.read()[0]


@pytest.mark.parametrize("colour", [(230, 30, 30), (30, 200, 60), (40, 60, 220), (255, 255, 255), (0, 0, 0)])
def test_colours_are_those_of_the_picture(tmp_path: Path, colour: tuple[int, int, int]) -> None:
    picture = np.full((64, 96, 3), colour, dtype=np.uint8)
    path = write(tmp_path / "overlay.mp4", [picture], [0])
    with av.open(path) as container:
        [frame] = container.decode(video=0)
        found = frame.to_ndarray(format="rgb24", src_colorspace="ITU709")
    assert np.abs(found.astype(int) - colour).max() <= 4


@pytest.mark.parametrize(
    ("size", "stored"),
    [
        ((97, 65), (98, 66)),
        ((96, 65), (96, 66)),
        ((1, 1), (2, 2)),
        ((2, 3000), (2, LONGEST_SIDE)),
        ((3840, 2160), (1920, 1080)),
        ((1081, 1921), (1080, 1920)),
    ],
)
def test_sides_are_even_and_no_longer_than_the_limit(
    tmp_path: Path, size: tuple[int, int], stored: tuple[int, int]
) -> None:
    path = write(tmp_path / "overlay.mp4", [np.full((size[1], size[0], 3), 200, dtype=np.uint8)] * 2, [0, 3003])
    assert read_header(path) == OverlayVideo(stored, VIDEO_CLOCK, 0)
    for _, picture in decode(path):
        assert picture.shape == (stored[1], stored[0], 3)
        assert np.abs(picture.astype(int) - 200).max() <= 4


def test_what_is_added_to_an_odd_side_moves_no_pixel(tmp_path: Path) -> None:
    path = write(tmp_path / "overlay.mp4", [numbered(0b10100101, (97, 65))], [0])
    [(_, picture)] = decode(path)
    assert np.abs(picture[:65, :97].astype(int) - numbered(0b10100101, (97, 65))).mean() < 4


# --- the same again ------------------------------------------------------------------------------------------------


def test_the_same_pictures_make_the_same_file(tmp_path: Path) -> None:
    times = [3003 * number for number in range(20)]
    files = []
    for name in ("one", "other"):
        folder = tmp_path / name
        folder.mkdir()
        parts = cut(times, 6, folder)
        join_overlays(parts, folder / "joined.mp4")
        files.append([path.read_bytes() for path in (*parts, folder / "joined.mp4")])
    assert files[0] == files[1]


# --- joining -------------------------------------------------------------------------------------------------------


def test_a_part_is_needed_only_while_it_is_its_turn(tmp_path: Path) -> None:
    def come_and_go() -> Iterator[Path]:
        for number in range(4):
            path = write(tmp_path / "part.mp4", [numbered(number)], [3003 * number])
            yield path
            path.unlink()

    join_overlays(come_and_go(), tmp_path / "joined.mp4")
    assert [read_number(picture) for _, picture in decode(tmp_path / "joined.mp4")] == [0, 1, 2, 3]


def test_parts_of_another_kind_or_order_are_refused_by_name(tmp_path: Path) -> None:
    sound = write(tmp_path / "sound.mp4", [numbered(0), numbered(1)], [0, 3003])
    others = {
        "size": write(tmp_path / "size.mp4", [numbered(2, (64, 96))], [9000]),
        "time base": write(tmp_path / "clock.mp4", [numbered(2)], [9000], time_base=Fraction(1, 1000)),
        "come after": write(tmp_path / "order.mp4", [numbered(2)], [3003]),
        "not come": write(tmp_path / "before.mp4", [numbered(2)], [-1]),
    }
    for reason, other in others.items():
        with pytest.raises(InvalidMedia, match=rf"Part 1 \({other.name}\).*{reason}"):
            join_overlays([sound, other], tmp_path / "joined.mp4")
        assert not (tmp_path / "joined.mp4").exists()


def test_a_part_cut_short_is_refused_by_name(tmp_path: Path) -> None:
    one, two = cut([3003 * number for number in range(12)], 6, tmp_path)
    whole = two.read_bytes()
    for length in range(0, len(whole), 61):
        two.write_bytes(whole[:length])
        with pytest.raises(InvalidMedia, match=r"Part 1 \(6.mp4\)"):
            join_overlays([one, two], tmp_path / "joined.mp4")


def test_nothing_cannot_be_joined(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no parts"):
        join_overlays([], tmp_path / "joined.mp4")


# --- what is refused -----------------------------------------------------------------------------------------------


def test_only_rgb_of_the_size_in_order_of_time_is_taken_and_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "overlay.mp4"
    for picture, pts, reason in (
        (numbered(1, (64, 96)), 1, "uint8"),
        (numbered(1)[:, :, 0], 1, "uint8"),
        (numbered(1), 0, "come after"),
        (numbered(1), 2**31, "stays"),
    ):
        with pytest.raises(ValueError, match=reason):
            write(path, [numbered(0), picture], [0, pts])
        assert not path.exists()


def test_a_video_has_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "overlay.mp4"
    path.write_bytes(b"an earlier attempt")
    with pytest.raises(ValueError, match="at least one"), OverlayVideoWriter(path, (96, 64), VIDEO_CLOCK):
        pass
    assert not path.exists()


@pytest.mark.parametrize("data", [b"", b"no video", bytes(100)])
def test_what_is_no_video_is_invalid_media(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "overlay.mp4"
    path.write_bytes(data)
    with pytest.raises(InvalidMedia):
        read_header(path)
