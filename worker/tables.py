"""What a recording's masks say in rows: the area of each class per frame, and the frames with their exact times.

Both are Parquet, the areas as lines of JSON too. Each chunk writes areas of its own, and joined they are byte for byte
what a single writer makes. Only frames that were segmented have areas; `frames` has a row for every frame there is.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from shared.inference.errors import InvalidMedia
from shared.inference.labels import LABEL_SPACES, LabelSpace

SCHEMA_VERSION = 1
GROUP_ROWS = 2**16
"""A group of rows ends with the frame that fills it: some 20 MB in memory, which is all that is held."""
_KEY = "maskline."

_AREAS = pa.schema(
    [
        pa.field("frame", pa.int64(), nullable=False),
        pa.field("pts", pa.int64(), nullable=False),
        pa.field("seconds", pa.float64(), nullable=False),
        pa.field("class_id", pa.uint8(), nullable=False),
        pa.field("class", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("pixels", pa.int64(), nullable=False),
        pa.field("fraction", pa.float64(), nullable=False),
    ]
)
_FRAMES = pa.schema(
    [
        pa.field("frame", pa.int64(), nullable=False),
        pa.field("pts", pa.int64(), nullable=False),
        pa.field("time_base_numerator", pa.int32(), nullable=False),
        pa.field("time_base_denominator", pa.int32(), nullable=False),
        pa.field("seconds", pa.float64(), nullable=False),
        pa.field("chunk", pa.int32(), nullable=False),
        pa.field("processed", pa.bool_(), nullable=False),
        pa.field("bad", pa.bool_(), nullable=False),
    ]
)


@dataclass(frozen=True)
class AreasHeader:
    """What holds for all rows of `areas`: (width, height) of the masks, seconds per unit of time, what ids mean."""

    size: tuple[int, int]
    time_base: Fraction
    label_space: LabelSpace


@dataclass(frozen=True)
class FrameAreas:
    """One frame: its index from 0, its time, and the pixels of each class in it, by class id."""

    frame: int
    pts: int
    pixels: Mapping[int, int]


@dataclass(frozen=True)
class FrameRow:
    """One frame of the source: its index from 0, its time, the chunk it belongs to, and what became of it."""

    frame: int
    pts: int
    chunk: int
    processed: bool
    """Whether it has a mask of its own."""
    bad: bool
    """Whether the source's bytes could not be decoded."""


class _TableWriter:
    """Rows in the order of their frames, in groups. Left by an exception, it takes the file away."""

    def __init__(self, path: Path, schema: pa.Schema, time_base: Fraction, metadata: Mapping[str, str]) -> None:
        if time_base <= 0 or max(time_base.as_integer_ratio()) >= 2**31:
            raise ValueError(f"{time_base} s is no time base")
        self._path = path
        self.time_base = time_base
        self._last: tuple[int, int] | None = None
        entries = {"schema": str(SCHEMA_VERSION), "time_base": str(time_base), **metadata}
        self._schema = schema.with_metadata({_KEY + name: value for name, value in entries.items()})
        self._columns: list[list[Any]] = [[] for _ in schema]
        self._parquet = pq.ParquetWriter(path, self._schema, compression="zstd", write_page_checksum=True)

    def _follow(self, frame: int, pts: int) -> None:
        if self._last is not None and (frame <= self._last[0] or pts <= self._last[1]):
            raise ValueError(f"frame {frame} at time {pts} does not come after {self._last[0]} at {self._last[1]}")
        if frame < 0 or frame >= 2**63 or abs(pts) >= 2**63:
            raise ValueError(f"frame {frame} at time {pts} is beyond what the table holds")
        self._last = frame, pts

    def _append(self, *row: Any) -> None:
        for column, value in zip(self._columns, row, strict=True):
            column.append(value)

    def _end_frame(self) -> None:
        if len(self._columns[0]) >= GROUP_ROWS:
            self._write_group()

    def _write_group(self) -> None:
        rows = [self._to_array(number, values) for number, values in enumerate(self._columns)]
        self._parquet.write_table(pa.Table.from_arrays(rows, schema=self._schema), row_group_size=2 * GROUP_ROWS)
        self._columns = [[] for _ in self._columns]

    def _to_array(self, number: int, values: list[Any]) -> pa.Array:
        return pa.array(values, type=self._schema.field(number).type)

    def close(self) -> None:
        """Finish the file; without it, it cannot be read."""
        if self._columns[0]:
            self._write_group()
        self._parquet.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        finished = False
        try:
            if kind is None:
                self.close()
                finished = True
            else:
                self._parquet.close()
        finally:
            if not finished:
                self._path.unlink(missing_ok=True)


