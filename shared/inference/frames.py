"""The frames of a chunk, decoded: each exactly once, at its time, upright, or known to be lost.

A frame is known by its packet: every packet is handed to the decoder with its number for a time, which the decoder
gives back with the picture. So times that are missing, doubled or differ after a seek do not matter here.
"""

from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from av.error import FFmpegError
from av.video.frame import VideoFrame
from numpy.typing import NDArray

from shared.inference.chunks import Chunk
from shared.inference.colors import RgbConverter
from shared.inference.containers import Source, raising_invalid_media
from shared.inference.errors import OutOfMemory
from shared.inference.packets import PacketReader
from shared.inference.recording import Index

_REORDERED_PACKETS = 32
"""Twice the most frames that a decoder of H.264 or HEVC holds back."""
_DELAYED_BY_ONE = ("mpeg1video", "mpeg2video", "mpeg4")
"""Codecs whose decoders give a frame for every packet after the first; none is how they tell that one is rubbish."""
_REORDERING = ("h264", "hevc", *_DELAYED_BY_ONE)
_MOST_FAILURES = 3
"""After so many between two keyframes, what follows is given up, so that a decoder does not begin again for each."""
_EMPTY_BYTES = 16
"""A packet of MPEG-4 that says only "as before" is shorter, and gives no frame."""
_DAMAGED = "The frame is damaged"
_DEPENDENT = "The frame may be made from a damaged one"
_WITHOUT_START = "The frame is made from frames before the beginning of the recording"
_MISSING = "The decoder gives no picture for the frame"


@dataclass(frozen=True, eq=False)
class Frame:
    """Frame `number` of the recording, shown from `pts` on: uint8 (height, width, 3) RGB, upright, or None with why."""

    number: int
    pts: int
    image: NDArray[np.uint8] | None
    problem: str | None = None


def read_frames(
    source: Source, index: Index, chunk: Chunk, *, wanted: Iterable[int] | None = None, threads: int = 1
) -> Iterator[Frame]:
    """The chunk's frames in the order of showing; of these the ones at the times `wanted`, by default all.

    A frame that is damaged, missing, or may have been made from one that is, comes without an image. The bytes of an
    image depend neither on the chunk nor on what is wanted. A frame that changes size is scaled to the recording's.
    Holds a few frames at a time. Raises ValueError for a chunk or times that are not the index's, InvalidMedia where
    the source is not the recording that was indexed, and what `source` itself raises.
    """
    positions = _find_frames(index, chunk, wanted)
    header = index.header
    converter = RgbConverter(header.colors, header.size)
    with PacketReader(source, index, threads=threads) as packets:
        for run, keyframe, last in _plan_runs(index, positions):
            for position, picture in _Decoding(packets, index, keyframe, last).read(run):
                pts = int(index.times[position])
                if isinstance(picture, str):
                    yield Frame(position, pts, None, picture)
                else:
                    with raising_invalid_media(packets.recording.file):
                        image = header.orientation.turn(converter.convert(picture))
                    yield Frame(position, pts, image)


def _find_frames(index: Index, chunk: Chunk, wanted: Iterable[int] | None) -> NDArray[np.int64]:
    end = chunk.first + chunk.frames
    if chunk.frames < 1 or end > len(index.times) or index.times[chunk.first] != chunk.start:
        raise ValueError("the chunk is not one of this index")
    if wanted is None:
        return np.arange(chunk.first, end)
    times = np.fromiter(wanted, np.int64)
    positions = chunk.first + np.searchsorted(index.times[chunk.first : end], times)
    if (np.diff(times) <= 0).any() or (positions >= end).any() or (index.times[positions] != times).any():
        raise ValueError("the wanted times are not ascending times of the chunk's frames")
    return positions


def _plan_runs(index: Index, positions: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], int, int]]:
    """Stretches of packets to decode without a break: the frames wanted of each, its keyframe, its last packet."""
    if not len(positions):
        return
    rows = index.keyframe_before(positions)
    # From the last to the first, as a frame may need an earlier keyframe than the one shown before it.
    rows = np.minimum.accumulate(rows[::-1])[::-1]
    numbers = np.concatenate([[0], index.keyframes.number])[rows + 1]
    last = np.maximum.accumulate(index.packets[positions])
    breaks = np.flatnonzero(numbers[1:] > last[:-1] + 1) + 1
    bounds = [0, *breaks.tolist(), len(positions)]
    for a, b in pairwise(bounds):
        yield positions[a:b], int(rows[a]), int(last[b - 1])


