"""What endpoints are handed: resources built at start-up, and the tenant behind the request's API key."""

import uuid
from dataclasses import dataclass
from typing import Annotated, Self

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy.orm import Session

from api.backlog import Backlog
from api.errors import Unauthorized
from shared import tenants
from shared.broker import Hints
from shared.config import Settings
from shared.db import SessionFactory
from shared.models import Upload
from shared.storage import Storage
from shared.tenants import Caller


@dataclass(frozen=True, kw_only=True)
class Resources:
    settings: Settings
    sessions: SessionFactory
    storage: Storage
    hints: Hints
    backlog: Backlog

    @classmethod
    def build(cls, settings: Settings) -> Self:
        sessions = SessionFactory(settings.database)
        return cls(
            settings=settings,
            sessions=sessions,
            storage=Storage.from_settings(settings.storage),
            hints=Hints(settings.broker),
            backlog=Backlog(sessions, limit=settings.jobs.queued_limit),
        )

    def close(self) -> None:
        self.hints.close()
        self.sessions.dispose()


async def get_resources(request: Request) -> Resources:  # or a thread would be woken to look it up
    resources: Resources = request.app.state.resources
    return resources


Built = Annotated[Resources, Depends(get_resources)]

_bearer = HTTPBearer(auto_error=False, description="An API key, `mk_…`")


Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


def get_tenant(resources: Built, credentials: Credentials) -> Caller:
    """Raises Unauthorized. No connection is held from then on, while files move."""
    with resources.sessions.autocommit() as session:
        return find_caller(session, credentials)


def find_caller(session: Session, credentials: Credentials) -> Caller:
    """Raises Unauthorized."""
    return _admit(tenants.find_caller(session, _read_key(credentials)))


def find_caller_and_upload(
    session: Session, credentials: Credentials, upload_id: uuid.UUID
) -> tuple[Caller, Upload | None]:
    """Both by one question to the database. Raises Unauthorized."""
    caller, upload = tenants.find_caller_and_upload(session, _read_key(credentials), upload_id)
    return _admit(caller), upload


def _read_key(credentials: Credentials) -> str:
    if credentials is None:
        raise Unauthorized("send an API key: `Authorization: Bearer mk_…`")
    return credentials.credentials


def _admit(caller: Caller | None) -> Caller:
    if caller is None:
        raise Unauthorized("the API key is not valid")
    return caller


CurrentTenant = Annotated[Caller, Depends(get_tenant)]
