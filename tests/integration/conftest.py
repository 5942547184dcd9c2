"""Jobs put into any state by the moves that lead there, and the REST interface in this process on the real servers."""

import io
import json
import socket
import time
import uuid
from base64 import b64decode
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx2
import pytest
import redis
from PIL import Image
from sqlalchemy import select, text
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from api.main import create_app
from shared import intake, lateness, lifecycle, tenants
from shared.broker import DELIVER, GPU, RUN, WEBHOOKS, Hints
from shared.config import Settings, Webhooks
from shared.contract import Failure, Options
from shared.db import SessionFactory
from shared.lifecycle import ClaimedStep
from shared.locks import Lease
from shared.models import Base, Job, JobEvent, JobState, Step, StepKind, Tenant, Worker, create_id
from shared.storage import Storage, job_prefix
from tests.integration.scripted import ScriptedService, run_scripted
from tests.integration.workbench import WAIT_SECONDS, Workbench
from tests.receiver import Receiver, run_receiver
from worker.deliver import Sender
from worker.housekeeping import Housekeeping
from worker.upkeep import Upkeep

TIMING = {"frames": 1, "inference_seconds": 0.5}
MODEL = {"name": "a model", "revision": "1", "dtype": "float32", "input_size": [64, 64]}
TROUBLE = Failure(code="storage_unavailable", detail="the storage cannot be reached", retryable=True)
BAD_MEDIA = Failure(code="invalid_media", detail="not an image", retryable=False)

MakeJob = Callable[..., Job]
Claim = Callable[..., ClaimedStep | None]
Take = Callable[..., ClaimedStep]
Submit = Callable[..., httpx2.Response]
Row = TypeVar("Row", bound=Base)


def new_job(tenant: Tenant, **values: object) -> Job:
    chosen: dict[str, object] = {
        "id": create_id(), "tenant_id": tenant.id, "kind": "image", "mode": "demo",
        "options": Options().model_dump(mode="json"), "details": {}, "priority": 0,
        "source": {"key": "a key", "etag": "an etag", "size_bytes": 10, "filename": "a.png"},
        "start_deadline_seconds": 60, "run_timeout_seconds": 60, "keep_seconds": 60,
    }  # fmt: skip
    return Job(**(chosen | values))


@pytest.fixture
def make_job(sessions: SessionFactory, tenant: Tenant) -> MakeJob:
    """Submit a job with as many gpu steps as asked for, one unless said otherwise."""

    def make(*, steps: int = 1, owner: Tenant = tenant, **values: object) -> Job:
        with sessions.begin() as session:
            job = new_job(owner, **values)
            intake.submit(session, job, steps=[(StepKind.INFER, GPU)] * steps)
            return job

    return make


@pytest.fixture
def claim(sessions: SessionFactory) -> Claim:
    def take(**values: object) -> ClaimedStep | None:
        chosen: dict[str, object] = {
            "worker_id": create_id(), "queue_name": GPU, "modes": ("demo", "fast", "sota"), "mode_loaded": None,
            "lease_seconds": 30,
        }  # fmt: skip
        with sessions.begin() as session:
            return lifecycle.claim(session, **(chosen | values))  # type: ignore[arg-type]

    return take


@pytest.fixture
def take(claim: Claim) -> Take:
    """Claim the next step, which there is."""

    def take_one(**values: object) -> ClaimedStep:
        claimed = claim(**values)
        assert claimed is not None
        return claimed

    return take_one


@pytest.fixture
def job_in(sessions: SessionFactory, make_job: MakeJob, claim: Claim) -> MakeJob:
    """A job that got into the wanted state as a real one would."""

    def put(state: JobState) -> Job:
        job = make_job()
        if state == JobState.QUEUED:
            return job
        with sessions.begin() as session:
            if state == JobState.CANCELED:
                return lifecycle.request_cancel(session, job.id)
            if state == JobState.EXPIRED:
                make_late(session, "jobs", "start_by")
                expired = lateness.expire(session)
                assert expired is not None
                return expired
        claimed = claim()
        assert claimed is not None
        with sessions.begin() as session:
            if state == JobState.SUCCEEDED:
                lifecycle.publish(session, claimed.lease, manifest_key="a key", model=MODEL, timing=TIMING)
            if state == JobState.FAILED:
                lifecycle.fail_step(session, claimed.lease, BAD_MEDIA, failed_attempts=3)
        return read_job(sessions, job)

    return put


