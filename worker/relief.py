"""Giving back at once what workers that died on this machine held.

Every worker leaves a mark of its process in its row. Whoever starts here looks for rows whose process is gone: the
child that Celery forks into a dead one's place, and the first one of a worker that is started again. The lease remains
for deaths that nobody on the machine is left to notice, and for systems that do not tell.
"""

import os
import uuid
from contextlib import suppress
from pathlib import Path

import structlog
from sqlalchemy import delete, select

from shared import lateness
from shared.broker import Hints
from shared.config import Settings
from shared.db import SessionFactory
from shared.models import Step, Worker
from worker.runner import MOST_HINTS

log = structlog.get_logger(__name__)

DEAD = ("Z", "X")  # of the states in proc(5); a zombie's parent has only not taken note of it yet


def read_mark(pid: int) -> str | None:
    """What no other process has or will have: this run of this machine, the namespace of process ids, the moment it
    began in it. None for one that is gone, and where the system does not tell (only Linux does).

    A process id alone is used again, and means another process in another container.
    """
    with suppress(OSError):
        state, began = _read_stat(pid)
        return None if state in DEAD else f"{_read_place()}{began}"
    return None


def find_gone(sessions: SessionFactory) -> list[uuid.UUID]:
    """The workers of this machine, and of this container, whose processes are gone for certain."""
    try:
        place = _read_place()
    except OSError:
        return []
    with sessions() as session:
        here = session.execute(select(Worker.id, Worker.pid, Worker.mark).where(Worker.mark.startswith(place))).all()
    return [worker_id for worker_id, pid, mark in here if _is_gone(pid, mark)]


def take_back(sessions: SessionFactory, worker_id: uuid.UUID, *, lost_attempts: int) -> list[Step]:
    """Give back all that a dead worker holds, one by one, and forget the worker; may be done again at any time."""
    with sessions.begin() as session:
        # Waits for the claim whose commit may have been the last that was heard of it.
        session.execute(select(Worker.id).where(Worker.id == worker_id).with_for_update())
    taken: list[Step] = []
    while True:
        with sessions.begin() as session:
            step = lateness.take_from(session, worker_id, lost_attempts=lost_attempts)
        if step is None:
            break
        taken.append(step)
    with sessions.begin() as session:
        session.execute(delete(Worker).where(Worker.id == worker_id))
    return taken


def relieve(settings: Settings, sessions: SessionFactory, hints: Hints) -> None:
    """Give back what those who died here held, and wake others for it."""
    for dead in find_gone(sessions):
        steps = take_back(sessions, dead, lost_attempts=settings.jobs.lost_attempts)
        for step in steps:
            log.warning(
                "a step was taken back from a worker that died", job_id=str(step.job_id), step=step.ordinal,
                attempt=step.attempt, state=step.state, lost=step.lost, worker_id=str(dead),
            )  # fmt: skip
        # One that failed for it, too: the hint it was claimed by stood for all that waits.
        for step in steps[:MOST_HINTS]:
            hints.wake(step.queue, step.id)


def _read_place() -> str:
    run = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{run} {os.readlink('/proc/self/ns/pid')} "


def _read_stat(pid: int) -> tuple[str, str]:
    """State, and clock ticks from the machine's start to the process's (proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # a name may hold spaces and brackets
    return fields[0], fields[19]


def _is_gone(pid: int, mark: str) -> bool:
    shown = read_mark(pid)
    if shown is None:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # it lives, and /proc may hide what belongs to other users
            return False
    return shown != mark
