"""Rows 28 to 54 of the catalogue of bad input: recordings, each with what must become of its job."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from av.packet import Packet
from av.video.stream import VideoStream

from tests.acceptance.catalogue.images import save
from tests.acceptance.catalogue.rows import DONE, INVALID, WARNED, Ended, Media
from tests.recordings import RATE, box, encode, make_sound, packet_places, point_elsewhere, remux

FRAMES = 12
QUIET = {"x264-params": "log-level=none"}
SPOILT = Ended("failed", "too_many_bad_frames")
GIANT = struct.pack(">HH", 16384, 16384)
HOURS = 3600 * RATE


def list_movies(folder: Path, *, canary: str) -> Iterator[Media]:
    """`folder` is empty; `canary` is the URL of a server that nobody may call."""
    plain, secret = folder / "plain.mp4", folder / "secret.ts"
    encode(plain, "libx264", frames=FRAMES, options=QUIET)
    encode(secret, "libx264", frames=FRAMES, options=QUIET)
    movie = plain.read_bytes()
    header_at, pixels_at = movie.index(b"moov") - 4, movie.index(b"mdat") - 4
    assert pixels_at < header_at
    emptied = blank(movie, pixels_at + 8, header_at)
    yield Media(28, "a movie without its header", "a.mp4", movie[:header_at], INVALID)
    yield Media(29, "a movie with its header at the end", "a.mp4", movie, DONE)
    matroska = made("a.mkv", folder, codec="mpeg4", grain=60)
    yield Media(30, "half a Matroska file", "a.mkv", matroska[: len(matroska) // 2], WARNED)
    for row, name, text in list_texts(secret, canary):
        yield Media(row, f"a text that is called {name}", name, text.encode(), INVALID)
    yield Media(36, "a movie whose frames lie in another file", "a.mov", refer_to(emptied, secret), INVALID)
    yield Media(37, "a picture that is called movie", "a.mp4", save("PNG"), DONE)
    yield Media(38, "sound alone", "a.mp4", make_sound(), INVALID)
    yield Media(39, "subtitles alone", "a.mkv", subtitles(), INVALID)
    uneven = [0, 1, 3, 4, 10, 11, 12, 40, 41, 50, 90, 300]
    yield Media(40, "uneven times", "a.mp4", made("uneven.mp4", folder, times=uneven), DONE)
    early = made("early.mkv", folder, times=list(range(-5, 7)), container_options={"avoid_negative_ts": "disabled"})
    yield Media(41, "times below zero", "a.mkv", early, DONE)
    yield Media(41, "a clock that goes back", "a.ts", 2 * secret.read_bytes(), WARNED)
    for says, matrix in TURNS.items():
        yield Media(42, f"turned: {says}", "a.mp4", turned(movie, matrix), DONE)
    fields = {"x264-params": "tff=1:log-level=none"}
    yield Media(43, "interlaced", "a.mp4", made("fields.mp4", folder, options=fields), DONE)
    sizes = made("small.ts", folder) + made("large.ts", folder, size=(192, 128))
    yield Media(44, "another size in the middle", "a.ts", sizes, WARNED)
    yield Media(45, "ten bits", "a.mkv", made("ten.mkv", folder, pixel_format="yuv420p10le"), DONE)
    yield Media(45, "colours at full size", "a.mkv", made("full.mkv", folder, pixel_format="yuv444p"), DONE)
    yield Media(46, "frames that promise to be giants", "a.avi", giant(folder), INVALID)
    yield Media(47, "half a second that promises to last for days", "a.mp4", lasting(movie, 2**31 - 1), DONE)
    yield Media(48, "a hundred thousand frames a second", "a.mp4", hurried(movie, 4000), DONE)
    every_two_hours = [2 * HOURS * number for number in range(6)]
    yield Media(49, "ten hours of six frames", "a.mp4", made("slow.mp4", folder, times=every_two_hours), DONE)
    yield Media(50, "encrypted", "a.mp4", movie.replace(b"avc1", b"encv"), INVALID)
    yield Media(51, "frames of nothing", "a.mp4", emptied, INVALID)
    cut = remux(plain, lambda _, packet: [moved(packet, -5)], container="mp4")
    yield Media(52, "an edit list", "a.mp4", cut, DONE)
    yield Media(
        53,
        "a codec that nobody takes",
        "a.avi",
        made("a.avi", folder, codec="huffyuv", pixel_format="yuv422p"),
        INVALID,
    )
    yield Media(54, "one frame in three destroyed", "a.mp4", spoil(plain, every=3), SPOILT)


def made(name: str, folder: Path, *, codec: str = "libx264", times: list[int] | None = None, **more: Any) -> bytes:
    path = folder / name
    options = more.pop("options", QUIET if codec == "libx264" else {})
    encode(path, codec, frames=len(times) if times else FRAMES, times=times, options=options, **more)
    return path.read_bytes()


def list_texts(secret: Path, canary: str) -> Iterator[tuple[int, str, str]]:
    head, tail = "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n", "\n#EXT-X-ENDLIST\n"
    yield 31, "a.m3u8", f"{head}{canary}{tail}"
    yield 32, "a.m3u8", f"{head}file://{secret}{tail}"
    yield 33, "a.mp4", f"{head}{canary}{tail}"
    yield 34, "a.ffconcat", f"ffconcat version 1.0\nfile '{secret}'\n"
    yield 35, "a.sdp", "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
    yield 35, "a.mp4", f"RTSPtext\nrtsp://{canary.removeprefix('http://')}\n"


def moved(packet: "Packet[VideoStream]", frames: int) -> "Packet[VideoStream]":
    assert packet.pts is not None
    assert packet.dts is not None
    assert packet.time_base is not None
    shift = int(frames / RATE / packet.time_base)
    packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
    return packet


TURNS = {
    "a quarter": (0, 1, -1, 0),
    "a half": (-1, 0, 0, -1),
    "three quarters": (0, -1, 1, 0),
    "an angle of thirty degrees": (0.866, 0.5, -0.5, 0.866),
}


def turned(movie: bytes, matrix: tuple[float, ...]) -> bytes:
    """With another display matrix in the track's header (ISO 14496-12, 8.3.2)."""
    place = movie.index(b"tkhd") + 4 + 40
    a, b, c, d = (round(value * 65536) for value in matrix)
    return movie[:place] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + movie[place + 36 :]


