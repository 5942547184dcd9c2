"""News to a receiver that is well: how much later they come when other receivers misbehave in every way there is.

A tenant's jobs end one after another, each told to a receiver that answers at once; timed from the commit that ends the
job until the request has arrived. Then the same beside other endpoints of the same tenant that hang, drip a head, drip
a body, redirect, answer 500, 410 and 429, reset the connection, and send a gigabyte: each is told of every job too, and
has news waiting from the start. Both take turns, through the real sender and PostgreSQL. The first jobs beside them,
while the sender finds out what they are, are told apart: `first_max_ms`.
"""

import argparse
import json
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import structlog
from sqlalchemy import delete, func, select, text

from bench._service import Service, open_service
from shared import endpoints, lifecycle
from shared.broker import GPU
from shared.config import Webhooks
from shared.models import StepKind, WebhookDelivery, WebhookEndpoint
from worker.deliver import Sender

Script = Callable[[socket.socket], None]

WAIT_SECONDS = 60
DRIP_SECONDS = 0.2
FIRST_JOBS = 20
BLOCK = bytes(2**20)


# --- receivers -----------------------------------------------------------------------------------------------------


@dataclass
class Receiver:
    """Answers at once, and remembers when each job's news came first."""

    url: str = ""
    arrived: dict[str, float] = field(default_factory=dict)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def wait_for(self, job_ids: Sequence[str]) -> None:
        with self.changed:
            came = self.changed.wait_for(lambda: self.arrived.keys() >= set(job_ids), timeout=WAIT_SECONDS)
        assert came, "news did not come"


@contextmanager
def receive() -> Iterator[Receiver]:
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            arrived_at = time.perf_counter()
            event = json.loads(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(204)
            self.end_headers()
            with receiver.changed:
                receiver.arrived.setdefault(event["data"]["id"], arrived_at)
                receiver.changed.notify_all()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        receiver.url = f"http://127.0.0.1:{server.server_port}/well"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield receiver
        server.shutdown()


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
    for _ in range(1024):
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
    """The URLs of receivers of every bad kind, and their kinds. They live in a process of their own, as they would."""
    program = "from bench.webhooks import serve_bad; serve_bad()"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())
        finally:
            process.kill()


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
        connection.recv(2**16)
        script(connection)


# --- the measurement -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    service: Service
    sender: Sender
    receiver: Receiver

    def measure(self, *, jobs: int, pause_seconds: float) -> list[float]:
        """Milliseconds from the end of each job until it was told of."""
        ended: dict[str, float] = {}
        for _ in range(jobs):
            job_id = self.service.submit((StepKind.INFER, GPU), kind="image", source=SOURCE)
            with self.service.sessions.begin() as session:
                lifecycle.request_cancel(session, job_id)
            ended[str(job_id)] = time.perf_counter()
            self.sender.wake()
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
            self.sender.wake()
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
    parser.add_argument("--jobs", type=int, default=200, help="of each turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--pause", type=float, default=0.05, help="seconds between the ends of jobs")
    parser.add_argument("--backlog", type=int, default=20, help="news that wait for each bad receiver at the start")
    options = parser.parse_args(arguments)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))  # errors alone
    quiet: list[float] = []
    first: list[float] = []
    beside: list[float] = []
    attempts: dict[str, Any] = {}
    with open_service() as service, receive() as receiver:
        with service.sessions.begin() as session:
            endpoints.register(
                session, service.tenant_id, url=receiver.url, events=["job.canceled"], description=None, most=99
            )
        sender = Sender(service.sessions, Webhooks(allow_private_addresses=True))
        bench = Bench(service, sender, receiver)
        sender.start()
        bench.measure(jobs=FIRST_JOBS, pause_seconds=options.pause)  # to warm up
        for _ in range(options.turns):
            quiet += bench.measure(jobs=options.jobs, pause_seconds=options.pause)
            with bench.beside_bad(backlog=options.backlog) as attempts:
                first += bench.measure(jobs=FIRST_JOBS, pause_seconds=options.pause)
                beside += bench.measure(jobs=options.jobs, pause_seconds=options.pause)
            with service.sessions.begin() as session:
                session.execute(text("TRUNCATE webhook_deliveries CASCADE"))
        sender.close()
    print(f"attempts at bad receivers in the last turn: {attempts}")
    quiet_p99, beside_p99 = percentile(quiet, 99), percentile(beside, 99)
    print(
        json.dumps(
            {
                "quiet_p50_ms": round(percentile(quiet, 50), 1),
                "beside_bad_p50_ms": round(percentile(beside, 50), 1),
                "quiet_p99_ms": round(quiet_p99, 1),
                "beside_bad_p99_ms": round(beside_p99, 1),
                "first_max_ms": round(max(first), 1),
                "growth": round(beside_p99 / quiet_p99 - 1, 3),
                "jobs": len(beside),
            }
        )
    )


if __name__ == "__main__":
    run(sys.argv[1:])
