"""News to a receiver that is well: how much later they come when other receivers misbehave in every way there is.

A tenant's jobs end one after another, each told to a receiver that answers at once; timed from the commit that ends the
job until the request has arrived. Then the same beside other endpoints of the same tenant that hang, drip a head, drip
a body, redirect, answer 500, 410 and 429, reset the connection, and send a gigabyte: each is told of every job too, and
has news waiting from the start. Both take turns, through the real sender and PostgreSQL; the sender and the receivers
live in processes of their own, as they would. The first jobs beside bad receivers, while the sender finds out what they
are, are told apart: `first_max_ms`.
"""

import argparse
import json
import re
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import IO, Any

import structlog
from sqlalchemy import delete, func, select, text

from bench._service import Service, open_service
from shared import db, endpoints, lifecycle
from shared.broker import GPU
from shared.config import Database, Webhooks
from shared.models import StepKind, WebhookDelivery, WebhookEndpoint
from worker.deliver import Sender

Script = Callable[[socket.socket], None]

WAIT_SECONDS = 60
DRIP_SECONDS = 0.2
FIRST_JOBS = 20
BLOCK = bytes(2**18)


@contextmanager
def run_aside(function: str, *arguments: str) -> Iterator[tuple[IO[str], IO[str]]]:
    """A function of this module in a process of its own, which is killed when the block ends: its input and output."""
    program = f"import sys; from bench.webhooks import {function}; {function}(*sys.argv[1:])"
    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield process.stdin, process.stdout
        finally:
            process.kill()


# --- receivers -----------------------------------------------------------------------------------------------------


@dataclass
class Receiver:
    """Answers at once, and remembers when each job's news came first."""

    url: str
    arrived: dict[str, float] = field(default_factory=dict)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def note(self, told: IO[str]) -> None:
        for line in told:
            job_id, moment = line.split()
            with self.changed:
                self.arrived.setdefault(job_id, float(moment))
                self.changed.notify_all()

    def wait_for(self, job_ids: Sequence[str]) -> None:
        with self.changed:
            came = self.changed.wait_for(lambda: self.arrived.keys() >= set(job_ids), timeout=WAIT_SECONDS)
        assert came, "news did not come"


@contextmanager
def receive() -> Iterator[Receiver]:
    with run_aside("serve_well") as (_, told):
        receiver = Receiver(told.readline().strip())
        threading.Thread(target=receiver.note, args=[told], daemon=True).start()
        yield receiver


def serve_well() -> None:
    """Tell the URL, then each job and the moment at which its news was there; its clock is the whole machine's."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=128)
    print(f"http://127.0.0.1:{listening.getsockname()[1]}/well", flush=True)

    while True:
        connection, _ = listening.accept()
        with connection:
            body = _read_request(connection)
            arrived_at = time.monotonic()
            connection.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")
        print(json.loads(body)["data"]["id"], arrived_at, flush=True)


def say(head: str) -> Script:
    return lambda connection: connection.sendall(f"HTTP/1.1 {head}\r\nContent-Length: 0\r\n\r\n".encode())


def hang(connection: socket.socket) -> None:
    connection.recv(1)  # until the sender hangs up


def drip_a_head(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    while True:
        connection.sendall(b"X-Drip: 1\r\n")
        time.sleep(DRIP_SECONDS)


def drip_a_body(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    while True:
        connection.sendall(b"x")
        time.sleep(DRIP_SECONDS)


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def pour_a_gigabyte(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1073741824\r\n\r\n")
    for _ in range(2**30 // len(BLOCK)):
        connection.sendall(BLOCK)


BAD: dict[str, Script] = {
    "hangs": hang,
    "drips a head": drip_a_head,
    "drips a body": drip_a_body,
    "redirects": say("307 Elsewhere\r\nLocation: http://127.0.0.1:1/"),
    "answers 500": say("500 No"),
    "answers 410": say("410 Gone"),
    "answers 429": say("429 Later\r\nRetry-After: 1"),
    "resets": reset,
    "pours a gigabyte": pour_a_gigabyte,
}


@contextmanager
def misbehave() -> Iterator[dict[str, str]]:
    """The URLs of receivers of every bad kind, and their kinds."""
    with run_aside("serve_bad") as (_, told):
        yield json.loads(told.readline())


def serve_bad() -> None:
    """Tell the URLs, and serve until killed."""
    urls = {}
    for kind, script in BAD.items():
        listening = socket.create_server(("127.0.0.1", 0), backlog=128)
        urls[f"http://127.0.0.1:{listening.getsockname()[1]}/bad"] = kind
        threading.Thread(target=_accept, args=[listening, script], daemon=True).start()
    print(json.dumps(urls), flush=True)
    threading.Event().wait()


def _accept(listening: socket.socket, script: Script) -> None:
    while True:
        connection, _ = listening.accept()
        threading.Thread(target=_serve, args=[connection, script], daemon=True).start()


def _serve(connection: socket.socket, script: Script) -> None:
    with connection, suppress(OSError):
        _read_request(connection)
        script(connection)


def _read_request(connection: socket.socket) -> bytes:
    """Its body."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += connection.recv(2**16)
    head, _, body = received.partition(b"\r\n\r\n")
    [length] = re.findall(rb"(?i)content-length: (\d+)", head)
    while len(body) < int(length):
        body += connection.recv(2**16)
    return body


