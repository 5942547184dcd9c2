"""The heart of a worker: a thread that keeps the worker's row and the leases of its steps alive, and hears orders.

It beats on a connection of its own, so that a busy or blocked step never stops it.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import structlog
from sqlalchemy import func, update
from sqlalchemy.exc import SQLAlchemyError

from shared import lifecycle
from shared.db import SessionFactory
from shared.errors import LeaseLost, MasklineError
from shared.lifecycle import Orders
from shared.locks import Lease
from shared.models import Worker

log = structlog.get_logger(__name__)

DESCRIPTION = ("id", "host", "pid", "queue", "device", "memory_bytes", "modes")  # of a worker, as it never changes


class Draining(MasklineError):
    """The worker is to stop; its step is given back."""

    code = "draining"


class Stopped(MasklineError):
    """The job was canceled or has ended."""

    code = "stopped"


class Flag(Protocol):
    def is_set(self) -> bool: ...


class Hold:
    """A worker's hold on the step it runs, as far as the worker itself can know."""

    def __init__(self, lease: Lease, *, draining: Flag, lease_seconds: float) -> None:
        self.lease = lease
        self._draining = draining
        self._lease_seconds = lease_seconds
        self._valid_until = time.monotonic() + lease_seconds
        self._lost = False
        self._stop = False
        self._unwanted_since: float | None = None

    def require_lease(self) -> None:
        """Raises LeaseLost once the lease may have passed to another attempt."""
        if self._lost or time.monotonic() > self._valid_until:
            raise LeaseLost("the lease ran out; another attempt may have begun")

    def check(self) -> None:
        """To be called between pieces of work. Raises LeaseLost, Stopped or Draining."""
        self.require_lease()
        if self._stop:
            raise Stopped("the job was canceled or has ended")
        if self._draining.is_set():
            raise Draining("the worker is draining")

    def renew(self, sessions: SessionFactory) -> None:
        asked_at = time.monotonic()  # before the question: the lease runs from then at the earliest

        def ask() -> Orders:
            with sessions.begin() as session:
                return lifecycle.heartbeat(session, self.lease, lease_seconds=self._lease_seconds)

        if self.hear(ask):
            self._valid_until = asked_at + self._lease_seconds
        if not (self._lost or self._stop):
            self._unwanted_since = None
        elif self._unwanted_since is None:
            self._unwanted_since = asked_at

    def hear(self, ask: Callable[[], Orders]) -> bool:
        """Keep in mind what the database says of the step, for the next check; whether it is still held."""
        try:
            orders = ask()
        except LeaseLost:
            self._lost = True
            return False
        self._stop = orders == "stop"
        return True

    def is_ignored(self, *, obey_seconds: float) -> bool:
        """Whether the step goes on so long after it was told to stop that it must hang."""
        return self._unwanted_since is not None and time.monotonic() - self._unwanted_since > obey_seconds


class Heart:
    def __init__(
        self,
        sessions: SessionFactory,
        *,
        worker: Worker,
        draining: Flag,
        beat_seconds: float,
        lease_seconds: float,
        obey_seconds: float,
    ) -> None:
        self.worker_id = worker.id
        self._description = {name: getattr(worker, name) for name in DESCRIPTION}
        self._sessions = sessions
        self._draining = draining
        self._beat_seconds = beat_seconds
        self._lease_seconds = lease_seconds
        self._obey_seconds = obey_seconds
        self._holds: dict[Hold, None] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heart", daemon=True)
        self._thread.start()

    @contextmanager
    def hold(self, lease: Lease) -> Iterator[Hold]:
        """Keep `lease` alive for as long as the block runs; any number of them at once, from any thread."""
        hold = Hold(lease, draining=self._draining, lease_seconds=self._lease_seconds)
        self._holds[hold] = None
        try:
            yield hold
        finally:
            del self._holds[hold]

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(self._beat_seconds)

    def _beat(self) -> None:
        while not self._stopping.wait(self._beat_seconds):
            beats: list[Callable[[], None]] = [partial(hold.renew, self._sessions) for hold in tuple(self._holds)]
            for beat in [*beats, self._show]:
                try:
                    beat()
                except SQLAlchemyError as error:  # the hold runs out by itself should this go on
                    log.warning("a heartbeat failed", error=type(error).__name__)
            if any(hold.is_ignored(obey_seconds=self._obey_seconds) for hold in tuple(self._holds)):
                log.error("a step hangs that nobody wants any more: its process ends, and another comes in its place")
                os.kill(os.getpid(), signal.SIGKILL)  # nothing gentler reaches code that does not come back to Python

    def _show(self) -> None:
        """Tell that the worker lives, and enter it anew when upkeep took a long silence for its death."""
        beat = update(Worker).where(Worker.id == self.worker_id).values(heartbeat_at=func.now()).returning(Worker.id)
        with self._sessions.begin() as session:
            if session.scalar(beat) is None:
                session.add(Worker(**self._description))
