"""The commands that work on the database itself: migrate, keys create. They need its address alone, no service."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from cli.failures import Failure

if TYPE_CHECKING:
    from shared.config import Database

app = typer.Typer(rich_markup_mode=None)
keys = typer.Typer(rich_markup_mode=None, help="API keys.")


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
    with _open_database() as database:
        from sqlalchemy import select

        from shared import db, tenants
        from shared.models import Tenant

        sessions = db.create_session_factory(database)
        try:
            with sessions.begin() as session:
                found = session.scalar(select(Tenant).where(Tenant.name == tenant))
                owner = found or tenants.create_tenant(session, tenant)
                key = tenants.create_key(session, owner.id, name=name)
        finally:
            sessions.kw["bind"].dispose()
    print(key)


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
