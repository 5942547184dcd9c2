"""Processes of a test's own, that hang, stand still or die as it says."""

import os
import signal
from collections.abc import Callable


def fork(child: Callable[[], None] = lambda: None) -> int:
    """A process as Celery makes them; it lives until it is killed."""
    pid = os.fork()
    if pid == 0:
        try:
            child()
            signal.pause()
        finally:
            os._exit(1)
    return pid


def bury(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
