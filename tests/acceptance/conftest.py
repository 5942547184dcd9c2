"""One whole stack of real processes for these tests, spoken to as a customer would: over HTTP."""

import io
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import numpy as np
import psycopg
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydantic import SecretStr
from sqlalchemy import make_url

from cli.local.apps import App, app_environment, worker_arguments
from cli.local.stack import Stack
from shared import config
from shared.inference.demo.scenes import draw_scene
from shared.storage import Storage
from tests import recordings
from tests.receiver import Receiver, run_receiver

LEASE_SECONDS = 900
"""Longer than any test: who waits for the end of a lease is not noticed to be dead."""
WAIT_SECONDS = 120
Seen = TypeVar("Seen")
ENDED = {"succeeded", "failed", "canceled", "expired"}


@dataclass(frozen=True)
class Service:
    """The stack as its customers and its operator see it."""

    stack: Stack
    http: httpx2.Client
    faults: Path

    def submit(self, image: bytes, *, name: str = "scene.png", **fields: Any) -> dict[str, Any]:
        form = {
            "mode": "demo",
            **{key: json.dumps(value) if isinstance(value, dict) else value for key, value in fields.items()},
        }
        answer = self.http.post("/v1/jobs", data=form, files={"file": (name, image)})
        assert answer.status_code == 202, answer.text
        job: dict[str, Any] = answer.json()
        return job

    def look(self, job: dict[str, Any]) -> dict[str, Any]:
        seen: dict[str, Any] = self.http.get(job["links"]["self"]).raise_for_status().json()
        return seen

    def wait_for(self, job: dict[str, Any], *, states: set[str] = ENDED, stage: str | None = None) -> dict[str, Any]:
        """The job once it is in one of `states` and, when one is named, in that `stage`."""
        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline:
            seen = self.look(job)
            if seen["state"] in states and (stage is None or seen["progress"]["stage"] == stage):
                return seen
            assert not (seen["state"] in ENDED and ENDED.isdisjoint(states)), f"it ended too early: {seen}"
            time.sleep(0.02)
        raise AssertionError(f"the job did not get there: {self.look(job)}")

    def result(self, job: dict[str, Any]) -> dict[str, Any]:
        manifest: dict[str, Any] = self.http.get(job["links"]["result"]).raise_for_status().json()
        return manifest

    def mask(self, job: dict[str, Any]) -> NDArray[np.uint8]:
        [file] = [each for each in self.result(job)["files"] if each["name"] == "mask.png"]
        with Image.open(io.BytesIO(httpx2.get(file["url"]).raise_for_status().content)) as image:
            assert image.mode == "L"
            return np.array(image)

    def storage(self) -> Storage:
        given = self.stack.environment()
        return Storage.from_settings(
            config.Storage(
                endpoint_url=given["MASKLINE_STORAGE__ENDPOINT_URL"],
                bucket=given["MASKLINE_STORAGE__BUCKET"],
                access_key=given["MASKLINE_STORAGE__ACCESS_KEY"],
                secret_key=SecretStr(given["MASKLINE_STORAGE__SECRET_KEY"]),
            )
        )

    def query(self, statement: str) -> list[tuple[Any, ...]]:
        url = make_url(self.stack.environment()["MASKLINE_DATABASE__URL"]).set(drivername="postgresql")
        with psycopg.connect(url.render_as_string(hide_password=False), autocommit=True) as connection:
            return connection.execute(statement.encode()).fetchall()

    def arm(self, point: str, order: str = "kill") -> None:
        """Whichever process comes to this point next is killed or stopped there, see `shared/faults.py`."""
        waiting = self.faults / f"{point}.written"
        waiting.write_text(order)
        waiting.rename(self.faults / point)

    def wait_for_fault(self, point: str) -> int:
        """The process that came to the armed point."""
        [struck] = wait_until(lambda: list(self.faults.glob(f"{point}.*")), f"nobody came to {point}")
        struck.unlink()
        return int(struck.suffix.removeprefix("."))

    def end_leases(self) -> None:
        """What waiting would do, without the wait."""
        self.query("UPDATE steps SET lease_expires_at = now() WHERE state = 'running' RETURNING id")

    @contextmanager
    def second_worker(self, **settings: str) -> Iterator[None]:
        """On the same queue, for the length of the block; `settings` are variables of its own."""
        environment = {**app_environment(self.stack.environment()), **settings}
        arguments = worker_arguments("gpu", node="second@%h", concurrency=1)
        worker = App("second", home=self.stack.path, arguments=arguments, environment=environment)
        worker.start()
        try:
            yield
        finally:
            worker.stop()

    def kill_gpu_child(self) -> int:
        """`kill -9` of the process that runs the steps; its parent lives on and starts another."""
        busy = "SELECT pid FROM workers WHERE queue = 'gpu' AND step_id IS NOT NULL ORDER BY heartbeat_at DESC"
        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline:
            for (pid,) in self.query(busy):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:  # the rows of others killed linger
                    continue
                return int(pid)
            time.sleep(0.01)
        raise AssertionError("no worker was busy")

    def events(self, job: dict[str, Any], kind: str) -> list[dict[str, Any]]:
        rows = self.query(f"SELECT data FROM job_events WHERE job_id = '{job['id']}' AND type = '{kind}' ORDER BY id")  # noqa: S608
        return [data for (data,) in rows]

    def outcomes(self, job: dict[str, Any], *, step: int | None = None) -> list[str]:
        """What became of its attempts, or of those of one step, in their order."""
        return [event["outcome"] for event in self.events(job, "attempt") if step in (None, event["step"])]


