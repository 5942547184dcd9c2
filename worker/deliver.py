"""Sending webhooks: one signed POST per attempt, bounded in time and in what is read of the answer."""

import socket
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Self

import httpx2
import structlog

from shared import webhooks
from shared.config import Webhooks
from shared.db import SessionFactory
from shared.egress import AddressRefused, resolve
from shared.webhooks import DueDelivery

log = structlog.get_logger(__name__)

READ_BYTES = 64_000
GONE = 410
ERROR_LENGTH = 300


class Sender:
    def __init__(self, sessions: SessionFactory, settings: Webhooks) -> None:
        self._sessions = sessions
        self._settings = settings

    def send_due(self) -> None:
        """Send whatever is due, until nothing is."""
        while True:
            with self._sessions.begin() as session:
                delivery = webhooks.claim_due(session)
            if delivery is None:
                return
            status, error = self._send(delivery)
            with self._sessions.begin() as session:
                state = webhooks.record_outcome(session, delivery, status=status, error=error, gone=status == GONE)
            log.info(
                "a webhook was sent", webhook_id=webhooks.message_id(delivery.id), type=delivery.type,
                attempt=delivery.attempt, status=status, error=error, state=state,
            )  # fmt: skip

    def _send(self, delivery: DueDelivery) -> tuple[int | None, str | None]:
        """The receiver's status, or None and why there is none."""
        headers = webhooks.sign(delivery, at=datetime.now(UTC))
        try:
            return self._post(delivery, headers), None
        except AddressRefused as error:
            return None, str(error)
        except (OSError, httpx2.HTTPError, httpx2.InvalidURL, UnicodeError) as error:
            return None, f"{type(error).__name__}: {error}"[:ERROR_LENGTH]

    def _post(self, delivery: DueDelivery, headers: dict[str, str]) -> int:
        limit = self._settings.total_timeout_seconds
        parts, address = resolve(delivery.url, allow_private=self._settings.allow_private_addresses)
        dialled = httpx2.URL(delivery.url).copy_with(host=address)
        headers = {**headers, "host": parts.netloc, "content-type": "application/json", "user-agent": "Maskline"}
        timeout = httpx2.Timeout(limit, connect=self._settings.connect_timeout_seconds)
        with _Deadline(limit) as deadline, httpx2.Client(trust_env=False, timeout=timeout) as client:
            extensions = {"sni_hostname": parts.hostname or "", "trace": deadline.watch}  # TLS verifies the name
            with client.stream(
                "POST", dialled, content=delivery.body, headers=headers, extensions=extensions, follow_redirects=False
            ) as answer:
                _read_some(answer)
                return answer.status_code


def _read_some(answer: httpx2.Response) -> None:
    """Let the receiver finish, within bounds. Its status has come; whatever its body does, it does not change that."""
    read = 0
    with suppress(httpx2.HTTPError, OSError):
        for block in answer.iter_raw():  # undecoded, so that a small answer cannot grow in our memory
            read += len(block)
            if read > READ_BYTES:
                return


class _Deadline:
    """Shuts the connection down when the time of a call is over.

    The client's own timeouts begin anew with every byte, so that a receiver that drips could hold the sender for ever.
    """

    def __init__(self, seconds: float) -> None:
        self._ends_at = time.monotonic() + seconds
        self._connection: socket.socket | None = None
        self._timer = threading.Timer(seconds, self._cut)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def watch(self, event: str, details: dict[str, Any]) -> None:
        """The client's `trace` hook, which is how it shows its connection."""
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            self._connection = details["return_value"].get_extra_info("socket")
            if time.monotonic() >= self._ends_at:
                self._cut()

    def _cut(self) -> None:
        if self._connection is not None:
            with suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)
