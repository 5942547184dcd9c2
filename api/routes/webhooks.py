"""Webhooks: endpoints that are told of everything, their secrets, what was sent to them and what they answered."""

import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel
from sqlalchemy import Select, select, tuple_
from sqlalchemy.orm import Session

from api import pages
from api.deps import Built, CurrentTenant
from api.errors import describe_problems
from api.schemas import (
    Delivery,
    DeliveryAttempt,
    DeliveryPage,
    Endpoint,
    EndpointChange,
    EndpointWithSecret,
    NewEndpoint,
)
from shared import deliveries, endpoints
from shared.egress import check_url, reach_of_webhooks
from shared.models import Tenant, WebhookAttempt, WebhookDelivery, WebhookEndpoint
from shared.webhooks import message_id

router = APIRouter(prefix="/v1/webhooks", tags=["webhooks"])

HINT_LENGTH = 10  # of a secret: its prefix and four characters

Limit = Annotated[int, Query(ge=1, le=200)]
Cursor = Annotated[str | None, Query(max_length=200)]


class SigningSecret(BaseModel):
    secret: str


@router.get("/secret", responses=describe_problems(401, 503))
def get_signing_secret(resources: Built, tenant: CurrentTenant) -> SigningSecret:
    """What signs the callbacks to the `webhook_url` of a job or batch; endpoints have secrets of their own."""
    with resources.sessions.autocommit() as session:
        return SigningSecret(secret=session.get_one(Tenant, tenant.id).webhook_secret)


@router.post("", status_code=201, responses=describe_problems(401, 409, 422, 503))
def create_endpoint(
    wanted: NewEndpoint, response: Response, resources: Built, tenant: CurrentTenant
) -> EndpointWithSecret:
    """Register a URL, to be told of every job and batch from now on. The secret is shown this once."""
    check_url(wanted.url, reach_of_webhooks(resources.settings.webhooks))
    with resources.sessions.begin() as session:
        row = endpoints.register(
            session, tenant.id, url=wanted.url, events=wanted.events or (), description=wanted.description,
            most=resources.settings.webhooks.endpoints_per_tenant,
        )  # fmt: skip
    response.headers["Location"] = f"/v1/webhooks/{row.id}"
    return _describe_with_secret(row)


@router.get("", responses=describe_problems(401, 503))
def list_endpoints(resources: Built, tenant: CurrentTenant) -> list[Endpoint]:
    """Newest first."""
    with resources.sessions() as session:
        return [_describe(row) for row in endpoints.find_all(session, tenant.id)]


@router.get("/deliveries", responses=describe_problems(401, 422, 503))
def list_deliveries(
    resources: Built, tenant: CurrentTenant, job_id: uuid.UUID | None = None, limit: Limit = 50, cursor: Cursor = None
) -> DeliveryPage:
    """To endpoints and to jobs' own URLs alike, newest first; pass `next_cursor` back as `cursor` for more."""
    gone = select(WebhookEndpoint.id).where(
        WebhookEndpoint.id == WebhookDelivery.endpoint_id, WebhookEndpoint.deleted_at.is_not(None)
    )
    wanted = select(WebhookDelivery).where(WebhookDelivery.tenant_id == tenant.id, ~gone.exists())
    if job_id is not None:
        wanted = wanted.where(WebhookDelivery.job_id == job_id)
    with resources.sessions() as session:
        return _read_page(session, wanted, limit=limit, cursor=cursor)


@router.post(
    "/deliveries/{delivery_id}/redeliver", status_code=202, responses=describe_problems(401, 404, 409, 422, 503)
)
def redeliver(delivery_id: uuid.UUID, resources: Built, tenant: CurrentTenant) -> Delivery:
    """Send it now, whatever became of it. Its `webhook-id` stays: the receiver may have it already."""
    with resources.sessions.begin() as session:
        [delivery] = _describe_deliveries(session, [deliveries.redeliver(session, tenant.id, delivery_id)])
    resources.hints.wake_sender()
    return delivery


@router.get("/{endpoint_id}", responses=describe_problems(401, 404, 422, 503))
def get_endpoint(endpoint_id: uuid.UUID, resources: Built, tenant: CurrentTenant) -> Endpoint:
    with resources.sessions() as session:
        return _describe(endpoints.find(session, tenant.id, endpoint_id))


@router.patch("/{endpoint_id}", responses=describe_problems(401, 404, 409, 422, 503))
def change_endpoint(
    endpoint_id: uuid.UUID, wanted: EndpointChange, resources: Built, tenant: CurrentTenant
) -> Endpoint:
    """Enabling it again, or giving it another URL, clears its record; what still waits for it is then sent."""
    if wanted.url is not None:
        check_url(wanted.url, reach_of_webhooks(resources.settings.webhooks))
    values = wanted.model_dump(exclude_unset=True, exclude={"disabled"})
    if "events" in values:
        values["events"] = list(values["events"] or ())
    with resources.sessions.begin() as session:
        row = endpoints.change(session, tenant.id, endpoint_id, values, disabled=wanted.disabled)
        session.refresh(row)
    resources.hints.wake_sender()
    return _describe(row)


