"""What one worker process owns: its row in the database, its connections, and on the gpu queue the engine."""

import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import structlog
from sqlalchemy import delete

from shared.broker import GPU, WEBHOOKS, Hints
from shared.config import Settings
from shared.db import SessionFactory, create_session_factory
from shared.inference.errors import InferenceError
from shared.models import Worker
from shared.storage import Storage
from worker.deliver import Sender
from worker.heart import Flag, Heart
from worker.runner import Runner

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

    @classmethod
    def build(cls, settings: Settings, *, queue_name: str, draining: Flag) -> Self:
        """Enter the worker in the database, start its heart, and warm up the modes it is told to keep ready."""
        sessions = create_session_factory(settings.database)
        engine = _build_engine(settings) if queue_name == GPU else None
        device, memory_bytes = _describe_device(engine) if engine else ("none", 0)
        row = Worker(
            host=socket.gethostname(), pid=os.getpid(), queue=queue_name,
            device=device, memory_bytes=memory_bytes,
            modes=list(settings.worker.modes) if engine else [],
        )  # fmt: skip
        with sessions.begin() as session:
            session.add(row)
        heart = Heart(
            sessions, worker=row, draining=draining,
            beat_seconds=settings.worker.heartbeat_seconds, lease_seconds=settings.worker.lease_seconds,
        )  # fmt: skip
        hints = Hints(settings.broker)
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
        return cls(runner=runner, sender=sender, heart=heart, hints=hints, sessions=sessions)

    def close(self) -> None:
        """Leave the database; what is not left, upkeep notices by its silence."""
        self.sender.close()
        self.heart.stop()
        self.hints.close()
        with self.sessions.begin() as session:
            session.execute(delete(Worker).where(Worker.id == self.heart.worker_id))
        self.sessions.kw["bind"].dispose()


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
