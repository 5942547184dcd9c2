"""Rows 88 to 111 of the catalogue of bad input: bytes on the API's port, each with the answers that may come."""

import json
from collections.abc import Iterator
from typing import Any

from shared.models import create_id
from tests.acceptance.catalogue.images import save
from tests.acceptance.catalogue.rows import Sent

INVALID = (422, "invalid_request")
TOO_LARGE = (413, "too_large")
MISSING = (404, "not_found")
NO_METHOD = (405, "method_not_allowed")
GARBLED = (400, None)
FINE, ACCEPTED = (200, None), (202, None)
CUT_OFF = (0, None)
"""The connection ends without an answer."""

DEEP = 10_000


def list_requests(key: str, *, job_id: str) -> Iterator[Sent]:
    """By the owner of `key` and of a job that has ended."""
    yield from list_documents(key)
    yield from list_questions(key, job_id=job_id)
    yield from list_framings(key)
    yield from list_forms(key)


def list_documents(key: str) -> Iterator[Sent]:
    valid = json.dumps(document())
    for row, says, body in (
        (88, "nothing", b""),
        (89, "null", b"null"),
        (90, "a list", b"[]"),
        (91, "a number beyond all", with_metadata('{"a": 1e400}')),
        (92, "a number beyond 64 bits", json.dumps(document(priority=2**63)).encode()),
        (92, "a number of 4301 digits", with_metadata('{"a": ' + "9" * 4301 + "}")),
        (93, "ten thousand lists in each other", with_metadata('{"a": ' + "[" * DEEP + "]" * DEEP + "}")),
        (94, "half a surrogate pair", with_metadata(r'{"a": "\ud800"}')),
        (94, "half a surrogate pair as a key", with_metadata(r'{"\udfff": 1}')),
        (95, "a NUL", with_metadata(r'{"a": "\u0000"}')),
        (95, "a NUL where a mode goes", valid.replace("demo", r"demo\u0000").encode()),
        (96, "UTF-16", valid.encode("utf-16")),
        (97, "an unknown field", json.dumps(document(tenant_id="1")).encode()),
        (98, "true for a number", json.dumps(document(priority=True)).encode()),
        (98, "text for a number", json.dumps(document(priority="1")).encode()),
        (99, "a size below nothing", json.dumps(document(options={"input_size": -1})).encode()),
        (99, "a size beyond all", json.dumps(document(options={"input_size": 2**31})).encode()),
        (99, "a size that is no number", json.dumps(document(options={"input_size": float("nan")})).encode()),
    ):  # fmt: skip
        yield Sent(row, says, post(key, body), frozenset({INVALID}))
    large = json.dumps(document(metadata={"a": "x" * 2**20})).encode()
    yield Sent(101, "metadata of a megabyte", post(key, large), frozenset({TOO_LARGE}))
    marked = b"\xef\xbb\xbf" + valid.encode()
    yield Sent(96, "a byte order mark", post(key, marked), frozenset({INVALID, MISSING}))


def list_questions(key: str, *, job_id: str) -> Iterator[Sent]:
    for number in ("1", "a" * 36, "%00", "null", "..%2F..%2Fetc", "../../etc/passwd", str(create_id())):
        yield Sent(100, f"the id {number}", ask(key, f"/v1/jobs/{number}"), frozenset({INVALID, MISSING}))
    for query in ("cursor=garbage", "cursor=%00", "limit=0", "limit=-1", "limit=1000000000", "limit=x", "state=done"):
        yield Sent(102, f"jobs with {query}", ask(key, f"/v1/jobs?{query}"), frozenset({INVALID}))
    path = f"/v1/jobs/{job_id}"
    for says, header in (
        (106, "X-Forwarded-For: 1.2.3.4"),
        (107, "X-Forwarded-Host: elsewhere.example"),
        (108, "Range: bytes=0-0,1-1," + ",".join(f"{number}-" for number in range(500))),
        (108, "Range: bytes=-0"),
        (108, "Range: bytes=999999999-"),
        (111, "Accept-Encoding: junk;q=9, *;q=x, gzip;q=0"),
    ):
        yield Sent(says, header[:40], ask(key, path, header), frozenset({FINE}))
    yield Sent(
        107, "another host", ask(key, path).replace(b"Host: here", b"Host: elsewhere.example"), frozenset({FINE})
    )
    yield Sent(
        109,
        "a method in a header",
        post(key, b"", path=path, header="X-HTTP-Method-Override: DELETE"),
        frozenset({NO_METHOD}),
    )
    for method in ("HEAD", "OPTIONS", "TRACE", "PUT", "PATCH", "BREW"):
        yield Sent(109, method, ask(key, "/v1/jobs", method=method), frozenset({NO_METHOD, (405, None), GARBLED}))


