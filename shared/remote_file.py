"""An object of the storage as a file for media libraries: read by blocks, since they ask for a few kilobytes a time."""

import io
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from shared.errors import SourceChanged

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

BLOCK_BYTES = 2 * 2**20
BLOCKS_KEPT = 8
"""Streams that are not interleaved, an index at the end: several places of a file are read in turns."""

ReadRange: TypeAlias = Callable[[int, int], bytes]
"""From the position and length of a range to its bytes."""


class RemoteFile(io.RawIOBase):
    """Seekable, for one reader. Reading raises SourceChanged and StorageUnavailable; opening asks for nothing."""

    def __init__(self, read_range: ReadRange, *, size_bytes: int) -> None:
        super().__init__()
        self._read_range = read_range
        self._size_bytes = size_bytes
        self._position = 0
        self._blocks: OrderedDict[int, bytes] = OrderedDict()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origins = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size_bytes}
        if whence not in origins or origins[whence] + offset < 0:
            raise ValueError(f"there is no position {offset} from origin {whence}")
        self._position = origins[whence] + offset
        return self._position

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        """At most to the end of a block; the buffered reader around this asks again for the rest."""
        if self._position >= self._size_bytes:
            return 0
        number, start = divmod(self._position, BLOCK_BYTES)
        with memoryview(buffer).cast("B") as wanted:
            found = memoryview(self._block(number))[start : start + len(wanted)]
            wanted[: len(found)] = found
        self._position += len(found)
        return len(found)

    def close(self) -> None:
        self._blocks.clear()
        super().close()

    def _block(self, number: int) -> bytes:
        if number in self._blocks:
            self._blocks.move_to_end(number)
            return self._blocks[number]
        start = number * BLOCK_BYTES
        length = min(BLOCK_BYTES, self._size_bytes - start)
        block = self._read_range(start, length)
        if len(block) != length:
            raise SourceChanged(f"the source ends before its {self._size_bytes} bytes")
        while len(self._blocks) >= BLOCKS_KEPT:
            self._blocks.popitem(last=False)
        self._blocks[number] = block
        return block
