"""The index of a recording: every frame at its time, whatever the container leaves out or gets wrong."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from av.packet import Packet
from av.video.stream import VideoStream

from shared.inference.chunks import Chunk, plan_chunks
from shared.inference.colors import Colors
from shared.inference.errors import InvalidMedia, MediaLimit
from shared.inference.orientation import Orientation
from shared.inference.probe import probe
from shared.inference.recording import Header, Index, Keyframes, Limits
from tests.recordings import FRAMES, GOP, LIMITS, RATE, draw, encode, numbers, probe_all, read_all, remux

H264 = {"x264-params": f"bframes=2:b-adapt=0:keyint={GOP}:scenecut=0:log-level=none"}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("probe")


@pytest.fixture(scope="session")
def h264(folder: Path) -> Path:
    path = folder / "h264.mp4"
    encode(path, "libx264", options=H264)
    return path


def seconds(index: Index) -> list[Fraction]:
    return [int(time) * index.header.time_base for time in index.times]


# --- what a header says --------------------------------------------------------------------------------------------


def test_the_header_describes_the_recording(h264: Path) -> None:
    header = probe_all(h264).header
    assert (header.format, header.codec, header.pixel_format) == ("mov", "h264", "yuv420p")
    assert header.size == header.upright_size == (96, 64)
    assert header.orientation == Orientation(0, mirrored=False)
    assert header.sample_aspect_ratio == 1
    assert header.seconds == header.declared_seconds == FRAMES / RATE
    assert header.warnings == ()


def test_pixels_that_are_not_square_are_told_and_left_alone(tmp_path: Path) -> None:
    def stretch(stream: VideoStream) -> None:
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)

    encode(tmp_path / "wide.mkv", "mpeg4", frames=2, prepare=stretch)
    index = probe_all(tmp_path / "wide.mkv")
    assert index.header.sample_aspect_ratio == Fraction(4, 3)
    [frame, _] = read_all(tmp_path / "wide.mkv", index)
    assert frame.image is not None
    assert frame.image.shape == (64, 96, 3)


def test_the_name_of_a_file_does_not_matter(h264: Path, tmp_path: Path) -> None:
    path = tmp_path / "recording.avi.txt"
    path.write_bytes(h264.read_bytes())
    assert probe_all(path).header == probe_all(h264.read_bytes()).header == probe_all(h264).header


@pytest.mark.parametrize("name", ["h264.mp4", "h264.mkv", "h264.ts"])
def test_keyframes_are_where_decoding_can_begin(folder: Path, name: str) -> None:
    encode(folder / name, "libx264", options=H264)
    index = probe_all(folder / name)
    assert index.keyframes.number.tolist() == list(range(0, FRAMES, GOP))
    assert index.keyframes.pts.tolist() == index.times[::GOP].tolist()


def test_a_stored_index_is_the_same_and_small(h264: Path) -> None:
    index = probe_all(h264)
    stored = Index.from_bytes(index.to_bytes())
    assert stored.header == index.header
    assert np.array_equal(stored.times, index.times)
    assert np.array_equal(stored.packets, index.packets)
    for name, column in vars(index.keyframes).items():
        assert np.array_equal(getattr(stored.keyframes, name), column)
    assert len(make_index(range(100_000), range(0, 100_000, 250)).to_bytes()) < 50_000


@pytest.mark.parametrize("data", [b"", b"no index", b"PK\x03\x04" + bytes(100)])
def test_other_bytes_are_no_index(data: bytes) -> None:
    with pytest.raises(ValueError, match="index"):
        Index.from_bytes(data)


# --- times ---------------------------------------------------------------------------------------------------------

UNEVEN = [0, 1, 3, 4, 10, 11, 12, 40, 41, 50, 90, 91, 92, 95, 99, 100, 101, 150, 151, 300]


@pytest.mark.parametrize("name", ["uneven.mp4", "uneven.mkv", "uneven.mov", "uneven.flv"])
def test_uneven_times_are_kept(folder: Path, name: str) -> None:
    encode(folder / name, "libx264", frames=len(UNEVEN), times=UNEVEN, options=H264)
    index = probe_all(folder / name)
    found = seconds(index)
    assert [round((time - found[0]) * RATE) for time in found] == UNEVEN
    assert numbers(read_all(folder / name, index, frames=3)) == list(range(len(UNEVEN)))


def test_times_below_zero_are_kept(folder: Path) -> None:
    path = folder / "negative.mkv"
    encode(path, "mpeg4", times=range(-10, FRAMES - 10), container_options={"avoid_negative_ts": "disabled"})
    # Matroska may start below zero within a cluster.
    index = probe_all(path)
    assert np.diff(index.times).tolist() == [1000 // RATE] * (FRAMES - 1)
    assert index.times[0] == -10 * 1000 // RATE
    assert numbers(read_all(path, index, frames=7)) == list(range(FRAMES))


def test_what_an_edit_list_cuts_away_is_no_frame(h264: Path) -> None:
    def begin_before_zero(_: int, packet: "Packet[VideoStream]") -> Iterable["Packet[VideoStream]"]:
        assert packet.pts is not None
        assert packet.dts is not None
        shift = 5 * 12800 // RATE
        packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
        return [packet]

    data = remux(h264, begin_before_zero, container="mp4")
    index = probe_all(data)
    assert index.times[0] == 0
    assert numbers(read_all(data, index)) == list(range(5, FRAMES))
    assert numbers(read_all(data, index, frames=3)) == list(range(5, FRAMES))


@pytest.mark.parametrize(("codec", "options"), [("libx264", H264), ("mpeg4", {"bf": "2"})])
def test_times_that_avi_leaves_out_are_found(folder: Path, codec: str, options: dict[str, str]) -> None:
    path = folder / f"{codec}.avi"
    encode(path, codec, options=options)
    with av.open(path) as container:
        container.flags &= ~1
        assert any(packet.pts is None for packet in container.demux(video=0) if packet.size)
    index = probe_all(path)
    assert np.diff(index.times).tolist() == [1] * (FRAMES - 1)
    assert numbers(read_all(path, index)) == list(range(FRAMES))


def test_of_frames_with_the_same_time_the_last_is_taken(folder: Path) -> None:
    path = folder / "doubled.mkv"
    encode(path, "mjpeg", frames=10, pixel_format="yuvj420p")

    def double(number: int, packet: "Packet[VideoStream]") -> Iterable["Packet[VideoStream]"]:
        if number == 4:
            packet.pts = packet.dts = 3 * 1000 // RATE
        return [packet]

    data = remux(path, double, container="matroska")
    index = probe_all(data)
    assert "1 frames have the time of another" in " ".join(index.header.warnings)
    assert numbers(read_all(data, index)) == [0, 1, 2, 4, 5, 6, 7, 8, 9]


def test_a_clock_that_goes_back_goes_on(folder: Path) -> None:
    path = folder / "part.ts"
    encode(path, "libx264", frames=20, options=H264)
    index = probe_all(path.read_bytes() * 2)
    assert "clock goes back" in " ".join(index.header.warnings)
    assert np.diff(index.times).tolist() == [90000 // RATE] * 39
    for length in (1, 7, 100):
        assert numbers(read_all(path.read_bytes() * 2, index, frames=length)) == [*range(20), *range(20)]


def test_a_recording_that_begins_between_keyframes_has_no_image_until_the_first(folder: Path) -> None:
    path = folder / "whole.ts"
    encode(path, "libx264", options=H264)

    def leave_out(number: int, packet: "Packet[VideoStream]") -> Iterable["Packet[VideoStream]"]:
        return [] if number < 3 else [packet]

    data = remux(path, leave_out, container="mpegts")
    index = probe_all(data)
    for length in (1, 7, 100):
        shown = numbers(read_all(data, index, frames=length))
        assert shown[-(FRAMES - GOP) :] == list(range(GOP, FRAMES))
        assert set(shown[: -(FRAMES - GOP)]) == {None}


# --- what is cut short or lies -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cut.mp4", "cut.mkv", "cut.avi", "cut.ts", "cut.mpg", "cut.flv"])
@pytest.mark.parametrize("share", [0.4, 0.75])
def test_of_a_file_cut_short_the_frames_are_taken_that_are_there(folder: Path, name: str, share: float) -> None:
    codec, options = ("mpeg2video", {}) if name == "cut.mpg" else ("libx264", H264 | {"tune": "zerolatency"})
    moov_first = {"movflags": "faststart"} if name == "cut.mp4" else {}
    encode(folder / name, codec, options=options, size=(192, 128), grain=60, container_options=moov_first)
    whole = (folder / name).read_bytes()
    data = whole[: int(len(whole) * share)]
    index = probe_all(data)
    count = len(index.times)
    assert 0 < count < FRAMES
    if index.header.declared_seconds is not None:
        assert any("cut short" in warning for warning in index.header.warnings)
    assert numbers(read_all(data, index))[:-3] == list(range(count))[:-3]
    assert numbers(read_all(data, index, frames=7)) == numbers(read_all(data, index))


def test_a_duration_that_is_too_short_is_told(h264: Path) -> None:
    data = bytearray(h264.read_bytes())
    # The media header's duration, after its time scale; version 0.
    place = data.index(b"mdhd") + 4 + 16
    data[place : place + 4] = (12800).to_bytes(4, "big")
    index = probe_all(bytes(data))
    assert len(index.times) == FRAMES
    assert index.header.seconds == FRAMES / RATE
    assert index.header.warnings == ("The recording lasts longer than it declares: 1.600 s, not 1.000 s",)


def test_a_duration_that_is_too_long_is_told(folder: Path) -> None:
    encode(folder / "lie.mkv", "mpeg4")
    index = probe_all((folder / "lie.mkv").read_bytes().replace(b"00:00:01.6", b"99:59:59.0"))
    assert len(index.times) == FRAMES
    [warning] = index.header.warnings
    assert warning == "The recording is cut short: it declares 359999.000 s, and 40 frames (1.600 s) are there"


# --- limits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Limits(96 * 64 - 1, 100, 100), "96×64 pixels"),
        (Limits(96 * 64, FRAMES - 1, 100), f"more than the {FRAMES - 1} frames"),
        (Limits(96 * 64, FRAMES, 1), "lasts 2 s; at most 1 s"),
    ],
)
def test_what_is_beyond_a_limit_is_refused(h264: Path, limits: Limits, words: str) -> None:
    with pytest.raises(MediaLimit, match=words):
        probe(h264, limits=limits)


def test_what_is_within_the_limits_is_taken(h264: Path) -> None:
    assert len(probe(h264, limits=Limits(96 * 64, FRAMES, 1.6)).times) == FRAMES


# --- chunks --------------------------------------------------------------------------------------------------------


def make_index(times: Iterable[int], keyframes: Iterable[int]) -> Index:
    """An index without reordering, for planning."""
    pts, keys = np.array(times, np.int64), np.array(keyframes, np.int64)
    header = probe_header()
    rows = Keyframes(keys, pts[keys], pts[keys], keys, keys, np.ones_like(keys))
    return Index(header, pts, np.arange(len(pts)), rows)


def probe_header() -> Header:
    size, upright = (96, 64), Orientation(0, mirrored=False)
    one, colors = Fraction(1), Colors("bt709", full_range=False)
    return Header(
        "mov", "h264", 0, Fraction(1, 1000), size, size, upright, one, "yuv420p", colors, 1.0, None, 10**6, ()
    )


@pytest.mark.parametrize("frames", [1, 2, 10, 25, 60, 250, 1000, 5000])
@pytest.mark.parametrize("gop", [1, 7, 24, 250, 3000])
@pytest.mark.parametrize("exact", [False, True])
def test_chunks_hold_every_frame_once_and_begin_where_decoding_can(frames: int, gop: int, exact: bool) -> None:
    times = [3 * number + number % 2 for number in range(3000)]
    index = make_index(times, range(0, 3000, gop))
    chunks = plan_chunks(index, frames=frames, exact=exact)
    assert [chunk.ordinal for chunk in chunks] == list(range(len(chunks)))
    assert sum(chunk.frames for chunk in chunks) == 3000
    assert chunks[0].start == times[0]
    assert chunks[-1].end is None
    for chunk, following in pairwise(chunks):
        assert chunk.first + chunk.frames == following.first
        assert chunk.end == following.start == times[following.first]
    assert all(chunk.keyframe == times[chunk.first // gop * gop] for chunk in chunks)
    if exact:
        assert {chunk.frames for chunk in chunks[:-1]} <= {frames}
    elif gop <= frames:
        assert all(chunk.keyframe == chunk.start for chunk in chunks)
        assert all(frames / 2 <= chunk.frames <= 1.5 * frames for chunk in chunks[:-1])


@pytest.mark.parametrize(
    ("total", "gop", "expected"),
    [(800, 25, [50] * 16), (70, 70, [70]), (80, 25, [50, 30])],
)
def test_the_last_chunk_is_no_leftover_where_the_end_is_near(total: int, gop: int, expected: list[int]) -> None:
    index = make_index(range(total), range(0, total, gop))
    assert [chunk.frames for chunk in plan_chunks(index, frames=50)] == expected


def test_far_keyframes_make_chunks_grow_so_that_little_is_decoded_twice() -> None:
    index = make_index(range(100_000), [0])
    chunks = plan_chunks(index, frames=100)
    assert len(chunks) < 20
    assert sum(chunk.first + chunk.frames for chunk in chunks) <= 2.1 * 100_000


def test_a_chunk_that_is_less_than_a_frame_is_refused(h264: Path) -> None:
    with pytest.raises(ValueError, match="at least one"):
        plan_chunks(probe_all(h264), frames=0)


def test_a_chunk_is_plain_data(h264: Path) -> None:
    chunks = plan_chunks(probe_all(h264), frames=GOP)
    assert [Chunk(**json.loads(json.dumps(asdict(chunk)))) for chunk in chunks] == chunks


# --- several streams -----------------------------------------------------------------------------------------------


def test_cover_art_is_no_recording(folder: Path) -> None:
    def call_picture(stream: VideoStream) -> None:
        stream.disposition = av.stream.Disposition.attached_pic

    encode(folder / "cover.mp4", "mjpeg", frames=1, pixel_format="yuvj420p", prepare=call_picture)
    with pytest.raises(InvalidMedia, match="no video stream"):
        probe(folder / "cover.mp4", limits=LIMITS)


def test_of_several_streams_the_best_is_read_beside_sound(folder: Path) -> None:
    path = folder / "several.mkv"
    with av.open(path, "w") as output:
        small = output.add_stream("mpeg4", rate=RATE, width=32, height=32, pix_fmt="yuv420p")
        sound = output.add_stream("aac", rate=48000)
        large = output.add_stream("mpeg4", rate=RATE, width=96, height=64, pix_fmt="yuv420p")
        for number in range(20):
            output.mux(small.encode(av.VideoFrame(32, 32, "yuv420p")))
            image = av.VideoFrame.from_ndarray(draw(number))
            output.mux(large.encode(image))
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1920), np.float32), format="fltp", layout="mono")
            silence.sample_rate = 48000
            output.mux(sound.encode(silence))
        for stream in (small, sound, large):
            output.mux(stream.encode(None))
    index = probe_all(path)
    assert index.header.size == (96, 64)
    assert numbers(read_all(path, index, frames=7)) == list(range(20))