@router.delete("/{endpoint_id}", status_code=204, responses=describe_problems(401, 404, 422, 503))
def delete_endpoint(endpoint_id: uuid.UUID, resources: Built, tenant: CurrentTenant) -> None:
    """With it go its deliveries, those that wait to be sent too."""
    with resources.sessions.begin() as session:
        endpoints.remove(session, tenant.id, endpoint_id)


@router.post("/{endpoint_id}/ping", status_code=202, responses=describe_problems(401, 404, 409, 422, 503))
def ping_endpoint(endpoint_id: uuid.UUID, resources: Built, tenant: CurrentTenant) -> Delivery:
    """Send it a `ping`, whatever events it chose; its deliveries tell what it answered."""
    with resources.sessions.begin() as session:
        row = endpoints.ping(session, tenant.id, endpoint_id)
        session.refresh(row)
        [delivery] = _describe_deliveries(session, [row])
    resources.hints.wake_sender()
    return delivery


@router.post("/{endpoint_id}/rotate-secret", responses=describe_problems(401, 404, 422, 503))
def rotate_secret(endpoint_id: uuid.UUID, resources: Built, tenant: CurrentTenant) -> EndpointWithSecret:
    """A new secret, shown this once. For a while the one before signs along, so that receivers can be changed."""
    grace_seconds = resources.settings.webhooks.secret_grace_seconds
    with resources.sessions.begin() as session:
        row = endpoints.rotate(session, tenant.id, endpoint_id, grace_seconds=grace_seconds)
    return _describe_with_secret(row)


@router.get("/{endpoint_id}/deliveries", responses=describe_problems(401, 404, 422, 503))
def list_deliveries_to_endpoint(
    endpoint_id: uuid.UUID, resources: Built, tenant: CurrentTenant, limit: Limit = 50, cursor: Cursor = None
) -> DeliveryPage:
    """Newest first; pass `next_cursor` back as `cursor` for the page after."""
    with resources.sessions() as session:
        endpoints.find(session, tenant.id, endpoint_id)
        wanted = select(WebhookDelivery).where(WebhookDelivery.endpoint_id == endpoint_id)
        return _read_page(session, wanted, limit=limit, cursor=cursor)


def _read_page(
    session: Session, wanted: Select[tuple[WebhookDelivery]], *, limit: int, cursor: str | None
) -> DeliveryPage:
    if cursor is not None:
        before = tuple_(WebhookDelivery.created_at, WebhookDelivery.id) < pages.read_cursor(cursor)
        wanted = wanted.where(before)
    newest = wanted.order_by(WebhookDelivery.created_at.desc(), WebhookDelivery.id.desc())
    rows = list(session.scalars(newest.limit(limit + 1)))
    return DeliveryPage(
        items=_describe_deliveries(session, rows[:limit]), next_cursor=pages.next_cursor(rows, limit=limit)
    )


def _describe_deliveries(session: Session, rows: Sequence[WebhookDelivery]) -> list[Delivery]:
    wanted = select(WebhookAttempt).where(WebhookAttempt.delivery_id.in_([row.id for row in rows]))
    attempts: dict[uuid.UUID, list[DeliveryAttempt]] = {row.id: [] for row in rows}
    for each in session.scalars(wanted.order_by(WebhookAttempt.number)):
        told = {name: getattr(each, name) for name in DeliveryAttempt.model_fields}
        attempts[each.delivery_id].append(DeliveryAttempt.model_validate(told))
    return [
        Delivery(
            id=row.id, webhook_id=message_id(row.id), type=row.type, endpoint_id=row.endpoint_id, job_id=row.job_id,
            state=row.state, created_at=row.created_at, finished_at=row.finished_at,
            next_attempt_at=row.next_attempt_at, attempts=attempts[row.id],
        )
        for row in rows
    ]  # fmt: skip


def _describe(row: WebhookEndpoint) -> Endpoint:
    return Endpoint.model_validate(_tell(row))


def _describe_with_secret(row: WebhookEndpoint) -> EndpointWithSecret:
    return EndpointWithSecret.model_validate({**_tell(row), "secret": row.secret})


def _tell(row: WebhookEndpoint) -> dict[str, object]:
    untils = [datetime.fromisoformat(each["until"]) for each in row.old_secrets]
    return {
        "id": row.id,
        "url": row.url,
        "description": row.description,
        "events": row.events or None,
        "secret_hint": row.secret[:HINT_LENGTH] + "…",
        "old_secret_until": max((each for each in untils if each > datetime.now(UTC)), default=None),
        "disabled": row.disabled_at is not None,
        "disabled_at": row.disabled_at,
        "disabled_reason": row.disabled_reason,
        "failing_since": row.failing_since,
        "paused_until": row.paused_until,
        "created_at": row.created_at,
    }
