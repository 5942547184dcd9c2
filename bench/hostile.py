"""A small job of somebody well-behaved: how much longer it takes while 50 clients send the worst there is.

The healthy tenant sends a form with a small image and waits for its end in the same request (`Prefer: wait`), one after
another; timed from the first byte sent to the finished job. Then the same while the clients of another tenant send the
catalogue of bad input, from `tests/acceptance/catalogue`, over and over as fast as they are answered, in processes of
their own: images that are bombs, movies that lie, requests that never end, forms with ten thousand fields. Both take
turns. The whole stack is real, with the settings that production has.
"""

import argparse
import json
import multiprocessing
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from pathlib import Path

import httpx2
from sqlalchemy import func, select

from bench._system import System, open_system, wait_until
from shared import tenants
from shared.models import Job, JobState, Tenant
from tests.acceptance.catalogue import movies, wire
from tests.acceptance.catalogue.images import list_images, save
from tests.acceptance.catalogue.talk import talk

CLIENTS = 50
HOSTILE = "hostile"
PROCESSES = 2
TURNS = 3
CANARY = "http://127.0.0.1:9/"
"""Nobody listens there; a call would be one to the service's own machine."""


def list_worst(key: str, *, job_id: str) -> Iterator[bytes]:
    """All of the catalogue as requests."""
    mode = b'Content-Disposition: form-data; name="mode"\r\n\r\ndemo'
    with tempfile.TemporaryDirectory() as folder:
        media = [*list_images(), *movies.list_movies(Path(folder), canary=CANARY)]
    for row in media:
        head = f'Content-Disposition: form-data; name="file"; filename="{row.name}"\r\n\r\n'
        yield wire.form(key, mode, head.encode() + row.data)
    for sent in wire.list_requests(key, job_id=job_id):
        yield sent.request


def attack(
    url: str, requests: Sequence[bytes], seed: int, clients: int, stopped: Event, sent: "Synchronized[int]"
) -> None:
    def send_on(number: int) -> None:
        order = random.Random(seed + number)
        while not stopped.is_set():
            with suppress(OSError):
                talk(url, order.choice(requests))
            with sent.get_lock():
                sent.value += 1

    threads = [threading.Thread(target=send_on, args=[number], daemon=True) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@contextmanager
def under_attack(url: str, requests: Sequence[bytes], *, seed: int) -> Iterator["Synchronized[int]"]:
    context = multiprocessing.get_context("spawn")
    stopped, sent = context.Event(), context.Value("q", 0)
    each = CLIENTS // PROCESSES
    attackers = [
        context.Process(target=attack, args=(url, requests, seed + number * each, each, stopped, sent), daemon=True)
        for number in range(PROCESSES)
    ]
    for process in attackers:
        process.start()
    try:
        yield sent
    finally:
        stopped.set()
        for process in attackers:
            process.join()


def has_begun(sent: "Synchronized[int]") -> bool:
    return sent.value >= CLIENTS


def measure_healthy(system: System, jobs: int) -> list[float]:
    image, found = save("PNG", size=(320, 240)), []
    for _ in range(jobs):
        began = time.monotonic()
        answer = system.http.post(
            "/v1/jobs",
            data={"mode": "demo"},
            files={"file": ("a.png", image)},
            headers={"Prefer": "wait=60"},
            timeout=90,
        )
        assert answer.status_code == 200, answer.text
        assert answer.json()["state"] == "succeeded", answer.text
        found.append(time.monotonic() - began)
    return found


def is_idle(system: System) -> bool:
    with system.sessions() as session:
        waiting = select(Job.id).where(Job.state.in_([JobState.QUEUED, JobState.RUNNING])).limit(1)
        return session.scalar(waiting) is None


def count_states(system: System) -> dict[str, int]:
    """Of the jobs of the attack."""
    with system.sessions() as session:
        theirs = (
            select(Job.state, func.count().label("jobs"))
            .join(Tenant, Tenant.id == Job.tenant_id)
            .where(Tenant.name == HOSTILE)
        )
        return {row.state: row.jobs for row in session.execute(theirs.group_by(Job.state))}


def run(*, jobs: int, seed: int) -> dict[str, float | int]:
    quiet: list[float] = []
    loud: list[float] = []
    requests_sent, seconds = 0, 0.0
    with open_system() as system:
        with system.sessions.begin() as session:
            key = tenants.create_key(session, tenants.create_tenant(session, HOSTILE).id, name="bad")
        with httpx2.Client(base_url=system.stack.url, headers={"Authorization": f"Bearer {key}"}) as http:
            sent = http.post("/v1/jobs", data={"mode": "demo"}, files={"file": ("a.png", save("PNG"))})
            requests = list(list_worst(key, job_id=sent.raise_for_status().json()["id"]))
        measure_healthy(system, 5)
        for turn in range(TURNS):
            quiet += measure_healthy(system, jobs)
            with under_attack(system.stack.url, requests, seed=seed + 100 * turn) as count:
                wait_until(partial(has_begun, count), otherwise="the attack did not begin")
                began, before = time.monotonic(), count.value
                loud += measure_healthy(system, jobs)
                seconds += time.monotonic() - began
                requests_sent += count.value - before
            wait_until(partial(is_idle, system), otherwise="jobs of the attack are left")
        states = count_states(system)
    return {
        "quiet_p50_ms": 1000 * statistics.median(quiet),
        "hostile_p50_ms": 1000 * statistics.median(loud),
        "hostile_to_quiet": statistics.median(loud) / statistics.median(quiet),
        "quiet_p95_ms": 1000 * statistics.quantiles(quiet, n=20)[-1],
        "hostile_p95_ms": 1000 * statistics.quantiles(loud, n=20)[-1],
        "bad_requests_per_second": requests_sent / seconds,
        **{f"bad_jobs_{state}": number for state, number in sorted(states.items())},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=30, help="of the healthy tenant, in each turn")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="the last line alone")
    arguments = parser.parse_args()
    figures = run(jobs=arguments.jobs, seed=arguments.seed)
    if not arguments.json:
        for name, value in figures.items():
            print(f"{name:<28} {value:.3g}")
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))
