"""A webhook receiver on this machine, for the demo: it keeps what it is sent, and says yes to everything."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BODY_BYTES = 64_000
POLL_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class Message:
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Receiver:
    url: str
    messages: list[Message] = field(default_factory=list)

    def wait_for(self, text: str, *, seconds: float) -> Message | None:
        """The first message that mentions `text`, or None if there is none in time."""
        deadline = time.monotonic() + seconds
        while True:
            found = next((message for message in list(self.messages) if text.encode() in message.body), None)
            if found is not None or time.monotonic() > deadline:
                return found
            time.sleep(POLL_SECONDS)


@contextmanager
def run_receiver() -> Iterator[Receiver]:
    """Listens on a free port of 127.0.0.1 until the block ends."""
    messages: list[Message] = []

    class Handler(BaseHTTPRequestHandler):
        timeout = 10.0

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            if not length.isdigit() or int(length) > BODY_BYTES:
                self.send_error(413)
                return
            body = self.rfile.read(int(length))
            messages.append(Message(headers=dict(self.headers.items()), body=body))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - named by the base class
            """Says nothing: the demo's own lines are on the terminal."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        serving = threading.Thread(target=server.serve_forever, args=(POLL_SECONDS,), name="receiver", daemon=True)
        serving.start()
        try:
            yield Receiver(f"http://127.0.0.1:{server.server_port}/webhook", messages)
        finally:
            server.shutdown()
            serving.join()
