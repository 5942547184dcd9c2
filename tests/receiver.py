"""A customer's webhook receiver: a real HTTP server on this machine that keeps what it was sent."""

import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from standardwebhooks import Webhook

WAIT_SECONDS = 30
DRIP_SECONDS = 20

Script = Callable[[socket.socket], None]


@dataclass(frozen=True)
class Delivery:
    headers: dict[str, str]
    body: str

    def verify(self, secret: str) -> dict[str, object]:
        """The event, as the reference library reads it; raises WebhookVerificationError."""
        event: dict[str, object] = Webhook(secret).verify(self.body, self.headers)
        return event

    @property
    def webhook_id(self) -> str:
        return self.headers["webhook-id"]


@dataclass
class Receiver:
    url: str
    deliveries: list[Delivery] = field(default_factory=list)
    _arrived: threading.Condition = field(default_factory=threading.Condition)

    def take(self, delivery: Delivery) -> None:
        with self._arrived:
            self.deliveries.append(delivery)
            self._arrived.notify_all()

    def wait_for(self, job_id: str, *, count: int = 1) -> list[Delivery]:
        """The deliveries that speak of the job, once there are `count`; raises AssertionError when they do not come."""
        with self._arrived:
            came = self._arrived.wait_for(lambda: len(self.about(job_id)) >= count, timeout=WAIT_SECONDS)
        assert came, f"{count} deliveries about {job_id} did not come; there were {len(self.about(job_id))}"
        return self.about(job_id)

    def about(self, job_id: str) -> list[Delivery]:
        return [each for each in self.deliveries if job_id in each.body]


@contextmanager
def run_receiver(
    *, status: int = 204, headers: Mapping[str, str] | None = None, reply: bytes = b""
) -> Iterator[Receiver]:
    receiver = Receiver(url="")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"])).decode()
            receiver.take(Delivery({name.lower(): value for name, value in self.headers.items()}, body))
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it so
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    receiver.url = f"http://127.0.0.1:{server.server_port}/hook"
    serving = threading.Thread(target=server.serve_forever, daemon=True)
    serving.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        server.server_close()
        serving.join()


@contextmanager
def scripted(script: Script) -> Iterator[str]:
    """The URL of a server that does to every connection what the script says, once it has read the request."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with suppress(OSError):  # the other side hangs up, or the test is over
            while True:
                connection, _ = listening.accept()
                with connection, suppress(OSError):
                    connection.recv(2**16)
                    script(connection)

    serving = threading.Thread(target=serve)
    serving.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/hook"
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        serving.join()


def answering(head: str) -> Script:
    return lambda connection: connection.sendall(head.encode())


def say_nothing(connection: socket.socket) -> None:
    connection.recv(1)  # returns when the sender has hung up


def hang_up(connection: socket.socket) -> None:
    connection.close()


def drip_a_head(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    drip(connection, b"X-Drip: 1\r\n")


def drip_a_body(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    drip(connection, b"x")


def drip(connection: socket.socket, drop: bytes) -> None:
    """Goes on far longer than a sender may stay, and then lets the test fail by an answer that arrived."""
    for _ in range(DRIP_SECONDS * 10):
        connection.sendall(drop)
        time.sleep(0.1)
    connection.sendall(b"\r\n")
