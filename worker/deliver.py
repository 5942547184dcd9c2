"""Sending webhooks: one signed POST per attempt, bounded in time and in what is read of the answer."""

import time
from datetime import UTC, datetime
from typing import Any

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
        deadline = time.monotonic() + limit
        parts, address = resolve(delivery.url, allow_private=self._settings.allow_private_addresses)
        host = parts.hostname or ""
        dialled = httpx2.URL(delivery.url).copy_with(host=address)
        extensions: dict[str, Any] = {"sni_hostname": host}  # TLS still verifies the name, not the address
        headers = {**headers, "host": parts.netloc, "content-type": "application/json", "user-agent": "Maskline"}
        timeout = httpx2.Timeout(limit, connect=self._settings.connect_timeout_seconds)
        with (
            httpx2.Client(trust_env=False, follow_redirects=False, timeout=timeout) as client,
            client.stream("POST", dialled, content=delivery.body, headers=headers, extensions=extensions) as answer,
        ):
            read = 0
            for block in answer.iter_raw():  # undecoded, so that a small answer cannot grow in our memory
                read += len(block)
                if read > READ_BYTES or time.monotonic() > deadline:
                    break
            return answer.status_code
