"""What a recording holds: when each of its frames is shown, and where decoding can begin.

The index is what probe.py finds; it is small and can be stored. chunks.py plans with it, frames.py decodes by it.
"""

import io
import json
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from shared.inference.colors import Colors
from shared.inference.orientation import Orientation
from shared.inference.timestamps import Times


@dataclass(frozen=True)
class Limits:
    """What an installation takes: pixels per frame, frames, and seconds from the first frame to the last."""

    max_pixels: int
    max_frames: int
    max_seconds: float


@dataclass(frozen=True, eq=False)
class Keyframes:
    """Where decoding can begin, in order: arrays (K,) int64.

    `number` counts packets from 0 in the order of decoding, `pts` and `dts` are in ticks (`dts` as the container tells
    it, to seek by), `position` is the byte in the file, -1 where unknown, `size` the packet's bytes. `clean` is 1 where
    a decoder makes sound frames at once; 0 is H.264's recovery point, after which it may need some frames, and may
    complain about what is missing from before.
    """

    number: NDArray[np.int64]
    pts: Times
    dts: Times
    position: NDArray[np.int64]
    size: NDArray[np.int64]
    clean: NDArray[np.int64]


@dataclass(frozen=True)
class Header:
    """What holds for all frames of a recording.

    `size` is (width, height) as stored, `upright_size` as it is to be seen; pixels are never stretched, whatever
    `sample_aspect_ratio` says. `declared_seconds` is what the container says, None where it says nothing, and
    `seconds` what was found. `warnings` are sentences for the person who sent the recording.
    """

    format: str
    codec: str
    stream: int
    time_base: Fraction
    size: tuple[int, int]
    upright_size: tuple[int, int]
    orientation: Orientation
    sample_aspect_ratio: Fraction
    pixel_format: str
    colors: Colors
    seconds: float
    declared_seconds: float | None
    max_pixels: int
    warnings: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Index:
    """A recording's header, and per frame, in the order of showing, its time and its packet: arrays (F,) int64.

    `times` are presentation timestamps in ticks of the header's time base, strictly ascending; `packets` are numbers of
    packets in the order of decoding.
    """

    header: Header
    times: Times
    packets: NDArray[np.int64]
    keyframes: Keyframes

    @cached_property
    def positions(self) -> NDArray[np.int64]:
        """For each packet the frame that it is, -1 where it is none; all beyond the last frame and one are left out."""
        positions = np.full(int(self.packets.max()) + 2, -1, np.int64)
        positions[self.packets] = np.arange(len(self.packets))
        return positions

    @cached_property
    def origins(self) -> NDArray[np.int64]:
        """For each frame the keyframe that decoding begins at, -1 for the file's beginning; int64, never descending."""
        rows = self.keyframe_before(np.arange(len(self.times)))
        # From the last to the first, as a frame may need an earlier keyframe than the one shown before it.
        return np.minimum.accumulate(rows[::-1])[::-1]

    def keyframe_before(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which keyframe decoding must begin at for each of the frames, int64; -1 where only the file's beginning does.

        A frame that is decoded after a keyframe and shown before it may be made from frames before that keyframe. One
        that is not clean is preceded by another, so that the decoder has come to rest when it gets there.
        """
        rows = np.searchsorted(self.keyframes.number, self.packets[positions], side="right") - 1
        rows -= (rows >= 0) & (self.times[positions] < self.keyframes.pts[np.maximum(rows, 0)])
        rows -= (rows >= 0) & (self.keyframes.clean[np.maximum(rows, 0)] == 0)
        return rows

    def to_bytes(self) -> bytes:
        """A form to be stored, about a byte per frame; `from_bytes` reads it."""
        header = asdict(self.header) | {
            "time_base": str(self.header.time_base),
            "sample_aspect_ratio": str(self.header.sample_aspect_ratio),
        }
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            header=np.frombuffer(json.dumps(header).encode(), np.uint8),
            # Differences, of which most are alike.
            times=np.diff(self.times, prepend=0),
            packets=np.diff(self.packets, prepend=0),
            **{name: np.diff(values, prepend=0) for name, values in vars(self.keyframes).items()},
        )
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The index that `to_bytes` wrote; raises ValueError for anything else."""
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
            header = json.loads(arrays.pop("header").tobytes())
            columns = {name: np.cumsum(values) for name, values in arrays.items()}
            return cls(_read_header(header), columns.pop("times"), columns.pop("packets"), Keyframes(**columns))
        except Exception as error:
            raise ValueError("these bytes are no stored index") from error


def _read_header(stored: dict[str, Any]) -> Header:
    return Header(
        **stored
        | {
            "time_base": Fraction(stored["time_base"]),
            "sample_aspect_ratio": Fraction(stored["sample_aspect_ratio"]),
            "size": tuple(stored["size"]),
            "upright_size": tuple(stored["upright_size"]),
            "orientation": Orientation(**stored["orientation"]),
            "colors": Colors(**stored["colors"]),
            "warnings": tuple(stored["warnings"]),
        }
    )
