"""Recordings from strangers: what is none is refused with a stable sentence, and nothing but the file is opened."""

import io
import os
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from shared.inference.errors import InvalidMedia, MediaLimit
from shared.inference.probe import probe
from shared.inference.recording import Limits
from tests.recordings import (
    FRAMES,
    LIMITS,
    box,
    encode,
    make_sound,
    numbers,
    open_source,
    point_elsewhere,
    probe_all,
    read_all,
)

UNKNOWN = "no recording of a known container"


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostile") / "clip.mp4"
    encode(path, "mpeg4", options={"bf": "2"})
    return path


@pytest.fixture(scope="session")
def secret(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound recording beside the one that was sent, which must stay closed."""
    path = tmp_path_factory.mktemp("secret") / "secret.ts"
    encode(path, "mpeg4", container="mpegts", frames=10)
    return path


@contextmanager
def watching_files(path: Path) -> Iterator[list[str]]:
    """What is done with `path` meanwhile: opened by Python, by FFmpeg (seen by the time of reading), or still open."""
    seen: list[str] = []
    active = True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if active and event == "open" and str(arguments[0]) == str(path):
            seen.append("opened by Python")

    sys.addaudithook(hook)
    os.utime(path, (1, path.stat().st_mtime))
    yield seen
    active = False
    if path.stat().st_atime != 1:
        seen.append("read")


# --- what is no recording ------------------------------------------------------------------------------------------


def test_an_empty_file_is_refused() -> None:
    with pytest.raises(InvalidMedia, match="is empty"):
        probe_all(b"")


@pytest.mark.parametrize("data", [b"\0", b"\0" * 5000, b"hello", b"<html>" * 200, b"%PDF-1.7" + bytes(1000), b"G" * 99])
def test_what_is_no_recording_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidMedia, match=UNKNOWN):
        probe_all(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF"])
def test_a_still_image_is_refused_whatever_its_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "image.mp4"
    Image.new("RGB", (64, 48)).save(path, kind)
    with pytest.raises(InvalidMedia, match=UNKNOWN):
        probe(path, limits=LIMITS)


@pytest.mark.parametrize("brand", [b"avif", b"heic", b"mif1"])
def test_a_still_image_in_a_container_of_recordings_is_refused(brand: bytes) -> None:
    with pytest.raises(InvalidMedia, match="still image"):
        probe_all(box(b"ftyp", brand, bytes(4), brand) + bytes(100))


PLAYLISTS = {
    "m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{path}\n#EXT-X-ENDLIST\n",
    "m3u8-url": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile://{path}\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile '{path}'\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><BaseURL>{path}</BaseURL></MPD>',
    "lavfi": "movie={path}",
    "rtsp": "RTSPtext\nrtsp://127.0.0.1/{path}\n",
}


@pytest.mark.parametrize("kind", PLAYLISTS)
@pytest.mark.parametrize("name", ["clip.mp4", "clip.m3u8", "clip.ts"])
def test_a_text_that_names_another_file_opens_nothing(tmp_path: Path, secret: Path, kind: str, name: str) -> None:
    path = tmp_path / name
    path.write_text(PLAYLISTS[kind].format(path=secret))
    with watching_files(secret) as seen, pytest.raises(InvalidMedia, match=UNKNOWN):
        probe(path, limits=LIMITS)
    assert not seen


@pytest.mark.parametrize("kind", [b"url ", b"alis"])
@pytest.mark.parametrize("named", ["absolute", "relative"])
def test_a_mov_whose_frames_lie_in_another_file_opens_nothing(
    clip: Path, tmp_path: Path, kind: bytes, named: str
) -> None:
    # The same file without its frames, which stand beside it at the same places.
    beside = tmp_path / "frames.mp4"
    beside.write_bytes(clip.read_bytes())
    target = str(beside) if named == "absolute" else beside.name
    path = tmp_path / "refers.mov"
    data = point_elsewhere(clip.read_bytes(), reference(kind, target))
    begin, end = data.index(b"mdat") + 4, data.index(b"moov") - 4
    path.write_bytes(data[:begin] + bytes(end - begin) + data[end:])
    with watching_files(beside) as seen, pytest.raises(InvalidMedia):
        probe(path, limits=LIMITS)
    assert not seen
    # The trap is a real one: where FFmpeg is allowed to follow such a reference, it does.
    if kind == b"alis":
        with av.open(path, options={"enable_drefs": "1", "use_absolute_path": "1"}) as followed:
            assert len(list(followed.decode(video=0))) == FRAMES


def reference(kind: bytes, target: str) -> bytes:
    """A data reference that is not to the file itself."""
    if kind == b"url ":
        return box(kind, bytes(4), target.encode() + b"\0")
    name = Path(target).name.encode()
    record = bytearray(150)
    record[4:8] = struct.pack(">HH", 150, 2)
    record[50 : 51 + len(name)] = bytes([len(name)]) + name
    # How many folders up and down; none where only the whole path, tag 2, leads there.
    record[130:134] = struct.pack(">hh", -1, -1) if target.startswith("/") else struct.pack(">hh", 1, 1)
    text = target.encode()
    tagged = struct.pack(">HH", 2, len(text)) + text + bytes(len(text) % 2) + struct.pack(">hH", -1, 0)
    return box(kind, bytes(4), bytes(record), tagged)


def test_sound_alone_is_refused() -> None:
    with pytest.raises(InvalidMedia, match="no video stream"):
        probe_all(make_sound())


@pytest.mark.parametrize("codec", ["ffv1", "huffyuv", "wmv2"])
def test_a_codec_that_is_not_listed_is_refused(tmp_path: Path, codec: str) -> None:
    pixel_format = "yuv422p" if codec == "huffyuv" else "yuv420p"
    encode(tmp_path / "odd.avi", codec, frames=2, pixel_format=pixel_format)
    with pytest.raises(InvalidMedia, match="codec is none of those"):
        probe(tmp_path / "odd.avi", limits=LIMITS)


# --- what is damaged -----------------------------------------------------------------------------------------------


def test_a_movie_without_its_header_is_refused(clip: Path) -> None:
    data = clip.read_bytes()
    with pytest.raises(InvalidMedia):
        probe_all(data[: data.index(b"moov") - 4])


def test_a_recording_of_rubbish_is_refused(clip: Path) -> None:
    data = bytearray(clip.read_bytes())
    begin, end = data.index(b"mdat") + 4, data.index(b"moov") - 4
    data[begin:end] = b"\xff" * (end - begin)
    with pytest.raises(InvalidMedia, match="No frame of the recording can be decoded"):
        probe_all(bytes(data))


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.ts", "a.mpg", "a.flv"])
def test_random_damage_gives_frames_or_one_of_two_errors(tmp_path: Path, name: str) -> None:
    codec = {"a.mpg": "mpeg2video", "a.flv": "libx264"}.get(name, "mpeg4")
    encode(tmp_path / name, codec, frames=15)
    whole = (tmp_path / name).read_bytes()
    random, sentences = np.random.default_rng(7), set[str]()
    for _ in range(40):
        data = bytearray(whole)
        for place in random.integers(0, len(data), 1 + int(random.integers(0, 30))):
            data[place] = random.integers(0, 256)
        try:
            index = probe_all(bytes(data))
            frames = read_all(bytes(data), index, frames=4)
        except (InvalidMedia, MediaLimit) as error:
            sentences.add(str(error))
            continue
        assert [frame.pts for frame in frames] == index.times.tolist()
        assert (np.diff(index.times) > 0).all()
    assert all(sentence.startswith(("The ", "No ")) for sentence in sentences)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.ts", "a.mpg"])
def test_a_file_cut_anywhere_gives_frames_or_invalid_media(tmp_path: Path, name: str) -> None:
    encode(tmp_path / name, "mpeg2video" if name == "a.mpg" else "mpeg4", frames=10)
    whole = (tmp_path / name).read_bytes()
    for length in range(0, len(whole), max(1, len(whole) // 40)):
        try:
            index = probe_all(whole[:length])
        except InvalidMedia:
            continue
        assert [frame.pts for frame in read_all(whole[:length], index)] == index.times.tolist()


# --- what is too much ----------------------------------------------------------------------------------------------


def test_frames_that_promise_to_be_giants_are_refused_before_decoding(tmp_path: Path) -> None:
    encode(tmp_path / "giant.avi", "mjpeg", frames=3, pixel_format="yuvj420p")
    data = (tmp_path / "giant.avi").read_bytes()
    # Height and width in the frames' own headers.
    giant = data.replace(struct.pack(">HH", 64, 96), struct.pack(">HH", 16384, 16384))
    assert giant != data
    with pytest.raises((MediaLimit, InvalidMedia)):
        probe_all(giant)


def test_trouble_with_the_source_is_raised_as_it_is(clip: Path) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if size is None or self.tell() + size > 2000:
                raise TimeoutError("storage does not answer")
            return super().read(size)

    with pytest.raises(TimeoutError, match="does not answer"):
        probe(Broken(clip.read_bytes()), limits=LIMITS)


def test_a_path_that_leads_nowhere_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        probe(tmp_path / "nowhere.mp4", limits=LIMITS)


def test_a_sound_recording_is_none_of_all_that(clip: Path) -> None:
    assert numbers(read_all(clip, probe(open_source(clip), limits=Limits(96 * 64, FRAMES, 2)))) == list(range(FRAMES))
