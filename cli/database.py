"""The commands that work on the database itself: migrate, keys, tenants. They need its address alone, no service."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from cli.failures import Failure, Misuse

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from shared.config import Database

app = typer.Typer(rich_markup_mode=None)
keys = typer.Typer(rich_markup_mode=None, help="API keys.")
tenants = typer.Typer(rich_markup_mode=None, help="Tenants, and how long their files are kept.")

UNITS = {"m": 60, "h": 3600, "d": 86400}
DEFAULT = "default"


@app.command(epilog="Example: maskline migrate")
def migrate() -> None:
    """Bring the database's schema up to date.

    It is safe to run twice, and from several machines at once.
    """
    with _open_database() as database:
        from shared import db

        db.upgrade(database.url)
    print("the schema is up to date")


@keys.command(epilog="Example: maskline keys create laptop --tenant acme")
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the key is for.")],
    tenant: Annotated[str, typer.Option(help="Whose key it is; a tenant that is not there yet is made.")] = "local",
) -> None:
    """Create an API key and print it.

    It works on the database itself. This is the only time that the key can be seen.
    """
    with _open_session() as session:
        from sqlalchemy import select

        from shared.models import Tenant
        from shared.tenants import create_key, create_tenant

        found = session.scalar(select(Tenant).where(Tenant.name == tenant))
        owner = found or create_tenant(session, tenant)
        key = create_key(session, owner.id, name=name)
    print(key)


@tenants.command("list", epilog="Example: maskline tenants list")
def list_tenants() -> None:
    """List the tenants and how long what they send and get is kept."""
    with _open_session() as session:
        from sqlalchemy import select

        from shared.models import Tenant

        rows = list(session.scalars(select(Tenant).order_by(Tenant.name)))
    for row in rows:
        results, sources = _say(row.keep_results_seconds), _say(row.keep_sources_seconds)
        print(f"{row.name}\tresults {results}\tsources {sources}")


@tenants.command(epilog="Example: maskline tenants keep acme --results 90d --sources 12h")
def keep(
    name: Annotated[str, typer.Argument(metavar="TENANT")],
    results: Annotated[str | None, typer.Option(metavar="TIME", help="Of a job and its result, after its end.")] = None,
    sources: Annotated[
        str | None, typer.Option(metavar="TIME", help="Of what was uploaded, sent or fetched; never longer than those.")
    ] = None,
) -> None:
    """Say how long the files of a tenant are kept.

    A TIME is like 90m, 12h or 30d, or `default` for what the service's settings say. It holds for jobs that are
    submitted from now on; each of them states when it goes.
    """
    wanted = {"keep_results_seconds": results, "keep_sources_seconds": sources}
    values = {column: _parse_time(told) for column, told in wanted.items() if told is not None}
    if not values:
        raise Misuse("say --results, --sources or both")
    with _open_session() as session:
        from sqlalchemy import update

        from shared.models import Tenant

        changed = session.scalar(update(Tenant).where(Tenant.name == name).values(values).returning(Tenant.id))
    if changed is None:
        raise Failure(f"there is no tenant {name}: `maskline tenants list` shows those there are")


def _parse_time(told: str) -> float | None:
    """Seconds; None for the default."""
    if told == DEFAULT:
        return None
    found = re.fullmatch("([0-9]{1,6})(.)", told)
    if found is None or int(found[1]) == 0 or found[2] not in UNITS:
        raise Misuse(f"{told} is no time: give one like 90m, 12h or 30d, or {DEFAULT}")
    return float(int(found[1]) * UNITS[found[2]])


def _say(seconds: float | None) -> str:
    if seconds is None:
        return DEFAULT
    unit = next((unit for unit in reversed(UNITS) if seconds % UNITS[unit] == 0), None)
    return f"{seconds / UNITS[unit]:.0f}{unit}" if unit else f"{seconds:g}s"


@contextmanager
def _open_session() -> Iterator["Session"]:
    """One transaction, committed at the end of the block."""
    with _open_database() as database:
        from shared import db

        sessions = db.SessionFactory(database)
        try:
            with sessions.begin() as session:
                yield session
        finally:
            sessions.dispose()


@contextmanager
def _open_database() -> Iterator["Database"]:
    """The settings of the database; what goes wrong with it inside the block is told in one line."""
    from alembic.util import CommandError
    from sqlalchemy.exc import SQLAlchemyError

    from cli.access import load_service_settings

    try:
        yield load_service_settings().database
    except (SQLAlchemyError, CommandError) as error:
        why = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        raise Failure(f"the database cannot be used: {why} (maskline doctor tells more)") from error
