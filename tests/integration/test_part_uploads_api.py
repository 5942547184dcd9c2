"""Uploads in parts: announced here, sent straight to the storage, resumed, and joined only when all is there."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import httpx2
import pytest
from sqlalchemy import Connection, func, select, text
from starlette.testclient import TestClient

from shared import multipart
from shared.config import Api, Settings
from shared.db import SessionFactory
from shared.models import Upload
from shared.multipart import MEBIBYTE, SMALLEST_PART_BYTES, choose_part_bytes, divide
from shared.storage import Storage
from tests.integration.commits import watched_commits
from tests.integration.conftest import count_rows, make_late, problem, read_only, serve
from worker.housekeeping import Housekeeping

SIZES = {1: 5 * MEBIBYTE, 2: 5 * MEBIBYTE, 3: MEBIBYTE}
CONTENT = {number: bytes([number]) * size for number, size in SIZES.items()}
WANTED = {"filename": "a.mp4", "size": 11 * MEBIBYTE, "content_type": "video/mp4"}


@pytest.fixture
def api(settings: Settings, storage: Storage, api_key: str) -> Iterator[TestClient]:
    """One that asks for parts early."""
    limits = Api(single_upload_bytes=MEBIBYTE, part_bytes=SMALLEST_PART_BYTES)
    with serve(settings.model_copy(update={"api": limits}), key=api_key) as client:
        yield client


@pytest.fixture
def upload(api: TestClient) -> dict[str, Any]:
    """Announced, and nothing more."""
    answer = api.post("/v1/uploads", json=WANTED)
    assert answer.status_code == 201, answer.text
    announced: dict[str, Any] = answer.json()
    return announced


def path(upload: Mapping[str, Any], verb: str = "") -> str:
    return f"/v1/uploads/{upload['id']}{verb}"


def sign(api: TestClient, upload: Mapping[str, Any], *numbers: int) -> list[dict[str, Any]]:
    answer = api.post(path(upload, "/parts"), json={"numbers": numbers})
    assert answer.status_code == 200, answer.text
    links: list[dict[str, Any]] = answer.json()["parts"]
    return links


def send(api: TestClient, upload: Mapping[str, Any], *numbers: int) -> list[dict[str, Any]]:
    """PUT these parts; returns what completing is to name."""
    sent = []
    for link in sign(api, upload, *numbers):
        answer = httpx2.put(link["url"], content=CONTENT[link["number"]])
        assert answer.status_code == 200, answer.text
        sent.append({"number": link["number"], "etag": answer.headers["etag"]})
    return sent


def complete(
    api: TestClient, upload: Mapping[str, Any], parts: Iterable[Mapping[str, Any]] | None = None
) -> httpx2.Response:
    return api.post(path(upload, "/complete"), json={} if parts is None else {"parts": list(parts)})


def stored(storage: Storage, sessions: SessionFactory) -> bytes:
    return storage.read(read_only(sessions, Upload).storage_key, limit_bytes=10**9)


def join_behind_our_back(storage: Storage, sessions: SessionFactory) -> None:
    """As a request does that dies before its commit."""
    row = read_only(sessions, Upload)
    assert row.multipart_id is not None
    parts = storage.multipart.list_parts(row.storage_key, row.multipart_id)
    storage.multipart.complete(row.storage_key, row.multipart_id, parts)


# --- announced ------------------------------------------------------------------------------------------------------


def test_a_large_file_is_announced_in_parts(upload: dict[str, Any]) -> None:
    assert (upload["part_size"], upload["part_count"], upload["parts"]) == (5 * MEBIBYTE, 3, [])
    assert (upload["url"], upload["headers"], upload["completed"]) == (None, {}, False)


def test_a_small_file_stays_one_put(api: TestClient) -> None:
    small = api.post("/v1/uploads", json={**WANTED, "size": MEBIBYTE}).json()
    assert (small["part_size"], small["part_count"], small["parts"]) == (None, None, [])
    assert small["url"]
    problem(api.post(path(small, "/parts"), json={"numbers": [1]}), 422, "invalid_request")


def test_a_terabyte_may_come_and_no_more(api: TestClient) -> None:
    largest = api.post("/v1/uploads", json={**WANTED, "size": 10**12}).json()
    assert largest["part_count"] <= 10_000
    problem(api.post("/v1/uploads", json={**WANTED, "size": 10**12 + 1}), 413, "too_large")
    problem(api.post("/v1/uploads", json={**WANTED, "size": 0}), 422, "invalid_request")


@pytest.mark.parametrize("size", [1, 5 * MEBIBYTE, 50_000 * MEBIBYTE, 50_000 * MEBIBYTE + 1, 10**12, 5 * 10**12])
def test_parts_are_as_storages_want_them(size: int) -> None:
    part_bytes = choose_part_bytes(size, smallest=SMALLEST_PART_BYTES)
    sizes = divide(size, part_bytes)
    assert SMALLEST_PART_BYTES <= part_bytes <= multipart.LARGEST_PART_BYTES
    assert 1 <= len(sizes) <= multipart.MOST_PARTS
    assert sum(sizes) == size
    assert set(sizes[:-1]) <= {part_bytes}
    assert 0 < sizes[-1] <= part_bytes


# --- sent -----------------------------------------------------------------------------------------------------------


def test_parts_become_the_file_in_whatever_order_they_came(
    api: TestClient, upload: dict[str, Any], storage: Storage, sessions: SessionFactory
) -> None:
    sent = send(api, upload, 3, 1, 2)
    answer = complete(api, upload, sent)
    assert answer.status_code == 200, answer.text
    assert (answer.json()["completed"], answer.json()["parts"]) == (True, [])
    assert stored(storage, sessions) == b"".join(CONTENT.values())


def test_the_etag_is_pinned_as_the_storage_gives_it_later(
    api: TestClient, upload: dict[str, Any], storage: Storage, sessions: SessionFactory
) -> None:
    """Not as the answer that joins the parts says, which may be another one."""
    send(api, upload, 1, 2, 3)
    complete(api, upload)
    row = read_only(sessions, Upload)
    assert row.etag == storage.head(row.storage_key).etag


def test_what_the_storage_has_counts_where_nothing_is_named(api: TestClient, upload: dict[str, Any]) -> None:
    send(api, upload, 1, 2, 3)
    assert api.post(path(upload, "/complete")).json()["completed"] is True


def test_submitting_joins_the_parts(api: TestClient, upload: dict[str, Any]) -> None:
    send(api, upload, 1, 2, 3)
    answer = api.post("/v1/jobs", json={"mode": "demo", "source": {"upload_id": upload["id"]}})
    assert answer.status_code == 202, answer.text
    assert api.get(path(upload)).json()["completed"] is True


def test_each_link_says_how_many_bytes_it_takes(api: TestClient, upload: dict[str, Any]) -> None:
    links = sign(api, upload, 3, 1, 1)
    assert [(link["number"], link["size"]) for link in links] == [(3, SIZES[3]), (1, SIZES[1])]


def test_a_part_of_another_size_is_refused_by_the_storage(api: TestClient, upload: dict[str, Any]) -> None:
    """The length is part of what is signed."""
    first, last = sign(api, upload, 1, 3)
    assert httpx2.put(first["url"], content=CONTENT[1][:-1]).status_code == 403
    assert httpx2.put(last["url"], content=CONTENT[3] + b"!").status_code == 403
    assert api.get(path(upload)).json()["parts"] == []


def test_the_parts_that_arrived_are_known_so_that_an_upload_is_resumed(api: TestClient, upload: dict[str, Any]) -> None:
    sent = send(api, upload, 1, 3)
    arrived = api.get(path(upload)).json()["parts"]
    assert [(part["number"], part["size"]) for part in arrived] == [(1, SIZES[1]), (3, SIZES[3])]
    assert [part["etag"] for part in arrived] == [part["etag"].strip('"') for part in sent]
    send(api, upload, 2)
    assert complete(api, upload).status_code == 200


def test_a_part_may_be_sent_again(
    api: TestClient, upload: dict[str, Any], storage: Storage, sessions: SessionFactory
) -> None:
    send(api, upload, 1, 2, 1, 3)
    send(api, upload, 1)
    assert complete(api, upload).status_code == 200
    assert stored(storage, sessions) == b"".join(CONTENT.values())


def test_asking_for_links_keeps_a_slow_upload_open(
    api: TestClient, upload: dict[str, Any], sessions: SessionFactory
) -> None:
    with sessions.begin() as session:
        session.execute(text("UPDATE uploads SET expires_at = now() + interval '10 seconds'"))
    sign(api, upload, 1)
    with sessions() as session:
        left = session.scalars(select(func.extract("epoch", Upload.expires_at - func.now()))).one()
    assert left > 3000


def test_more_parts_than_one_page_of_a_listing_all_count(storage: Storage, api: TestClient) -> None:
    """Pages of this server overlap or leave gaps, depending on how one asks."""
    multipart_id = storage.multipart.begin("many", content_type="a/b")
    with httpx2.Client() as http:
        for number in range(1, 1103):
            link = storage.multipart.link("many", multipart_id, number, size_bytes=1, seconds=60)
            assert http.put(link, content=b"x").status_code == 200
    parts = storage.multipart.list_parts("many", multipart_id)
    assert [part.number for part in parts] == list(range(1, 1103))


# --- twice ----------------------------------------------------------------------------------------------------------


def test_completing_twice_is_the_same_as_once(
    api: TestClient, upload: dict[str, Any], sessions: SessionFactory
) -> None:
    sent = send(api, upload, 1, 2, 3)
    first = complete(api, upload, sent).json()
    row = read_only(sessions, Upload)
    assert complete(api, upload, sent).json() == first
    again = read_only(sessions, Upload)
    assert (again.etag, again.completed_at, again.expires_at) == (row.etag, row.completed_at, row.expires_at)


def test_completing_after_a_death_in_between_is_the_same_as_once(
    api: TestClient, upload: dict[str, Any], storage: Storage, sessions: SessionFactory
) -> None:
    sent = send(api, upload, 1, 2, 3)
    join_behind_our_back(storage, sessions)
    assert complete(api, upload, sent).json()["completed"] is True
    assert read_only(sessions, Upload).etag


def test_looking_after_a_death_in_between_shows_the_upload_complete(
    api: TestClient, upload: dict[str, Any], storage: Storage, sessions: SessionFactory
) -> None:
    send(api, upload, 1, 2, 3)
    join_behind_our_back(storage, sessions)
    assert api.get(path(upload)).json()["completed"] is True


def test_a_commit_that_fails_after_the_parts_were_joined_is_made_up_for(
    api: TestClient, upload: dict[str, Any], sessions: SessionFactory, storage: Storage
) -> None:
    send(api, upload, 1, 2, 3)

    def joined(connection: Connection) -> bool:
        return storage.list_keys("") != []

    with watched_commits(api.app.state.resources.sessions, joined):  # type: ignore[attr-defined]
        assert complete(api, upload).status_code == 503
    assert read_only(sessions, Upload).etag is None
    assert complete(api, upload).json()["completed"] is True


def test_a_complete_upload_takes_no_more_parts(api: TestClient, upload: dict[str, Any]) -> None:
    [link] = sign(api, upload, 1)
    send(api, upload, 1, 2, 3)
    complete(api, upload)
    problem(api.post(path(upload, "/parts"), json={"numbers": [1]}), 409, "invalid_state")
    assert httpx2.put(link["url"], content=CONTENT[1]).status_code == 404


# --- refused --------------------------------------------------------------------------------------------------------


def test_completing_before_all_arrived_says_what_is_missing_and_harms_nothing(
    api: TestClient, upload: dict[str, Any]
) -> None:
    sent = send(api, upload, 1)
    assert "2, 3" in problem(complete(api, upload), 409, "upload_incomplete")["detail"]
    problem(complete(api, upload, sent), 409, "upload_incomplete")
    problem(
        api.post("/v1/jobs", json={"mode": "demo", "source": {"upload_id": upload["id"]}}), 409, "upload_incomplete"
    )
    send(api, upload, 2, 3)
    assert complete(api, upload).status_code == 200


def test_parts_named_wrongly_are_refused_and_nothing_is_harmed(
    api: TestClient, upload: dict[str, Any], subtests: pytest.Subtests
) -> None:
    first, second, third = send(api, upload, 1, 2, 3)
    wrong = {"number": 2, "etag": "0" * 32}
    for parts in ([first, wrong, third], [first, third], [first, second, second, third], [third]):
        with subtests.test(parts=parts):
            problem(complete(api, upload, parts), 409, "upload_incomplete")
    for part in ({"number": 0, "etag": "x"}, {"number": 10_001, "etag": "x"}, {"number": 1, "etag": "\x00"}):
        with subtests.test(part=part):
            problem(complete(api, upload, [part]), 422, "invalid_request")
    assert complete(api, upload, [third, first, second]).status_code == 200


def test_parts_of_another_size_do_not_count_where_a_storage_took_them(
    api: TestClient, upload: dict[str, Any], storage: Storage, sessions: SessionFactory
) -> None:
    send(api, upload, 1, 2)
    row = read_only(sessions, Upload)
    larger = SIZES[3] + 1
    link = storage.multipart.link(row.storage_key, row.multipart_id or "", 3, size_bytes=larger, seconds=60)
    assert httpx2.put(link, content=bytes(larger)).status_code == 200
    assert "3" in problem(complete(api, upload), 409, "upload_incomplete")["detail"]


@pytest.mark.parametrize("numbers", [[], [0], [-1], [4], [10_000], [10_001], [1.0], ["1"], [True], [1] * 101, None])
def test_parts_that_cannot_be_are_refused(api: TestClient, upload: dict[str, Any], numbers: object) -> None:
    problem(api.post(path(upload, "/parts"), json={"numbers": numbers}), 422, "invalid_request")


def test_another_tenant_cannot_complete_what_has_arrived(
    api: TestClient, upload: dict[str, Any], foreign: dict[str, str], sessions: SessionFactory
) -> None:
    parts = send(api, upload, 1, 2, 3)
    problem(api.post(path(upload, "/complete"), json={"parts": parts}, headers=foreign), 404, "not_found")
    wanted = {"mode": "demo", "source": {"upload_id": upload["id"]}}
    problem(api.post("/v1/jobs", json=wanted, headers=foreign), 404, "not_found")
    assert read_only(sessions, Upload).etag is None


# --- lost and given up ----------------------------------------------------------------------------------------------


def test_an_upload_that_the_storage_gave_up_is_lost(api: TestClient, upload: dict[str, Any], storage: Storage) -> None:
    """As lifecycle rules of buckets do after some days."""
    storage.multipart.abort("")
    problem(api.get(path(upload)), 409, "upload_lost")
    problem(complete(api, upload), 409, "upload_lost")


def test_an_upload_that_died_before_the_storage_began_is_lost(
    api: TestClient, upload: dict[str, Any], sessions: SessionFactory
) -> None:
    with sessions.begin() as session:
        session.execute(text("UPDATE uploads SET multipart_id = NULL"))
    problem(api.get(path(upload)), 409, "upload_lost")
    problem(api.post(path(upload, "/parts"), json={"numbers": [1]}), 409, "upload_lost")
    problem(complete(api, upload), 409, "upload_lost")


def test_a_given_up_upload_leaves_nothing(
    api: TestClient, upload: dict[str, Any], housekeeping: Housekeeping, sessions: SessionFactory, storage: Storage
) -> None:
    [link] = sign(api, upload, 2)
    send(api, upload, 1)
    assert api.delete(path(upload)).status_code == 204
    problem(api.get(path(upload)), 404, "not_found")
    problem(api.post(path(upload, "/parts"), json={"numbers": [1]}), 404, "not_found")
    problem(complete(api, upload), 404, "not_found")
    housekeeping.purge_uploads()
    assert (count_rows(sessions, Upload), storage.list_keys("")) == (0, [])
    assert httpx2.put(link["url"], content=CONTENT[2]).status_code == 404


def test_one_given_up_upload_does_not_harm_another(
    api: TestClient, upload: dict[str, Any], housekeeping: Housekeeping, sessions: SessionFactory
) -> None:
    other = api.post("/v1/uploads", json=WANTED).json()
    send(api, other, 1)
    api.delete(path(upload))
    housekeeping.purge_uploads()
    assert str(read_only(sessions, Upload).id) == other["id"]
    send(api, other, 2, 3)
    assert complete(api, other).status_code == 200


def test_what_a_death_right_after_the_storage_began_leaves_is_removed(
    api: TestClient, upload: dict[str, Any], housekeeping: Housekeeping, sessions: SessionFactory, storage: Storage
) -> None:
    """The row is there before, but not yet the storage's name of the upload."""
    [link] = sign(api, upload, 1)
    with sessions.begin() as session:
        session.execute(text("UPDATE uploads SET multipart_id = NULL"))
        make_late(session, "uploads", "expires_at")
    housekeeping.purge_uploads()
    assert httpx2.put(link["url"], content=CONTENT[1]).status_code == 404
