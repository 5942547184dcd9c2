"""Submissions: how many a second, and how long each takes, beside the least that an endpoint with a row can do."""

import json
import socket
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from bench._system import System
from bench.webhooks import percentile
from cli.local.apps import App, answers, api_arguments, app_environment
from cli.local.server import HOST

WARM_UP = 50


@dataclass(frozen=True)
class Turn:
    """What one turn of all clients came to."""

    milliseconds: list[float]
    per_second: float


@contextmanager
def bare_endpoint(system: System) -> Iterator[str]:
    """Its URL. One process with the flags of the service's own, on the same database."""
    with closing(socket.create_server((HOST, 0))) as listening:
        port: int = listening.getsockname()[1]
    arguments = tuple(
        "bench._bare:create_app" if each == "api.main:create_app" else each for each in api_arguments(port)
    )
    url, environment = f"http://{HOST}:{port}", app_environment(system.stack.environment())
    app = App(
        "bare", home=system.stack.path, arguments=arguments, environment=environment,
        is_ready=lambda _: answers(url, "/readyz"),
    )  # fmt: skip
    app.start()
    try:
        yield url
    finally:
        app.stop()


def compare(
    system: System, bare_url: str, upload_id: str, *, clients: int, seconds: float, turns: int
) -> dict[str, Any]:
    """The service and the bare endpoint by turns, each with so many clients that send one request after another."""
    body = json.dumps({"source": {"upload_id": upload_id}, "mode": "demo"}).encode()
    ours, bare = (make_request(url, "/v1/jobs", body, key=system.stack.api_key) for url in (system.stack.url, bare_url))
    for url, request in ((bare_url, bare), (system.stack.url, ours)):
        send_all(url, request, clients=1, seconds=seconds, most=WARM_UP)
    told: dict[str, list[Turn]] = {"bare": [], "ours": []}
    for _ in range(turns):
        told["bare"].append(send_all(bare_url, bare, clients=clients, seconds=seconds))
        told["ours"].append(send_all(system.stack.url, ours, clients=clients, seconds=seconds))
    ratios = [mine.per_second / theirs.per_second for mine, theirs in zip(told["ours"], told["bare"], strict=True)]
    figures: dict[str, Any] = {"clients": clients, "ratio_to_bare": round(statistics.median(ratios), 3)}
    for name, done in told.items():
        times = [each for turn in done for each in turn.milliseconds]
        figures[f"{name}_per_second"] = round(statistics.median(turn.per_second for turn in done), 1)
        figures |= {f"{name}_p{rank}_ms": round(percentile(times, rank), 2) for rank in (50, 95, 99)}
    return figures


def make_request(url: str, path: str, body: bytes, *, key: str) -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def send_all(url: str, request: bytes, *, clients: int, seconds: float, most: int | None = None) -> Turn:
    """For so many seconds, or `most` requests of each client; all of them accepted.

    Over bare sockets, as any client library would take more of the machine than what is measured.
    """
    times: list[list[float]] = [[] for _ in range(clients)]
    begin = threading.Barrier(clients + 1)
    threads = [
        threading.Thread(target=_send, args=[url, request, each, begin, seconds, most], daemon=True) for each in times
    ]
    for thread in threads:
        thread.start()
    begin.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    lasted = time.perf_counter() - began
    done = [each for one in times for each in one]
    assert all(times), "a client was refused or cut off"
    return Turn(done, len(done) / lasted)


def _send(
    url: str, request: bytes, times: list[float], begin: threading.Barrier, seconds: float, most: int | None
) -> None:
    place = urlsplit(url)
    with ExitStack() as opened:
        line = opened.enter_context(socket.create_connection((place.hostname, place.port or 80), timeout=60))
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        answers_of_line = opened.enter_context(line.makefile("rb"))
        begin.wait()
        until = time.perf_counter() + seconds
        made: list[float] = []
        while time.perf_counter() < until and (most is None or len(made) < most):
            began = time.perf_counter()
            line.sendall(request)
            status = answers_of_line.readline()
            length = 0
            while (header := answers_of_line.readline().lower()) not in (b"\r\n", b""):
                if header.startswith(b"content-length:"):
                    length = int(header.partition(b":")[2])
            answers_of_line.read(length)
            made.append(1000 * (time.perf_counter() - began))
            assert status.split()[1:2] == [b"202"], status
        times += made


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a service is judged by: its best rate, and the lowest of its ratios whatever the number of clients."""
    return {
        "submissions_per_second": max(row["ours_per_second"] for row in rows),
        "submissions_ratio_to_bare": min(row["ratio_to_bare"] for row in rows),
    }