def wait_until(seen: Callable[[], Seen], otherwise: str) -> Seen:
    """What is seen, once it is something."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not (found := seen()):
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.02)
    return found


def family(pid: int) -> list[int]:
    """The process and all that it started."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += family(int(child))
    return found


@contextmanager
def stopped(service: Service, name: str) -> Iterator[None]:
    """As a machine that hangs: connections are taken, and nobody answers."""
    pid = service.stack.processes[name].pid
    assert pid is not None
    members = family(pid)
    for each in members:
        os.kill(each, signal.SIGSTOP)
    try:
        yield
    finally:
        for each in members:
            with suppress(ProcessLookupError):
                os.kill(each, signal.SIGCONT)


@pytest.fixture(scope="session")
def service() -> Iterator[Service]:
    folder, faults = Path(tempfile.mkdtemp(prefix="maskline-")), Path(tempfile.mkdtemp(prefix="maskline-faults-"))
    chosen = {
        "MASKLINE_ENVIRONMENT": "test",
        "MASKLINE_FAULTS_FOLDER": str(faults),
        "MASKLINE_WORKER__LEASE_SECONDS": str(LEASE_SECONDS),
        "MASKLINE_WORKER__HEARTBEAT_SECONDS": "1",
        "MASKLINE_RECORDINGS__CHUNK_SECONDS": "0.001",  # as many chunks as there are keyframes
        "MASKLINE_WORKER__BATCH_IMAGES": "2",  # for rounds, which a CPU would not begin by itself
    }
    try:
        with Stack(folder, durable=False, settings=chosen) as stack:
            headers = {"Authorization": f"Bearer {stack.api_key}"}
            with httpx2.Client(base_url=stack.url, headers=headers, timeout=30) as http:
                yield Service(stack, http, faults)
    finally:
        shutil.rmtree(folder)
        shutil.rmtree(faults)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with run_receiver() as running:
        yield running


@pytest.fixture(scope="session")
def scene() -> bytes:
    return encode(draw_scene(7, width=320, height=240).image)


@pytest.fixture(scope="session")
def large_scene() -> bytes:
    """Enough work for a test to interfere: with SLOW options, seconds of inference on two cores."""
    return encode(draw_scene(8, width=1600, height=1600).image)


SLOW = {"input_size": 1280}
GIVEN_BACK = "SELECT 1 FROM steps WHERE job_id = '{}' AND state = 'queued' AND lost = 1"


def encode(image: NDArray[np.uint8] | Image.Image, *, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def make_recording(frames: int) -> bytes:
    """Every frame a keyframe, and so a chunk."""
    buffer = io.BytesIO()
    recordings.encode(buffer, "libx264", container="mp4", frames=frames, options={"g": "1"}, size=(320, 240))
    return buffer.getvalue()
