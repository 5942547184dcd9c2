"""The client of the REST interface: submit, wait, look, download. It knows nothing of the server but its contract.

Every wait is bounded and every call may be repeated: a submission carries an Idempotency-Key, a broken event stream is
taken up where it ended, and a file lies in its place only once its digest is right. Jobs are plain JSON objects.
"""

import contextlib
import json
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

import httpx2

from cli import downloads, uploads
from cli.exchange import ATTEMPTS, BUSY, PAUSE_SECONDS, ApiError, ServiceUnreachable, refusal, repeat
from cli.failures import Failure, Misuse

__all__ = ["ApiError", "Client", "Json", "NotDownloaded", "OnEvent", "ServiceUnreachable", "WaitedLongEnough"]

Json: TypeAlias = dict[str, Any]
OnEvent: TypeAlias = Callable[[str, Json], None]

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 60.0
SILENCE_SECONDS = 10.0
"""An event stream that says nothing for so long is asked anew: the job is looked at, and the wait stays bounded."""
OUTAGE_SECONDS = 60.0
"""How long a service may be away while a job is waited for."""
FORM_BYTES = 32 * 2**20
"""Larger files go straight to the storage, by a signed link."""
LOOK_SECONDS = 1.0
"""Between two looks at a job whose event stream says nothing or breaks."""
TERMINAL = frozenset({"succeeded", "failed", "canceled", "expired"})


class WaitedLongEnough(Failure):
    """The job goes on; only the waiting ended."""


class NotDownloaded(Failure):
    """The result is there, and did not come whole."""


