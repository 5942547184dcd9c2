"""Speaking HTTP badly: bytes as they are, to the API's port."""

import json
import socket
from contextlib import suppress

import httpx2

PROBLEM = "application/problem+json"
SILENT_SECONDS = 2
"""How long an answer is waited for, of a server that has no reason to think about it."""


def talk(url: str, request: bytes) -> tuple[int, str | None]:
    """The status and code of the answer to a request that asks for the connection to be closed after it.

    0 where the connection ends, or nothing comes, without an answer.
    """
    address = httpx2.URL(url)
    with socket.create_connection((address.host, address.port or 80), timeout=SILENT_SECONDS) as line:
        with suppress(BrokenPipeError, ConnectionResetError):  # refused before it was heard; the answer is there
            line.sendall(request)
        return read_answer(line)


def read_answer(line: socket.socket) -> tuple[int, str | None]:
    """What `talk` tells, of all that comes until the end of the connection."""
    received = b""
    with suppress(TimeoutError, ConnectionResetError):  # what came until then is the answer
        while block := line.recv(2**16):
            received += block
    while received.startswith(b"HTTP/1.1 1"):  # interim answers
        received = received.partition(b"\r\n\r\n")[2]
    head, _, body = received.partition(b"\r\n\r\n")
    if not head:
        return 0, None
    status = int(head.split(b" ", 2)[1])
    if PROBLEM.encode() not in head or not body:
        return status, None
    return status, json.JSONDecoder().raw_decode(body.decode())[0]["code"]
