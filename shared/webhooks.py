"""The outbox of webhooks: what is to be told, signed how, and what became of it. Sending is `worker/deliver.py`.

Signatures and schedule follow Standard Webhooks 1.0.
"""

import json
import random
import secrets
import uuid
from base64 import b64encode
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session
from standardwebhooks import Webhook

from shared.contract import describe_batch, describe_job
from shared.models import Batch, DeliveryState, Job, Tenant, WebhookDelivery

RETRY_SECONDS = (5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400)
JITTER = 0.2
SENDING_SECONDS = 60  # after this a sender that never reported back is taken for dead
BODY_BYTES = 20_000


@dataclass(frozen=True, kw_only=True)
class DueDelivery:
    id: uuid.UUID
    attempt: int
    url: str
    body: str
    secret: str
    type: str


def create_secret() -> str:
    return "whsec_" + b64encode(secrets.token_bytes(32)).decode()


def message_id(delivery_id: uuid.UUID) -> str:
    """The `webhook-id` header: the same on every attempt, so that a receiver can drop what it already has."""
    return f"msg_{delivery_id.hex}"


def sign(delivery: DueDelivery, *, at: datetime) -> dict[str, str]:
    """The three headers of one attempt. `at` must be aware; the library takes any zone's clock face for UTC."""
    at = at.astimezone(UTC)
    name = message_id(delivery.id)
    return {
        "webhook-id": name,
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": Webhook(delivery.secret).sign(name, at, delivery.body),
    }


def enqueue(session: Session, job: Job) -> None:
    """Queue the news of a job's end, in the transaction that ends it."""
    if job.webhook_url is None:
        return
    name = f"job.{job.state}"
    body = _write_body(name, describe_job(job).model_dump(mode="json"))
    session.add(_new_delivery(job.tenant_id, job.webhook_url, name, body, job_id=job.id))


def enqueue_batch(session: Session, batch: Batch, totals: dict[str, Any]) -> None:
    """Queue the news of a batch's end, in the transaction that ends its last job."""
    if batch.webhook_url is None:
        return
    name = "batch.completed"
    body = _write_body(name, describe_batch(batch, totals).model_dump(mode="json"))
    session.add(_new_delivery(batch.tenant_id, batch.webhook_url, name, body))


def claim_due(session: Session) -> DueDelivery | None:
    """Take one delivery that is due, or None. Another sender gets it should this one not report back in time."""
    due = (
        select(WebhookDelivery)
        .where(WebhookDelivery.state == DeliveryState.PENDING, WebhookDelivery.next_attempt_at <= func.now())
        .order_by(WebhookDelivery.next_attempt_at)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    row = session.scalar(due)
    if row is None:
        return None
    row.attempt += 1
    row.next_attempt_at = func.now() + timedelta(seconds=SENDING_SECONDS)
    secret = session.scalars(select(Tenant.webhook_secret).where(Tenant.id == row.tenant_id)).one()
    session.flush()
    return DueDelivery(id=row.id, attempt=row.attempt, url=row.url, body=row.body, secret=secret, type=row.type)


def record_outcome(
    session: Session, delivery: DueDelivery, *, status: int | None, error: str | None, gone: bool = False
) -> DeliveryState | None:
    """Note what the receiver answered: 2xx is delivered, anything else is tried again on schedule, until it ends.

    `gone` ends it at once. Returns None when another sender took the delivery over meanwhile.
    """
    delivered = status is not None and 200 <= status < 300
    retries_left = delivery.attempt <= len(RETRY_SECONDS) and not gone
    values: dict[str, Any] = {"last_status": status, "last_error": error}
    if delivered or not retries_left:
        state = DeliveryState.DELIVERED if delivered else DeliveryState.FAILED
        values |= {"state": state, "next_attempt_at": None, "finished_at": func.now()}
    else:
        pause = RETRY_SECONDS[delivery.attempt - 1] * (1 + JITTER * random.random())  # noqa: S311 - spreads load, hides nothing
        values |= {"next_attempt_at": func.now() + timedelta(seconds=pause)}
    return session.scalar(
        update(WebhookDelivery)
        .where(
            WebhookDelivery.id == delivery.id,
            WebhookDelivery.attempt == delivery.attempt,
            WebhookDelivery.state == DeliveryState.PENDING,
        )
        .values(**values)
        .returning(WebhookDelivery.state)
    )


def _new_delivery(
    tenant_id: uuid.UUID, url: str, name: str, body: str, *, job_id: uuid.UUID | None = None
) -> WebhookDelivery:
    return WebhookDelivery(
        tenant_id=tenant_id, job_id=job_id, url=url, type=name, body=body, state=DeliveryState.PENDING
    )


def _write_body(name: str, data: dict[str, Any]) -> str:
    event = {"type": name, "timestamp": datetime.now(UTC).isoformat(), "data": data}
    body = json.dumps(event, separators=(",", ":"))
    if len(body.encode()) > BODY_BYTES:  # only the customer's own metadata is unbounded
        data["metadata"] = {}
        body = json.dumps(event, separators=(",", ":"))
    return body