class _Decoding:
    """One stretch of packets, from a keyframe (-1: the beginning of the file) to the last that is needed."""

    def __init__(self, packets: PacketReader, index: Index, keyframe: int, last: int) -> None:
        self._packets = packets
        self._index = index
        self._keyframe = keyframe
        self._last = last
        self._sent = -1
        self._unanswered: set[int] = set()
        self._failed: set[int] = set()
        self._failures: Counter[int] = Counter()
        self._damaged: dict[tuple[int, bool], int] = {}
        """By keyframe, and apart for the frames shown before it, the first packet that is damaged and may be needed.

        Those shown before it may need what was before the keyframe, so they are no measure for those after it.
        """

    def read(self, positions: NDArray[np.int64]) -> Iterator[tuple[int, VideoFrame | str]]:
        """Each of the frames, or why it is not there."""
        numbers = self._index.packets[positions].tolist()
        wanted = set(numbers)
        waiting: dict[int, VideoFrame] = {}
        following = 0
        for pictures, done in self._decode():
            for picture in pictures:
                number = picture.pts
                if number is None:
                    continue
                self._unanswered.discard(number)
                if picture.is_corrupt:
                    self._fail(number)
                elif number in wanted:
                    waiting[number] = picture
            while following < len(numbers):
                number = numbers[following]
                late = done or self._sent >= number + _REORDERED_PACKETS
                lost = number in self._failed or self._is_dependent(number)
                if number not in waiting and not lost and not late:
                    break
                position = int(positions[following])
                yield position, self._judge(position, waiting.pop(number, None))
                wanted.discard(number)
                following += 1
            if following == len(numbers):
                return

    def _decode(self) -> Iterator[tuple[list[VideoFrame], bool]]:
        """What the decoder gives after each packet, and at last all that it held back."""
        keyframe = self._keyframe
        while (failed := (yield from self._decode_from(keyframe))) is not None:
            # For frames shown before its keyframe the one before that, and one more for the decoder to come to rest.
            keyframe = max(self._keyframe, self._row(failed) - 2)

    def _decode_from(self, keyframe: int) -> Generator[tuple[list[VideoFrame], bool], None, int | None]:
        """Decode up to the end, or to a packet that has failed and with which a sound frame may have been lost.

        A decoder that reorders gives an earlier frame with each packet, and none where the packet is damaged. So it
        begins again then, without that packet and what rests on it: once for a damaged stretch between keyframes.
        """
        context = self._packets.recording.stream.codec_context
        context.flush_buffers()
        self._unanswered.clear()
        begun = False
        for number, packet in self._packets.read(keyframe, self._last):
            # The recording may have been opened anew to get here.
            context = self._packets.recording.stream.codec_context
            if number in self._failed or self._is_dependent(number):
                continue
            packet.pts = packet.dts = number
            self._sent = number
            if packet.size > _EMPTY_BYTES and self._index.positions[number] >= 0:
                self._unanswered.add(number)
            pictures: list[VideoFrame] = []
            try:
                pictures = packet.decode()
            except MemoryError as error:
                raise OutOfMemory("Not enough memory to decode a recording") from error
            except FFmpegError:
                if not self._is_recovering(number):
                    self._fail(number, needed=not packet.is_disposable)
                    if context.name in _REORDERING:
                        return number
            else:
                if begun and not pictures and packet.size > _EMPTY_BYTES and context.name in _DELAYED_BY_ONE:
                    self._fail(number)
            begun = True
            yield pictures, False
        try:
            pictures = context.decode(None)
        except FFmpegError:
            # What was held back is lost; each of these frames is then given as missing.
            pictures = []
        yield pictures, True
        return None

    def _is_recovering(self, number: int) -> bool:
        """Whether a decoder that began at a recovery point of H.264 may still miss what was before it."""
        row = self._row(number)
        begins = row <= max(self._keyframe, 0) or (row - 1, False) in self._damaged
        return begins and (row < 0 or not self._index.keyframes.clean[row])

    def _fail(self, number: int, *, needed: bool = True) -> None:
        self._failed.add(number)
        self._unanswered.discard(number)
        row = self._row(number)
        self._failures[row] += 1
        if needed or self._failures[row] > _MOST_FAILURES:
            part = row, self._is_leading(number, row)
            self._damaged[part] = min(number, self._damaged.get(part, number))

    def _judge(self, position: int, picture: VideoFrame | None) -> VideoFrame | str:
        number = int(self._index.packets[position])
        if picture is not None:
            self._find_lost(position)
        if number in self._failed:
            return _DAMAGED
        if self._row(number) < 0:
            return _WITHOUT_START
        if self._is_dependent(number):
            return _DEPENDENT
        return _MISSING if picture is None else picture

    def _find_lost(self, position: int) -> None:
        """Frames come in the order of showing: what is not there before `position` is lost, though nothing failed."""
        for number in [number for number in self._unanswered if self._index.positions[number] < position]:
            self._unanswered.discard(number)
            if not self._is_recovering(number):
                self._fail(number)

    def _is_dependent(self, number: int) -> bool:
        """Whether what a packet holds may be made from a damaged one before it."""
        row = self._row(number)
        if number > self._damaged.get((row, False), number):
            return True
        return self._is_leading(number, row) and (
            number > self._damaged.get((row, True), number) or (row - 1, False) in self._damaged
        )

    def _is_leading(self, number: int, row: int) -> bool:
        """Whether a frame is shown before the keyframe that it is decoded after."""
        position = self._index.positions[number]
        return position >= 0 <= row and bool(self._index.times[position] < self._index.keyframes.pts[row])

    def _row(self, number: int) -> int:
        """The keyframe that a packet follows, or is; -1 before the first."""
        return int(np.searchsorted(self._index.keyframes.number, number, side="right")) - 1
