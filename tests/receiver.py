"""A customer's webhook receiver: a real HTTP server on this machine that keeps what it was sent."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from standardwebhooks import Webhook

WAIT_SECONDS = 30


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
def run_receiver(*, status: int = 204) -> Iterator[Receiver]:
    receiver = Receiver(url="")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"])).decode()
            receiver.take(Delivery({name.lower(): value for name, value in self.headers.items()}, body))
            self.send_response(status)
            self.end_headers()

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