def twice(chore: Callable[[], None]) -> None:
    """As two processes do, or one that forgot what it has done."""
    chore()
    chore()


def make_late(session: Session, table: str, column: str) -> None:
    """What waiting would do, without the wait."""
    late = f"UPDATE {table} SET {column} = now() - interval '1 second' WHERE {column} IS NOT NULL"  # noqa: S608
    session.execute(text(late))


def read_job(sessions: SessionFactory, job: Job) -> Job:
    with sessions() as session:
        return session.scalars(select(Job).where(Job.id == job.id)).one()


def read_steps(sessions: SessionFactory, job: Job) -> list[Step]:
    with sessions() as session:
        return list(session.scalars(select(Step).where(Step.job_id == job.id).order_by(Step.ordinal)))


def told(sessions: SessionFactory, kind: str) -> list[str]:
    """What the events of a kind say, in their order, of all jobs there are."""
    key = {"state": "state", "attempt": "outcome"}[kind]
    with sessions() as session:
        wanted = select(JobEvent.data[key].as_string()).where(JobEvent.type == kind).order_by(JobEvent.id)
        return list(session.scalars(wanted))


def older(lease: Lease) -> Lease:
    return Lease(step_id=lease.step_id, attempt=lease.attempt - 1)


def changed(settings: Settings, group: str, **values: object) -> Settings:
    """The same settings but for these of one group."""
    return settings.model_copy(update={group: getattr(settings, group).model_copy(update=values)})


# --- the REST interface --------------------------------------------------------------------------------------------


