"""The source of a job that names a place: an object in S3 is looked up and pinned, what is at a URL is copied."""

import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

import httpx2
import structlog

from shared.config import Fetch
from shared.contract import JobKind, Options
from shared.egress import UNREACHABLE, open_answer, reach_of_fetch
from shared.errors import SourceMissing, SourceRefused, SourceTooLarge, SourceUnreachable
from shared.inference.signatures import HEAD_BYTES
from shared.kinds import tell_kind
from shared.lifecycle import ClaimedStep
from shared.sources import check_kind
from shared.storage import step_prefix
from worker.desk import Desk
from worker.manifest import prefix_of

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

log = structlog.get_logger(__name__)

REDIRECTS = frozenset({301, 302, 303, 307, 308})
MOST_REDIRECTS = 5
GONE = frozenset({404, 410})
TRY_AGAIN = frozenset({408, 425, 429})
NEXT_TO_NOTHING_BYTES = 64 * 2**10
WORTH_GOING_ON_BYTES = 2**20
"""A connection that broke sooner is not taken up again at once; the step is, after a pause."""

TOO_LATE = "the file did not come in the time there is for one"


@dataclass(frozen=True, kw_only=True)
class Fetched:
    kind: JobKind
    source: dict[str, Any]


def fetch(claimed: ClaimedStep, desk: Desk) -> Fetched:
    """Make the job's source one that can be read. Raises what storage and `read_body` raise, and KindMismatch."""
    desk.tell("fetching")
    place = claimed.job.source
    if "url" not in place:
        return _look_up(claimed, desk)
    if claimed.lease.attempt > 1:  # what a killed one had stored may be large, and nothing else would ever name it
        job = claimed.job
        desk.storage.delete_prefix(step_prefix(job.tenant_id, job.id, ordinal=claimed.ordinal))
    limits, key = desk.settings.fetch, f"{prefix_of(claimed)}source"
    blocks = read_body(place["url"], limits, checkpoint=desk.checkpoint)
    head = _take(blocks, HEAD_BYTES)
    kind = _check_kind(claimed, head)
    with io.BufferedReader(_Stream(chain([head], blocks))) as body:
        stored = desk.storage.put_stream(
            key, body, limit_bytes=limits.source_bytes, content_type="application/octet-stream"
        )
    return Fetched(
        kind=kind,
        source={
            "key": key, "etag": stored.etag, "size_bytes": stored.size_bytes, "filename": place["filename"],
            "location": place["location"],
        },
    )  # fmt: skip


def _look_up(claimed: ClaimedStep, desk: Desk) -> Fetched:
    place = claimed.job.source
    storage = desk.storage_of(claimed.job)
    found = storage.head(place["key"])
    if found.size_bytes > desk.settings.api.source_bytes:
        raise SourceTooLarge(f"a source may have at most {desk.settings.api.source_bytes} bytes")
    head = storage.read(place["key"], etag=found.etag, limit_bytes=HEAD_BYTES)
    kept = {name: place[name] for name in ("bucket", "key", "filename", "location")}
    return Fetched(kind=_check_kind(claimed, head), source={**kept, "etag": found.etag, "size_bytes": found.size_bytes})


def _check_kind(claimed: ClaimedStep, head: bytes) -> JobKind:
    place, options = claimed.job.source, Options.model_validate(claimed.job.options)
    kind = tell_kind(head[:HEAD_BYTES], filename=place["filename"], content_type="")
    check_kind(kind, options, filename=place["filename"], expect=place["expect"])
    return kind


