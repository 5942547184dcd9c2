"""What ends a command early: one line for whoever typed it, and an exit status.

Every error of the command line that is not a bug is one of these or a subclass; `cli/main.py` prints them.
"""

from typing import ClassVar

FAILED, MISUSED, UNREACHABLE, REFUSED, INTERRUPTED = 1, 2, 3, 4, 130


class Failure(Exception):
    """It did not work; the message says what and, where that is known, what to do."""

    exit_status: ClassVar[int] = FAILED


class Misuse(Failure):
    """What was typed cannot be meant."""

    exit_status = MISUSED
