"""Idempotency-Key: the same key and body give the same job or batch, however often and however broken the line.

A request takes its key before it does anything and settles it in the transaction that accepts what it asks for. One
that died in between holds the key no longer than `locked_until`; one that was only slow accepts nothing once another
has taken its key over.
"""

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TypeVar

from sqlalchemy import ColumnElement, delete, func, or_, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from api.deps import Resources
from api.errors import InvalidRequest
from shared.errors import IdempotencyConflict, IdempotencyMismatch
from shared.models import IdempotencyKey
from shared.tenants import Caller

KEY_LENGTH = 255

Answer = TypeVar("Answer")


@dataclass(frozen=True, kw_only=True)
class Hold:
    """A key that one request uses. Its end also tells it from the hold of a request that took the key over."""

    tenant_id: uuid.UUID
    key: str
    locked_until: datetime


def parse_key(header: str) -> str:
    """The key inside the header, which may be a structured-header string or bare. Raises InvalidRequest."""
    key = header.strip()
    if len(key) >= 2 and key[0] == key[-1] == '"':
        key = key[1:-1]
    if not 1 <= len(key) <= KEY_LENGTH or not all("!" <= character <= "~" for character in key):
        raise InvalidRequest(f"Idempotency-Key must be 1 to {KEY_LENGTH} visible ASCII characters")
    return key


def answer_once(
    resources: Resources,
    tenant: Caller,
    key: str | None,
    *,
    digest: Callable[[], bytes],
    extra_seconds: float = 0,
    accept: Callable[[Hold | None], Answer],
    recall: Callable[[Session, uuid.UUID], Answer],
) -> Answer:
    """What `accept` makes, settling the hold it is given; or what an earlier request with the key made, by `recall`.

    `digest` is the SHA-256 of all that was asked for, and `extra_seconds` how much longer than others the request may
    take before it is taken for dead. Raises what they raise, and as `take` does.
    """
    if key is None:
        return accept(None)
    limits = resources.settings.api
    asked = digest()  # before there is a connection to hold: a file takes its time
    with resources.sessions.begin() as session:
        taken = take(
            session, tenant.id, key, request_sha256=asked,
            lock_seconds=limits.idempotency_lock_seconds + extra_seconds,
            keep_seconds=limits.idempotency_keep_seconds,
        )  # fmt: skip
        if not isinstance(taken, Hold):
            return recall(session, taken)
    try:
        return accept(taken)
    except Exception:
        with resources.sessions.begin() as session:
            release(session, taken)
        raise


def take(
    session: Session,
    tenant_id: uuid.UUID,
    key: str,
    *,
    request_sha256: bytes,
    lock_seconds: float,
    keep_seconds: float,
) -> Hold | uuid.UUID:
    """The key, ours to use now, or the job or batch it already stands for.

    Raises IdempotencyMismatch for another body, IdempotencyConflict while a first request is in flight.
    """
    values = {
        "request_sha256": request_sha256,
        "locked_until": func.now() + timedelta(seconds=lock_seconds),
        "expires_at": func.now() + timedelta(seconds=keep_seconds),
    }
    abandoned = _stands_for().is_(None) & (IdempotencyKey.locked_until < func.now())
    taken = session.scalar(
        insert(IdempotencyKey)
        .values(tenant_id=tenant_id, key=key, **values)
        .on_conflict_do_update(
            index_elements=["tenant_id", "key"],
            set_={**values, "job_id": None, "batch_id": None},
            where=or_(abandoned, IdempotencyKey.expires_at < func.now()),
        )
        .returning(IdempotencyKey.locked_until)
    )
    if taken is not None:
        return Hold(tenant_id=tenant_id, key=key, locked_until=taken)
    row = session.scalars(select(IdempotencyKey).filter_by(tenant_id=tenant_id, key=key)).one()
    if row.request_sha256 != request_sha256:
        raise IdempotencyMismatch("this Idempotency-Key was used with another request")
    made = row.job_id or row.batch_id
    if made is None:
        raise IdempotencyConflict("a request with this Idempotency-Key is still in flight")
    return made


def settle(session: Session, hold: Hold, *, job_id: uuid.UUID | None = None, batch_id: uuid.UUID | None = None) -> None:
    """Raises IdempotencyConflict when another request took the key over, whose job or batch it shall be."""
    made = {"job_id": job_id, "batch_id": batch_id}
    settled = update(IdempotencyKey).where(*_is_held(hold)).values(made).returning(IdempotencyKey.key)
    if session.scalar(settled) is None:
        raise IdempotencyConflict("this request took so long that another one with its Idempotency-Key began")


def release(session: Session, hold: Hold) -> None:
    """A refused request did not use its key."""
    session.execute(delete(IdempotencyKey).where(*_is_held(hold)))


def _is_held(hold: Hold) -> tuple[ColumnElement[bool], ...]:
    return (
        IdempotencyKey.tenant_id == hold.tenant_id,
        IdempotencyKey.key == hold.key,
        IdempotencyKey.locked_until == hold.locked_until,
        _stands_for().is_(None),
    )


def _stands_for() -> ColumnElement[uuid.UUID | None]:
    return func.coalesce(IdempotencyKey.job_id, IdempotencyKey.batch_id)