def read_body(url: str, limits: Fetch, *, checkpoint: Callable[[], None]) -> Iterator[bytes]:
    """The file behind a URL, block by block, from start to end. A connection that breaks is taken up again where the
    server can tell that the file is still the same.

    Raises SourceMissing, SourceRefused, SourceTooLarge, SourceUnreachable, AddressRefused and what `checkpoint` does.
    """
    ends_at = time.monotonic() + limits.total_timeout_seconds
    position, unchanged = 0, None
    while True:
        began_at = position
        try:
            with _open(url, limits, ends_at=ends_at, start=position, unchanged=unchanged) as answer:
                unchanged = _strong_etag(answer)
                for block in _read_briskly(answer, limits.silent_seconds):
                    position += len(block)
                    if position > limits.source_bytes:
                        raise SourceTooLarge(f"a file may have at most {limits.source_bytes} bytes to be fetched")
                    checkpoint()
                    yield block
            if time.monotonic() < ends_at:
                return
            raise SourceUnreachable(TOO_LATE)  # where no length was told, a connection we cut looks like the end
        except UNREACHABLE as error:
            if time.monotonic() >= ends_at:
                raise SourceUnreachable(TOO_LATE) from error
            if unchanged is None or position - began_at < WORTH_GOING_ON_BYTES:
                raise SourceUnreachable(f"the file cannot be had: {type(error).__name__}") from error
            log.info("a download goes on after its connection broke", position=position, error=type(error).__name__)


@contextmanager
def _open(url: str, limits: Fetch, *, ends_at: float, start: int, unchanged: str | None) -> Iterator[httpx2.Response]:
    """The answer that has the file from `start` on, wherever redirects lead."""
    headers = {"accept": "*/*", "accept-encoding": "identity"}
    if start and unchanged:
        headers |= {"range": f"bytes={start}-", "if-range": unchanged}
    for _ in range(MOST_REDIRECTS + 1):
        if urlsplit(url).scheme != "https" and not limits.allow_private_addresses:
            raise SourceRefused("only https:// is fetched, and the server leads elsewhere")
        with open_answer(
            "GET", url, headers=headers, reach=reach_of_fetch(limits),
            connect_seconds=limits.connect_timeout_seconds, silent_seconds=limits.silent_seconds,
            total_seconds=max(0.001, ends_at - time.monotonic()),
        ) as answer:  # fmt: skip
            if answer.status_code not in REDIRECTS:
                _check_answer(answer, start=start)
                yield answer
                return
            url = _follow(url, answer.headers.get("location", ""))
    raise SourceRefused(f"the server redirects more than {MOST_REDIRECTS} times")


def _follow(url: str, location: str) -> str:
    try:
        target = urljoin(url, location)
        urlsplit(target)
    except ValueError as error:
        raise SourceRefused("the server leads to what is no URL") from error
    return target


def _check_answer(answer: httpx2.Response, *, start: int) -> None:
    status = answer.status_code
    if status in GONE:
        raise SourceMissing(f"the server of the file answers {status}")
    if status >= 500 or status in TRY_AGAIN:
        raise SourceUnreachable(f"the server of the file answers {status}")
    if start and status == 200:
        raise SourceUnreachable("the connection broke, and the file is another one by now")
    if status != (206 if start else 200):
        raise SourceRefused(f"the server of the file answers {status}")
    if start and not answer.headers.get("content-range", "").startswith(f"bytes {start}-"):
        raise SourceUnreachable("the connection broke, and the server does not go on where it did")


def _strong_etag(answer: httpx2.Response) -> str | None:
    """What tells the same bytes again; a weak one does not."""
    found: str | None = answer.headers.get("etag")
    return found if found and found.startswith('"') else None


def _read_briskly(answer: httpx2.Response, silent_seconds: float) -> Iterator[bytes]:
    """The body undecoded; SourceUnreachable when it drips. Only the waiting counts, not what is done with the bytes."""
    blocks = answer.iter_raw()
    waited, came = 0.0, 0
    while True:
        began_at = time.monotonic()
        block = next(blocks, None)
        waited += time.monotonic() - began_at
        if block is None:
            return
        came += len(block)
        if waited > silent_seconds:
            if came < NEXT_TO_NOTHING_BYTES:
                raise SourceUnreachable(f"the server sent only {came} bytes in {waited:.0f} s")
            waited, came = 0.0, 0
        yield block


def _take(blocks: Iterator[bytes], least: int) -> bytes:
    """At least so many bytes, or all there are."""
    taken = b""
    while len(taken) < least and (block := next(blocks, b"")):
        taken += block
    return taken


class _Stream(io.RawIOBase):
    """Blocks as a file that is read once."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        super().__init__()
        self._blocks = blocks
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        while not self._left:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._left = memoryview(block)
        with memoryview(buffer).cast("B") as wanted:
            size = min(len(wanted), len(self._left))
            wanted[:size] = self._left[:size]
        self._left = self._left[size:]
        return size