# --- the measurement -----------------------------------------------------------------------------------------------


def serve_sender(database_url: str) -> None:
    """Send what is due, woken by a line each time."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))  # errors alone
    sender = Sender(db.SessionFactory(Database(url=database_url)), Webhooks(allow_private_addresses=True))
    sender.start()
    for _ in sys.stdin:
        sender.wake()


@dataclass(frozen=True)
class Bench:
    service: Service
    receiver: Receiver
    orders: IO[str]

    def wake(self) -> None:
        print(file=self.orders, flush=True)

    def measure(self, *, jobs: int, pause_seconds: float) -> list[float]:
        """Milliseconds from the end of each job until it was told of."""
        ended: dict[str, float] = {}
        for _ in range(jobs):
            job_id = self.service.submit((StepKind.INFER, GPU), kind="image", source=SOURCE)
            with self.service.sessions.begin() as session:
                lifecycle.request_cancel(session, job_id)
            ended[str(job_id)] = time.monotonic()
            self.wake()
            time.sleep(pause_seconds)
        self.receiver.wait_for(list(ended))
        return [1000 * (self.receiver.arrived[job] - moment) for job, moment in ended.items()]

    @contextmanager
    def beside_bad(self, *, backlog: int) -> Iterator[dict[str, Any]]:
        """Endpoints of every bad kind while the block runs, with so many jobs' news for each waiting from the start."""
        with misbehave() as urls:
            with self.service.sessions.begin() as session:
                for url in urls:
                    endpoints.register(
                        session, self.service.tenant_id, url=url, events=["job.canceled"], description=None, most=99
                    )
            before = [self.service.submit((StepKind.INFER, GPU), kind="image", source=SOURCE) for _ in range(backlog)]
            with self.service.sessions.begin() as session:
                lifecycle.request_cancels(session, before)
            self.wake()
            told: dict[str, Any] = {}
            yield told
            with self.service.sessions.begin() as session:
                attempts = select(WebhookEndpoint.url, func.sum(WebhookDelivery.attempt)).join_from(
                    WebhookEndpoint, WebhookDelivery, WebhookDelivery.endpoint_id == WebhookEndpoint.id
                )
                bad = WebhookEndpoint.url.in_(urls)
                for url, sent in session.execute(attempts.where(bad).group_by(WebhookEndpoint.url)):
                    told[urls[url]] = int(sent)
                session.execute(delete(WebhookEndpoint).where(bad))


SOURCE = {"key": "none", "etag": "none", "size_bytes": 1, "filename": "none.png"}


def percentile(values: Sequence[float], per_cent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[per_cent - 1]


def run(arguments: Sequence[str] = ()) -> None:
    """Measure and print; the last line is one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m bench.webhooks", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=100, help="of each turn")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--pause", type=float, default=0.05, help="seconds between the ends of jobs")
    parser.add_argument("--backlog", type=int, default=20, help="news that wait for each bad receiver at the start")
    options = parser.parse_args(arguments)
    quiet: list[float] = []
    first: list[float] = []
    beside: list[float] = []
    attempts: Counter[str] = Counter()
    with open_service() as service, receive() as receiver:
        with service.sessions.begin() as session:
            endpoints.register(
                session, service.tenant_id, url=receiver.url, events=["job.canceled"], description=None, most=99
            )
        with run_aside("serve_sender", service.settings.database.url) as (orders, _):
            bench = Bench(service, receiver, orders)
            bench.measure(jobs=FIRST_JOBS, pause_seconds=options.pause)  # to warm up
            for _ in range(options.turns):
                quiet += bench.measure(jobs=options.jobs, pause_seconds=options.pause)
                with bench.beside_bad(backlog=options.backlog) as told:
                    first += bench.measure(jobs=FIRST_JOBS, pause_seconds=options.pause)
                    beside += bench.measure(jobs=options.jobs, pause_seconds=options.pause)
                attempts.update(told)
                with service.sessions.begin() as session:
                    session.execute(text("TRUNCATE webhook_deliveries CASCADE"))
    print(f"attempts at bad receivers: {dict(attempts)}")
    found = {
        "webhooks_p99_growth": percentile(beside, 99) / percentile(quiet, 99) - 1,
        "webhooks_p50_growth": percentile(beside, 50) / percentile(quiet, 50) - 1,
    }
    milliseconds = {
        "quiet_p50_ms": percentile(quiet, 50),
        "beside_bad_p50_ms": percentile(beside, 50),
        "quiet_p99_ms": percentile(quiet, 99),
        "beside_bad_p99_ms": percentile(beside, 99),
        "first_max_ms": max(first),
    }
    rounded = {name: round(value, 1) for name, value in milliseconds.items()}
    rounded |= {name: round(value, 3) for name, value in found.items()}
    print(json.dumps(rounded | {"jobs": len(beside)}))


if __name__ == "__main__":
    run(sys.argv[1:])
