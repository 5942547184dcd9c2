"""Files on their way to the storage, straight by signed links: small ones in one PUT, large ones in parts."""

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import httpx2

from cli.exchange import ATTEMPTS, PAUSE_SECONDS, ApiError, ServiceUnreachable, describe, repeat
from cli.failures import Failure

Json: TypeAlias = dict[str, Any]
Ask: TypeAlias = Callable[[str, str, Json | None], Json]
"""Method, path and body of a request to the service, to its answer."""
OnBytes: TypeAlias = Callable[[int], None]
"""Is told how many bytes more are on their way or there; fewer, as a negative number, where some did not arrive. It is
called from several threads, and may raise to give the transfer up."""

BLOCK_BYTES = 2**20
PARTS_IN_FLIGHT = 4
PARTS_SIGNED = 2 * PARTS_IN_FLIGHT
"""Few links at a time, so that none runs out while its part waits for its turn."""
GONE = frozenset({"not_found", "upload_lost"})
"""Refusals after which only another upload can bring the file."""


class _GivenUp(Exception):
    """Another part ended the upload."""


def send(
    path: Path,
    *,
    ask: Ask,
    storage: httpx2.Client,
    begun: str | None = None,
    on_announced: Callable[[str], None] = lambda _upload_id: None,
    on_bytes: OnBytes = lambda _count: None,
) -> str:
    """The id of the upload, whose bytes are all there. Raises Failure, ApiError and ServiceUnreachable.

    `begun` is an earlier upload of the same bytes: of that one only what is missing is sent, if the service still knows
    it. `on_announced` is told the id of a new one before its first byte is sent.
    """
    before = path.stat()
    upload = _find(begun, size=before.st_size, ask=ask) if begun is not None else None
    if upload is None:
        upload = ask("POST", "/v1/uploads", {"filename": _name(path), "size": before.st_size})
        on_announced(str(upload["id"]))
    if upload.get("completed"):
        on_bytes(before.st_size)
    elif upload.get("part_size") is None:
        _send_whole(path, upload, size=before.st_size, storage=storage, on_bytes=on_bytes)
    else:
        _Parts(path, upload, ask=ask, storage=storage, on_bytes=on_bytes).send()
    after = path.stat()
    if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise Failure(f"{path} was written to while it was uploaded; submit it again")
    return str(upload["id"])


def _find(upload_id: str, *, size: int, ask: Ask) -> Json | None:
    """None where it cannot become the file any more."""
    try:
        upload = ask("GET", f"/v1/uploads/{upload_id}", None)
    except ApiError as error:
        if error.code in GONE:
            return None
        raise
    return upload if upload["size"] == size else None


def _name(path: Path) -> str:
    """As far as it is text: a name may be any bytes, and a request may not."""
    return os.fsencode(path.name).decode(errors="replace")


def _send_whole(path: Path, upload: Mapping[str, Any], *, size: int, storage: httpx2.Client, on_bytes: OnBytes) -> None:
    sent = 0

    def count(length: int) -> None:
        nonlocal sent
        sent += length
        on_bytes(length)

    def put() -> httpx2.Response:
        if sent:
            count(-sent)  # of a try before this one
        with path.open("rb") as file:
            body = _read(file, path, size, on_bytes=count)
            return storage.put(upload["url"], content=body, headers={**upload["headers"], "Content-Length": str(size)})

    answer = repeat(put, whom="the storage of the service")
    if not answer.is_success:
        raise _refused(path, answer.status_code)


@dataclass
class _Parts:
    """One file, sent part by part until none is missing; what fails is sent again by a fresh link."""

    path: Path
    upload: Mapping[str, Any]
    ask: Ask
    storage: httpx2.Client
    on_bytes: OnBytes
    given_up: threading.Event = field(default_factory=threading.Event)

    def send(self) -> None:
        where = f"/v1/uploads/{self.upload['id']}"
        arrived = {part["number"]: part["size"] for part in self.upload["parts"]}
        missing: Sequence[int] = [number for number in range(1, self.upload["part_count"] + 1) if number not in arrived]
        self.on_bytes(sum(arrived.values()))
        rounds_in_vain = 0
        while missing:
            now, later = missing[:PARTS_SIGNED], missing[PARTS_SIGNED:]
            links = self.ask("POST", f"{where}/parts", {"numbers": list(now)})["parts"]
            failures = self._send_round(links)
            rounds_in_vain = rounds_in_vain + 1 if len(failures) == len(now) else 0
            if rounds_in_vain == ATTEMPTS:
                raise next(iter(failures.values()))
            if failures:
                time.sleep(PAUSE_SECONDS * 2**rounds_in_vain)
            missing = [*failures, *later]
        self.ask("POST", f"{where}/complete", None)

    def _send_round(self, links: Sequence[Json]) -> dict[int, Failure]:
        """What became of the parts that were not taken, by number."""
        with ThreadPoolExecutor(PARTS_IN_FLIGHT, thread_name_prefix="upload") as pool:
            try:
                outcomes = list(pool.map(self._send_part, links))
            except BaseException:
                self.given_up.set()  # or leaving would wait until all parts under way are through
                raise
        return {link["number"]: outcome for link, outcome in zip(links, outcomes, strict=True) if outcome is not None}

    def _send_part(self, link: Json) -> Failure | None:
        sent = 0

        def count(length: int) -> None:
            nonlocal sent
            if self.given_up.is_set():
                raise _GivenUp
            sent += length
            self.on_bytes(length)

        try:
            with self.path.open("rb") as file:
                file.seek((link["number"] - 1) * self.upload["part_size"])
                body = _read(file, self.path, link["size"], on_bytes=count)
                answer = self.storage.put(link["url"], content=body, headers={"Content-Length": str(link["size"])})
        except httpx2.TransportError as error:
            self.on_bytes(-sent)
            return ServiceUnreachable(f"the storage of the service cannot be reached: {describe(error)}")
        if answer.is_success:
            return None
        self.on_bytes(-sent)
        return _refused(self.path, answer.status_code)


def _read(file: BinaryIO, path: Path, length: int, *, on_bytes: OnBytes) -> Iterator[bytes]:
    """So many bytes from where the file stands."""
    while length:
        block = file.read(min(BLOCK_BYTES, length))
        if not block:
            raise Failure(f"{path} became shorter while it was uploaded; submit it again")
        length -= len(block)
        on_bytes(len(block))
        yield block


def _refused(path: Path, status: int) -> ApiError:
    return ApiError(status, "upload_refused", f"the storage did not take {path.name}")
