"""Small image jobs queued at once: how much sooner they are all published in rounds than one by one.

Through the real runner, PostgreSQL and S3, both ways taking turns; timed from the last commit of a submission to the
last publication. `sleeping` is a model whose forward pass takes the same time for one image as for a whole batch, as
on a device far from full, so that it measures the system around the model. `demo` is the real model that ships with
Maskline. `alone` is one job with nothing else queued, which must not pay for what it does not use.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, cast
from unittest import mock

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import SecretStr
from sqlalchemy import func, select

from cli.local.servers import BUCKET, Servers, run_servers
from shared import config, db, lifecycle, tenants
from shared.broker import GPU, Hints
from shared.config import Settings
from shared.contract import Options
from shared.db import SessionFactory
from shared.inference.demo.scenes import draw_scene
from shared.inference.device import choose_device, describe_device
from shared.inference.engine import Engine, ModelInfo, Segmentation
from shared.inference.recipe import Recipe
from shared.models import Job, JobState, StepKind, Tenant, Worker, create_id
from shared.storage import Storage, source_key
from worker.heart import Heart
from worker.runner import Runner

WAYS = ("in_rounds", "one_by_one")
MODE = "demo"
SIDE = (320, 240)


class SleepingEngine:
    """Answers as the engine does, after `latency` seconds however many images it was given."""

    def __init__(self, *, latency: float, batch_images: int) -> None:
        self._latency = latency
        self.batch_images = batch_images

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
        time.sleep(self._latency)
        checkpoint()
        model = ModelInfo("asleep", "1", "float32", SIDE, 1, "none", MODE)
        share = self._latency / len(images)
        return [Segmentation(image[:, :, 0] // 32, None, 0.0, 0.0, share, 0.0, 0, model) for image in images]


@dataclass(frozen=True)
class Bench:
    """A service without its API: servers, a tenant, and runners that are called by hand."""

    settings: Settings
    sessions: SessionFactory
    storage: Storage
    hints: Hints
    tenant: Tenant
    images: list[bytes]

    def measure(self, engine: Any, *, jobs: int, repeats: int) -> dict[str, Any]:
        """Median seconds of both ways, and the median of the ratios of each turn."""
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for turn in range(repeats + 1):
            for way in WAYS if turn % 2 else WAYS[::-1]:
                spent = self._run(engine, way, jobs)
                if turn:  # the first warms up
                    seconds[way].append(spent)
        ratios = [one / rounds for rounds, one in zip(seconds["in_rounds"], seconds["one_by_one"], strict=True)]
        return {
            "jobs": jobs,
            "batch_images": engine.batch_images,
            **{f"{way}_seconds": round(statistics.median(times), 4) for way, times in seconds.items()},
            "batching_speedup": round(statistics.median(ratios), 3),
            "slowest_turn_speedup": round(min(ratios), 3),
        }

    def _run(self, engine: Any, way: str, jobs: int) -> float:
        batch_images = 1 if way == "one_by_one" else engine.batch_images
        with mock.patch.object(engine, "batch_images", batch_images), self._runner(engine) as runner:
            submitted = [self._submit(self.images[number % len(self.images)]) for number in range(jobs)]
            started = time.perf_counter()
            runner.run_until_idle()
            spent = time.perf_counter() - started
        with self.sessions() as session:
            done = select(func.count()).where(Job.id.in_(submitted), Job.state == JobState.SUCCEEDED)
            assert session.scalar(done) == jobs, "a job has not succeeded"
        return spent

    def _submit(self, image: bytes) -> Any:
        job_id = create_id()
        key = source_key(self.tenant.id, job_id)
        stored = self.storage.put(key, image, content_type="image/png")
        source = {"key": key, "etag": stored.etag, "size_bytes": stored.size_bytes, "filename": "scene.png"}
        job = Job(
            id=job_id, tenant_id=self.tenant.id, kind="image", mode=MODE, options=Options().model_dump(mode="json"),
            details={}, priority=0, source=source, start_deadline_seconds=600, run_timeout_seconds=600,
            keep_seconds=600,
        )  # fmt: skip
        with self.sessions.begin() as session:
            lifecycle.submit(session, job, steps=[(StepKind.INFER, GPU)])
        return job_id

    @contextmanager
    def _runner(self, engine: Any) -> Iterator[Runner]:
        limits = self.settings.worker
        row = Worker(host="bench", pid=os.getpid(), queue=GPU, device="cpu", memory_bytes=0, modes=[MODE])
        with self.sessions.begin() as session:
            session.add(row)
        draining = threading.Event()
        heart = Heart(
            self.sessions, worker=row, draining=draining,
            beat_seconds=limits.heartbeat_seconds, lease_seconds=limits.lease_seconds,
        )  # fmt: skip
        try:
            yield Runner(
                settings=self.settings, sessions=self.sessions,
                storage=self.storage, hints=self.hints, heart=heart, draining=draining, queue_name=GPU,
                engine=cast("Engine", engine),
            )  # fmt: skip
        finally:
            heart.stop()
            with self.sessions.begin() as session:
                session.delete(session.merge(row))


@contextmanager
def open_bench() -> Iterator[Bench]:
    folder = Path(tempfile.mkdtemp(prefix="maskline-"))
    try:
        with run_servers(folder) as servers:
            settings = _make_settings(servers)
            db.upgrade(settings.database.url)
            sessions = db.create_session_factory(settings.database)
            storage = Storage.from_settings(settings.storage)
            storage.ensure_bucket()
            with sessions.begin() as session:
                tenant = tenants.create_tenant(session, "bench")
            hints = Hints(settings.broker)
            images = [_draw(seed) for seed in range(8)]
            try:
                yield Bench(settings, sessions, storage, hints, tenant, images)
            finally:
                hints.close()
                sessions.kw["bind"].dispose()
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


def _draw(seed: int) -> bytes:
    buffer = BytesIO()
    Image.fromarray(draw_scene(seed, width=SIDE[0], height=SIDE[1]).image).save(buffer, "PNG")
    return buffer.getvalue()


def run(arguments: Sequence[str] = ()) -> None:
    """Measure and print; the last line is one JSON object with --json."""
    parser = argparse.ArgumentParser(prog="python -m bench.batching", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16, help="images that the sleeping model takes together")
    parser.add_argument("--demo-batch", type=int, help="of the demo model; the device's own unless given")
    parser.add_argument("--latency", type=float, nargs="+", default=[0.02, 0.05, 0.1], help="seconds it sleeps")
    parser.add_argument("--device", default="cpu", help="of the demo model")
    parser.add_argument("--threads", type=int, help="of the demo model; torch's own number unless given")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args(arguments)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))  # errors alone
    if options.threads:
        torch.set_num_threads(options.threads)
    name, _ = describe_device(choose_device(options.device))
    load, threads = os.getloadavg()[0], torch.get_num_threads()
    print(f"{name}, {threads} threads, torch {torch.__version__}, Python {platform.python_version()}, load {load:.2f}")
    rows: list[dict[str, Any]] = []
    with open_bench() as bench:
        plan: list[tuple[str, Any, int, int]] = [
            (f"sleeping {latency:g} s", SleepingEngine(latency=latency, batch_images=options.batch), options.jobs, 1)
            for latency in options.latency
        ]
        batched = Engine(device=options.device, batch_images=options.demo_batch)
        plan += [(MODE, batched, options.jobs, 1), (f"{MODE} alone", batched, 1, 8)]
        for model, engine, jobs, times in plan:
            rows.append({"model": model, **bench.measure(engine, jobs=jobs, repeats=times * options.repeats)})
            print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    if options.json:
        print(json.dumps({"device": name, "threads": threads, "load": load, "batching": rows}))


if __name__ == "__main__":
    run(sys.argv[1:])
