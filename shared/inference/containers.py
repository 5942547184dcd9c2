"""Opening the file of a recording: which containers and decoders strangers may feed, and that nothing else is opened.

FFmpeg reads playlists, scripts and devices beside files. So a container is recognised by its first bytes, its one
demuxer is named, decoders are listed, and every request for another file or address is refused.
"""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, NoReturn

import av
from av.codec.context import ThreadType
from av.container import InputContainer
from av.stream import Discard, Disposition
from av.video.stream import VideoStream

from shared.inference.errors import InvalidMedia, MediaLimit, OutOfMemory
from shared.inference.signatures import HEAD_BYTES, find_container, is_still

Source = BinaryIO | Path | str

CODECS = {
    "h264": "h264",
    "hevc": "hevc",
    "vp8": "vp8",
    "vp9": "vp9",
    "libdav1d": "av1",
    "mpeg4": "mpeg4",
    "mjpeg": "mjpeg",
    "prores": "prores",
    "mpeg1video": "mpeg1video",
    "mpeg2video": "mpeg2video",
}
"""The decoders that are let at customers' bytes, and what their codec is called. The few that recordings are made with:
each of FFmpeg's hundreds of others is one more to be attacked through."""

_PATCHING = ("h264", "mpeg4", "mpeg1video", "mpeg2video", "mjpeg")
"""Decoders that patch damaged places with what was there before and do not always tell, unless errors stop them."""
_BUFFER_BYTES = 1 << 16
_GENERATE_TIMES: Final = 0x0001
"""FFmpeg's AVFMT_FLAG_GENPTS, which PyAV sets. Where times are missing throughout, it holds the file in memory."""
_DAMAGED = "The recording is damaged and cannot be read"
_UNKNOWN = "The file is no recording of a known container (MP4/MOV, Matroska/WebM, AVI, MPEG-TS, MPEG-PS, FLV)"


@dataclass(frozen=True)
class OpenRecording:
    """A recording that can be read: FFmpeg's container, the one stream that is meant, and the demuxer's name."""

    container: InputContainer
    stream: VideoStream
    format: str
    file: "WatchedFile"


class WatchedFile:
    """A file without a name that remembers what went wrong with reading it.

    FFmpeg takes many an error for the end of the file; trouble with storage must not pass for a short recording.
    Without a name, a demuxer cannot think of files beside it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._error: Exception | None = None

    def read(self, size: int) -> bytes:
        try:
            return self._file.read(size)
        except Exception as error:
            self._error = self._error or error
            raise

    def seek(self, offset: int, whence: int = 0) -> int:
        try:
            return self._file.seek(offset, whence)
        except Exception as error:
            self._error = self._error or error
            raise

    def tell(self) -> int:
        return self._file.tell()

    def raise_own_error(self) -> None:
        if self._error is not None:
            raise self._error


@contextmanager
def open_recording(
    source: Source, *, max_pixels: int, threads: int = 1, number: int | None = None
) -> Iterator[OpenRecording]:
    """Open the video stream `number`, by default the best, ready to demux and decode; other streams are skipped.

    Raises InvalidMedia for what is no recording, MediaLimit for a stream whose header says more than `max_pixels` per
    frame, and whatever `source` itself raises.
    """
    with contextlib.ExitStack() as stack:
        file = WatchedFile(stack.enter_context(Path(source).open("rb")) if isinstance(source, (str, Path)) else source)
        name = detect_format(file)
        with raising_invalid_media(file):
            container = stack.enter_context(_open(file, name, max_pixels))
            container.flags &= ~_GENERATE_TIMES
            stream = _best_stream(container) if number is None else container.streams[number]
        if not isinstance(stream, VideoStream):
            raise InvalidMedia(_DAMAGED)
        if stream.width * stream.height > max_pixels:
            raise MediaLimit(f"The recording has {stream.width}×{stream.height} pixels; at most {max_pixels} are taken")
        for other in container.streams:
            other.discard = Discard.none if other is stream else Discard.all
        # By slices, as threads by frames report damage late, when the frames that rest on it have been given.
        stream.codec_context.thread_type = ThreadType.SLICE
        stream.codec_context.thread_count = threads
        strictness = {"err_detect": "explode"} if stream.codec_context.name in _PATCHING else {}
        stream.codec_context.options = _bound_memory(max_pixels) | strictness
        yield OpenRecording(container, stream, name, file)


def _open(file: WatchedFile, name: str, max_pixels: int) -> InputContainer:
    return av.open(
        file,
        "r",
        format=name,
        options=_bound_memory(max_pixels),
        container_options={
            "format_whitelist": ",".join(["mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "mpegts", "mpeg", "flv"]),
            "codec_whitelist": ",".join(CODECS),
            # No protocol has this name: with a file object none is needed.
            "protocol_whitelist": "none",
            **({"enable_drefs": "0", "use_absolute_path": "0"} if name == "mov" else {}),
        },
        metadata_errors="replace",
        buffer_size=_BUFFER_BYTES,
        io_open=_refuse_to_open,
    )


def _bound_memory(max_pixels: int) -> dict[str, str]:
    # A decoder counts the padding of its buffers too. This stops what grows in the middle of a recording.
    return {"max_pixels": str(2 * max_pixels + (1 << 20))}


def _refuse_to_open(*_: object) -> NoReturn:
    raise InvalidMedia("The recording refers to another file")


def detect_format(file: WatchedFile) -> str:
    """The demuxer for what the first bytes say; the name of a file says nothing. InvalidMedia where there is none."""
    file.seek(0)
    head = file.read(HEAD_BYTES)
    file.seek(0)
    if not head:
        raise InvalidMedia("The file is empty")
    if is_still(head):
        raise InvalidMedia("The file is a still image, no recording")
    name = find_container(head)
    if name is None:
        raise InvalidMedia(_UNKNOWN)
    return name


def _best_stream(container: InputContainer) -> VideoStream:
    pictures = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
    moving = [stream for stream in container.streams.video if not stream.disposition & pictures]
    if not moving:
        raise InvalidMedia("The file has no video stream")
    known = [stream for stream in moving if codec_of(stream) is not None]
    if not known:
        raise InvalidMedia(f"The recording's codec is none of those that are read ({', '.join(CODECS.values())})")
    # Not FFmpeg's choice, which is the first that the container calls its default, be it a preview.
    return max(
        known,
        key=lambda stream: (
            stream.width * stream.height,
            bool(stream.disposition & Disposition.default),
            -stream.index,
        ),
    )


def codec_of(stream: VideoStream) -> str | None:
    """What the stream's codec is called; None where it is not read."""
    # A stream without any decoder has no context at all, which PyAV's types do not say.
    context: object = stream.codec_context
    return None if context is None else CODECS.get(stream.codec_context.name)


@contextmanager
def raising_invalid_media(file: WatchedFile) -> Iterator[None]:
    """What FFmpeg raises becomes InvalidMedia, unless the source itself had failed."""
    try:
        yield
    except (InvalidMedia, MediaLimit, OutOfMemory):
        raise
    except MemoryError as error:
        raise OutOfMemory("Not enough memory to read a recording") from error
    except Exception as error:
        file.raise_own_error()
        raise InvalidMedia(_DAMAGED) from error
    file.raise_own_error()
