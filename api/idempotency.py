"""Idempotency-Key: the same key and body give the same job, however often and however broken the line.

A request takes its key before it does anything and settles it in the transaction that accepts the job. One that
died in between holds the key no longer than `locked_until`.
"""

import uuid
from datetime import timedelta

from sqlalchemy import delete, func, or_, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from api.errors import InvalidRequest
from shared.errors import IdempotencyConflict, IdempotencyMismatch
from shared.models import IdempotencyKey

KEY_LENGTH = 255


def parse_key(header: str) -> str:
    """The key inside the header, which may be a structured-header string or bare. Raises InvalidRequest."""
    key = header.strip()
    if len(key) >= 2 and key[0] == key[-1] == '"':
        key = key[1:-1]
    if not 1 <= len(key) <= KEY_LENGTH or not all("!" <= character <= "~" for character in key):
        raise InvalidRequest(f"Idempotency-Key must be 1 to {KEY_LENGTH} visible ASCII characters")
    return key


def take(
    session: Session,
    tenant_id: uuid.UUID,
    key: str,
    *,
    request_sha256: bytes,
    lock_seconds: float,
    keep_seconds: float,
) -> uuid.UUID | None:
    """None when the key is ours to use now, else the job it already stands for.

    Raises IdempotencyMismatch for another body, IdempotencyConflict while a first request is in flight.
    """
    values = {
        "request_sha256": request_sha256,
        "locked_until": func.now() + timedelta(seconds=lock_seconds),
        "expires_at": func.now() + timedelta(seconds=keep_seconds),
    }
    abandoned = IdempotencyKey.job_id.is_(None) & (IdempotencyKey.locked_until < func.now())
    taken = session.scalar(
        insert(IdempotencyKey)
        .values(tenant_id=tenant_id, key=key, **values)
        .on_conflict_do_update(
            index_elements=["tenant_id", "key"],
            set_={**values, "job_id": None},
            where=or_(abandoned, IdempotencyKey.expires_at < func.now()),
        )
        .returning(IdempotencyKey.key)
    )
    if taken is not None:
        return None
    row = session.scalars(select(IdempotencyKey).filter_by(tenant_id=tenant_id, key=key)).one()
    if row.request_sha256 != request_sha256:
        raise IdempotencyMismatch("this Idempotency-Key was used with another request")
    if row.job_id is None:
        raise IdempotencyConflict("a request with this Idempotency-Key is still in flight")
    return row.job_id


def settle(session: Session, tenant_id: uuid.UUID, key: str, *, job_id: uuid.UUID) -> None:
    session.execute(update(IdempotencyKey).filter_by(tenant_id=tenant_id, key=key).values(job_id=job_id))


def release(session: Session, tenant_id: uuid.UUID, key: str) -> None:
    """A refused request did not use its key."""
    session.execute(delete(IdempotencyKey).filter_by(tenant_id=tenant_id, key=key, job_id=None))
