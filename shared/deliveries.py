"""News on their way: which are due, who sends them, what came of each attempt and when the next one is.

The schedule is that of Standard Webhooks 1.0. An endpoint's row is locked before those of its deliveries.
"""

import random
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import delete, func, insert, select, text, update
from sqlalchemy.orm import Session

from shared import endpoints
from shared.errors import NotFound
from shared.models import DeliveryState, Tenant, WebhookAttempt, WebhookDelivery, WebhookEndpoint

RETRY_SECONDS = (5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400)
JITTER = 0.2
SENDING_SECONDS = 60  # after this a sender that never reported back is taken for dead
RETRY_AFTER_SECONDS = 3600  # the longest that a receiver's Retry-After is obeyed
KEPT_ATTEMPTS = 20  # of each delivery, the newest
ENDED_AT_ONCE = 1000
GONE = 410
BUSY = (429, 503)

# The heads of every lane are found by a loose index scan, so that the cost follows the number of lanes and not the
# number of deliveries that wait behind a receiver which is down.
_DUE = text("""
    WITH RECURSIVE lanes AS (
        (SELECT lane FROM webhook_deliveries WHERE state = 'pending' ORDER BY lane LIMIT 1)
        UNION ALL
        SELECT following.lane FROM lanes CROSS JOIN LATERAL (
            SELECT lane FROM webhook_deliveries WHERE state = 'pending' AND lane > lanes.lane
            ORDER BY lane LIMIT 1) following
    )
    SELECT head.id, head.tenant_id, lanes.lane FROM lanes CROSS JOIN LATERAL (
        SELECT id, tenant_id, next_attempt_at FROM webhook_deliveries
        WHERE state = 'pending' AND webhook_deliveries.lane = lanes.lane AND next_attempt_at <= now()
        ORDER BY next_attempt_at LIMIT :per_lane) head
    WHERE lanes.lane NOT IN (
        SELECT id::text FROM webhook_endpoints WHERE disabled_at IS NOT NULL OR paused_until > now())
    ORDER BY head.next_attempt_at, head.id
""")


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """A delivery that is due, not locked."""

    id: uuid.UUID
    tenant_id: uuid.UUID
    lane: str


@dataclass(frozen=True, kw_only=True)
class DueDelivery:
    """One that a sender took."""

    id: uuid.UUID
    tenant_id: uuid.UUID
    endpoint_id: uuid.UUID | None
    lane: str
    attempt: int
    position: int
    """In the schedule, from 1."""
    url: str
    body: str
    secrets: tuple[str, ...] = field(repr=False)
    type: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of one attempt: the receiver's status, or why there is none."""

    seconds: float = 0.0
    status: int | None = None
    error: str | None = None
    reply: str | None = None
    cut: bool = False
    """The answer was longer than anybody reads."""
    retry_after_seconds: float | None = None

    @property
    def delivered(self) -> bool:
        return self.status is not None and 200 <= self.status < 300

    @property
    def pause_seconds(self) -> float:
        """What the receiver asked for, as far as it is obeyed."""
        if self.status not in BUSY or self.retry_after_seconds is None:
            return 0.0
        return min(self.retry_after_seconds, RETRY_AFTER_SECONDS)


def find_due(session: Session, *, per_lane: int) -> list[Waiting]:
    """What is due, the longest due first, at most `per_lane` of each lane; none of endpoints disabled or pausing."""
    rows = session.execute(_DUE, {"per_lane": per_lane})
    return [Waiting(id=row.id, tenant_id=row.tenant_id, lane=row.lane) for row in rows]


def claim(session: Session, delivery_ids: Sequence[uuid.UUID]) -> list[DueDelivery]:
    """Take those that are still due and that no other sender is just taking, in the order given.

    Another sender gets one that is not reported back in SENDING_SECONDS.
    """
    if not delivery_ids:
        return []
    wanted = (
        select(WebhookDelivery, Tenant.webhook_secret, WebhookEndpoint, func.now())
        .join(Tenant, Tenant.id == WebhookDelivery.tenant_id)
        .outerjoin(WebhookEndpoint, WebhookEndpoint.id == WebhookDelivery.endpoint_id)
        .where(
            WebhookDelivery.id.in_(delivery_ids),
            WebhookDelivery.state == DeliveryState.PENDING,
            WebhookDelivery.next_attempt_at <= func.now(),
        )
        .with_for_update(of=WebhookDelivery, skip_locked=True)
    )
    rows = session.execute(wanted).all()
    for row, _, _, now in rows:
        row.attempt += 1
        row.next_attempt_at = now + timedelta(seconds=SENDING_SECONDS)
    session.flush()
    taken = {row.id: _take(row, secret, endpoint, now=now) for row, secret, endpoint, now in rows}
    return [taken[each] for each in delivery_ids if each in taken]


