"""News for customers: what is told, to whom, and signed how. A row per event and receiver, in the event's transaction.

Signatures follow Standard Webhooks 1.0. What becomes of the rows is `shared/deliveries.py`.
"""

import json
import secrets
import uuid
from base64 import b64encode
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal
from urllib.parse import urlsplit

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session
from standardwebhooks import Webhook

from shared.contract import describe_batch, describe_job
from shared.models import Batch, DeliveryState, Job, WebhookDelivery, WebhookEndpoint, create_id

EventName = Literal[
    "job.succeeded", "job.failed", "job.canceled", "job.expired", "batch.completed", "webhook.disabled"
]  # fmt: skip
"""What an endpoint may choose from; a ping comes when it is asked for."""
BODY_BYTES = 20_000
LANE_LENGTH = 300  # an index holds it


@dataclass(frozen=True, kw_only=True)
class _Listener:
    id: uuid.UUID
    tenant_id: uuid.UUID
    url: str
    events: Collection[str]


def create_secret() -> str:
    return "whsec_" + b64encode(secrets.token_bytes(32)).decode()


def message_id(delivery_id: uuid.UUID) -> str:
    """The `webhook-id` header: the same on every attempt, so that a receiver can drop what it already has."""
    return f"msg_{delivery_id.hex}"


def sign(delivery_id: uuid.UUID, body: str, *, secrets: Sequence[str], at: datetime) -> dict[str, str]:
    """The three headers of one attempt, with a signature by each secret, of which the receiver needs to know one.

    `at` must be aware; the library takes any zone's clock face for UTC.
    """
    at = at.astimezone(UTC)
    name = message_id(delivery_id)
    return {
        "webhook-id": name,
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": " ".join(Webhook(secret).sign(name, at, body) for secret in secrets),
    }


def enqueue(session: Session, jobs: Sequence[Job]) -> None:
    """Queue the news of these jobs' ends, in the transaction that ends them: for each one's own URL and for every
    endpoint of its tenant that wants them."""
    listening = _find_listeners(session, {job.tenant_id for job in jobs}, {f"job.{job.state}" for job in jobs})
    for job in jobs:
        name = f"job.{job.state}"
        told = _wanting(listening, job.tenant_id, name)
        if job.webhook_url is None and not told:
            continue
        body = _write_body(name, describe_job(job).model_dump(mode="json"), sequence=job.ends)
        _queue(session, job.tenant_id, name, body, own_url=job.webhook_url, listeners=told, job_id=job.id)


def enqueue_batch(session: Session, batch: Batch, totals: dict[str, Any]) -> None:
    """Queue the news of a batch's end, in the transaction that ends its last job."""
    name = "batch.completed"
    told = _find_listeners(session, {batch.tenant_id}, {name})
    if batch.webhook_url is None and not told:
        return
    body = _write_body(name, describe_batch(batch, totals).model_dump(mode="json"))
    _queue(session, batch.tenant_id, name, body, own_url=batch.webhook_url, listeners=told)


def enqueue_disabled(session: Session, endpoint: WebhookEndpoint) -> None:
    """Tell the tenant's other endpoints, in the transaction that disables this one; its URL may hold a password."""
    name = "webhook.disabled"
    told = _find_listeners(session, {endpoint.tenant_id}, {name})
    data = {"id": str(endpoint.id), "description": endpoint.description, "reason": endpoint.disabled_reason}
    _queue(session, endpoint.tenant_id, name, _write_body(name, data), listeners=told)


def enqueue_ping(session: Session, endpoint: WebhookEndpoint) -> WebhookDelivery:
    body = _write_body("ping", {"id": str(endpoint.id)})
    row = _new_delivery(endpoint.tenant_id, "ping", body, url=endpoint.url, endpoint_id=endpoint.id)
    session.add(row)
    session.flush()
    return row


def _find_listeners(session: Session, tenant_ids: Collection[uuid.UUID], names: Collection[str]) -> Sequence[_Listener]:
    """Locked, so that none can go before a row refers to it; one that is going, nobody waits for."""
    wanted = (
        select(WebhookEndpoint.id, WebhookEndpoint.tenant_id, WebhookEndpoint.url, WebhookEndpoint.events)
        .where(
            WebhookEndpoint.tenant_id.in_(tenant_ids),
            WebhookEndpoint.disabled_at.is_(None),
            or_(func.cardinality(WebhookEndpoint.events) == 0, WebhookEndpoint.events.overlap(list(names))),
        )
        .order_by(WebhookEndpoint.id)
        .with_for_update(read=True, key_share=True, skip_locked=True)
    )
    return [_Listener(id=row.id, tenant_id=row.tenant_id, url=row.url, events=row.events)
            for row in session.execute(wanted)]  # fmt: skip


def _wanting(listeners: Sequence[_Listener], tenant_id: uuid.UUID, name: str) -> list[_Listener]:
    return [each for each in listeners if each.tenant_id == tenant_id and (not each.events or name in each.events)]


def _queue(
    session: Session, tenant_id: uuid.UUID, name: str, body: str, *, listeners: Sequence[_Listener],
    own_url: str | None = None, job_id: uuid.UUID | None = None,
) -> None:  # fmt: skip
    if own_url is not None:
        session.add(_new_delivery(tenant_id, name, body, url=own_url, job_id=job_id))
    for each in listeners:
        session.add(_new_delivery(tenant_id, name, body, url=each.url, endpoint_id=each.id, job_id=job_id))


def _new_delivery(
    tenant_id: uuid.UUID, name: str, body: str, *, url: str, endpoint_id: uuid.UUID | None = None,
    job_id: uuid.UUID | None = None,
) -> WebhookDelivery:  # fmt: skip
    lane = f"{tenant_id} {urlsplit(url).netloc.lower()}"[:LANE_LENGTH] if endpoint_id is None else str(endpoint_id)
    return WebhookDelivery(
        id=create_id(), tenant_id=tenant_id, job_id=job_id, endpoint_id=endpoint_id, url=url, lane=lane, type=name,
        body=body, state=DeliveryState.PENDING,
    )  # fmt: skip


def _write_body(name: str, data: dict[str, Any], *, sequence: int | None = None) -> str:
    event: dict[str, Any] = {"type": name, "timestamp": datetime.now(UTC).isoformat(), "data": data}
    if sequence is not None:
        event["sequence"] = sequence
    body = json.dumps(event, separators=(",", ":"))
    if len(body.encode()) > BODY_BYTES:  # only the customer's own metadata is unbounded
        data["metadata"] = {}
        body = json.dumps(event, separators=(",", ":"))
    return body
