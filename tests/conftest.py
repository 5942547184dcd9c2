"""What all tests share: one set of real servers for the run, and a fresh database, bucket and queue for each test."""

import os
import shutil
import signal
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from pydantic import SecretStr
from sqlalchemy import make_url
from sqlalchemy.orm import Session

from cli.local.servers import Servers, run_servers
from shared import db, tenants
from shared.broker import Hints
from shared.config import PREFIX, Broker, Database, Settings, Webhooks
from shared.config import Storage as StorageSettings
from shared.config import Worker as WorkerSettings
from shared.db import SessionFactory
from shared.models import Tenant
from shared.storage import Storage

TEMPLATE = "maskline_template"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=3, help="how often the kill test kills a worker")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The kill test takes its time for every kill."""
    seconds = int(config.getini("timeout")) + 60 * int(config.getoption("--kills"))
    for item in items:
        if "kills" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(seconds))


@pytest.fixture(autouse=True, scope="session")
def _nothing_from_outside() -> None:
    """A developer's own variables must not reach the tests; nor that a shell in the background ignores SIGINT, which
    the commands that are interrupted here would inherit."""
    for variable in [name for name in os.environ if name.startswith(PREFIX)]:
        del os.environ[variable]
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    """PostgreSQL, Redis and S3, as `maskline up` runs them, in a folder that goes with the run."""
    # Not under pytest's own folder: it keeps the last runs, 50 MB each, and closes it to the user PostgreSQL runs as.
    folder = Path(tempfile.mkdtemp(prefix="maskline-"))
    try:
        with run_servers(folder, durable=False) as running:
            yield running
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def migrated_template(servers: Servers) -> str:
    """A migrated database that others are copied from, a copy being far quicker than a migration."""
    _execute(servers, f"CREATE DATABASE {TEMPLATE}")
    db.upgrade(_url(servers, TEMPLATE))
    return TEMPLATE


@pytest.fixture
def database_url(servers: Servers, migrated_template: str) -> Iterator[str]:
    name = f"test_{uuid.uuid4().hex}"
    _execute(servers, f"CREATE DATABASE {name} TEMPLATE {migrated_template}")
    yield _url(servers, name)
    _execute(servers, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def settings(servers: Servers, database_url: str) -> Settings:
    """A short lease, so that tests of lost workers need not be slow."""
    return Settings(
        database=Database(url=database_url, pool_size=20),
        broker=Broker(url=servers.redis.url),
        storage=StorageSettings(
            endpoint_url=servers.s3.url,
            bucket=f"test-{uuid.uuid4().hex}",
            access_key=servers.s3.access_key,
            secret_key=SecretStr(servers.s3.secret_key),
        ),
        worker=WorkerSettings(lease_seconds=3, heartbeat_seconds=0.5),
        webhooks=Webhooks(allow_private_addresses=True),
    )


@pytest.fixture
def sessions(settings: Settings) -> Iterator[SessionFactory]:
    factory = db.SessionFactory(settings.database)
    yield factory
    factory.dispose()


@pytest.fixture
def session(sessions: SessionFactory) -> Iterator[Session]:
    with sessions() as opened:
        yield opened


@pytest.fixture
def storage(settings: Settings) -> Storage:
    opened = Storage.from_settings(settings.storage)
    opened.ensure_bucket()
    return opened


@pytest.fixture
def hints(settings: Settings) -> Iterator[Hints]:
    opened = Hints(settings.broker)
    yield opened
    opened.close()


@pytest.fixture
def tenant(sessions: SessionFactory) -> Tenant:
    with sessions.begin() as session:
        return tenants.create_tenant(session, "tenant under test")


def _url(servers: Servers, database: str) -> str:
    return make_url(servers.postgres.url).set(database=database).render_as_string(hide_password=False)


def _execute(servers: Servers, statement: str) -> None:
    url = make_url(servers.postgres.url).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(statement.encode())
