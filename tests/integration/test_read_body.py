"""What a server may do while a file of its is read: break off, redirect, drip, hang, and send without end."""

import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from shared.config import Fetch
from shared.errors import AddressRefused, MasklineError, SourceRefused, SourceTooLarge, SourceUnreachable
from tests.integration.scripted import Answer, ScriptedService, hang_up, say
from worker.fetch import WORTH_GOING_ON_BYTES, read_body

ETAG = '"the-same"'
CONTENT = bytes(range(256)) * 16 * 1024  # 4 MiB
LIMITS = Fetch(
    allow_private_addresses=True, connect_timeout_seconds=1, silent_seconds=0.5, source_bytes=len(CONTENT),
    total_timeout_seconds=20,
)  # fmt: skip


def read(url: str, **limits: Any) -> bytes:
    return b"".join(read_body(url, LIMITS.model_copy(update=limits), checkpoint=lambda: None))


def part_of(content: bytes, size: int, **headers: str) -> Answer:
    """Announces all of it, sends so much, and hangs up."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        for name, value in {"content-length": str(len(content)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content[:size])
        handler.wfile.flush()
        hang_up(handler)

    return answer


def the_rest(handler: BaseHTTPRequestHandler) -> None:
    start = int(handler.headers["range"].removeprefix("bytes=").removesuffix("-"))
    rest = CONTENT[start:]
    told = {"content_range": f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}", "etag": ETAG}
    say(206, rest, **told)(handler)


def test_a_broken_connection_is_taken_up_where_it_broke(server: ScriptedService) -> None:
    server.script(part_of(CONTENT, 2 * WORTH_GOING_ON_BYTES, etag=ETAG), the_rest)
    assert read(server.url) == CONTENT
    again = server.asked[1].headers
    assert (again["range"], again["if-range"]) == (f"bytes={2 * WORTH_GOING_ON_BYTES}-", ETAG)


@pytest.mark.parametrize(
    "then",
    [
        pytest.param(say(200, CONTENT, etag='"another"'), id="another file"),
        pytest.param(say(206, CONTENT[5:], content_range="bytes 5-9/10", etag=ETAG), id="another part"),
        pytest.param(say(416, b""), id="no part"),
    ],
)
def test_what_is_not_the_rest_of_the_same_file_is_not_put_behind_its_beginning(
    server: ScriptedService, then: Answer
) -> None:
    server.script(part_of(CONTENT, 2 * WORTH_GOING_ON_BYTES, etag=ETAG), then)
    with pytest.raises((SourceUnreachable, SourceRefused)):
        read(server.url)


@pytest.mark.parametrize("headers", [{}, {"etag": 'W/"weak"'}])
def test_a_file_that_cannot_be_told_again_is_not_taken_up(server: ScriptedService, headers: dict[str, str]) -> None:
    server.script(part_of(CONTENT, 2 * WORTH_GOING_ON_BYTES, **headers))
    with pytest.raises(SourceUnreachable):
        read(server.url)
    assert len(server.asked) == 1


def test_a_server_that_always_breaks_off_is_left_in_peace(server: ScriptedService) -> None:
    server.script(*[part_of(CONTENT, 1000, etag=ETAG)] * 3)
    with pytest.raises(SourceUnreachable):
        read(server.url)
    assert len(server.asked) == 1


def test_redirects_are_followed(server: ScriptedService) -> None:
    server.script(say(302, b"", location="/there?a=b"), say(307, b"", location=f"{server.url}/x"), say(200, CONTENT))
    assert read(f"{server.url}/here") == CONTENT
    assert server.paths() == ["GET /here", "GET /there?a=b", "GET /x"]


def test_redirects_end(server: ScriptedService) -> None:
    server.always["/"] = say(302, b"", location="/")
    with pytest.raises(SourceRefused, match="redirects more than 5 times"):
        read(f"{server.url}/")


@pytest.mark.parametrize(
    ("location", "error"),
    [
        ("file:///etc/passwd", AddressRefused),
        ("http://user:word@127.0.0.1/", AddressRefused),
        ("http://[", SourceRefused),
        ("", SourceRefused),
    ],
)
def test_a_redirect_leads_nowhere_that_a_job_may_not_name(
    server: ScriptedService, location: str, error: type[MasklineError]
) -> None:
    server.always["/a"] = say(302, b"", location=location)
    with pytest.raises(error):
        read(f"{server.url}/a")


@pytest.mark.parametrize("announced", [True, False])
def test_a_file_that_is_too_large_is_not_read_to_its_end(server: ScriptedService, announced: bool) -> None:
    more = CONTENT + b"x"
    server.script(say(200, more) if announced else endless)
    with pytest.raises(SourceTooLarge):
        read(server.url)


def endless(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    handler.close_connection = True
    with suppress(OSError):
        while True:
            handler.wfile.write(CONTENT)


def drip(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("content-length", str(len(CONTENT)))
    handler.end_headers()
    with suppress(OSError):
        while True:
            handler.wfile.write(b"x")
            time.sleep(0.05)


def say_nothing(handler: BaseHTTPRequestHandler) -> None:
    handler.rfile.read(1)  # returns when the reader has hung up


@pytest.mark.parametrize("trouble", [drip, say_nothing])
def test_a_server_that_sends_next_to_nothing_is_given_up(server: ScriptedService, trouble: Answer) -> None:
    server.script(trouble)
    with pytest.raises(SourceUnreachable):
        read(server.url)


def test_a_download_ends_when_its_time_is_over(server: ScriptedService) -> None:
    def steady(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        with suppress(OSError):
            for _ in range(1000):
                handler.wfile.write(bytes(4096))
                time.sleep(0.02)

    server.script(steady)
    with pytest.raises(SourceUnreachable, match="in the time there is"):
        read(server.url, total_timeout_seconds=1, silent_seconds=10, source_bytes=10**9)
