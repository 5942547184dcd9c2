"""The endpoints of a tenant: registered, changed, their secrets rotated, disabled when nobody is there any more.

Whoever adds one or gives one another URL locks the tenant before, so that limits hold.
"""

import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Literal

from sqlalchemy import delete, func, or_, select, update
from sqlalchemy.orm import Session

from shared import webhooks
from shared.errors import EndpointDisabled, EndpointExists, NotFound, TooManyEndpoints
from shared.models import Tenant, WebhookDelivery, WebhookEndpoint

FAILING_SECONDS = 5 * 86400  # without one success, and an endpoint is disabled
FORGOTTEN_AT_ONCE = 1000  # deliveries, each with up to twenty lines of a log
OLD_SECRETS = 3  # that sign along at most, however often a rotation is asked for

Reason = Literal["asked", "gone", "failing"]


def register(
    session: Session, tenant_id: uuid.UUID, *, url: str, events: Sequence[str], description: str | None, most: int
) -> WebhookEndpoint:
    """Raises EndpointExists; TooManyEndpoints when the tenant has `most` already."""
    others = _lock_all(session, tenant_id)
    _check_url(others, url)
    if len(others) >= most:
        raise TooManyEndpoints(f"there are {len(others)} endpoints already; delete one that is not needed")
    row = WebhookEndpoint(
        tenant_id=tenant_id, url=url, events=list(events), description=description,
        secret=webhooks.create_secret(), old_secrets=[],
    )  # fmt: skip
    session.add(row)
    session.flush()
    return row


def find_all(session: Session, tenant_id: uuid.UUID) -> list[WebhookEndpoint]:
    """The newest first."""
    wanted = select(WebhookEndpoint).where(WebhookEndpoint.tenant_id == tenant_id, WebhookEndpoint.deleted_at.is_(None))
    return list(session.scalars(wanted.order_by(WebhookEndpoint.created_at.desc(), WebhookEndpoint.id.desc())))


def find(session: Session, tenant_id: uuid.UUID, endpoint_id: uuid.UUID, *, locked: bool = False) -> WebhookEndpoint:
    """Raises NotFound, for another tenant's too."""
    mine = WebhookEndpoint.id == endpoint_id, WebhookEndpoint.tenant_id == tenant_id
    wanted = select(WebhookEndpoint).where(*mine, WebhookEndpoint.deleted_at.is_(None))
    # Not the stronger lock: news of jobs refer to the row, and their ends do not wait for it.
    row = session.scalar(wanted.with_for_update(key_share=True) if locked else wanted)
    if row is None:
        raise NotFound("there is no such webhook endpoint")
    return row


def lock(session: Session, endpoint_id: uuid.UUID) -> WebhookEndpoint | None:
    """None when it was deleted."""
    wanted = select(WebhookEndpoint).where(WebhookEndpoint.id == endpoint_id, WebhookEndpoint.deleted_at.is_(None))
    return session.scalar(wanted.with_for_update(key_share=True).execution_options(populate_existing=True))


def change(
    session: Session, tenant_id: uuid.UUID, endpoint_id: uuid.UUID, values: Mapping[str, Any], *, disabled: bool | None
) -> WebhookEndpoint:
    """Give it these values of its columns, enable or disable it. Raises NotFound; EndpointExists.

    Enabled, or with another URL, it has a clean record.
    """
    if "url" in values:
        _check_url([each for each in _lock_all(session, tenant_id) if each.id != endpoint_id], values["url"])
    row = find(session, tenant_id, endpoint_id, locked=True)
    if values.get("url", row.url) != row.url or (disabled is False and row.disabled_at is not None):
        row.failing_since = row.paused_until = None
    for name, value in values.items():
        setattr(row, name, value)
    if disabled is False:
        row.disabled_at = row.disabled_reason = None
    elif disabled and row.disabled_at is None:
        row.disabled_at, row.disabled_reason = func.now(), "asked"
    session.flush()
    return row


def remove(session: Session, tenant_id: uuid.UUID, endpoint_id: uuid.UUID) -> None:
    """It is gone for every reader at once, and nothing more is sent to it. Raises NotFound.

    What was ever sent to it may be more than one statement can delete: `forget_deleted` does so in slices.
    """
    row = find(session, tenant_id, endpoint_id, locked=True)
    row.deleted_at = func.now()
    if row.disabled_at is None:
        row.disabled_at, row.disabled_reason = func.now(), "asked"
    session.flush()


