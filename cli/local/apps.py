"""The application's own processes in a local stack: the API, the GPU and io workers, and upkeep."""

import os
import sys
import time
from collections.abc import Callable, Mapping
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from cli.local.child import Child, Command, StackError, describe_exit
from cli.local.folder import PACKAGES
from cli.local.server import HOST

READY_SECONDS = 180.0
POLL_SECONDS = 0.1
DRAIN_SECONDS = 30.0
OWNED = ("MASKLINE_DATABASE__URL", "MASKLINE_BROKER__URL", "MASKLINE_STORAGE__", "MASKLINE_URL", "MASKLINE_API_KEY")
"""What the stack sets itself, or its processes have no use for: a value of the user's is meant for another stack."""
FOLDER_VARIABLES = "MASKLINE_MODELS__"


class App(Child):
    def __init__(
        self,
        name: str,
        *,
        home: Path,
        arguments: tuple[str, ...],
        environment: Mapping[str, str],
        is_ready: Callable[["App"], bool] | None = None,
    ) -> None:
        super().__init__(name, home=home)
        self._arguments = arguments
        self._environment = environment
        self._is_ready = is_ready

    def launch(self) -> None:
        """Start it unless it runs, without waiting."""
        if self.running:
            return
        command = Command(
            arguments=(sys.executable, *self._arguments),
            # Celery and uvicorn import from where they run first: nothing of the user's may be taken for ours.
            folder=PACKAGES,
            environment=self._environment,
            rank=1,
        )
        self.spawn(command)

    def start(self) -> None:
        self.launch()
        self.wait_ready()

    def wait_ready(self, *, given_up: Callable[[], bool] = lambda: False) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while self._is_ready is not None and not self._is_ready(self):
            if given_up():
                return
            if not self.running:
                status = self.poll()
                how = "was not started" if status is None else f"ended ({describe_exit(status)}) while starting"
                raise StackError(f"{self.name} {how}:\n{self.last_words()}")
            if time.monotonic() > deadline:
                raise StackError(f"{self.name} was not ready in {READY_SECONDS:.0f} s:\n{self.last_words()}")
            time.sleep(POLL_SECONDS)

    def stop(self) -> None:
        self.end(grace_seconds=DRAIN_SECONDS)


def api_arguments(port: int) -> tuple[str, ...]:
    # Event streams end only when their clients leave, so without a bound a shutdown would wait for them for ever.
    limits = ("--no-access-log", "--timeout-graceful-shutdown", "5")
    return ("-m", "uvicorn", "--factory", "api.main:create_app", "--host", HOST, "--port", str(port), *limits)


def worker_arguments(queue: str, *, node: str, concurrency: int) -> tuple[str, ...]:
    # Whoever starts the stack as root, in a container say, knows; and the banner is ten lines of pictures.
    silent = ("-W", "ignore:You're running the worker with superuser privileges", "-m", "celery", "--quiet")
    pool = ("-P", "prefork", "-c", str(concurrency), "-Q", queue)
    return (*silent, "-A", "worker.app", "worker", *pool, "--without-gossip", "--without-mingle", "-n", node)


def app_environment(settings: Mapping[str, str]) -> dict[str, str]:
    """The user's environment under the stack's settings."""
    kept = {name: _absolute(name, value) for name, value in os.environ.items() if not name.startswith(OWNED)}
    return kept | {"PYTHONUNBUFFERED": "1"} | dict(settings)


def answers(url: str, path: str) -> bool:
    connection = HTTPConnection(url.removeprefix("http://"), timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def _absolute(name: str, value: str) -> str:
    """A folder that was named from where the user stands; the processes stand elsewhere."""
    if name.startswith(FOLDER_VARIABLES) and value and not os.path.isabs(value) and os.path.isdir(value):
        return os.path.abspath(value)
    return value
