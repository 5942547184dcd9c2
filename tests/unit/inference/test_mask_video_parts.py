"""Mask videos in parts: joined without decoding, refused when one does not fit, and read one mask at a time."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import numpy as np
import pytest

from shared.inference import mask_video
from shared.inference.errors import InvalidMedia
from shared.inference.mask_video import join, read_header, read_mask, read_masks
from tests.unit.inference.mask_videos import VIDEO_CLOCK, Mask, assert_holds, blobs, copy_packets, noise, write

# --- joining -------------------------------------------------------------------------------------------------------


def test_parts_are_joined_by_copying_packets(tmp_path: Path) -> None:
    masks = [blobs((50, 40), number) for number in range(60)]
    times = [3003 * number + number % 3 for number in range(60)]
    parts = [
        write(tmp_path / f"{start}.mkv", masks[start:end], times[start:end], time_base=VIDEO_CLOCK)
        for start, end in ((0, 25), (25, 26), (26, 60))
    ]
    joined = copy_packets(parts, tmp_path / "joined.mkv")
    assert_holds(joined, masks)
    assert [pts for pts, _ in read_masks(joined)] == times
    assert read_header(joined).time_base == VIDEO_CLOCK


def test_writers_of_the_same_size_make_the_same_codec_header(tmp_path: Path) -> None:
    headers = set()
    for number in range(3):
        path = write(tmp_path / f"{number}.mkv", [noise((50, 40), number)], [9 * number], threads=1 + number % 2)
        with av.open(path) as container:
            headers.add(container.streams.video[0].codec_context.extradata)
    assert len(headers) == 1


def cut(masks: Sequence[Mask], times: Sequence[int], size: int, folder: Path) -> list[Path]:
    """Parts of `size` frames each."""
    return [
        write(folder / f"{start}.mkv", masks[start : start + size], times[start : start + size], time_base=VIDEO_CLOCK)
        for start in range(0, len(masks), size)
    ]


@pytest.mark.parametrize("first", [0, -20_000, 10**12])
@pytest.mark.parametrize("size", [1, 3, 7, 30])
def test_joined_parts_are_the_file_that_one_writer_makes(tmp_path: Path, size: int, first: int) -> None:
    masks = [blobs((96, 64), number) for number in range(30)]
    times = [first + 3003 * number + number % 3 for number in range(30)]
    whole = write(tmp_path / "whole.mkv", masks, times, time_base=VIDEO_CLOCK)
    join(cut(masks, times, size, tmp_path), tmp_path / "joined.mkv")
    assert_holds(tmp_path / "joined.mkv", masks)
    assert [pts for pts, _ in read_masks(tmp_path / "joined.mkv")] == times
    assert (tmp_path / "joined.mkv").read_bytes() == whole.read_bytes()


def test_what_was_joined_can_be_joined_again(tmp_path: Path) -> None:
    masks = [blobs((96, 64), number) for number in range(8)]
    times = [3003 * number for number in range(8)]
    one, two, three, four = cut(masks, times, 2, tmp_path)
    join([one, two], tmp_path / "early.mkv")
    join([three, four], tmp_path / "late.mkv")
    join([tmp_path / "early.mkv", tmp_path / "late.mkv"], tmp_path / "joined.mkv")
    whole = write(tmp_path / "whole.mkv", masks, times, time_base=VIDEO_CLOCK)
    assert (tmp_path / "joined.mkv").read_bytes() == whole.read_bytes()


def test_a_part_is_needed_only_while_it_is_its_turn(tmp_path: Path) -> None:
    masks = [blobs((96, 64), number) for number in range(6)]

    def come_and_go() -> Iterator[Path]:
        for number, mask in enumerate(masks):
            path = write(tmp_path / "part.mkv", [mask], [40 * number])
            yield path
            path.unlink()

    join(come_and_go(), tmp_path / "joined.mkv")
    assert_holds(tmp_path / "joined.mkv", masks)


def test_parts_of_another_kind_or_order_are_refused_by_name(tmp_path: Path) -> None:
    sound = write(tmp_path / "sound.mkv", [blobs((96, 64), 1)] * 3)
    others = {
        "pixels": write(tmp_path / "size.mkv", [blobs((64, 96), 1)], [1000]),
        "time base": write(tmp_path / "clock.mkv", [blobs((96, 64), 1)], [1000], time_base=VIDEO_CLOCK),
        "does not come after 80": write(tmp_path / "order.mkv", [blobs((96, 64), 1)], [80]),
    }
    for reason, other in others.items():
        with pytest.raises(InvalidMedia, match=rf"Part 1 \({other.name}\).*{reason}"):
            join([sound, other], tmp_path / "joined.mkv")
        with pytest.raises(InvalidMedia):
            list(read_masks(tmp_path / "joined.mkv"))


def test_a_part_encoded_in_another_way_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = write(tmp_path / "sound.mkv", [blobs((96, 64), 1)])
    monkeypatch.setattr(mask_video, "_count_slices", lambda *_: 1)
    other = write(tmp_path / "other.mkv", [blobs((96, 64), 2)], [40])
    with pytest.raises(InvalidMedia, match=r"Part 1 \(other.mkv\): Encoded in another way"):
        join([sound, other], tmp_path / "joined.mkv")


def test_a_part_without_its_end_is_refused_by_name(tmp_path: Path) -> None:
    sound, damaged = cut(
        [blobs((96, 64), number) for number in range(8)], [3003 * number for number in range(8)], 4, tmp_path
    )
    whole = damaged.read_bytes()
    for length in range(0, int(len(whole) * 0.8), 97):
        damaged.write_bytes(whole[:length])
        with pytest.raises(InvalidMedia, match=r"Part 1 \(4.mkv\)"):
            join([sound, damaged], tmp_path / "joined.mkv")


@pytest.mark.parametrize("flip", [0x01, 0x80])
def test_damage_in_a_part_is_noticed_when_joining_or_when_reading(tmp_path: Path, flip: int) -> None:
    masks = [blobs((9, 7), number) for number in range(4)]
    one, two = cut(masks, [1, 3004, 6007, 9010], 2, tmp_path)
    sound = two.read_bytes()
    refused = 0
    for place in range(len(sound)):
        two.write_bytes(sound[:place] + bytes([sound[place] ^ flip]) + sound[place + 1 :])
        try:
            join([one, two], tmp_path / "joined.mkv")
        except InvalidMedia:
            refused += 1
            continue
        try:
            found = list(read_masks(tmp_path / "joined.mkv"))
        except InvalidMedia:
            continue
        assert [pts for pts, _ in found] == [1, 3004, 6007, 9010], place
        assert np.array_equal([mask for _, mask in found], masks), place
    assert refused > 100


def test_nothing_cannot_be_joined(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no parts"):
        join([], tmp_path / "joined.mkv")


# --- one mask of many ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "times",
    [
        [3003 * number for number in range(40)],
        [-9000 + 3003 * number for number in range(40)],
        [17 * number for number in range(40)],  # five frames in a millisecond, which the container cannot tell apart
        [10**12 + number**3 for number in range(40)],
    ],
)
def test_a_mask_is_found_by_its_number_and_by_its_time(tmp_path: Path, times: list[int]) -> None:
    masks = [blobs((96, 64), number) for number in range(40)]
    path = tmp_path / "joined.mkv"
    join(cut(masks, times, 7, tmp_path), path)
    for number, (pts, mask) in enumerate(zip(times, masks, strict=True)):
        for found in (read_mask(path, number=number), read_mask(path, pts=pts)):
            assert found[:2] == (number, pts)
            assert np.array_equal(found[2], mask)


@pytest.mark.parametrize(
    "wanted", [{"number": -1}, {"number": 3}, {"pts": -1}, {"pts": 41}, {"pts": 10**30}, {"number": 10**30}]
)
def test_a_mask_that_is_not_there_is_a_lookup_error(tmp_path: Path, wanted: dict[str, int]) -> None:
    path = write(tmp_path / "masks.mkv", [blobs((96, 64), number) for number in range(3)])
    with pytest.raises(LookupError, match="no frame"):
        read_mask(path, **wanted)


def test_a_mask_is_asked_for_in_one_way(tmp_path: Path) -> None:
    path = write(tmp_path / "masks.mkv", [blobs((96, 64), 1)])
    for wanted in ({}, {"number": 0, "pts": 0}):
        with pytest.raises(ValueError, match="either"):
            read_mask(path, **wanted)


class CountedReads(io.FileIO):
    """A file that counts the bytes asked of it, as a store would charge them."""

    count = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(-1 if size is None else size)
        self.count += len(data)
        return data


def test_one_mask_of_a_long_video_costs_little_more_than_itself(tmp_path: Path) -> None:
    """The beginning, the table of times, the frame: two buffers of 32 KiB and 20 bytes for each frame there is."""
    masks = [noise((96, 64), number) for number in range(1000)]
    path = write(tmp_path / "masks.mkv", masks, [3003 * number for number in range(1000)], time_base=VIDEO_CLOCK)
    assert path.stat().st_size > 6_000_000
    with CountedReads(path) as file:
        number, pts, mask = read_mask(file, number=700)
        assert (number, pts, file.closed) == (700, 700 * 3003, False)
        assert np.array_equal(mask, masks[700])
        assert file.count < 150_000


def test_what_the_store_cannot_give_is_no_damage(tmp_path: Path) -> None:
    class Lost(io.FileIO):
        def read(self, _: int | None = -1) -> bytes:
            raise ConnectionResetError("the store is gone")

    path = write(tmp_path / "masks.mkv", [blobs((96, 64), 1)])
    with Lost(path) as file, pytest.raises(ConnectionResetError):
        read_mask(file, number=0)