class AreasWriter(_TableWriter):
    """Writes `areas`, a row per frame and class present; the same rows make the same bytes.

    Columns: frame and pts int64, seconds float64, class_id uint8, class (its name) dictionary of string, pixels int64,
    fraction (of the frame) float64. The file's metadata names size, time base, label space and version of the schema.
    """

    def __init__(self, path: Path, header: AreasHeader) -> None:
        """Raises ValueError for a time base that is not positive or beyond 31 bits."""
        width, height = header.size
        metadata = {"width": str(width), "height": str(height), "label_space": header.label_space.name}
        super().__init__(path, _AREAS, header.time_base, metadata)
        self.header = header
        self._frame_pixels = width * height
        self._names = header.label_space.classes

    def write(self, row: FrameAreas) -> None:
        """Append a frame; frames and times must ascend.

        Raises ValueError unless they do, and unless the classes are of the label space and fill the frame.
        """
        if sum(row.pixels.values()) != self._frame_pixels or min(row.pixels.values()) < 1:
            raise ValueError(f"the areas of frame {row.frame} do not fill it: {dict(row.pixels)}")
        if not all(0 <= class_id < len(self._names) for class_id in row.pixels):
            raise ValueError(f"frame {row.frame} has a class beyond its label space: {sorted(row.pixels)}")
        self._follow(row.frame, row.pts)
        seconds = _to_seconds(row.pts, self.time_base)
        for class_id, pixels in sorted(row.pixels.items()):
            self._append(row.frame, row.pts, seconds, class_id, class_id, pixels, pixels / self._frame_pixels)
        self._end_frame()

    def _to_array(self, number: int, values: list[Any]) -> pa.Array:
        if _AREAS.names[number] == "class":
            # All names in each group, so that bytes do not depend on which class came first.
            return pa.DictionaryArray.from_arrays(pa.array(values, type=pa.int32()), pa.array(self._names))
        return super()._to_array(number, values)


class FramesWriter(_TableWriter):
    """Writes `frames`, a row per frame of the source; the same rows make the same bytes.

    Columns: frame and pts int64, time_base_numerator and time_base_denominator int32, seconds float64, chunk int32,
    processed and bad bool. The file's metadata names the time base and the version of the schema.
    """

    def __init__(self, path: Path, time_base: Fraction) -> None:
        """Raises ValueError for a time base that is not positive or beyond 31 bits."""
        super().__init__(path, _FRAMES, time_base, {})

    def write(self, row: FrameRow) -> None:
        """Append a frame; frames and times must ascend, or it raises ValueError."""
        self._follow(row.frame, row.pts)
        numerator, denominator = self.time_base.as_integer_ratio()
        seconds = _to_seconds(row.pts, self.time_base)
        self._append(row.frame, row.pts, numerator, denominator, seconds, row.chunk, row.processed, row.bad)
        self._end_frame()


def read_areas_header(path: Path) -> AreasHeader:
    """Raises InvalidMedia for what is no `areas` of this version, OSError if the path cannot be opened."""
    with _open(path, _AREAS) as (_, metadata):
        return _parse_areas_header(metadata)


def read_areas(path: Path) -> Iterator[FrameAreas]:
    """The frames of `areas` in order, a group of rows in memory at a time.

    Raises InvalidMedia for what is no finished `areas` or damaged, OSError if the path cannot be opened.
    """
    with _open(path, _AREAS) as (parquet, _):
        frame, pts, pixels = 0, 0, dict[int, int]()
        for group in _read_groups(parquet, ["frame", "pts", "class_id", "pixels"]):
            for next_frame, next_pts, class_id, count in zip(*group, strict=True):
                if pixels and next_frame != frame:
                    yield FrameAreas(frame, pts, pixels)
                    pixels = {}
                frame, pts = next_frame, next_pts
                pixels[class_id] = count
        if pixels:
            yield FrameAreas(frame, pts, pixels)


