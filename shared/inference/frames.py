"""The frames of a chunk, decoded: each exactly once, at its time, upright, or known to be lost.

A frame is known by its packet: every packet is handed to the decoder with its number for a time, which the decoder
gives back with the picture. So times that are missing, doubled or differ after a seek do not matter here.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from av.error import FFmpegError
from av.video.frame import VideoFrame
from numpy.typing import NDArray

from shared.inference.bitstreams import EMPTY_BYTES
from shared.inference.chunks import Chunk
from shared.inference.colors import RgbConverter
from shared.inference.containers import Source, raising_invalid_media
from shared.inference.continuity import Continuity
from shared.inference.errors import OutOfMemory
from shared.inference.packets import PacketReader
from shared.inference.recording import Index

_REORDERED_PACKETS = 32
"""Twice the most frames that a decoder of H.264 or HEVC holds back."""
_DELAYED_BY_ONE = ("mpeg1video", "mpeg2video", "mpeg4")
"""Codecs whose decoders give a frame for every packet after the first; none is how they tell that one is rubbish."""
_REORDERING = ("h264", "hevc", *_DELAYED_BY_ONE)
_CARRYING = ("vp8", "vp9", "libdav1d")
"""Codecs that can show an old picture again: a damaged keyframe must not bring back one from before it."""
_MOST_FAILURES = 3
"""After so many between two keyframes, what follows is given up, so that a decoder does not begin again for each."""
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
        for run, last in _plan_runs(index, positions):
            for position, picture in _Decoding(packets, index, last).read(run):
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


def _plan_runs(index: Index, positions: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], int]]:
    """Stretches of packets to decode without a break: the frames wanted of each, and its last packet."""
    if not len(positions):
        return
    numbers = np.concatenate([[0], index.keyframes.number])[index.origins[positions] + 1]
    last = np.maximum.accumulate(index.packets[positions])
    breaks = np.flatnonzero(numbers[1:] > last[:-1] + 1) + 1
    bounds = [0, *breaks.tolist(), len(positions)]
    for a, b in pairwise(bounds):
        yield positions[a:b], _complete(index, int(last[b - 1]))


def _complete(index: Index, packet: int) -> int:
    """The last packet of the frame that `packet` begins: its second field may be one of its own."""
    return packet + int(packet >= 0 and index.header.codec == "h264" and index.positions[packet + 1] < 0)


class _Decoding:
    """One stretch of packets, from a keyframe (-1: the beginning of the file) to the last that is needed.

    What becomes of a frame is told by the packets from its own origin, the keyframe that its decoding must begin at,
    up to its own packet, and by nothing else: so it is the same for all chunks. Damage is noticed when a decoder has
    seen more, or less, than that. So a frame waits until all packets up to its own are answered for, and where one has
    failed, frames of a later origin are decoded anew from there, with all forgotten.
    """

    def __init__(self, packets: PacketReader, index: Index, last: int) -> None:
        self._packets = packets
        self._index = index
        self._last = last
        self._origin = -1
        self._sent = -1
        self._waiting: dict[int, VideoFrame] = {}
        self._unanswered: dict[int, bool] = {}
        """Packets that a picture is still owed for, in order, and whether others may be made from it."""
        self._disturbed: set[int] = set()
        """Keyframes of which something failed that does not count, being before the origin."""
        self._forget()

    def _forget(self) -> None:
        self._failed: set[int] = set()
        self._failures: Counter[int] = Counter()
        self._first_failed_origin = len(self._index.keyframes.number)
        self._damaged: dict[tuple[int, bool], int] = {}
        """By keyframe, and apart for the frames shown before it, the first packet that is damaged and may be needed.

        Those shown before it may need what was before the keyframe, so they are no measure for those after it.
        """

    def read(self, positions: NDArray[np.int64]) -> Iterator[tuple[int, VideoFrame | str]]:
        """Each of the frames, or why it is not there."""
        numbers, origins = self._index.packets[positions].tolist(), self._index.origins[positions].tolist()
        wanted, following = set(numbers), 0
        while following < len(numbers):
            self._origin = origins[following]
            if self._origin > self._first_failed_origin:
                self._forget()
            for done in self._decode(wanted):
                while following < len(numbers) and origins[following] <= self._first_failed_origin:
                    number = numbers[following]
                    if not done and not self._is_settled(number):
                        break
                    yield int(positions[following]), self._judge(number, self._waiting.pop(number, None))
                    wanted.discard(number)
                    following += 1
                if following == len(numbers) or origins[following] > self._first_failed_origin:
                    break

    def _decode(self, wanted: set[int]) -> Iterator[bool]:
        """Decode from the origin, stopping after each picture and packet; whether all is given that was held back.

        A decoder that reorders gives an earlier frame with each packet, and none where the packet is damaged. So this
        ends then, to begin again without that packet and what rests on it.
        """
        context = self._packets.recording.stream.codec_context
        context.flush_buffers()
        self._waiting.clear()
        self._unanswered.clear()
        self._disturbed.clear()
        keys = self._index.keyframes.number
        continuity = Continuity(context)
        begun = False
        for number, packet in self._packets.read(self._origin, self._last):
            if number > self._end():
                break
            # The recording may have been opened anew to get here.
            context = self._packets.recording.stream.codec_context
            row = self._row(number)
            if begun and context.name in _CARRYING and row >= 0 and keys[row] == number:
                yield from self._drain(wanted)
                context.flush_buffers()
            if number in self._failed:
                if self._is_dependent(number + 1):
                    continuity.forget()
                continue
            continuity.add(packet, keyframe=row >= 0 and keys[row] == number)
            counts, needed = self._counts(number), continuity.is_needed
            if continuity.is_broken and counts and not self._is_dependent(number):
                self._fail(number, needed=True)
                # Which picture is missing is not known, nor whether only those before the keyframe are made from it.
                self._damaged.setdefault((row, False), number)
            if number in self._failed or self._is_dependent(number):
                continue
            packet.pts = packet.dts = number
            self._sent = number
            if counts and packet.size > EMPTY_BYTES and self._index.positions[number] >= 0:
                self._unanswered[number] = needed
            try:
                pictures = packet.decode()
            except MemoryError as error:
                raise OutOfMemory("Not enough memory to decode a recording") from error
            except FFmpegError:
                if counts:
                    self._fail(number, needed=needed)
                    if continuity.is_second_field:
                        self._fail(number - 1, needed=needed)
                    if context.name in _REORDERING:
                        return
                elif not self._is_leading(number, row):
                    self._disturbed.add(row)
                pictures = []
            else:
                silent = begun and not pictures and packet.size > EMPTY_BYTES and context.name in _DELAYED_BY_ONE
                if silent and counts:
                    self._fail(number, needed=needed)
            begun = True
            for picture in pictures:
                self._receive(picture, wanted)
                yield False
            self._give_up_late()
            yield False
        yield from self._drain(wanted)
        for number, needed in list(self._unanswered.items()):
            self._fail(number, needed=needed)
        yield True

    def _drain(self, wanted: set[int]) -> Iterator[bool]:
        try:
            pictures = self._packets.recording.stream.codec_context.decode(None)
        except FFmpegError:
            # What was held back is lost; each of these frames is then given as missing.
            return
        for picture in pictures:
            self._receive(picture, wanted)
            yield False

    def _receive(self, picture: VideoFrame, wanted: set[int]) -> None:
        number = picture.pts
        if number is None or self._origin_of(number) < self._origin:
            return
        needed = self._unanswered.pop(number, True)
        if picture.is_corrupt:
            self._fail(number, needed=needed)
        elif number in wanted:
            self._waiting[number] = picture

    def _give_up_late(self) -> None:
        while self._unanswered and (first := next(iter(self._unanswered))) + _REORDERED_PACKETS <= self._sent:
            self._fail(first, needed=self._unanswered[first])

    def _counts(self, number: int) -> bool:
        """Whether a packet's failure is its own.

        It is not before the origin, nor after a recovery point of H.264 whose decoder lacks what was before it.
        """
        row = self._row(number)
        recovers = row > 0 and row - 1 in self._disturbed and not self._index.keyframes.clean[row]
        return self._origin_of(number) >= self._origin and not recovers

    def _fail(self, number: int, *, needed: bool) -> None:
        self._failed.add(number)
        self._unanswered.pop(number, None)
        self._first_failed_origin = min(self._first_failed_origin, self._origin_of(number))
        row = self._row(number)
        self._failures[row] += 1
        if needed or self._failures[row] > _MOST_FAILURES:
            part = row, self._is_leading(number, row)
            self._damaged[part] = min(number, self._damaged.get(part, number))

    def _is_settled(self, number: int) -> bool:
        """Whether nothing that is decoded after a packet can change what becomes of it."""
        if number in self._failed or self._is_dependent(number):
            return True
        if number not in self._waiting and self._sent < number + _REORDERED_PACKETS:
            return False
        return not self._unanswered or next(iter(self._unanswered)) > number

    def _judge(self, number: int, picture: VideoFrame | None) -> VideoFrame | str:
        if number in self._failed:
            return _DAMAGED
        if self._is_without_start(number):
            return _WITHOUT_START
        if self._is_dependent(number):
            return _DEPENDENT
        return _MISSING if picture is None else picture

    def _is_dependent(self, number: int) -> bool:
        """Whether what a packet holds may be made from a damaged one before it."""
        if not self._damaged:
            return False
        row = self._row(number)
        if number > self._damaged.get((row, False), number):
            return True
        return self._is_leading(number, row) and (
            number > self._damaged.get((row, True), number) or (row - 1, False) in self._damaged
        )

    def _is_without_start(self, number: int) -> bool:
        row = self._row(number)
        return row < 0 or (row == 0 < self._index.keyframes.number[0] and self._is_leading(number, row))

    def _is_leading(self, number: int, row: int) -> bool:
        """Whether a frame is shown before the keyframe that it is decoded after."""
        position = self._index.positions[number]
        return position >= 0 <= row and bool(self._index.times[position] < self._index.keyframes.pts[row])

    def _row(self, number: int) -> int:
        """The keyframe that a packet follows, or is; -1 before the first."""
        return int(np.searchsorted(self._index.keyframes.number, number, side="right")) - 1

    def _origin_of(self, number: int) -> int:
        position = int(self._index.positions[number])
        if position < 0 < number and self._index.header.codec == "h264":
            # The second field of a frame has the frame's.
            position = int(self._index.positions[number - 1])
        return self._row(number) if position < 0 else int(self._index.origins[position])

    def _end(self) -> int:
        """The last packet to decode: where one has failed, that of the last frame of its origin."""
        if self._first_failed_origin == len(self._index.keyframes.number):
            return self._last
        frames = int(np.searchsorted(self._index.origins, self._first_failed_origin, side="right"))
        return min(self._last, _complete(self._index, int(self._index.packets[:frames].max(initial=-1))))