def forget_deleted(session: Session) -> bool:
    """Drop some of the deliveries to endpoints that were deleted, or such an endpoint after the last of its own;
    whether there may be more."""
    gone = WebhookEndpoint.deleted_at.is_not(None)
    endpoint_id = session.scalar(select(WebhookEndpoint.id).where(gone).order_by(WebhookEndpoint.id).limit(1))
    if endpoint_id is None:
        return False
    some = select(WebhookDelivery.id).where(WebhookDelivery.endpoint_id == endpoint_id).limit(FORGOTTEN_AT_ONCE)
    dropped = session.scalars(
        delete(WebhookDelivery)
        .where(WebhookDelivery.id.in_(some.scalar_subquery()))
        .returning(WebhookDelivery.id)
        .execution_options(synchronize_session=False)
    )
    if not dropped.all():
        session.execute(delete(WebhookEndpoint).where(WebhookEndpoint.id == endpoint_id))
    return True


def rotate(session: Session, tenant_id: uuid.UUID, endpoint_id: uuid.UUID, *, grace_seconds: float) -> WebhookEndpoint:
    """A new secret; the one before signs along for `grace_seconds`, as do those before it for what is left of theirs.

    So asking twice, because the first answer was lost, leaves no receiver behind. Raises NotFound.
    """
    row = find(session, tenant_id, endpoint_id, locked=True)
    now = session.scalars(select(func.now())).one()
    until = (now + timedelta(seconds=grace_seconds)).isoformat()
    kept = [{"secret": row.secret, "until": until}, *_live(row, now)]
    # The oldest of them is what receivers are most likely to hold; of too many, those between go.
    row.old_secrets = kept if len(kept) <= OLD_SECRETS else [*kept[: OLD_SECRETS - 1], kept[-1]]
    row.secret = webhooks.create_secret()
    session.flush()
    return row


def live_secrets(row: WebhookEndpoint, *, now: datetime) -> tuple[str, ...]:
    """The one it has, and those that sign along after a rotation."""
    return (row.secret, *(str(each["secret"]) for each in _live(row, now)))


def ping(session: Session, tenant_id: uuid.UUID, endpoint_id: uuid.UUID) -> WebhookDelivery:
    """Queue a `ping`. Raises NotFound; EndpointDisabled."""
    return webhooks.enqueue_ping(session, open_for_sending(session, tenant_id, endpoint_id))


def open_for_sending(session: Session, tenant_id: uuid.UUID, endpoint_id: uuid.UUID) -> WebhookEndpoint:
    """Its tenant wants something sent now: a pause that it asked for is over. Raises NotFound; EndpointDisabled."""
    row = find(session, tenant_id, endpoint_id, locked=True)
    if row.disabled_at is not None:
        raise EndpointDisabled("the endpoint is disabled; enable it first")
    row.paused_until = None
    session.flush()
    return row


def note_success(session: Session, endpoint_id: uuid.UUID) -> None:
    """Its record is clean; mostly it was before, and nothing is locked."""
    session.execute(
        update(WebhookEndpoint)
        .where(
            WebhookEndpoint.id == endpoint_id,
            or_(WebhookEndpoint.failing_since.is_not(None), WebhookEndpoint.paused_until.is_not(None)),
        )
        .values(failing_since=None, paused_until=None)
        .execution_options(synchronize_session=False)
    )


def note_failure(session: Session, row: WebhookEndpoint, *, now: datetime, pause_seconds: float) -> None:
    """One that has failed for FAILING_SECONDS is disabled; none of its news are sent for `pause_seconds`. It is locked,
    as for `disable`."""
    row.failing_since = row.failing_since or now
    if pause_seconds:
        row.paused_until = now + timedelta(seconds=pause_seconds)
    session.flush()
    if now - row.failing_since >= timedelta(seconds=FAILING_SECONDS):
        disable(session, row, reason="failing")


def disable(session: Session, row: WebhookEndpoint, *, reason: Reason) -> None:
    """Not by its tenant's wish, which the tenant's other endpoints are told; what waits for it is given up when due."""
    if row.disabled_at is not None:
        return
    row.disabled_at, row.disabled_reason = func.now(), reason
    session.flush()
    webhooks.enqueue_disabled(session, row)


def _lock_all(session: Session, tenant_id: uuid.UUID) -> list[WebhookEndpoint]:
    session.execute(select(Tenant.id).where(Tenant.id == tenant_id).with_for_update(key_share=True))
    return find_all(session, tenant_id)


def _check_url(others: Sequence[WebhookEndpoint], url: str) -> None:
    for each in others:
        if each.url == url:
            raise EndpointExists(f"endpoint {each.id} has this URL; if its secret is lost, rotate it")


def _live(row: WebhookEndpoint, now: datetime) -> list[dict[str, Any]]:
    return [each for each in row.old_secrets if datetime.fromisoformat(each["until"]) > now]
