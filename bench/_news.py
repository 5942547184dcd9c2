"""News from the service: webhooks to a receiver that is well, and events to many listeners at once."""

import socket
import threading
import time
import uuid
from collections.abc import Sequence
from urllib.parse import urlsplit

from sqlalchemy import insert

from bench._system import System
from bench.webhooks import SOURCE, receive
from shared import intake, lifecycle
from shared.broker import GPU, Hints
from shared.contract import Options
from shared.models import Job, JobEvent, StepKind, create_id

LISTEN_SECONDS = 120


def measure_webhooks(system: System, *, jobs: int) -> float:
    """Deliveries a second, from the commit that ended so many jobs until the last of them was told of.

    The first time it sends to the receiver, the sender finds out that it is quick; so they are sent twice.
    """
    with receive() as receiver:
        endpoint = system.http.post("/v1/webhooks", json={"url": receiver.url}).raise_for_status().json()
        try:
            for _ in range(2):
                ids = queue_jobs(system, jobs)
                with system.sessions.begin() as session:
                    lifecycle.request_cancels(session, ids)
                began = time.perf_counter()
                _wake_sender(system)
                receiver.wait_for([str(each) for each in ids])
                lasted = max(receiver.arrived.values()) - began
        finally:
            system.http.delete(f"/v1/webhooks/{endpoint['id']}").raise_for_status()
    return jobs / lasted


def measure_events(system: System, *, listeners: int, events: int, pause_seconds: float) -> dict[str, float]:
    """Each listener follows a job of its own, to which so many events happen, one every `pause_seconds`."""
    ids = queue_jobs(system, listeners)
    heard = [0] * listeners
    ready = threading.Barrier(listeners + 1)
    threads = [
        threading.Thread(target=_listen, args=[system, job_id, events, heard, place, ready], daemon=True)
        for place, job_id in enumerate(ids)
    ]
    for thread in threads:
        thread.start()
    ready.wait(LISTEN_SECONDS)
    began = time.perf_counter()
    for number in range(events):
        told = {"stage": "segmenting", "done": number, "total": events, "unit": "frames"}
        with system.sessions.begin() as session:
            rows = [{"job_id": each, "type": "progress", "data": told} for each in ids]
            session.execute(insert(JobEvent), rows)
        time.sleep(pause_seconds)
    for thread in threads:
        thread.join(LISTEN_SECONDS)
    lasted = time.perf_counter() - began
    assert heard == [events] * listeners, "events did not come"
    with system.sessions.begin() as session:
        lifecycle.request_cancels(session, ids)
    return {"events_per_second": listeners * events / lasted, "seconds": lasted, "told_seconds": events * pause_seconds}


def queue_jobs(system: System, count: int) -> Sequence[uuid.UUID]:
    """Jobs that no worker is woken for, of a mode that none is asked to serve: all they do is end."""
    jobs = [
        Job(
            id=create_id(), tenant_id=system.tenant.id, kind="image", mode="sota", details={}, priority=-100,
            options=Options().model_dump(mode="json"), source=SOURCE,
            start_deadline_seconds=3600, run_timeout_seconds=3600, keep_seconds=3600,
        )
        for _ in range(count)
    ]  # fmt: skip
    with system.sessions.begin() as session:
        intake.submit_all(session, [(job, [(StepKind.INFER, GPU)]) for job in jobs])
    return [job.id for job in jobs]


def _wake_sender(system: System) -> None:
    hints = Hints(system.settings.broker)
    hints.wake_sender()
    hints.close()


def _listen(
    system: System, job_id: uuid.UUID, events: int, heard: list[int], place: int, ready: threading.Barrier
) -> None:
    url = urlsplit(system.stack.url)
    head = (
        f"GET /v1/jobs/{job_id}/events HTTP/1.1\r\nHost: {url.netloc}\r\nAuthorization: Bearer {system.stack.api_key}"
    )
    with (
        socket.create_connection((url.hostname, url.port or 80), timeout=LISTEN_SECONDS) as line,
        line.makefile("rb") as stream,
    ):
        line.sendall(f"{head}\r\n\r\n".encode())
        stream.readline()
        ready.wait(LISTEN_SECONDS)
        while heard[place] < events and (text := stream.readline()):
            heard[place] += text.startswith(b"event: progress")
