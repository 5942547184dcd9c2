"""The whole stack of real processes for benchmarks: spoken to over HTTP, with a look into its database."""

import io
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx2
from PIL import Image
from pydantic import SecretStr
from sqlalchemy import select

from cli.local.servers import BUCKET
from cli.local.stack import Stack
from shared import config, db
from shared.config import Settings
from shared.db import SessionFactory
from shared.inference.demo.scenes import draw_scene
from shared.models import Tenant
from shared.tenants import LOCAL_TENANT

WAIT_SECONDS = 120
Seen = TypeVar("Seen")


@dataclass(frozen=True)
class System:
    stack: Stack
    settings: Settings
    sessions: SessionFactory
    http: httpx2.Client
    tenant: Tenant

    def upload(self, *, side: int) -> str:
        """A square PNG of a drawn scene, complete; its id."""
        scene = io.BytesIO()
        Image.fromarray(draw_scene(7, width=side, height=side).image).save(scene, "PNG")
        body = scene.getvalue()
        answer = self.http.post("/v1/uploads", json={"filename": "scene.png", "size": len(body)}).raise_for_status()
        upload = answer.json()
        httpx2.put(upload["url"], content=body, headers=upload["headers"]).raise_for_status()
        self.http.post(f"/v1/uploads/{upload['id']}/complete").raise_for_status()
        return str(upload["id"])

    def submit(self, upload_id: str) -> str:
        wanted = {"source": {"upload_id": upload_id}, "mode": "demo"}
        return str(self.http.post("/v1/jobs", json=wanted).raise_for_status().json()["id"])


@contextmanager
def open_system() -> Iterator[System]:
    """A stack with nothing in it but its tenant, gone when the block ends. It writes as durably as in production."""
    folder = Path(tempfile.mkdtemp(prefix="maskline-"))
    try:
        with Stack(folder) as stack, connect(stack) as system:
            yield system
    finally:
        shutil.rmtree(folder)


@contextmanager
def connect(stack: Stack) -> Iterator[System]:
    settings = _read_settings(stack)
    sessions = db.SessionFactory(settings.database)
    headers = {"Authorization": f"Bearer {stack.api_key}"}
    try:
        with httpx2.Client(base_url=stack.url, headers=headers, timeout=30) as http:
            with sessions() as session:
                tenant = session.scalars(select(Tenant).where(Tenant.name == LOCAL_TENANT)).one()
            yield System(stack, settings, sessions, http, tenant)
    finally:
        sessions.dispose()


def wait_until(seen: Callable[[], Seen], *, otherwise: str, pause_seconds: float = 0.02) -> Seen:
    """What is seen, once it is something."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not (found := seen()):
        assert time.monotonic() < deadline, otherwise
        time.sleep(pause_seconds)
    return found


def _read_settings(stack: Stack) -> Settings:
    given = stack.environment()
    return Settings(
        database=config.Database(url=given["MASKLINE_DATABASE__URL"]),
        broker=config.Broker(url=given["MASKLINE_BROKER__URL"]),
        storage=config.Storage(
            endpoint_url=given["MASKLINE_STORAGE__ENDPOINT_URL"], bucket=BUCKET,
            access_key=given["MASKLINE_STORAGE__ACCESS_KEY"],
            secret_key=SecretStr(given["MASKLINE_STORAGE__SECRET_KEY"]),
        ),
    )  # fmt: skip
