"""Sending webhooks: one signed POST per attempt, bounded in time and in what is read of the answer."""

from contextlib import suppress
from datetime import UTC, datetime

import httpx2
import structlog

from shared import faults, webhooks
from shared.config import Webhooks
from shared.db import SessionFactory
from shared.egress import UNREACHABLE, AddressRefused, open_answer
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
            faults.reach("webhook-answered")
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
        except UNREACHABLE as error:
            return None, f"{type(error).__name__}: {error}"[:ERROR_LENGTH]

    def _post(self, delivery: DueDelivery, headers: dict[str, str]) -> int:
        settings = self._settings
        with open_answer(
            "POST", delivery.url, content=delivery.body, headers={**headers, "content-type": "application/json"},
            allow_private=settings.allow_private_addresses, connect_seconds=settings.connect_timeout_seconds,
            silent_seconds=settings.total_timeout_seconds, total_seconds=settings.total_timeout_seconds,
        ) as answer:  # fmt: skip
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
