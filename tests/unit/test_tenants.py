"""API keys: what they are made of, and that a mistyped one is told without asking anybody."""

import string
from typing import cast

import pytest
from sqlalchemy.orm import Session

from shared import tenants
from shared.models import ApiKey, create_id

NO_DATABASE = cast("Session", None)


class Rows(list[ApiKey]):
    """As much of a session as a new key needs."""

    add = list.append

    def flush(self) -> None: ...


@pytest.fixture
def rows() -> Rows:
    return Rows()


@pytest.fixture
def key(rows: Rows) -> str:
    return tenants.create_key(cast("Session", rows), create_id(), name="under test")


def test_a_key_is_a_prefix_an_id_and_a_secret_with_its_checksum(key: str) -> None:
    prefix, key_id, rest = key.split("_")
    assert (prefix, len(key_id), len(rest)) == ("mk", 12, 43 + 6)
    assert set(key_id + rest) <= set(string.ascii_letters + string.digits)


def test_only_the_hash_of_the_secret_is_stored(rows: Rows, key: str) -> None:
    [row] = rows
    _, key_id, rest = key.split("_")
    assert (row.id, len(row.secret_sha256)) == (key_id, 32)
    assert rest[:43] not in repr(vars(row))


def test_no_two_keys_are_alike(rows: Rows) -> None:
    made = {tenants.create_key(cast("Session", rows), create_id(), name="n") for _ in range(200)}
    assert len(made) == len({each.split("_")[1] for each in made}) == 200


def test_any_one_wrong_character_is_noticed_without_a_query(key: str) -> None:
    for place in range(len(key)):
        for wrong in ("a", "Z", "7", "_", "é"):
            if key[place] != wrong:
                mistyped = key[:place] + wrong + key[place + 1 :]
                assert tenants.find_caller(NO_DATABASE, mistyped) is None, mistyped


def test_two_characters_in_the_wrong_order_are_noticed_without_a_query(key: str) -> None:
    for place in range(len(key) - 1):
        if key[place] != key[place + 1]:
            mistyped = key[:place] + key[place + 1] + key[place] + key[place + 2 :]
            assert tenants.find_caller(NO_DATABASE, mistyped) is None, mistyped


@pytest.mark.parametrize(
    "text", ["", "mk", "mk_", "mk__", "mk_" + "a" * 12, "mk_" + "a" * 12 + "_", "sk_a_b", "_" * 66, "\x00", "ключ"]
)
def test_what_is_no_key_is_noticed_without_a_query(text: str) -> None:
    assert tenants.find_caller(NO_DATABASE, text) is None
