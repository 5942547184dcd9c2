"""Frames of recordings: each the right one, once, at its time, with the same bytes wherever reading began."""

import io
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace
from av.video.stream import VideoStream

from shared.inference.chunks import plan_chunks
from shared.inference.errors import InvalidMedia
from shared.inference.frames import read_frames
from shared.inference.orientation import Orientation
from shared.inference.recording import Index
from tests.recordings import (
    BLUE,
    FRAMES,
    GOP,
    RATE,
    RED,
    draw,
    encode,
    numbers,
    packet_places,
    probe_all,
    read_all,
    read_number,
)

QUIET = "log-level=none"
OPEN_GOP = {"x264-params": f"open-gop=1:bframes=3:b-adapt=0:keyint={GOP}:scenecut=0:{QUIET}"}
CLOSED_GOP = {"x264-params": f"bframes=2:b-adapt=0:keyint={GOP}:scenecut=0:{QUIET}"}
HEVC = {"x265-params": f"open-gop=1:bframes=3:keyint={GOP}:min-keyint={GOP}:{QUIET}"}
MPEG_B = {"bf": "2", "qscale": "3"}
FIELDS_H264 = {"x264-params": f"tff=1:bframes=2:b-adapt=0:keyint={GOP}:scenecut=0:{QUIET}"}
FIELDS_MPEG2 = MPEG_B | {"flags": "+ildct+ilme"}

