"""Tenants and their API keys. A key is `mk_<id>_<secret><checksum>`; only a hash of its secret is stored."""

import hashlib
import hmac
import secrets
import string
import uuid
import zlib
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, and_, bindparam, func, or_, select
from sqlalchemy.orm import Session

from shared import webhooks
from shared.db import SessionFactory
from shared.models import ApiKey, Tenant, Upload

LOCAL_TENANT = "local"
ALPHABET = string.digits + string.ascii_letters
ID_LENGTH, SECRET_LENGTH, CHECKSUM_LENGTH = 12, 43, 6  # 43 base-62 characters carry 256 bits

_OF_KEY = (  # asked with every request
    select(Tenant.id, Tenant.name, Tenant.keep_results_seconds, Tenant.keep_sources_seconds, ApiKey.secret_sha256)
    .join(ApiKey, ApiKey.tenant_id == Tenant.id)
    .where(
        ApiKey.id == bindparam("key_id"),
        ApiKey.revoked_at.is_(None),
        or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > func.now()),
    )
)
_UPLOAD = {column.key: f"upload_{column.key}" for column in Upload.__table__.c}
_OF_KEY_WITH_UPLOAD = _OF_KEY.add_columns(
    *(Upload.__table__.c[key].label(name) for key, name in _UPLOAD.items())
).outerjoin(
    Upload,
    and_(Upload.id == bindparam("upload_id"), Upload.tenant_id == Tenant.id, Upload.expires_at > func.now()),
)


@dataclass(frozen=True, kw_only=True)
class Caller:
    """The tenant behind a key, as far as its requests go by it."""

    id: uuid.UUID
    name: str
    keep_results_seconds: float | None
    keep_sources_seconds: float | None


@dataclass(frozen=True, kw_only=True)
class LocalAccess:
    api_key: str
    webhook_secret: str


def create_tenant(session: Session, name: str) -> Tenant:
    tenant = Tenant(name=name, webhook_secret=webhooks.create_secret())
    session.add(tenant)
    session.flush()
    return tenant


def create_key(session: Session, tenant_id: uuid.UUID, *, name: str) -> str:
    """A new key, in full: this is the only time that it can be seen."""
    key_id, secret = _draw(ID_LENGTH), _draw(SECRET_LENGTH)
    session.add(ApiKey(id=key_id, tenant_id=tenant_id, name=name, secret_sha256=_digest(secret)))
    session.flush()
    return f"mk_{key_id}_{secret}{_checksum(key_id, secret)}"


def find_caller(session: Session, key: str) -> Caller | None:
    """Whom `key` belongs to; None for a key that is malformed, unknown, wrong, revoked or expired."""
    parsed = _parse(key)
    if parsed is None:
        return None
    key_id, secret = parsed
    return _check(session.execute(_OF_KEY, {"key_id": key_id}).one_or_none(), secret)


def find_caller_and_upload(
    session: Session, key: str, upload_id: uuid.UUID
) -> tuple[Caller, Upload | None] | tuple[None, None]:
    """As `find_caller`, and in the same trip to the database the caller's upload, if there is such a one that a job may
    name."""
    parsed = _parse(key)
    if parsed is None:
        return None, None
    key_id, secret = parsed
    # Past the ORM, which would take longer for the upload than the database.
    row = session.connection().execute(_OF_KEY_WITH_UPLOAD, {"key_id": key_id, "upload_id": upload_id}).one_or_none()
    caller = _check(row, secret)
    if row is None or caller is None:
        return None, None
    if row.upload_id is None:
        return caller, None
    return caller, Upload(**{key: getattr(row, name) for key, name in _UPLOAD.items()})


def ensure_local_tenant(session_factory: SessionFactory, *, api_key: str | None) -> LocalAccess:
    """The tenant of a local stack and a key for it: `api_key` itself while that works, else a new one."""
    with session_factory.begin() as session:
        caller = find_caller(session, api_key) if api_key else None
        if caller is not None and api_key is not None:
            return LocalAccess(api_key=api_key, webhook_secret=session.get_one(Tenant, caller.id).webhook_secret)
        tenant = session.scalar(select(Tenant).where(Tenant.name == LOCAL_TENANT)) or create_tenant(
            session, LOCAL_TENANT
        )
        new_key = create_key(session, tenant.id, name="local stack")
        return LocalAccess(api_key=new_key, webhook_secret=tenant.webhook_secret)


def _check(row: Row[Any] | None, secret: str) -> Caller | None:
    if row is None or not hmac.compare_digest(row.secret_sha256, _digest(secret)):
        return None
    return Caller(
        id=row.id, name=row.name,
        keep_results_seconds=row.keep_results_seconds, keep_sources_seconds=row.keep_sources_seconds,
    )  # fmt: skip


def _parse(key: str) -> tuple[str, str] | None:
    parts = key.split("_")
    if len(parts) != 3 or parts[0] != "mk" or len(parts[1]) != ID_LENGTH:
        return None
    secret, checksum = parts[2][:SECRET_LENGTH], parts[2][SECRET_LENGTH:]
    if not key.isascii() or checksum != _checksum(parts[1], secret):  # a mistyped key costs no query
        return None
    return parts[1], secret


def _draw(length: int) -> str:
    return "".join(secrets.choice(ALPHABET) for _ in range(length))


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def _checksum(key_id: str, secret: str) -> str:
    number = zlib.crc32(f"{key_id}_{secret}".encode())
    digits = ""
    for _ in range(CHECKSUM_LENGTH):
        number, digit = divmod(number, len(ALPHABET))
        digits = ALPHABET[digit] + digits
    return digits
