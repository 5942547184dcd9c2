"""Tables of a recording: read back as written by anybody's reader, joined to the file of a single writer, refused
where they do not fit.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.inference.errors import InvalidMedia
from shared.inference.labels import ADE20K, VOC
from worker import tables
from worker.tables import AreasHeader, AreasWriter, FrameAreas, FrameRow, FramesWriter

HEADER = AreasHeader((96, 64), Fraction(1, 90000), VOC)
PIXELS = 96 * 64
TWO_FRAMES = [FrameAreas(4, -45000, {15: 44, 0: 6100}), FrameAreas(8, 3, {0: 6144})]


def make_areas(count: int) -> list[FrameAreas]:
    """Every third frame, each with background and up to three classes more."""
    rows = []
    for number in range(count):
        pixels = {1 + (number + k) % 20: 100 + number for k in range(number % 4)}
        rows.append(FrameAreas(3 * number, 9009 * number - 7, {0: PIXELS - sum(pixels.values()), **pixels}))
    return rows


def make_frames(count: int) -> list[FrameRow]:
    return [
        FrameRow(number, 3003 * number - 7, chunk=number // 7, processed=number % 3 == 0, bad=number == 11)
        for number in range(count)
    ]


def write_areas(path: Path, rows: Sequence[FrameAreas], header: AreasHeader = HEADER) -> Path:
    with AreasWriter(path, header) as table:
        for row in rows:
            table.write(row)
    return path


def write_frames(path: Path, rows: Sequence[FrameRow], time_base: Fraction = HEADER.time_base) -> Path:
    with FramesWriter(path, time_base) as table:
        for row in rows:
            table.write(row)
    return path


def cut_areas(rows: Sequence[FrameAreas], size: int, folder: Path) -> list[Path]:
    """Parts of `size` frames each."""
    return [write_areas(folder / f"{start}.parquet", rows[start : start + size]) for start in range(0, len(rows), size)]


# --- what others read ----------------------------------------------------------------------------------------------


def test_areas_have_a_row_for_each_frame_and_class(tmp_path: Path) -> None:
    path = write_areas(tmp_path / "areas.parquet", TWO_FRAMES)
    table = pq.read_table(path)
    assert table.schema.names == ["frame", "pts", "seconds", "class_id", "class", "pixels", "fraction"]
    assert [str(field.type) for field in table.schema] == [
        "int64", "int64", "double", "uint8", "dictionary<values=string, indices=int32, ordered=0>", "int64", "double",
    ]  # fmt: skip
    assert table.to_pylist() == [
        {"frame": 4, "pts": -45000, "seconds": -0.5, "class_id": 0, "class": "background", "pixels": 6100,
         "fraction": 6100 / PIXELS},
        {"frame": 4, "pts": -45000, "seconds": -0.5, "class_id": 15, "class": "person", "pixels": 44,
         "fraction": 44 / PIXELS},
        {"frame": 8, "pts": 3, "seconds": 3 / 90000, "class_id": 0, "class": "background", "pixels": 6144,
         "fraction": 1.0},
    ]  # fmt: skip


def test_frames_have_a_row_each_with_their_exact_time(tmp_path: Path) -> None:
    path = write_frames(tmp_path / "frames.parquet", make_frames(12)[10:], Fraction(1001, 30000))
    assert pq.read_table(path).to_pylist() == [
        {"frame": 10, "pts": 30023, "time_base_numerator": 1001, "time_base_denominator": 30000,
         "seconds": 30023 * 1001 / 30000, "chunk": 1, "processed": False, "bad": False},
        {"frame": 11, "pts": 33026, "time_base_numerator": 1001, "time_base_denominator": 30000,
         "seconds": 33026 * 1001 / 30000, "chunk": 1, "processed": False, "bad": True},
    ]  # fmt: skip


def test_files_say_what_their_numbers_mean(tmp_path: Path) -> None:
    areas = pq.read_schema(write_areas(tmp_path / "areas.parquet", make_areas(1))).metadata
    frames = pq.read_schema(write_frames(tmp_path / "frames.parquet", make_frames(1))).metadata
    assert {name: value for name, value in areas.items() if name.startswith(b"maskline.")} == {
        b"maskline.schema": b"1",
        b"maskline.time_base": b"1/90000",
        b"maskline.width": b"96",
        b"maskline.height": b"64",
        b"maskline.label_space": b"voc",
    }
    assert (frames[b"maskline.schema"], frames[b"maskline.time_base"]) == (b"1", b"1/90000")


def test_columns_are_packed_with_zstandard(tmp_path: Path) -> None:
    for path in (
        write_areas(tmp_path / "areas.parquet", make_areas(3)),
        write_frames(tmp_path / "frames.parquet", make_frames(3)),
    ):
        group = pq.ParquetFile(path).metadata.row_group(0)
        assert {group.column(number).compression for number in range(group.num_columns)} == {"ZSTD"}


def test_lines_are_one_object_for_each_frame(tmp_path: Path) -> None:
    part = write_areas(tmp_path / "part.parquet", TWO_FRAMES)
    tables.join_areas([part], tmp_path / "areas.parquet", tmp_path / "areas.jsonl")
    assert [json.loads(line) for line in (tmp_path / "areas.jsonl").read_text().splitlines()] == [
        {
            "frame": 4,
            "pts": -45000,
            "seconds": -0.5,
            "classes": {
                "background": {"id": 0, "pixels": 6100, "fraction": 6100 / PIXELS},
                "person": {"id": 15, "pixels": 44, "fraction": 44 / PIXELS},
            },
        },
        {
            "frame": 8,
            "pts": 3,
            "seconds": 3 / 90000,
            "classes": {"background": {"id": 0, "pixels": 6144, "fraction": 1.0}},
        },
    ]


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    areas = write_areas(tmp_path / "areas.parquet", make_areas(40))
    assert tables.read_areas_header(areas) == HEADER
    assert list(tables.read_areas(areas)) == make_areas(40)


# --- joining -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_rows", [5, 2**16])
@pytest.mark.parametrize("size", [1, 3, 7, 40])
def test_joined_areas_are_the_file_that_one_writer_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, group_rows: int
) -> None:
    monkeypatch.setattr(tables, "GROUP_ROWS", group_rows)
    rows = make_areas(40)
    whole = write_areas(tmp_path / "whole.parquet", rows)
    tables.join_areas(cut_areas(rows, size, tmp_path), tmp_path / "areas.parquet", tmp_path / "areas.jsonl")
    assert (tmp_path / "areas.parquet").read_bytes() == whole.read_bytes()
    assert list(tables.read_areas(tmp_path / "areas.parquet")) == rows
    lines = (tmp_path / "areas.jsonl").read_text().splitlines()
    assert [json.loads(line)["frame"] for line in lines] == [row.frame for row in rows]


def test_a_group_of_rows_ends_with_a_frame_and_is_all_that_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "GROUP_ROWS", 5)
    parquet = pq.ParquetFile(write_areas(tmp_path / "areas.parquet", make_areas(40)))
    groups = [set(parquet.read_row_group(number)["frame"].to_pylist()) for number in range(parquet.num_row_groups)]
    assert len(groups) > 10
    assert sum(len(frames) for frames in groups) == 40


def test_a_part_is_needed_only_while_it_is_its_turn(tmp_path: Path) -> None:
    rows = make_areas(6)

    def come_and_go() -> Iterator[Path]:
        for row in rows:
            path = write_areas(tmp_path / "part.parquet", [row])
            yield path
            path.unlink()

    tables.join_areas(come_and_go(), tmp_path / "areas.parquet", tmp_path / "areas.jsonl")
    assert list(tables.read_areas(tmp_path / "areas.parquet")) == rows


def test_a_chunk_without_a_mask_joins_as_nothing(tmp_path: Path) -> None:
    rows = make_areas(4)
    parts = [*cut_areas(rows, 2, tmp_path), write_areas(tmp_path / "empty.parquet", [])]
    tables.join_areas(parts, tmp_path / "areas.parquet", tmp_path / "areas.jsonl")
    assert list(tables.read_areas(tmp_path / "areas.parquet")) == rows


@pytest.mark.parametrize(
    ("header", "rows", "reason"),
    [
        (replace(HEADER, time_base=Fraction(1, 1000)), make_areas(8)[6:], "Another"),
        (replace(HEADER, label_space=ADE20K), make_areas(8)[6:], "Another"),
        (replace(HEADER, size=(64, 96)), make_areas(8)[6:], "Another"),
        (HEADER, make_areas(8)[5:], "does not come after"),
    ],
)
def test_parts_of_another_kind_or_order_are_refused_by_name(
    tmp_path: Path, header: AreasHeader, rows: list[FrameAreas], reason: str
) -> None:
    one = write_areas(tmp_path / "one.parquet", make_areas(6))
    two = write_areas(tmp_path / "two.parquet", rows, header)
    with pytest.raises(InvalidMedia, match=rf"Part 1 \(two.parquet\).*{reason}"):
        tables.join_areas([one, two], tmp_path / "areas.parquet", tmp_path / "areas.jsonl")
    assert not {"areas.parquet", "areas.jsonl"} & {path.name for path in tmp_path.iterdir()}


def test_nothing_cannot_be_joined(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no parts"):
        tables.join_areas([], tmp_path / "areas.parquet", tmp_path / "areas.jsonl")
    assert list(tmp_path.iterdir()) == []


# --- damage --------------------------------------------------------------------------------------------------------


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = write_areas(tmp_path / "areas.parquet", make_areas(10))
    whole = path.read_bytes()
    for length in range(0, len(whole), 53):
        path.write_bytes(whole[:length])
        with pytest.raises(InvalidMedia):
            list(tables.read_areas(path))


def test_a_flipped_byte_of_the_rows_is_noticed(tmp_path: Path) -> None:
    path = write_areas(tmp_path / "areas.parquet", make_areas(10))
    sound = path.read_bytes()
    noticed = 0
    for place in range(len(sound) - int.from_bytes(sound[-8:-4], "little") - 8):
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
        try:
            assert list(tables.read_areas(path)) == make_areas(10), place
        except InvalidMedia:
            noticed += 1
    assert noticed > 100


def test_other_tables_are_refused(tmp_path: Path) -> None:
    frames = write_frames(tmp_path / "frames.parquet", make_frames(3))
    pq.write_table(pa.table({"frame": [1]}), tmp_path / "other.parquet")
    for path in (frames, tmp_path / "other.parquet"):
        with pytest.raises(InvalidMedia, match="columns"):
            list(tables.read_areas(path))
    with pytest.raises(FileNotFoundError):
        list(tables.read_areas(tmp_path / "nowhere.parquet"))


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (FrameAreas(5, 100, {0: PIXELS}), "come after"),
        (FrameAreas(6, 50, {0: PIXELS}), "come after"),
        (FrameAreas(6, 100, {}), "fill"),
        (FrameAreas(6, 100, {0: PIXELS - 1}), "fill"),
        (FrameAreas(6, 100, {0: PIXELS, 1: 0}), "fill"),
        (FrameAreas(6, 100, {21: PIXELS}), "label space"),
        (FrameAreas(6, 2**63, {0: PIXELS}), "beyond"),
    ],
)
def test_areas_ascend_and_fill_the_frame_and_nothing_is_left_otherwise(
    tmp_path: Path, row: FrameAreas, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        write_areas(tmp_path / "areas.parquet", [FrameAreas(5, 50, {0: PIXELS}), row])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("row", [FrameRow(5, 100, 0, True, False), FrameRow(6, 50, 0, True, False)])
def test_frames_ascend_and_nothing_is_left_otherwise(tmp_path: Path, row: FrameRow) -> None:
    with pytest.raises(ValueError, match="come after"):
        write_frames(tmp_path / "frames.parquet", [FrameRow(5, 50, 0, True, False), row])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("time_base", [Fraction(0), Fraction(-1, 25), Fraction(1, 2**31)])
def test_a_time_base_is_positive_and_has_31_bits(tmp_path: Path, time_base: Fraction) -> None:
    with pytest.raises(ValueError, match="time base"):
        FramesWriter(tmp_path / "frames.parquet", time_base)
