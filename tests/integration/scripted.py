"""A service that answers what a test tells it to, in order, and keeps what it was asked: real HTTP, on this machine."""

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeAlias

Answer: TypeAlias = Callable[[BaseHTTPRequestHandler], None]


@dataclass(frozen=True)
class Asked:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class ScriptedService:
    url: str = ""
    asked: list[Asked] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    always: dict[str, Answer] = field(default_factory=dict)
    """By path; these do not use up the script."""

    def script(self, *answers: Answer) -> None:
        self.answers.extend(answers)

    def paths(self) -> list[str]:
        return [f"{each.method} {each.path}" for each in self.asked]

    def take(self, path: str) -> Answer:
        if path in self.always:
            return self.always[path]
        return self.answers.pop(0) if self.answers else say(500, problem("the_script_is_over"))


def say(status: int, body: Any = None, **headers: str) -> Answer:
    """A JSON answer, or the bytes or text as they are."""
    content = body if isinstance(body, bytes) else body.encode() if isinstance(body, str) else json.dumps(body).encode()

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in {"content-length": str(len(content)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def problem(code: str, detail: str = "no") -> dict[str, str]:
    return {"code": code, "detail": detail}


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    """The line breaks before the answer."""
    with contextlib.suppress(OSError):
        handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def stream(*events: str, then: Answer | None = None) -> Answer:
    """Server-Sent Events, and the end of the connection; `then` may cut it in its own way."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("content-type", "text/event-stream")
        handler.end_headers()
        for each in events:
            handler.wfile.write(each.encode())
        handler.wfile.flush()
        handler.close_connection = True
        if then is not None:
            then(handler)

    return answer


def event(kind: str, data: Any, *, number: int) -> str:
    return f"event: {kind}\nid: {number}\ndata: {json.dumps(data)}\n\n"


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Says nothing: lines are broken on purpose here."""


@contextmanager
def run_scripted() -> Iterator[ScriptedService]:
    service = ScriptedService()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 10.0

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            if self.headers.get("transfer-encoding") == "chunked":
                body = _read_chunks(self)
            path, headers = self.path.partition("?")[0], {name.lower(): each for name, each in self.headers.items()}
            service.asked.append(Asked(self.command, self.path, headers, body))
            service.take(path)(self)

        do_GET = do_POST = do_PUT = do_DELETE = _answer  # noqa: N815 - the base class names them so

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it so
            pass

    with Server(("127.0.0.1", 0), Handler) as server:
        service.url = f"http://127.0.0.1:{server.server_port}"
        serving = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        serving.start()
        try:
            yield service
        finally:
            server.shutdown()
            serving.join()


def _read_chunks(handler: BaseHTTPRequestHandler) -> bytes:
    body = b""
    while size := int(handler.rfile.readline(), 16):
        body += handler.rfile.read(size)
        handler.rfile.readline()
    handler.rfile.readline()
    return body
