"""Log files as they grow, each line under the name of who wrote it.

Processes write to their files themselves and a reader follows: a terminal that is held still must not fill a pipe and
with it stop a worker. For the same reason `say` only leaves its line for the reader's thread.
"""

import os
import queue
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

POLL_SECONDS = 0.1
CLOSE_SECONDS = 2.0
CHUNK_BYTES = 2**16
COLOURS = (36, 33, 32, 35, 34, 96, 93, 92, 95, 94)


class Follower:
    """Prints what is added to the files from now on, and between them what is said, until closed."""

    def __init__(self, logs: Mapping[str, Path], *, output: TextIO) -> None:
        self._logs = dict(logs)
        self._output = output
        self._coloured = output.isatty() and "NO_COLOR" not in os.environ
        self._width = max(map(len, logs), default=0)
        self._read_until = {name: path.stat().st_size if path.exists() else 0 for name, path in logs.items()}
        self._unfinished = dict.fromkeys(logs, b"")
        self._said: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="logs", daemon=True)
        self._thread.start()

    def say(self, text: str) -> None:
        self._said.put(text)

    def close(self) -> None:
        """Print what is left, and stop; a terminal held still does not hold us."""
        self._closed.set()
        self._thread.join(CLOSE_SECONDS)

    def _follow(self) -> None:
        last = False
        while not last:
            last = self._closed.wait(POLL_SECONDS)
            try:
                self._print_new()
            except BrokenPipeError:
                return  # nobody reads any more; the files have it all

    def _print_new(self) -> None:
        for index, (name, path) in enumerate(self._logs.items()):
            prefix = f"{name:<{self._width}} │ "
            if self._coloured:
                prefix = f"\x1b[{COLOURS[index % len(COLOURS)]}m{prefix}\x1b[0m"
            while added := self._read(name, path):
                *lines, self._unfinished[name] = (self._unfinished[name] + added).split(b"\n")
                for line in lines:
                    print(f"{prefix}{line.decode(errors='replace')}", file=self._output)
        while not self._said.empty():
            print(self._said.get(), file=self._output)
        self._output.flush()

    def _read(self, name: str, path: Path) -> bytes:
        if not path.exists():
            return b""
        with path.open("rb") as log:
            if os.fstat(log.fileno()).st_size < self._read_until[name]:
                self._read_until[name] = 0  # it was set aside and begun anew
            log.seek(self._read_until[name])
            added = log.read(CHUNK_BYTES)
            self._read_until[name] += len(added)
        return added