class Client:
    def __init__(self, url: str, api_key: str) -> None:
        parts = _parse_address(url)
        if not api_key.isascii() or not api_key.isprintable():
            raise Misuse("an API key is made of letters, digits and underscores: mk_…")
        self.url = url.rstrip("/")
        timeout = httpx2.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS)
        # A proxy is for reaching the world, not this machine.
        through_proxy = parts.host not in ("127.0.0.1", "::1", "localhost")
        self._http = httpx2.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {api_key}", "User-Agent": "maskline"},
            timeout=timeout,
            trust_env=through_proxy,
        )
        # Signed links carry their own permission; our key is nothing for the storage to see.
        self._storage = httpx2.Client(timeout=timeout, trust_env=through_proxy)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()
        self._storage.close()

    # --- jobs ---------------------------------------------------------------------------------------------------

    def submit_file(
        self,
        path: Path,
        *,
        mode: str,
        options: Mapping[str, Any] | None = None,
        webhook_url: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        priority: int | None = None,
        idempotency_key: str | None = None,
    ) -> Json:
        """The job as accepted. A line that breaks meanwhile is no risk: the same key never makes a second job."""
        wanted = {
            "mode": mode, "options": options, "webhook_url": webhook_url, "metadata": metadata, "priority": priority,
        }  # fmt: skip
        wanted = {name: value for name, value in wanted.items() if value is not None}
        headers = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex}
        if path.stat().st_size > FORM_BYTES:
            wanted["source"] = {"upload_id": uploads.send(path, ask=self._ask, storage=self._storage)}
            return self._read(self._send("POST", "/v1/jobs", json=wanted, headers=headers))
        form = {name: value if isinstance(value, str) else json.dumps(value) for name, value in wanted.items()}
        return self._read(self._send("POST", "/v1/jobs", data=form, file=path, headers=headers))

    def upload(
        self, path: Path, *, begun: str | None, on_announced: Callable[[str], None], on_bytes: uploads.OnBytes
    ) -> str:
        """The id of the upload, whose bytes are all there: see `cli/uploads.py`."""
        return uploads.send(
            path, ask=self._ask, storage=self._storage, begun=begun, on_announced=on_announced, on_bytes=on_bytes
        )

    def submit_upload(self, upload_id: str, *, idempotency_key: str, **wanted: Any) -> Json:
        """The job as accepted; `wanted` are the fields of a submission besides its source."""
        body = {"source": {"upload_id": upload_id}, **wanted}
        return self._read(self._send("POST", "/v1/jobs", json=body, headers={"Idempotency-Key": idempotency_key}))

    def get(self, job_id: str) -> Json:
        return self._read(self._send("GET", f"/v1/jobs/{job_id}"))

    def list_jobs(self, *, limit: int | None = 50, **wanted: str | None) -> Sequence[Json]:
        """The newest jobs, from as many pages as `limit` needs; None is all. `wanted`: state, mode, kind, batch_id,
        created_after."""
        return self._list("/v1/jobs", wanted, limit=sys.maxsize if limit is None else limit)

    def cancel(self, job_id: str) -> Json:
        return self._change(job_id, "cancel")

    def retry(self, job_id: str) -> Json:
        return self._change(job_id, "retry")

    def delete(self, job_id: str) -> None:
        resent: list[str] = []
        try:
            self._send("DELETE", f"/v1/jobs/{job_id}", resent=resent)
        except ApiError as error:
            if error.status != 404 or not resent:  # else: the first try did it, and its answer was lost
                raise

    def wait(self, job_id: str, *, on_event: OnEvent | None = None, timeout_seconds: float = 3600) -> Json:
        """The finished job. `on_event` is told each `state`, `progress` and `attempt` event, once.

        Follows the event stream, and looks at the job between two streams, so that a proxy which lets no stream
        through only makes it slower. Raises WaitedLongEnough, and ServiceUnreachable after OUTAGE_SECONDS without.
        """
        deadline = time.monotonic() + timeout_seconds
        reached_at = time.monotonic()
        last_event_id: str | None = None
        while (left := deadline - time.monotonic()) > 0:
            started = time.monotonic()
            with contextlib.suppress(httpx2.TransportError):  # looked at below, then followed anew
                for event in self._follow(job_id, last_event_id, silence_seconds=min(left, SILENCE_SECONDS)):
                    reached_at = time.monotonic()
                    last_event_id = event.id or last_event_id
                    data: Json = json.loads(event.data)
                    if event.event == "completed":
                        return data
                    if on_event is not None:
                        on_event(event.event, data)
                    if reached_at > deadline:
                        break
            job = self._look(job_id, reached_at=reached_at)
            if job is not None:
                reached_at = time.monotonic()
                if job["state"] in TERMINAL:
                    return job
            time.sleep(max(0.0, min(started + LOOK_SECONDS, deadline) - time.monotonic()))
        raise WaitedLongEnough(f"job {job_id} has not finished within {timeout_seconds:g} s; it goes on")

    # --- batches ------------------------------------------------------------------------------------------------

    def get_batch(self, batch_id: str) -> Json:
        return self._read(self._send("GET", f"/v1/batches/{batch_id}"))

    def submit_batch(self, *, idempotency_key: str, **wanted: Any) -> Json:
        """The batch as accepted; `wanted` are the fields of the request."""
        return self._read(self._send("POST", "/v1/batches", json=wanted, headers={"Idempotency-Key": idempotency_key}))

    def retry_failed(self, batch_id: str) -> Json:
        """The batch, whose failed, canceled and expired jobs run again; twice is the same as once."""
        return self._read(self._send("POST", f"/v1/batches/{batch_id}/retry-failed"))

    def list_batches(self, *, limit: int = 50) -> Sequence[Json]:
        return self._list("/v1/batches", {}, limit=limit)

    # --- results ------------------------------------------------------------------------------------------------

    def result(self, job_id: str) -> Json:
        """The manifest, each file with a signed link."""
        return self._read(self._send("GET", f"/v1/jobs/{job_id}/result"))

    def download(
        self, job_id: str, folder: Path, *, on_bytes: Callable[[int], None] = lambda _count: None
    ) -> Sequence[Path]:
        """The files of a result, then its manifest, in `folder`; each is checked against the manifest's digest.

        `on_bytes` is told of every block, and may raise to give up. Raises NotDownloaded.
        """
        manifest = self.result(job_id)
        paths: list[Path] = []
        for name in [file["name"] for file in manifest["files"]]:
            for attempt in range(1, ATTEMPTS + 1):
                [file] = [each for each in manifest["files"] if each["name"] == name]
                try:
                    paths.append(downloads.fetch(self._storage, file, folder, on_bytes=on_bytes))
                    break
                except downloads.Damaged as error:
                    if attempt == ATTEMPTS:
                        raise NotDownloaded(f"{name} of job {job_id} could not be downloaded: {error}") from error
                    time.sleep(PAUSE_SECONDS * 2**attempt)
                    manifest = self.result(job_id)  # with fresh links: the old ones may have run out
        kept = {key: value for key, value in manifest.items() if key != "links_expire_in_seconds"}
        kept["files"] = [{key: value for key, value in file.items() if key != "url"} for file in manifest["files"]]
        paths.append(downloads.write(folder / "manifest.json", json.dumps(kept, indent=1).encode() + b"\n"))
        return paths

    # --- the service --------------------------------------------------------------------------------------------

    def modes(self) -> Sequence[Json]:
        return self._read_list(self._send("GET", "/v1/modes"))

    def workers(self) -> Sequence[Json]:
        return self._read_list(self._send("GET", "/v1/workers"))

    def readiness(self) -> Json:
        """What `/readyz` says; being unavailable is an answer too."""
        return self._read(self._send("GET", "/readyz", accepted=frozenset({503})))

    def signing_secret(self) -> str:
        return str(self._read(self._send("GET", "/v1/webhooks/secret"))["secret"])

    # --- how --------------------------------------------------------------------------------------------------

    def _list(self, path: str, wanted: Mapping[str, Any], *, limit: int) -> Sequence[Json]:
        items: list[Json] = []
        cursor: str | None = None
        while len(items) < limit:
            asked = {**wanted, "limit": min(limit - len(items), 200), "cursor": cursor}
            params = {name: each for name, each in asked.items() if each is not None}
            page = self._read(self._send("GET", path, params=params))
            items += page["items"]
            cursor = page["next_cursor"]
            if cursor is None:
                break
        return items

    def _change(self, job_id: str, verb: str) -> Json:
        resent: list[str] = []
        try:
            return self._read(self._send("POST", f"/v1/jobs/{job_id}/{verb}", resent=resent))
        except ApiError as error:
            if error.status != 409 or not resent:
                raise
            return self.get(job_id)  # the first try did it, and its answer was lost

    def _ask(self, method: str, path: str, body: Json | None) -> Json:
        return self._read(self._send(method, path, json=body))

    def _look(self, job_id: str, *, reached_at: float) -> Json | None:
        """The job; None while the service is away, which may last OUTAGE_SECONDS from when it was last reached."""
        try:
            return self.get(job_id)
        except (ServiceUnreachable, ApiError) as error:
            away = not isinstance(error, ApiError) or error.status in BUSY
            if not away or time.monotonic() - reached_at > OUTAGE_SECONDS:
                raise
            return None

    def _follow(
        self, job_id: str, last_event_id: str | None, *, silence_seconds: float
    ) -> Iterator[httpx2.ServerSentEvent]:
        headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
        timeout = httpx2.Timeout(silence_seconds, connect=CONNECT_SECONDS)
        with self._http.sse(f"/v1/jobs/{job_id}/events", headers=headers, timeout=timeout) as events:
            yield from events

    def _send(
        self,
        method: str,
        path: str,
        *,
        file: Path | None = None,
        accepted: frozenset[int] = frozenset(),
        resent: list[str] | None = None,
        **request: Any,
    ) -> httpx2.Response:
        """Raises ApiError and ServiceUnreachable. `resent` is filled with why the request was sent again after its
        answer was lost, since then a refusal may mean that it had been carried out."""

        def send() -> httpx2.Response:
            if file is None:
                return self._http.request(method, path, **request)
            with file.open("rb") as body:  # opened anew, since a try may have read half of it
                return self._http.request(method, path, files={"file": (file.name, body)}, **request)

        answer = repeat(send, whom=self.url, accepted=accepted, resent=resent)
        if answer.is_success or answer.status_code in accepted:
            return answer
        raise refusal(answer)

    def _read(self, answer: httpx2.Response) -> Json:
        body = self._parse(answer)
        if not isinstance(body, dict):
            raise ServiceUnreachable(f"{self.url} answers, but not as Maskline does")
        return body

    def _read_list(self, answer: httpx2.Response) -> Sequence[Json]:
        body = self._parse(answer)
        if not isinstance(body, list):
            raise ServiceUnreachable(f"{self.url} answers, but not as Maskline does")
        return body

    def _parse(self, answer: httpx2.Response) -> Any:
        try:
            return answer.json()
        except ValueError as error:
            raise ServiceUnreachable(f"{self.url} answers, but not as Maskline does") from error


def _parse_address(url: str) -> httpx2.URL:
    try:
        parts = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise Misuse(f"{url} is not the address of a service: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.host:
        raise Misuse(f"{url} is not the address of a service; one looks like http://127.0.0.1:8000")
    return parts
