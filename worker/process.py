"""What one worker process owns: its row in the database, its connections, and on the gpu queue the engine."""

import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Self

import structlog
from sqlalchemy import delete

from shared.broker import GPU, WEBHOOKS, Hints
from shared.config import Settings
from shared.db import SessionFactory
from shared.inference.errors import InferenceError
from shared.models import Worker, create_id
from shared.storage import Storage
from worker.deliver import Sender
from worker.heart import Draining, Flag, Heart
from worker.pulse import Pulses
from worker.relief import read_mark, relieve
from worker.runner import DATABASE_AWAY, DATABASE_PAUSE_SECONDS, Runner

if TYPE_CHECKING:
    from shared.inference.engine import Engine

log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class WorkerProcess:
    runner: Runner
    sender: Sender
    heart: Heart
    hints: Hints
    sessions: SessionFactory
    pulses: Pulses
    place: int
    closing: threading.Event

    @classmethod
    def build(cls, settings: Settings, *, queue_name: str, draining: Flag, pulses: Pulses, place: int) -> Self:
        """Give back what those who died here held, enter the worker in the database, start its heart, and warm up the
        modes it is told to keep ready. Waits for the database; raises Draining when the worker is to end before.
        """
        sessions, hints = SessionFactory(settings.database), Hints(settings.broker)
        _insist(partial(relieve, settings, sessions, hints), draining)  # first of all: loading an engine takes its time
        engine = _build_engine(settings) if queue_name == GPU else None
        device, memory_bytes = _describe_device(engine) if engine else ("none", 0)
        row = Worker(
            id=create_id(), host=socket.gethostname(), pid=os.getpid(), queue=queue_name,
            device=device, memory_bytes=memory_bytes, mark=read_mark(os.getpid()),
            modes=list(settings.worker.modes) if engine else [],
        )  # fmt: skip
        pulses.enter(place)
        closing = threading.Event()
        threading.Thread(target=pulses.show, args=(place, closing), name="pulse", daemon=True).start()
        _insist(partial(_enter, sessions, row), draining)
        heart = Heart(
            sessions, worker=row, draining=draining,
            beat_seconds=settings.worker.heartbeat_seconds, lease_seconds=settings.worker.lease_seconds,
            obey_seconds=settings.worker.obey_seconds,
        )  # fmt: skip
        runner = Runner(
            settings=settings, sessions=sessions, storage=Storage.from_settings(settings.storage), hints=hints,
            heart=heart, draining=draining, queue_name=queue_name, engine=engine,
        )  # fmt: skip
        if engine is not None:
            _warm_up(engine, settings.worker.warm_modes)
        sender = Sender(sessions, settings.webhooks, draining=draining)
        if queue_name == WEBHOOKS:
            sender.start()
        log.info("a worker is ready", queue=queue_name, device=row.device, worker_id=str(row.id))
        return cls(
            runner=runner, sender=sender, heart=heart, hints=hints, sessions=sessions,
            pulses=pulses, place=place, closing=closing,
        )  # fmt: skip

    def close(self) -> None:
        """Leave the database; what is not left, upkeep notices by its silence."""
        self.sender.close()
        self.heart.stop()
        self.hints.close()
        with self.sessions.begin() as session:
            session.execute(delete(Worker).where(Worker.id == self.heart.worker_id))
        self.closing.set()
        self.pulses.clear(self.place)
        self.sessions.dispose()


def _insist(action: Callable[[], None], draining: Flag) -> None:
    """Do it, again and again while the database is away: a child without it would be of no use to anybody."""
    while True:
        try:
            action()
            return
        except DATABASE_AWAY as error:
            log.warning("a worker waits for the database", error=type(error).__name__)
        if draining.is_set():
            raise Draining("the worker is draining")
        time.sleep(DATABASE_PAUSE_SECONDS)


def _enter(sessions: SessionFactory, row: Worker) -> None:
    with sessions.begin() as session:
        session.merge(row)  # and not added: it may be there, when only the answer to the commit was lost


def _build_engine(settings: Settings) -> "Engine":
    from shared.inference.engine import Engine  # brings torch, which an io worker does without

    return Engine(**settings.describe_engine())


def _describe_device(engine: "Engine") -> tuple[str, int]:
    from shared.inference.device import describe_device  # brings torch

    return describe_device(engine.device)


def _warm_up(engine: "Engine", modes: tuple[str, ...]) -> None:
    for mode in modes:
        try:
            engine.warm_up(mode)
        except InferenceError as error:  # its jobs will say so too, and the worker serves the others
            log.warning("a mode could not be warmed up", mode=mode, code=error.code, error=str(error))
