"""An object as a file: what a reader gets, and how often the storage is asked."""

import io
import random

import pytest

from shared.errors import SourceChanged
from shared.remote_file import BLOCK_BYTES, BLOCKS_KEPT, RemoteFile

CONTENT = random.Random(0).randbytes(2 * BLOCK_BYTES + 1000)


class Ranges:
    """The storage: it remembers the starts of what it was asked for."""

    def __init__(self, content: bytes = CONTENT) -> None:
        self.content = content
        self.asked: list[int] = []

    def read(self, start: int, length: int) -> bytes:
        self.asked.append(start)
        return self.content[start : start + length]


@pytest.fixture
def ranges() -> Ranges:
    return Ranges()


@pytest.fixture
def remote(ranges: Ranges) -> RemoteFile:
    return RemoteFile(ranges.read, size_bytes=len(CONTENT))


def test_opening_asks_for_nothing(ranges: Ranges, remote: RemoteFile) -> None:
    remote.seek(0, io.SEEK_END)
    assert remote.tell() == len(CONTENT)
    assert ranges.asked == []


def test_reading_through_in_small_pieces_asks_once_for_each_block(ranges: Ranges, remote: RemoteFile) -> None:
    file = io.BufferedReader(remote, 4096)
    pieces = iter(lambda: file.read(32_768), b"")
    assert b"".join(pieces) == CONTENT
    assert ranges.asked == [0, BLOCK_BYTES, 2 * BLOCK_BYTES]


def test_any_place_and_length_is_as_in_a_local_file(remote: RemoteFile) -> None:
    file, local = io.BufferedReader(remote, 4096), io.BytesIO(CONTENT)
    chance = random.Random(1)
    for _ in range(200):
        start, length = chance.randrange(len(CONTENT) + 10), chance.randrange(3 * BLOCK_BYTES // 2)
        assert file.seek(start) == local.seek(start)
        assert file.read(length) == local.read(length)
        assert file.tell() == local.tell()


def test_streams_that_lie_apart_are_read_in_turns_from_memory() -> None:
    ranges = Ranges(bytes(BLOCKS_KEPT * BLOCK_BYTES))
    remote = RemoteFile(ranges.read, size_bytes=len(ranges.content))
    for _ in range(10):
        for block in range(BLOCKS_KEPT):
            remote.seek(block * BLOCK_BYTES)
            remote.read(100)
    assert len(ranges.asked) == BLOCKS_KEPT


def test_only_a_few_blocks_are_kept() -> None:
    ranges = Ranges(bytes((BLOCKS_KEPT + 1) * BLOCK_BYTES))
    remote = RemoteFile(ranges.read, size_bytes=len(ranges.content))
    for block in [*range(BLOCKS_KEPT + 1), BLOCKS_KEPT, 0]:
        remote.seek(block * BLOCK_BYTES)
        remote.read(1)
    assert ranges.asked[-1] == 0
    assert len(ranges.asked) == BLOCKS_KEPT + 2


def test_behind_the_end_is_nothing(ranges: Ranges, remote: RemoteFile) -> None:
    remote.seek(10, io.SEEK_END)
    assert remote.read(5) == b""
    assert ranges.asked == []


@pytest.mark.parametrize(("offset", "whence"), [(-1, io.SEEK_SET), (-1, io.SEEK_CUR), (-(10**9), io.SEEK_END), (0, 7)])
def test_a_place_that_cannot_be_is_refused(remote: RemoteFile, offset: int, whence: int) -> None:
    with pytest.raises(ValueError, match="there is no position"):
        remote.seek(offset, whence)


def test_an_object_shorter_than_was_said_is_not_taken_for_its_end(ranges: Ranges) -> None:
    remote = RemoteFile(ranges.read, size_bytes=len(CONTENT) + 1)
    remote.seek(2 * BLOCK_BYTES)
    with pytest.raises(SourceChanged):
        remote.read(1)
