"""What a submission is measured against: a FastAPI endpoint that reads a small body, inserts one row and commits.

No key, no look-up, no event, nobody to wake. It has the service's own engine, and so its pool and its timeouts.
"""

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from shared import db
from shared.config import load_settings
from shared.models import Base as Tables
from shared.models import create_id


class Base(DeclarativeBase):
    type_annotation_map = Tables.type_annotation_map


class Row(Base):
    __tablename__ = "bare_rows"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=create_id)
    mode: Mapped[str]
    source: Mapped[dict[str, Any]]


class NewRow(BaseModel):
    mode: str
    source: dict[str, Any]


class Answer(BaseModel):
    id: uuid.UUID
    mode: str


def create_app() -> FastAPI:
    sessions = db.SessionFactory(load_settings().database)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        Base.metadata.create_all(sessions.engine)
        yield
        sessions.dispose()

    app = FastAPI(lifespan=lifespan)

    @app.get("/readyz")
    def get_readiness() -> dict[str, str]:
        return {"status": "ready"}

    @app.post("/v1/jobs", status_code=202)
    def submit(wanted: NewRow) -> Answer:
        row = Row(id=create_id(), mode=wanted.mode, source=wanted.source)
        with sessions.begin() as session:
            session.add(row)
        return Answer(id=row.id, mode=row.mode)

    return app
