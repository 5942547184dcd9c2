"""What an operator types beside real servers: migrate, keys, doctor."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest
from sqlalchemy import text

from cli import main
from cli.doctor import examine_database, examine_redis, examine_storage
from cli.local.servers import Servers
from shared import tenants
from shared.config import Settings
from shared.db import SessionFactory
from shared.storage import Storage

Typed: TypeAlias = Callable[..., tuple[int, str]]


@pytest.fixture
def type_in(
    servers: Servers, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Typed:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for name, value in {**servers.environment(), "MASKLINE_DATABASE__URL": database_url}.items():
        monkeypatch.setenv(name, value)

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["maskline", *arguments])
        with pytest.raises(SystemExit) as ended:
            main.run()
        assert isinstance(ended.value.code, int)
        return ended.value.code, capsys.readouterr().out

    return run


def test_a_key_is_shown_once_and_opens_its_tenants_door(type_in: Typed, sessions: SessionFactory) -> None:
    status, out = type_in("keys", "create", "laptop", "--tenant", "acme")
    assert status == 0
    _, second = type_in("keys", "create", "phone", "--tenant", "acme")
    with sessions() as session:
        first_owner, second_owner = (tenants.find_caller(session, key.strip()) for key in (out, second))
        assert first_owner is not None
        assert first_owner.name == "acme"
        assert first_owner == second_owner


def test_how_long_a_tenants_files_are_kept_is_said_and_taken_back(type_in: Typed) -> None:
    type_in("keys", "create", "laptop", "--tenant", "acme")
    assert type_in("tenants", "keep", "acme", "--results", "90d", "--sources", "12h") == (0, "")
    assert type_in("tenants", "list") == (0, "acme\tresults 90d\tsources 12h\n")
    assert type_in("tenants", "keep", "acme", "--results", "default") == (0, "")
    assert type_in("tenants", "list") == (0, "acme\tresults default\tsources 12h\n")


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (("nobody", "--results", "1d"), 1),
        (("acme",), 2),
        (("acme", "--sources", "0d"), 2),
        (("acme", "--sources", "1w"), 2),
    ],
)
def test_what_is_no_rule_for_a_tenants_files_is_refused(
    type_in: Typed, arguments: tuple[str, ...], status: int
) -> None:
    type_in("keys", "create", "laptop", "--tenant", "acme")
    assert type_in("tenants", "keep", *arguments) == (status, "")
    assert type_in("tenants", "list") == (0, "acme\tresults default\tsources default\n")


def test_migrating_again_changes_nothing(type_in: Typed) -> None:
    assert type_in("migrate") == (0, "the schema is up to date\n")
    assert type_in("migrate") == (0, "the schema is up to date\n")


def test_real_servers_are_well(settings: Settings, storage: Storage) -> None:
    assert examine_database(settings).mark == "✓"
    assert examine_redis(settings).mark == "✓"
    assert [found.mark for found in examine_storage(settings)] == ["✓"]


def test_a_bucket_that_is_not_there_is_named(settings: Settings) -> None:
    [found] = examine_storage(settings)
    assert found.mark == "✗"
    assert settings.storage.bucket in found.says


def test_a_bucket_of_sources_that_is_not_there_is_named_with_its_setting(settings: Settings, storage: Storage) -> None:
    sources = settings.storage.model_copy(update={"sources": ("nobodys-bucket/a/", "nobodys-bucket/b/")})
    ours, theirs = examine_storage(settings.model_copy(update={"storage": sources}))
    assert (ours.mark, theirs.mark) == ("✓", "✗")
    assert "'nobodys-bucket' and to MASKLINE_STORAGE__SOURCES" in theirs.says


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("DROP TABLE alembic_version", "has no tables of Maskline yet; run: maskline migrate"),
        ("UPDATE alembic_version SET version_num = 'future'", "is newer than this program; update the program"),
    ],
)
def test_a_schema_of_another_version_is_told_with_what_to_do(
    settings: Settings, sessions: SessionFactory, statement: str, says: str
) -> None:
    with sessions.begin() as session:
        session.execute(text(statement))
    found = examine_database(settings)
    assert found.mark == "✗"
    assert says in found.says