def list_framings(key: str) -> Iterator[Sent]:
    body = json.dumps(document()).encode()
    head = ask(key, "/v1/jobs", "Content-Type: application/json", method="POST").removesuffix(b"\r\n")
    yield Sent(103, "a length that is too short", head + b"Content-Length: 10\r\n\r\n" + body, frozenset({INVALID}))
    yield Sent(
        103,
        "a length that is too long",
        head + b"Content-Length: 9999\r\n\r\n" + body,
        frozenset({CUT_OFF, INVALID, GARBLED}),
    )
    both = head + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    yield Sent(103, "a length and chunks", both, frozenset({GARBLED, INVALID}))
    for says, lengths in (
        ("two lengths", b"Content-Length: 5\r\nContent-Length: 6\r\n"),
        ("a length below nothing", b"Content-Length: -5\r\n"),
        ("a length in words", b"Content-Length: five\r\n"),
    ):
        yield Sent(103, says, head + lengths + b"\r\n" + body, frozenset({GARBLED}))
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n"
    yield Sent(103, "chunks without an end", chunked + b'5\r\n{"a":\r\n', frozenset({CUT_OFF, INVALID, GARBLED}))
    yield Sent(103, "a chunk whose length is none", chunked + b"zz\r\n{}\r\n0\r\n\r\n", frozenset({GARBLED, CUT_OFF}))
    yield Sent(103, "a chunk beyond all", chunked + b"fffffffffffffffff\r\n", frozenset({GARBLED, CUT_OFF}))
    yield Sent(103, "a header without end", head + b"X: " + b"x" * 2**17, frozenset({GARBLED, CUT_OFF, (431, None)}))
    yield Sent(
        103, "no HTTP at all", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20, frozenset({GARBLED, CUT_OFF})
    )
    utf7 = post(key, body).replace(b"application/json", b"application/json; charset=utf-7")
    yield Sent(104, "JSON that calls itself UTF-7", utf7, frozenset({INVALID, MISSING}))
    for kind in ("text/plain", "", "multipart/form-data", "multipart/form-data; boundary=" + "x" * 1024, "image/png"):
        sent = post(key, body).replace(b"Content-Type: application/json", f"Content-Type: {kind}".encode())
        yield Sent(104, f"the type {kind[:40] or 'nothing'}", sent, frozenset({INVALID}))
    expecting = post(key, b"{}", header="Expect: 100-continue")
    yield Sent(110, "Expect: 100-continue", expecting, frozenset({INVALID}))


def list_forms(key: str) -> Iterator[Sent]:
    field = b'Content-Disposition: form-data; name="mode"\r\n\r\ndemo'
    yield Sent(105, "ten thousand fields", form(key, *[field] * 10_000), frozenset({INVALID}))
    yield Sent(105, "a field of a megabyte", form(key, field + b"x" * 2**20), frozenset({INVALID, TOO_LARGE}))
    png = save("PNG")
    for name in ("../../x", "..\\..\\x.png", "/etc/passwd", "x" * 4096, "%00.png", "\u202egnp.exe", ""):
        part = f'Content-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'.encode() + png
        yield Sent(105, f"a file called {name[:20]!r}", form(key, field, part), frozenset({ACCEPTED}))
    nul = b'Content-Disposition: form-data; name="file"; filename="a\0.png"\r\n\r\n' + png
    yield Sent(105, "a file with NUL in its name", form(key, field, nul), frozenset({ACCEPTED, INVALID}))


def document(**changed: Any) -> dict[str, Any]:
    """A submission whose upload nobody has."""
    return {"mode": "demo", "source": {"upload_id": str(create_id())}, **changed}


def with_metadata(text: str) -> bytes:
    return json.dumps(document(metadata="here")).replace('"here"', text).encode()


def ask(key: str, path: str, header: str = "X-Nothing: 1", *, method: str = "GET") -> bytes:
    told = f"Host: here\r\nAuthorization: Bearer {key}\r\nConnection: close\r\n{header}"
    return f"{method} {path} HTTP/1.1\r\n{told}\r\n\r\n".encode()


def post(key: str, body: bytes, *, path: str = "/v1/jobs", header: str = "X-Nothing: 1") -> bytes:
    told = f"{header}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return ask(key, path, told, method="POST") + body


def form(key: str, *parts: bytes) -> bytes:
    body = b"".join(b"--x\r\n" + part + b"\r\n" for part in parts) + b"--x--\r\n"
    told = f"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: {len(body)}"
    return ask(key, "/v1/jobs", told, method="POST") + body
