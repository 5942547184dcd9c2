"""The packets of an indexed recording by number: from a keyframe that the demuxer is moved to, they are counted."""

import contextlib
from collections.abc import Iterator
from types import TracebackType
from typing import Self, TypeAlias

import numpy as np
from av.error import FFmpegError
from av.packet import Packet
from av.video.stream import VideoStream

from shared.inference.containers import OpenRecording, Source, open_recording
from shared.inference.errors import InvalidMedia
from shared.inference.recording import Index
from shared.inference.timestamps import MISSING

_NEAR_PACKETS = 32
"""So few packets are read rather than jumped over."""
_SOUGHT_BY_BYTES = ("mpegts",)
"""Containers without an index that can be entered at any packet; to seek by time, FFmpeg would search through them."""
_SOUGHT_BY_PTS = ("matroska",)
_TIMED = ("mov", "avi", "flv")
"""Containers whose packets have the same times after a seek; an edit list may show the same bytes at several."""
_CHANGED = "The recording is not the one that was indexed"

VideoPacket: TypeAlias = "Packet[VideoStream]"
MaybePacket: TypeAlias = "VideoPacket | None"


class PacketReader:
    """Reads packets of one recording forward; a context manager."""

    recording: OpenRecording

    def __init__(self, source: Source, index: Index, *, threads: int) -> None:
        self._source = source
        self._index = index
        self._threads = threads
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def read(self, keyframe: int, last: int) -> Iterator[tuple[int, VideoPacket]]:
        """Number and packet, from a keyframe of the index (-1: from the beginning) to packet `last`.

        Ends early where the file does. Raises InvalidMedia where the file is not the one that was indexed.
        """
        first = int(self._index.keyframes.number[keyframe]) if keyframe >= 0 else 0
        self._go_to(keyframe, first)
        while self._next <= last:
            number = self._next
            packet = self._pull()
            if packet is None:
                return
            self._check(number, packet)
            if number >= first:
                yield number, packet

    def _open(self) -> None:
        self._stack.close()
        header = self._index.header
        self.recording = self._stack.enter_context(
            open_recording(self._source, max_pixels=header.max_pixels, threads=self._threads, number=header.stream)
        )
        if self.recording.format != header.format:
            raise InvalidMedia(_CHANGED)
        self._demux()
        self._next = 0

    def _demux(self) -> None:
        self._waiting: MaybePacket = None
        self._demuxed = self.recording.container.demux(self.recording.stream)

    def _pull(self) -> MaybePacket:
        """The next packet; None at the end, which a damaged file reaches where it did when it was indexed."""
        packet, self._waiting = self._waiting, None
        while packet is None or not packet.size:
            try:
                packet = next(self._demuxed, None)
            except FFmpegError:
                packet = None
            self.recording.file.raise_own_error()
            if packet is None:
                return None
        self._next += 1
        return packet

    def _go_to(self, keyframe: int, first: int) -> None:
        """Move so that packet `first` is the next, or one before it, from which it is reached by counting."""
        if self._next <= first <= self._next + _NEAR_PACKETS:
            return
        placed = np.flatnonzero(self._index.keyframes.position[: keyframe + 1] >= 0)
        row = int(placed[-1]) if len(placed) else -1
        number = int(self._index.keyframes.number[row]) if row >= 0 else 0
        # Nothing that can be sought is nearer.
        if number <= self._next <= first:
            return
        # Without an index in the file, or with one that is wrong, all that comes before is read.
        if row < 0 or not self._seek(row):
            self._open()

    def _seek(self, row: int) -> bool:
        """Whether the keyframe was found where the container's own index or its position says."""
        keys = self._index.keyframes
        container, stream = self.recording.container, self.recording.stream
        try:
            if self._index.header.format in _SOUGHT_BY_BYTES:
                container.seek(int(keys.position[row]), unsupported_byte_offset=True, stream=stream)
            elif self._index.header.format in _SOUGHT_BY_PTS or keys.dts[row] == MISSING:
                container.seek(int(keys.pts[row]), stream=stream)
            else:
                container.seek(int(keys.dts[row]), stream=stream)
        except FFmpegError:
            self.recording.file.raise_own_error()
            return False
        self._demux()
        while (packet := self._pull()) is not None:
            if self._is_keyframe(row, packet):
                self._waiting = packet
                self._next = int(keys.number[row])
                return True
            if packet.dts is not None and keys.dts[row] != MISSING and packet.dts > keys.dts[row]:
                return False
        return False

    def _is_keyframe(self, row: int, packet: VideoPacket) -> bool:
        keys = self._index.keyframes
        # Not by its being marked as one: of a damaged packet, that may depend on what was read before it.
        return (
            packet.size == keys.size[row]
            and (-1 if packet.pos is None else packet.pos) == keys.position[row]
            and (self._index.header.format not in _TIMED or packet.dts == keys.dts[row])
        )

    def _check(self, number: int, packet: VideoPacket) -> None:
        row = int(np.searchsorted(self._index.keyframes.number, number))
        expected = row < len(self._index.keyframes.number) and self._index.keyframes.number[row] == number
        if expected and not self._is_keyframe(row, packet):
            raise InvalidMedia(_CHANGED)