def record(session: Session, delivery: DueDelivery, outcome: Outcome) -> DeliveryState | None:
    """Note what the receiver answered: 2xx is delivered, anything else is tried again on schedule, until it ends.

    "Gone" ends it at once, and disables an endpoint. Returns None, with nothing noted, when another sender took the
    delivery over meanwhile, or it was deleted with its endpoint.
    """
    endpoint = None
    if delivery.endpoint_id is not None:
        if outcome.delivered:
            endpoints.note_success(session, delivery.endpoint_id)
        else:
            endpoint = endpoints.lock(session, delivery.endpoint_id)
    values: dict[str, Any] = {"last_status": outcome.status, "last_error": outcome.error}
    if outcome.delivered or outcome.status == GONE or delivery.position > len(RETRY_SECONDS):
        state = DeliveryState.DELIVERED if outcome.delivered else DeliveryState.FAILED
        values |= {"state": state, "next_attempt_at": None, "finished_at": func.now()}
    else:
        pause = max(RETRY_SECONDS[delivery.position - 1], outcome.pause_seconds)
        pause *= 1 + JITTER * random.random()  # noqa: S311 - spreads load, hides nothing
        values |= {"next_attempt_at": func.now() + timedelta(seconds=pause)}
    noted = session.scalar(
        update(WebhookDelivery)
        .where(
            WebhookDelivery.id == delivery.id,
            WebhookDelivery.attempt == delivery.attempt,
            WebhookDelivery.state == DeliveryState.PENDING,
        )
        .values(**values)
        .returning(WebhookDelivery.state)
        .execution_options(synchronize_session=False)
    )
    if noted is None:
        return None
    _log(session, delivery, outcome)
    if endpoint is not None and outcome.status == GONE:
        endpoints.disable(session, endpoint, reason="gone")
    elif endpoint is not None:
        endpoints.note_failure(session, endpoint, now=_now(session), pause_seconds=outcome.pause_seconds)
    return noted


def redeliver(session: Session, tenant_id: uuid.UUID, delivery_id: uuid.UUID) -> WebhookDelivery:
    """Send it now, whatever became of it before, under its old id and from the beginning of the schedule.

    Raises NotFound; EndpointDisabled.
    """
    mine = WebhookDelivery.id == delivery_id, WebhookDelivery.tenant_id == tenant_id
    found = session.execute(select(WebhookDelivery.endpoint_id).where(*mine)).first()
    if found is None:
        raise NotFound("there is no such delivery")
    if found.endpoint_id is not None:
        endpoints.open_for_sending(session, tenant_id, found.endpoint_id)
    row = session.scalar(
        update(WebhookDelivery)
        .where(*mine)
        .values(
            state=DeliveryState.PENDING,
            attempts_before=WebhookDelivery.attempt,
            next_attempt_at=func.now(),
            finished_at=None,
        )
        .returning(WebhookDelivery)
    )
    if row is None:
        raise NotFound("there is no such delivery")
    return row


def end_of_disabled(session: Session) -> int:
    """Give up what is due for endpoints that were disabled, some at a time; returns how many that were."""
    due = (
        select(WebhookDelivery.id)
        .join(WebhookEndpoint, WebhookEndpoint.id == WebhookDelivery.endpoint_id)
        .where(
            WebhookEndpoint.disabled_at.is_not(None),
            WebhookDelivery.state == DeliveryState.PENDING,
            WebhookDelivery.next_attempt_at <= func.now(),  # one that is being sent is not
        )
        .limit(ENDED_AT_ONCE)
        .with_for_update(of=WebhookDelivery, skip_locked=True)
    )
    ended = session.scalars(
        update(WebhookDelivery)
        .where(WebhookDelivery.id.in_(due.scalar_subquery()))
        .values(
            state=DeliveryState.FAILED, next_attempt_at=None, finished_at=func.now(),
            last_error="the endpoint was disabled",
        )
        .returning(WebhookDelivery.id)
        .execution_options(synchronize_session=False)
    )  # fmt: skip
    return len(ended.all())


def forget(session: Session, *, keep_seconds: float) -> bool:
    """Drop some of the deliveries that ended long ago; whether there may be more."""
    old = WebhookDelivery.finished_at < func.now() - timedelta(seconds=keep_seconds)
    some = select(WebhookDelivery.id).where(old).order_by(WebhookDelivery.finished_at).limit(ENDED_AT_ONCE)
    dropped = session.scalars(
        delete(WebhookDelivery)
        .where(WebhookDelivery.id.in_(some.with_for_update(skip_locked=True).scalar_subquery()))
        .returning(WebhookDelivery.id)
        .execution_options(synchronize_session=False)
    )
    return len(dropped.all()) == ENDED_AT_ONCE


def _take(row: WebhookDelivery, secret: str, endpoint: WebhookEndpoint | None, *, now: datetime) -> DueDelivery:
    return DueDelivery(
        id=row.id, tenant_id=row.tenant_id, endpoint_id=row.endpoint_id, lane=row.lane, attempt=row.attempt,
        position=row.attempt - row.attempts_before, type=row.type, body=row.body,
        url=row.url if endpoint is None else endpoint.url,
        secrets=(secret,) if endpoint is None else endpoints.live_secrets(endpoint, now=now),
    )  # fmt: skip


def _log(session: Session, delivery: DueDelivery, outcome: Outcome) -> None:
    reply = outcome.reply
    for secret in delivery.secrets:
        reply = reply and reply.replace(secret.removeprefix("whsec_"), "…")  # whatever a receiver may let slip
    row = insert(WebhookAttempt).values(
        delivery_id=delivery.id, number=delivery.attempt, status=outcome.status, error=outcome.error,
        latency_seconds=outcome.seconds, reply=reply,
    )  # fmt: skip
    session.execute(row)
    if delivery.attempt > KEPT_ATTEMPTS:
        old = WebhookAttempt.number <= delivery.attempt - KEPT_ATTEMPTS
        session.execute(delete(WebhookAttempt).where(WebhookAttempt.delivery_id == delivery.id, old))


def _now(session: Session) -> datetime:
    return session.scalars(select(func.now())).one()