def authorize(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@contextmanager
def serve(settings: Settings, *, key: str) -> Iterator[TestClient]:
    """The API with these settings, spoken to with this key."""
    with TestClient(create_app(settings), headers=authorize(key), follow_redirects=False) as client:
        yield client


@pytest.fixture
def api_key(sessions: SessionFactory, tenant: Tenant) -> str:
    with sessions.begin() as session:
        return tenants.create_key(session, tenant.id, name="under test")


@pytest.fixture
def api(settings: Settings, storage: Storage, api_key: str) -> Iterator[TestClient]:
    """A client of the tenant under test; `storage` is there so that the bucket is."""
    with serve(settings, key=api_key) as client:
        yield client


@pytest.fixture
def job(submit: Submit, sessions: SessionFactory) -> Job:
    """A job with a real image, and a receiver to tell."""
    submit(webhook_url="https://receiver.example")
    return read_only(sessions, Job)


@pytest.fixture
def foreign(sessions: SessionFactory) -> dict[str, str]:
    """What makes a request another tenant's: `api.get(…, headers=foreign)`."""
    with sessions.begin() as session:
        stranger = tenants.create_tenant(session, "a stranger")
        return authorize(tenants.create_key(session, stranger.id, name="a stranger's"))


@pytest.fixture
def put_upload(api: TestClient) -> Callable[..., str]:
    """Announce an upload and send its bytes, by the signed link; gives its id."""

    def put(body: bytes | None = None) -> str:
        body = small_image() if body is None else body
        upload = api.post("/v1/uploads", json={"filename": "a.png", "size": len(body)}).json()
        assert httpx2.put(upload["url"], content=body, headers=upload["headers"]).status_code == 200
        return str(upload["id"])

    return put


@pytest.fixture
def submit_batch(api: TestClient, put_upload: Callable[..., str]) -> Submit:
    """Submit a batch of so many small images, or of the items given."""

    def send(
        count: int = 3, *, headers: Mapping[str, str] | None = None, items: Sequence[Any] | None = None, **fields: Any
    ) -> httpx2.Response:
        chosen = [{"source": {"upload_id": put_upload()}} for _ in range(count)] if items is None else items
        wanted = {"name": "a batch", "mode": "demo", "items": chosen, **fields}
        return api.post("/v1/batches", json=wanted, headers=dict(headers or {}))

    return send


@pytest.fixture
def submit(api: TestClient) -> Submit:
    """Submit a small image in a form; fields that are not text are sent as JSON."""

    def send(*, file: bytes | None = None, headers: Mapping[str, str] | None = None, **fields: Any) -> httpx2.Response:
        form = {key: each if isinstance(each, str) else json.dumps(each) for key, each in fields.items()}
        sent = {"file": ("a.png", small_image() if file is None else file, "image/png")}
        return api.post("/v1/jobs", data={"mode": "demo", **form}, files=sent, headers=dict(headers or {}))

    return send


def small_image(*, width: int = 48, height: int = 32, colour: tuple[int, int, int] = (20, 90, 160)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, format="PNG")
    return buffer.getvalue()


def problem(answer: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    """The problem that was answered, after checking that it is one in full."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert (body["status"], body["code"], body["type"]) == (status, code, f"urn:maskline:problem:{code}")
    assert body["title"]
    assert body["detail"]
    return body


def wait_until(seen: Callable[[], object]) -> None:
    """For what another thread or process does, in its own time."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not seen():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def add_worker(sessions: SessionFactory, **values: object) -> Worker:
    """The row of a worker that is idle and has just given a sign of life, unless said otherwise."""
    described = {"host": "a host", "pid": 1, "queue": GPU, "device": "cpu", "memory_bytes": 0, "modes": ["demo"]}
    with sessions.begin() as session:
        row = Worker(**(described | values))
        session.add(row)
    return row


def read_only(sessions: SessionFactory, table: type[Row]) -> Row:
    """The one row there is."""
    with sessions() as session:
        return session.scalars(select(table)).one()


def count_rows(sessions: SessionFactory, table: type[Base]) -> int:
    with sessions() as session:
        return len(session.scalars(select(table)).all())


# --- servers that are not well -------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[ScriptedService]:
    """A server of somebody else."""
    with run_scripted() as running:
        yield running


@pytest.fixture
def closed_port() -> int:
    """A port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port where connections are taken and never answered, as by a stopped process."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


@dataclass(frozen=True)
class Broker:
    """The hints that wait in the real broker."""

    client: redis.Redis

    def steps(self, queue: str = GPU) -> list[uuid.UUID]:
        """The steps that workers were woken for."""
        return [uuid.UUID(arguments[0]) for task, arguments in self._waiting(queue) if task == RUN]

    def senders(self) -> int:
        """How often the sender of webhooks was woken."""
        return sum(task == DELIVER for task, _ in self._waiting(WEBHOOKS))

    def _waiting(self, queue: str) -> list[tuple[str, list[str]]]:
        messages = [json.loads(each) for each in self.client.lrange(f"maskline:{queue}", 0, -1)]
        return [(each["headers"]["task"], json.loads(b64decode(each["body"]))[0]) for each in messages]


@pytest.fixture
def broker(settings: Settings) -> Iterator[Broker]:
    """The real broker, emptied."""
    with redis.Redis.from_url(settings.broker.url) as client:
        client.flushdb()
        yield Broker(client)


# --- a worker ------------------------------------------------------------------------------------------------------


def nothing_stored(storage: Storage, job: Job) -> bool:
    return not [key for key in storage.list_keys(job_prefix(job.tenant_id, job.id)) if "attempts" in key]


@pytest.fixture
def workbench(settings: Settings, sessions: SessionFactory, storage: Storage, hints: Hints) -> Workbench:
    return Workbench(settings=settings, sessions=sessions, storage=storage, hints=hints)


@pytest.fixture
def upkeep(settings: Settings, sessions: SessionFactory, hints: Hints) -> Upkeep:
    return Upkeep(settings=settings, sessions=sessions, hints=hints)


@pytest.fixture
def housekeeping(settings: Settings, sessions: SessionFactory, storage: Storage) -> Housekeeping:
    return Housekeeping(settings=settings, sessions=sessions, storage=storage)


# --- webhooks ------------------------------------------------------------------------------------------------------


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with run_receiver() as running:
        yield running


@pytest.fixture
def sender(sessions: SessionFactory) -> Iterator[Sender]:
    """One with little patience, that may send to this machine."""
    made = Sender(sessions, Webhooks(total_timeout_seconds=1, connect_timeout_seconds=1, allow_private_addresses=True))
    yield made
    made.close()


@pytest.fixture
def end_job(sessions: SessionFactory, make_job: MakeJob) -> MakeJob:
    """A job that has just ended, with news of it for the URL, if there is one."""

    def end(url: str | None = None, **values: object) -> Job:
        job = make_job(webhook_url=url, **values)
        with sessions.begin() as session:
            return lifecycle.request_cancel(session, job.id)

    return end
