"""Who works in which place of a pool, so that a dead child's steps are given back when its death is noticed.

Celery's parent process notices the death of a child at once and forks another into its place, which it does only
when the one before is gone for certain. The roster is memory that they all share, and so the new child knows whose
place it has taken: no look at process ids, which are used again, and no thread or connection in a parent that forks.
The lease remains for the deaths that nobody is left to notice.

A child also shows its pulse there, so that its parent can end one that hangs with the interpreter to itself, where no
thread of the child's own could notice anything.
"""

import mmap
import os
import struct
import threading
import time
import uuid

from sqlalchemy import delete

from shared import lateness
from shared.db import SessionFactory
from shared.models import Step, Worker

PLACES = 256  # more children than any pool has
ENTRY = struct.Struct("16sqd")  # the worker's id, that of its process, and when its pulse was felt last
NOBODY = ENTRY.pack(bytes(16), 0, 0.0)
PULSE = struct.Struct("d")
PULSE_OFFSET = ENTRY.size - PULSE.size
PULSE_SECONDS = 0.5


class Roster:
    """To be made before the fork."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, PLACES * ENTRY.size)

    def enter(self, place: int, worker_id: uuid.UUID) -> None:
        """This process holds what that worker claims; to be called before it claims anything."""
        self._write(place, ENTRY.pack(worker_id.bytes, os.getpid(), time.monotonic()))

    def clear(self, place: int) -> None:
        self._write(place, NOBODY)

    def find(self, place: int) -> uuid.UUID | None:
        """Who was entered last, unless the place was cleared."""
        return self._read(place)[0]

    def find_dead(self) -> dict[int, uuid.UUID]:
        """Places whose process is gone without having cleared them. For the parent, and only it can tell."""
        entries = {place: self._read(place) for place in range(PLACES)}
        return {place: worker_id for place, (worker_id, pid, _) in entries.items() if worker_id and _is_gone(pid)}

    def find_silent(self, *, seconds: float) -> list[int]:
        """Process ids of those who live and have shown no pulse for so long. For the parent, and only it can tell."""
        before = time.monotonic() - seconds  # the same clock in all processes of a machine
        entries = [self._read(place) for place in range(PLACES)]
        return [pid for worker_id, pid, pulse in entries if worker_id and pulse < before and not _is_gone(pid)]

    def show_pulse(self, place: int, until: threading.Event) -> None:
        """From a thread of the child's."""
        while not until.wait(PULSE_SECONDS):
            PULSE.pack_into(self._memory, place * ENTRY.size + PULSE_OFFSET, time.monotonic())

    def _read(self, place: int) -> tuple[uuid.UUID | None, int, float]:
        worker_id, pid, pulse = ENTRY.unpack_from(self._memory, place * ENTRY.size)
        return uuid.UUID(bytes=worker_id) if any(worker_id) else None, pid, pulse

    def _write(self, place: int, entry: bytes) -> None:
        self._memory[place * ENTRY.size : (place + 1) * ENTRY.size] = entry


def take_back(sessions: SessionFactory, worker_id: uuid.UUID, *, lost_attempts: int) -> list[Step]:
    """Give back all that a dead worker holds, one by one, and forget the worker; may be done again at any time."""
    with sessions.begin() as session:
        # First of all, for this waits for the claim whose commit may have been the last that was heard of it.
        session.execute(delete(Worker).where(Worker.id == worker_id))
    taken: list[Step] = []
    while True:
        with sessions.begin() as session:
            step = lateness.take_from(session, worker_id, lost_attempts=lost_attempts)
        if step is None:
            return taken
        taken.append(step)


def _is_gone(pid: int) -> bool:
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # its parent, this process, has taken note of it already
        return True
