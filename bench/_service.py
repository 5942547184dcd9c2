"""A service without its API for benchmarks: servers, a tenant, runners that are called by hand, a model that sleeps."""

import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import SecretStr

from cli.local.servers import BUCKET, Servers, run_servers
from shared import config, db, intake, tenants
from shared.broker import GPU, Hints
from shared.config import Settings
from shared.contract import Options
from shared.db import SessionFactory
from shared.inference.engine import Engine, ModelInfo, Segmentation
from shared.inference.recipe import Recipe
from shared.models import Job, StepKind, Worker, create_id
from shared.storage import Storage
from worker.heart import Heart
from worker.runner import Runner

MODE = "demo"


def nothing(_images: int) -> None:
    pass


class SleepingEngine:
    """Answers as the engine does, after `latency` seconds however many images it was given.

    `count` is told how many they are, before it sleeps.
    """

    def __init__(self, *, latency: float, batch_images: int, count: Callable[[int], None] = nothing) -> None:
        self.latency = latency
        self.batch_images = batch_images
        self._count = count

    def input_size(self, width: int, height: int, _mode: str, _recipe: Recipe) -> tuple[int, int]:
        return width, height

    def segment(
        self, image: NDArray[np.uint8], mode: str, recipe: Recipe, *, checkpoint: Callable[[], None]
    ) -> Segmentation:
        [made] = self.segment_batch([image], mode, recipe, checkpoint=checkpoint)
        return made

    def segment_batch(
        self, images: Sequence[NDArray[np.uint8]], _mode: str, _recipe: Recipe, *, checkpoint: Callable[[], None]
    ) -> list[Segmentation]:
        checkpoint()
        self._count(len(images))
        time.sleep(self.latency)
        checkpoint()
        share = self.latency / len(images)
        made = []
        for image in images:
            height, width = image.shape[:2]
            model = ModelInfo("asleep", "1", "float32", (width, height), 1, "none", MODE)
            made.append(Segmentation(image[:, :, 0] // 32, None, 0.0, 0.0, share, 0.0, 0, model))
        return made


@dataclass(frozen=True, kw_only=True)
class Service:
    settings: Settings
    sessions: SessionFactory
    storage: Storage
    hints: Hints
    tenant_id: uuid.UUID

    def submit(
        self, step: tuple[StepKind, str], *, kind: str, source: dict[str, Any], job_id: uuid.UUID | None = None,
        options: Options | None = None,
    ) -> uuid.UUID:  # fmt: skip
        """Queue a job that begins with this step."""
        job = Job(
            id=job_id or create_id(), tenant_id=self.tenant_id, kind=kind, mode=MODE,
            options=(options or Options()).model_dump(mode="json"), details={}, priority=0, source=source,
            start_deadline_seconds=600, run_timeout_seconds=600, keep_seconds=600,
        )  # fmt: skip
        with self.sessions.begin() as session:
            intake.submit(session, job, steps=[step])
        return job.id

    @contextmanager
    def runner(self, queue_name: str, engine: Any = None) -> Iterator[Runner]:
        limits = self.settings.worker
        modes = [MODE] if queue_name == GPU else []
        row = Worker(host="bench", pid=os.getpid(), queue=queue_name, device="cpu", memory_bytes=0, modes=modes)
        with self.sessions.begin() as session:
            session.add(row)
        draining = threading.Event()
        heart = Heart(
            self.sessions, worker=row, draining=draining,
            beat_seconds=limits.heartbeat_seconds, lease_seconds=limits.lease_seconds,
            obey_seconds=limits.obey_seconds,
        )  # fmt: skip
        try:
            yield Runner(
                settings=self.settings, sessions=self.sessions, storage=self.storage, hints=self.hints, heart=heart,
                draining=draining, queue_name=queue_name, engine=cast("Engine | None", engine),
            )  # fmt: skip
        finally:
            heart.stop()
            with self.sessions.begin() as session:
                session.delete(session.merge(row))


@contextmanager
def connect(settings: Settings, tenant_id: uuid.UUID) -> Iterator[Service]:
    """The service from any process, with connections of its own."""
    sessions, hints = db.SessionFactory(settings.database), Hints(settings.broker)
    try:
        yield Service(
            settings=settings, sessions=sessions, storage=Storage.from_settings(settings.storage), hints=hints,
            tenant_id=tenant_id,
        )  # fmt: skip
    finally:
        hints.close()
        sessions.dispose()


@contextmanager
def open_service() -> Iterator[Service]:
    """Servers with nothing in them but a tenant, gone when the block ends."""
    folder = Path(tempfile.mkdtemp(prefix="maskline-"))
    try:
        with run_servers(folder) as servers:
            settings = _make_settings(servers)
            db.upgrade(settings.database.url)
            with connect(settings, create_id()) as service:
                service.storage.ensure_bucket()
                with service.sessions.begin() as session:
                    tenant = tenants.create_tenant(session, "bench")
                yield replace(service, tenant_id=tenant.id)
    finally:
        shutil.rmtree(folder)


def _make_settings(servers: Servers) -> Settings:
    return Settings(
        database=config.Database(url=servers.postgres.url),
        broker=config.Broker(url=servers.redis.url),
        storage=config.Storage(
            endpoint_url=servers.s3.url, bucket=BUCKET, access_key=servers.s3.access_key,
            secret_key=SecretStr(servers.s3.secret_key),
        ),
    )  # fmt: skip
