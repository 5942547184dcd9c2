"""Points at which a test may kill or stop a process, to see that what is promised holds at that very moment.

None of them does anything unless `MASKLINE_FAULTS_FOLDER` is set, with which only a test environment starts. There, a
file with the name of a point arms it and says `kill`, `stop` or `hang`; whoever reaches the point first takes the file
away, so that it happens once however many processes come by.
"""

import ctypes
import os
import signal
from pathlib import Path

POINTS = frozenset(
    {
        "job-uncommitted",  # the API is about to accept a job
        "job-committed",  # and has, but has not answered
        "fetch-made", "probe-made", "infer-made", "finalize-made",  # a step's files are stored, no row tells of them
        "manifest-unwritten",  # all other files of a result are stored
        "outcome-committed",  # a step has ended, nobody has been woken for what follows
        "files-purged",  # of what is over, its rows are there yet
        "webhook-answered",  # the receiver has the message, no row tells of it
    }
)  # fmt: skip
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


class _Armory:
    folder: Path | None = None


def prepare(folder: Path | None) -> None:
    """At the start of a process: where to look for armed points, if anywhere."""
    _Armory.folder = folder


def reach(point: str) -> None:
    """The process has come to this point."""
    if _Armory.folder is None:
        return
    if point not in POINTS:
        raise ValueError(f"{point} is not a point that could be armed")
    taken = _Armory.folder / f"{point}.{os.getpid()}"
    try:
        (_Armory.folder / point).rename(taken)
    except FileNotFoundError:
        return
    order = taken.read_text()
    if order == "hang":
        ctypes.PyDLL(None).pause()  # called so, it keeps the interpreter to itself: no other thread runs any more
    else:
        os.kill(os.getpid(), SIGNALS[order])
