"""Frames of recordings: each the right one, once, at its time, with the same bytes wherever reading began."""

from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange

from shared.inference.chunks import plan_chunks
from shared.inference.frames import read_frames
from shared.inference.recording import Index
from tests.recordings import (
    FRAMES,
    GOP,
    encode,
    numbers,
    probe_all,
    read_all,
)

QUIET = "log-level=none"
OPEN_GOP = {"x264-params": f"open-gop=1:bframes=3:b-adapt=0:keyint={GOP}:scenecut=0:{QUIET}"}
CLOSED_GOP = {"x264-params": f"bframes=2:b-adapt=0:keyint={GOP}:scenecut=0:{QUIET}"}
HEVC = {"x265-params": f"open-gop=1:bframes=3:keyint={GOP}:min-keyint={GOP}:{QUIET}"}
MPEG_B = {"bf": "2", "qscale": "3"}

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
    "mjpeg.avi": ("mjpeg", "avi", {}, "yuvj420p"),
    "prores.mov": ("prores_ks", "mov", {}, "yuv422p10le"),
}


@pytest.fixture(scope="session")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recordings")
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
    return folder


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
                src_colorspace="ITU601",
                dst_colorspace="ITU601",
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


def test_a_chunk_in_the_middle_reads_little_of_a_file_with_an_index(tmp_path: Path) -> None:
    path = tmp_path / "long.mp4"
    encode(path, "mjpeg", container="mp4", frames=60, size=(320, 240), pixel_format="yuvj420p")
    index = probe_all(path)
    chunk = plan_chunks(index, frames=2, exact=True)[20]
    with _CountingFile(path) as file:
        assert numbers(read_frames(file, index, chunk)) == [40, 41]
        assert file.bytes_read < path.stat().st_size / 2


class _CountingFile:
    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self.bytes_read = 0

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.bytes_read += len(data)
        return data

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)

    def __enter__(self) -> "_CountingFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
