"""The pulse of each child of a pool, in memory that it shares with its parent.

So the parent can end a child that hangs with the interpreter to itself, where no thread of the child's own could notice
anything.
"""

import mmap
import os
import struct
import threading
import time

PLACES = 256  # more children than any pool has
ENTRY = struct.Struct("qd")  # the process's id, and when its pulse was felt last
NOBODY = ENTRY.pack(0, 0.0)
PULSE = struct.Struct("d")
PULSE_OFFSET = ENTRY.size - PULSE.size
PULSE_SECONDS = 0.5


class Pulses:
    """To be made before the fork."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, PLACES * ENTRY.size)

    def enter(self, place: int) -> None:
        """This process is in that place of the pool now."""
        self._write(place, ENTRY.pack(os.getpid(), time.monotonic()))

    def clear(self, place: int) -> None:
        self._write(place, NOBODY)

    def show(self, place: int, until: threading.Event) -> None:
        """From a thread of the child's."""
        while not until.wait(PULSE_SECONDS):
            PULSE.pack_into(self._memory, place * ENTRY.size + PULSE_OFFSET, time.monotonic())

    def find_silent(self, *, seconds: float) -> list[int]:
        """Process ids of those who live and have shown no pulse for so long. For the parent, and only it can tell."""
        before = time.monotonic() - seconds  # the same clock in all processes of a machine
        return [pid for pid, pulse in ENTRY.iter_unpack(self._memory[:]) if pid and pulse < before and _lives(pid)]

    def _write(self, place: int, entry: bytes) -> None:
        self._memory[place * ENTRY.size : (place + 1) * ENTRY.size] = entry


def _lives(pid: int) -> bool:
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:  # its parent, this process, has taken note of its end already
        return False