def lasting(movie: bytes, ticks: int) -> bytes:
    """With a media header that says so much (ISO 14496-12, 8.4.2)."""
    data = bytearray(movie)
    place = data.index(b"mdhd") + 4 + 16
    data[place : place + 4] = struct.pack(">I", ticks)
    return bytes(data)


def hurried(movie: bytes, times: int) -> bytes:
    """With a clock that goes so much faster."""
    data = bytearray(movie)
    place = data.index(b"mdhd") + 4 + 12
    [ticks] = struct.unpack_from(">I", data, place)
    data[place : place + 4] = struct.pack(">I", times * ticks)
    return bytes(data)


def blank(movie: bytes, begin: int, end: int) -> bytes:
    return movie[:begin] + bytes(end - begin) + movie[end:]


def giant(folder: Path) -> bytes:
    """Height and width in the frames' own headers."""
    data = made("giant.avi", folder, codec="mjpeg", pixel_format="yuvj420p")
    return data.replace(struct.pack(">HH", 64, 96), GIANT)


def spoil(path: Path, *, every: int) -> bytes:
    data = bytearray(path.read_bytes())
    for place, size in packet_places(path)[1::every]:
        data[place + 4 : place + size] = b"\xff" * (size - 4)
    return bytes(data)


def refer_to(movie: bytes, target: Path) -> bytes:
    """Its frames are said to lie in another file."""
    return point_elsewhere(movie, box(b"url ", bytes(4), str(target).encode() + b"\0"))


def subtitles() -> bytes:
    """Matroska (RFC 9559) with one track of text and nothing else, put together by hand."""

    def element(number: bytes, content: bytes) -> bytes:
        return number + struct.pack(">BI", 0x08, len(content)) + content

    header = element(b"\x1a\x45\xdf\xa3", element(b"\x42\x82", b"matroska"))
    track = (
        element(b"\xd7", b"\x01") + element(b"\x73\xc5", b"\x01") + element(b"\x83", b"\x11")
        + element(b"\x86", b"S_TEXT/UTF8")
    )  # fmt: skip
    segment = element(b"\x15\x49\xa9\x66", b"") + element(b"\x16\x54\xae\x6b", element(b"\xae", track))
    return header + element(b"\x18\x53\x80\x67", segment)
