"""The keeper: a small process that outlives a killed owner just long enough to end what it left running.

It waits for the end of its standard input, whose other end only the owner holds, so it wakes however the owner died.
It shares the owner's lock on the data folder, so no new owner starts until it is done. A parent-death signal would be
shorter, but follows the thread that forked rather than the process, is lost when the user changes, and is Linux's own.
"""

import sys
from pathlib import Path

from cli.local.child import stop_leftovers


def keep() -> None:
    sys.stdin.buffer.read()
    folder = Path(sys.argv[1])
    stop_leftovers(folder)
    for description in ("stack.json", "authorization"):  # they say that a stack runs here
        (folder / description).unlink(missing_ok=True)


if __name__ == "__main__":
    keep()
