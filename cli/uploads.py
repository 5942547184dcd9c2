"""Files on their way to the storage, straight by signed links: small ones in one PUT, large ones in parts."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import httpx2

from cli.exchange import ATTEMPTS, PAUSE_SECONDS, ApiError, ServiceUnreachable, describe, repeat
from cli.failures import Failure

Json: TypeAlias = dict[str, Any]
Ask: TypeAlias = Callable[[str, str, Json | None], Json]
"""Method, path and body of a request to the service, to its answer."""

BLOCK_BYTES = 2**20
PARTS_IN_FLIGHT = 4
PARTS_SIGNED = 2 * PARTS_IN_FLIGHT
"""Few links at a time, so that none runs out while its part waits for its turn."""


class _GivenUp(Exception):
    """Another part ended the upload."""


def send(path: Path, *, ask: Ask, storage: httpx2.Client) -> str:
    """The id of the upload, whose bytes are all there. Raises Failure, ApiError and ServiceUnreachable."""
    before = path.stat()
    upload = ask("POST", "/v1/uploads", {"filename": path.name, "size": before.st_size})
    if upload.get("part_size") is None:
        _send_whole(path, upload, size=before.st_size, storage=storage)
    else:
        _Parts(path, upload, size=before.st_size, ask=ask, storage=storage).send()
    after = path.stat()
    if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise Failure(f"{path} was written to while it was uploaded; submit it again")
    return str(upload["id"])


def _send_whole(path: Path, upload: Mapping[str, Any], *, size: int, storage: httpx2.Client) -> None:
    def put() -> httpx2.Response:
        with path.open("rb") as body:
            return storage.put(upload["url"], content=body, headers={**upload["headers"], "Content-Length": str(size)})

    answer = repeat(put, whom="the storage of the service")
    if not answer.is_success:
        raise _refused(path, answer.status_code)


@dataclass
class _Parts:
    """One file, sent part by part until none is missing; what fails is sent again by a fresh link."""

    path: Path
    upload: Mapping[str, Any]
    size: int
    ask: Ask
    storage: httpx2.Client
    given_up: threading.Event = field(default_factory=threading.Event)

    def send(self) -> None:
        where = f"/v1/uploads/{self.upload['id']}"
        missing: Sequence[int] = range(1, self.upload["part_count"] + 1)
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
        start = (link["number"] - 1) * self.upload["part_size"]
        try:
            answer = self.storage.put(
                link["url"], content=self._read(start, link["size"]), headers={"Content-Length": str(link["size"])}
            )
        except httpx2.TransportError as error:
            return ServiceUnreachable(f"the storage of the service cannot be reached: {describe(error)}")
        return None if answer.is_success else _refused(self.path, answer.status_code)

    def _read(self, start: int, length: int) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            file.seek(start)
            while length:
                if self.given_up.is_set():
                    raise _GivenUp
                block = file.read(min(BLOCK_BYTES, length))
                if not block:
                    raise Failure(f"{self.path} became shorter while it was uploaded; submit it again")
                length -= len(block)
                yield block


def _refused(path: Path, status: int) -> ApiError:
    return ApiError(status, "upload_refused", f"the storage did not take {path.name}")