def join_areas(parts: Iterable[Path], out: Path, lines: Path) -> None:
    """Put files of `areas` together in their order, as Parquet `out` and as JSON `lines`, one object per frame:
    {"frame", "pts", "seconds", "classes": {name: {"id", "pixels", "fraction"}}}.

    A part may come into being when it is asked for and go when the next one is; memory does not grow. Raises
    InvalidMedia naming the part (counted from 0) that is no finished `areas`, is damaged, has another header or does
    not begin after the one before; OSError if a path cannot be opened; ValueError without parts. Neither file is there
    then.
    """
    with ExitStack() as files:
        file = files.enter_context(_open_lines(lines))
        writer: AreasWriter | None = None
        for number, path in enumerate(parts):
            with _naming(number, path):
                header = read_areas_header(path)
                writer = writer or files.enter_context(AreasWriter(out, header))
                if header != writer.header:
                    raise InvalidMedia("Another size, time base or label space than the parts before")
                for row in read_areas(path):
                    writer.write(row)
                    line = json.dumps(_describe(row, header), ensure_ascii=False, separators=(",", ":"))
                    file.write(f"{line}\n")
        if writer is None:
            raise ValueError("there are no parts to join")


def _describe(row: FrameAreas, header: AreasHeader) -> dict[str, Any]:
    names, (width, height) = header.label_space.classes, header.size
    classes = {
        names[class_id]: {"id": class_id, "pixels": pixels, "fraction": pixels / (width * height)}
        for class_id, pixels in sorted(row.pixels.items())
    }
    return {
        "frame": row.frame,
        "pts": row.pts,
        "seconds": _to_seconds(row.pts, header.time_base),
        "classes": classes,
    }


def _to_seconds(pts: int, time_base: Fraction) -> float:
    """The nearest number there is: whole numbers are divided without being rounded first."""
    return pts * time_base.numerator / time_base.denominator


@contextmanager
def _open_lines(path: Path) -> Iterator[TextIO]:
    try:
        with path.open("w", encoding="utf-8", newline="\n") as file:
            yield file
    except BaseException:
        path.unlink(missing_ok=True)
        raise


@contextmanager
def _naming(number: int, path: Path) -> Iterator[None]:
    try:
        yield
    except (InvalidMedia, ValueError) as error:
        raise InvalidMedia(f"Part {number} ({path.name}): {error}") from error


@contextmanager
def _open(path: Path, schema: pa.Schema) -> Iterator[tuple[pq.ParquetFile, dict[str, str]]]:
    with ExitStack() as closing:
        file = closing.enter_context(path.open("rb"))
        with _raising_invalid_media():
            parquet = closing.enter_context(pq.ParquetFile(file, page_checksum_verification=True))
            metadata = {
                name.decode().removeprefix(_KEY): value.decode()
                for name, value in (parquet.schema_arrow.metadata or {}).items()
            }
            if not parquet.schema_arrow.equals(schema) or metadata["schema"] != str(SCHEMA_VERSION):
                raise InvalidMedia("The table has other columns than this version writes")
        yield parquet, metadata


def _parse_areas_header(metadata: Mapping[str, str]) -> AreasHeader:
    with _raising_invalid_media():
        size = int(metadata["width"]), int(metadata["height"])
        return AreasHeader(size, Fraction(metadata["time_base"]), LABEL_SPACES[metadata["label_space"]])


def _read_groups(parquet: pq.ParquetFile, columns: list[str]) -> Iterator[list[list[Any]]]:
    for number in range(parquet.num_row_groups):
        with _raising_invalid_media():
            group = parquet.read_row_group(number, columns, use_threads=False)
            values = [group.column(name).to_numpy().tolist() for name in columns]
        yield values


@contextmanager
def _raising_invalid_media() -> Iterator[None]:
    try:
        yield
    except (InvalidMedia, MemoryError):
        raise
    except Exception as error:
        # Arrow's own errors about a file's content are OSError too, without a number.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise InvalidMedia("The table is damaged or no table") from error