KINDS: dict[str, tuple[str, str, dict[str, str], str]] = {
    "h264-open.mp4": ("libx264", "mp4", OPEN_GOP, "yuv420p"),
    "h264-open.mkv": ("libx264", "matroska", OPEN_GOP, "yuv420p"),
    "h264-open.ts": ("libx264", "mpegts", OPEN_GOP, "yuv420p"),
    "h264-closed.mov": ("libx264", "mov", CLOSED_GOP, "yuv420p"),
    "h264-closed.avi": ("libx264", "avi", CLOSED_GOP, "yuv420p"),
    "h264-closed.flv": ("libx264", "flv", CLOSED_GOP, "yuv420p"),
    "h264-refresh.mp4": ("libx264", "mp4", {"x264-params": f"intra-refresh=1:keyint={GOP}:{QUIET}"}, "yuv420p"),
    "h264-10bit.mkv": ("libx264", "matroska", CLOSED_GOP, "yuv420p10le"),
    "h264-single-key.mp4": ("libx264", "mp4", {"x264-params": f"keyint=infinite:scenecut=0:{QUIET}"}, "yuv420p"),
    "h264-fragments.mp4": ("libx264", "mp4", CLOSED_GOP, "yuv420p"),
    "hevc-open.mp4": ("libx265", "mp4", HEVC, "yuv420p"),
    "hevc-open.ts": ("libx265", "mpegts", HEVC, "yuv420p"),
    "hevc-10bit.mkv": ("libx265", "matroska", HEVC, "yuv420p10le"),
    "vp8.webm": ("libvpx", "webm", {"auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "8"}, "yuv420p"),
    "vp9.webm": ("libvpx-vp9", "webm", {"auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "8"}, "yuv420p"),
    "av1.mp4": ("libsvtav1", "mp4", {"preset": "10", "crf": "15"}, "yuv420p"),
    "mpeg4.avi": ("mpeg4", "avi", MPEG_B, "yuv420p"),
    "mpeg4.mp4": ("mpeg4", "mp4", MPEG_B, "yuv420p"),
    "mpeg2.ts": ("mpeg2video", "mpegts", MPEG_B, "yuv420p"),
    "mpeg2.mpg": ("mpeg2video", "mpeg", MPEG_B, "yuv420p"),
    "h264-fields.ts": ("libx264", "mpegts", FIELDS_H264, "yuv420p"),
    "h264-fields.mp4": ("libx264", "mp4", FIELDS_H264, "yuv420p"),
    "mpeg2-fields.ts": ("mpeg2video", "mpegts", FIELDS_MPEG2, "yuv420p"),
    "mpeg2-fields.mp4": ("mpeg2video", "mp4", FIELDS_MPEG2, "yuv420p"),
    "mjpeg.avi": ("mjpeg", "avi", {}, "yuvj420p"),
    "prores.mov": ("prores_ks", "mov", {}, "yuv422p10le"),
}


@pytest.fixture(scope="session")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recordings")
    encode_kinds(folder)
    return folder


def encode_kinds(folder: Path) -> None:
    for name, (codec, container, options, pixel_format) in KINDS.items():
        fragments = {"movflags": "frag_keyframe+empty_moov"} if "fragments" in name else {}
        encode(
            folder / name,
            codec,
            container=container,
            options=options,
            pixel_format=pixel_format,
            container_options=fragments,
        )


def decode_straight(path: Path, index: Index) -> list[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]:
    """What FFmpeg gives that reads the file from its beginning to its end, in the order of showing."""
    images = []
    with av.open(path) as container:
        reformatter = av.video.reformatter.VideoReformatter()
        for frame in container.decode(video=0):
            full = index.header.colors.full_range
            rgb = reformatter.reformat(
                frame,
                format="rgb24",
                src_colorspace=Colorspace.ITU601,
                dst_colorspace=Colorspace.ITU601,
                src_color_range=ColorRange.JPEG if full else ColorRange.MPEG,
                dst_color_range=ColorRange.JPEG,
                interpolation="BICUBIC",
            )
            images.append(np.asarray(rgb.to_ndarray(), np.uint8))
    return images


# --- every frame, once, the right one ------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 3, 7, GOP, 10**6])
@pytest.mark.parametrize("name", KINDS)
def test_every_frame_is_the_right_one_whatever_the_chunks(recordings: Path, name: str, length: int) -> None:
    index = probe_all(recordings / name)
    frames = read_all(recordings / name, index, frames=length)
    assert [frame.number for frame in frames] == list(range(FRAMES))
    assert [frame.pts for frame in frames] == index.times.tolist()
    assert numbers(frames) == list(range(FRAMES))


@pytest.mark.parametrize("length", [1, 3, 7, GOP])
@pytest.mark.parametrize("name", KINDS)
def test_the_bytes_of_a_frame_do_not_depend_on_the_chunk(recordings: Path, name: str, length: int) -> None:
    index = probe_all(recordings / name)
    whole = read_all(recordings / name, index)
    for frame, other in zip(whole, read_all(recordings / name, index, frames=length), strict=True):
        assert frame.image is not None
        assert other.image is not None
        assert np.array_equal(frame.image, other.image)


@pytest.mark.parametrize("name", KINDS)
def test_frames_are_those_of_a_straight_decode(recordings: Path, name: str) -> None:
    index = probe_all(recordings / name)
    straight = decode_straight(recordings / name, index)
    for frame, image in zip(read_all(recordings / name, index), straight, strict=True):
        assert frame.image is not None
        # Other flags of the same conversion: rounding may differ by a step, and chroma at edges.
        assert np.abs(frame.image.astype(int) - image).mean() < 3


def test_threads_change_nothing(recordings: Path) -> None:
    path = recordings / "h264-open.mp4"
    index = probe_all(path)
    [chunk] = plan_chunks(index, frames=10**6)
    threaded = read_frames(path, index, chunk, threads=4)
    for frame, other in zip(read_all(path, index), threaded, strict=True):
        assert np.array_equal(frame.image, other.image)  # type: ignore[arg-type]  # both have one, see above


@pytest.mark.parametrize("every", [2, 5, 20])
@pytest.mark.parametrize("name", ["h264-open.mp4", "hevc-open.ts", "mpeg4.avi", "vp9.webm"])
def test_of_a_selection_each_frame_comes_once_with_the_same_bytes(recordings: Path, name: str, every: int) -> None:
    path = recordings / name
    index = probe_all(path)
    whole = read_all(path, index)
    found = [
        frame
        for chunk in plan_chunks(index, frames=GOP)
        for frame in read_frames(
            path,
            index,
            chunk,
            wanted=[t for t in index.times[::every].tolist() if chunk.start <= t < (chunk.end or t + 1)],
        )
    ]
    assert [frame.number for frame in found] == list(range(0, FRAMES, every))
    for frame in found:
        assert np.array_equal(frame.image, whole[frame.number].image)  # type: ignore[arg-type]


def test_a_stored_index_reads_the_same(recordings: Path) -> None:
    path = recordings / "h264-open.ts"
    index = probe_all(path)
    stored = Index.from_bytes(index.to_bytes())
    assert stored.header == index.header
    assert numbers(read_all(path, stored, frames=7)) == list(range(FRAMES))


@pytest.fixture(scope="session")
def grainy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 frames of some 30 kB each, so that reading less of the file can be seen."""
    path = tmp_path_factory.mktemp("grainy") / "grainy.mov"
    size, options = (320, 240), {"b": "20M", "qmin": "1"}
    encode(path, "mjpeg", container="mov", frames=50, size=size, pixel_format="yuvj420p", grain=60, options=options)
    return path


def test_a_chunk_in_the_middle_reads_little_of_a_file_with_an_index(grainy: Path) -> None:
    index = probe_all(grainy)
    chunk = plan_chunks(index, frames=2, exact=True)[20]
    with _CountingFile(grainy) as file:
        assert numbers(read_frames(file, index, chunk)) == [40, 41]
        assert file.bytes_read < grainy.stat().st_size / 3


class _CountingFile(io.FileIO):
    bytes_read = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size) or b""
        self.bytes_read += len(data)
        return data


# --- pictures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(97, 65), (95, 63), (33, 17)])
def test_odd_sizes_are_kept(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "odd.mkv"
    encode(path, "mjpeg", frames=4, size=size, pixel_format="yuvj444p", options={"strict": "-1"})
    index = probe_all(path)
    assert index.header.size == size
    for frame in read_all(path, index):
        assert frame.image is not None
        assert frame.image.shape == (size[1], size[0], 3)
        assert read_number(frame.image) == frame.number


@pytest.mark.parametrize("clockwise", [0, 90, 180, 270])
@pytest.mark.parametrize("mirrored", [False, True])
def test_frames_are_upright(tmp_path: Path, clockwise: int, mirrored: bool) -> None:
    path = tmp_path / "turned.mp4"

    def turn(stream: VideoStream) -> None:
        # The writer's angle counts the other way.
        stream.set_display_rotation(-clockwise, hflip=mirrored)

    encode(path, "mpeg4", frames=3, size=(96, 64), options={"qscale": "2"}, prepare=turn)
    index = probe_all(path)
    [frame, *_] = read_all(path, index)
    expected = np.rot90(draw(0), -clockwise // 90)
    expected = expected[:, ::-1] if mirrored else expected
    assert index.header.orientation.rotation == clockwise
    assert index.header.orientation.mirrored == mirrored
    assert frame.image is not None
    assert index.header.upright_size == (frame.image.shape[1], frame.image.shape[0])
    assert frame.image.flags.c_contiguous
    assert np.abs(frame.image.astype(int) - expected).mean() < 8


def test_a_telephone_held_upright_stores_its_top_at_the_left() -> None:
    # As such files are: the matrix (0, 1, -1, 0) of "rotate 90", which players turn clockwise.
    assert Orientation(90, mirrored=False).turn(np.array([[[1], [2]]], np.uint8)).tolist() == [[[1]], [[2]]]


@pytest.mark.parametrize(("matrix", "name"), [(1, "bt709"), (5, "bt601"), (6, "bt601"), (9, "bt2020")])
@pytest.mark.parametrize("full", [False, True])
def test_colours_come_back_by_the_matrix_and_range_they_were_stored_with(
    tmp_path: Path, matrix: int, name: str, full: bool
) -> None:
    path = tmp_path / "colours.mkv"
    encode_colours(path, matrix, full)
    index = probe_all(path)
    assert (index.header.colors.matrix, index.header.colors.full_range) == (name, full)
    [frame] = read_all(path, index)
    assert frame.image is not None
    for place, color in (((10, 24), RED), ((10, 72), BLUE)):
        assert np.abs(frame.image[place].astype(int) - color).max() <= 3


def encode_colours(path: Path, matrix: int, full: bool) -> None:
    """One frame whose planes are computed here, by the definition of the matrix, and only stored by FFmpeg."""
    red, blue = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}[matrix]
    r, g, b = np.moveaxis(draw(0).astype(float), 2, 0) / 255
    luma = red * r + (1 - red - blue) * g + blue * b
    planes = [luma, (b - luma) / (2 - 2 * blue), (r - luma) / (2 - 2 * red)]
    scale, offset = ((255, 255), (0, 128)) if full else ((219, 224), (16, 128))
    stored = [np.clip(np.round(p * scale[k > 0] + offset[k > 0]), 0, 255) for k, p in enumerate(planes)]
    with av.open(path, "w") as output:
        stream = output.add_stream("libx264", rate=RATE, width=96, height=64, pix_fmt="yuv444p", options={"qp": "0"})
        stream.codec_context.colorspace = matrix
        stream.codec_context.color_range = ColorRange.JPEG if full else ColorRange.MPEG
        frame = av.VideoFrame.from_ndarray(np.stack(stored).astype(np.uint8), format="yuv444p")
        frame.colorspace, frame.color_range = matrix, ColorRange.JPEG if full else ColorRange.MPEG
        output.mux(stream.encode(frame))
        output.mux(stream.encode())


def test_ten_bits_give_the_colours_of_eight(recordings: Path) -> None:
    path = recordings / "h264-10bit.mkv"
    for frame in read_all(path, probe_all(path)):
        assert frame.image is not None
        assert np.abs(frame.image.astype(int) - draw(frame.number)).mean() < 8


def test_a_recording_that_changes_its_size_keeps_the_first(tmp_path: Path) -> None:
    paths = [tmp_path / "small.ts", tmp_path / "large.ts"]
    for path, size in zip(paths, [(96, 64), (192, 128)], strict=True):
        encode(path, "libx264", container="mpegts", frames=10, size=size, options=CLOSED_GOP)
    joined = b"".join(path.read_bytes() for path in paths)
    index = probe_all(joined)
    frames = read_all(joined, index)
    assert {frame.image.shape for frame in frames if frame.image is not None} == {(64, 96, 3)}
    assert numbers(frames) == [*range(10), *range(10)]


# --- damage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["h264-closed.mov", "h264-closed.avi", "mpeg4.avi", "hevc-open.mp4", "vp9.webm", "av1.mp4", "mjpeg.avi"]
)
@pytest.mark.parametrize("number", [6, 14, 25])
def test_a_destroyed_frame_has_no_image_and_all_that_have_one_are_right(
    recordings: Path, name: str, number: int
) -> None:
    path = recordings / name
    index = probe_all(path)
    whole = read_all(path, index)
    damaged = destroy_packet(path, int(index.packets[number]))
    lost = [frame.image is None for frame in read_all(damaged, index)]
    for length in (1, 7, 10**6):
        frames = read_all(damaged, index, frames=length)
        assert [frame.image is None for frame in frames] == lost
        assert frames[number].image is None
        assert frames[number].problem
        for frame in frames:
            assert frame.image is None or np.array_equal(frame.image, whole[frame.number].image)  # type: ignore[arg-type]
        # Nothing before the keyframe and after the next one rests on it.
        assert all(frame.image is not None for frame in frames if abs(frame.number - number) > 2 * GOP - 4)


def destroy_packet(path: Path, packet: int) -> bytes:
    place, size = packet_places(path)[packet]
    data = bytearray(path.read_bytes())
    head = 8 if path.suffix == ".webm" else 0
    data[place + head : place + size] = b"\xff" * (size - head)
    return bytes(data)


def test_trouble_with_the_source_is_the_sources_and_no_end_of_the_recording(grainy: Path) -> None:
    index = probe_all(grainy)
    [chunk] = plan_chunks(index, frames=10**6)
    with _FailingFile(grainy) as file:
        frames = read_frames(file, index, chunk)
        next(frames)
        file.failing = True
        with pytest.raises(ConnectionError):
            list(frames)


class _FailingFile(io.FileIO):
    failing = False

    def read(self, size: int | None = -1) -> bytes:
        if self.failing:
            raise ConnectionError("storage has gone away")
        return super().read(size) or b""


def test_another_file_is_not_read_as_if_it_were_the_indexed_one(recordings: Path) -> None:
    index = probe_all(recordings / "h264-open.mp4")
    [chunk] = plan_chunks(index, frames=10**6)
    for other in ("h264-open.mkv", "mpeg4.mp4"):
        with pytest.raises(InvalidMedia, match="not the one"):
            list(read_frames(recordings / other, index, chunk))


def test_chunks_and_times_that_are_not_the_indexs_are_refused(recordings: Path) -> None:
    path = recordings / "mjpeg.avi"
    index = probe_all(path)
    chunk = plan_chunks(index, frames=10)[1]
    with pytest.raises(ValueError, match="chunk"):
        list(read_frames(path, index, replace(chunk, start=chunk.start + 1)))
    for wanted in ([0], [12, 11], [11, 11], [40], [chunk.end]):
        with pytest.raises(ValueError, match="times"):
            list(read_frames(path, index, chunk, wanted=wanted))  # type: ignore[arg-type]
    assert list(read_frames(path, index, chunk, wanted=[])) == []
