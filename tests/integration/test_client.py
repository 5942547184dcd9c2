"""The client against a service that misbehaves: what it sends again, takes up again, refuses to keep."""

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cli import client as client_module
from cli import exchange, uploads
from cli.client import ApiError, Client, ServiceUnreachable, WaitedLongEnough
from cli.failures import Failure, Misuse
from tests.integration.scripted import ScriptedService, event, hang_up, problem, run_scripted, say, stream

JOB = "019a0b52-7c1e-7d0a-9c55-3f1f0a0f4b11"
MASK = b"a mask, for all that the client knows"


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (client_module, exchange, uploads):
        monkeypatch.setattr(module, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(client_module, "LOOK_SECONDS", 0.05)


@pytest.fixture
def service() -> Iterator[ScriptedService]:
    with run_scripted() as running:
        yield running


@pytest.fixture
def client(service: ScriptedService) -> Iterator[Client]:
    with Client(service.url, "mk_test") as opened:
        yield opened


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"light" * 1000)
    return path


def describe(state: str = "queued", **fields: Any) -> dict[str, Any]:
    return {"id": JOB, "state": state, **fields}


def describe_result(service: ScriptedService, **fields: Any) -> dict[str, Any]:
    file = {
        "name": "mask.png",
        "size": len(MASK),
        "sha256": hashlib.sha256(MASK).hexdigest(),
        "url": f"{service.url}/signed/mask.png?signature=abc",
        **fields,
    }
    return {"schema": 1, "job_id": JOB, "files": [file], "links_expire_in_seconds": 900}


# --- sending again --------------------------------------------------------------------------------------------------


def test_a_submission_cut_off_is_sent_again_whole_and_with_the_same_key(
    service: ScriptedService, client: Client, photo: Path
) -> None:
    service.script(hang_up, hang_up, say(202, describe()))

    job = client.submit_file(photo, mode="demo", options={"input_size": 256}, webhook_url="http://127.0.0.1/hook")

    assert job["id"] == JOB
    assert service.paths() == ["POST /v1/jobs"] * 3
    assert len({each.headers["idempotency-key"] for each in service.asked}) == 1
    for each in service.asked:
        assert photo.read_bytes() in each.body
        assert b'{"input_size": 256}' in each.body
        assert b"http://127.0.0.1/hook" in each.body


def test_every_submission_has_a_key_of_its_own(service: ScriptedService, client: Client, photo: Path) -> None:
    service.script(say(202, describe()), say(202, describe()))
    client.submit_file(photo, mode="demo")
    client.submit_file(photo, mode="demo")
    assert len({each.headers["idempotency-key"] for each in service.asked}) == 2


def test_a_service_that_says_later_is_asked_later(service: ScriptedService, client: Client) -> None:
    service.script(say(503, problem("database_unavailable"), retry_after="1"), say(200, describe()))
    began = time.monotonic()
    assert client.get(JOB)["id"] == JOB
    assert 1 <= time.monotonic() - began < 5


def test_a_request_that_is_still_in_flight_is_asked_for_again(
    service: ScriptedService, client: Client, photo: Path
) -> None:
    service.script(hang_up, say(409, problem("idempotency_in_flight"), retry_after="0"), say(202, describe()))
    assert client.submit_file(photo, mode="demo")["id"] == JOB


def test_a_service_that_stays_busy_is_given_up(service: ScriptedService, client: Client) -> None:
    service.script(*[say(503, problem("database_unavailable", "try again"), retry_after="0")] * 9)
    with pytest.raises(ApiError) as caught:
        client.get(JOB)
    assert (caught.value.status, caught.value.code) == (503, "database_unavailable")
    assert len(service.asked) == exchange.ATTEMPTS


def test_a_refusal_is_final_and_keeps_its_code(service: ScriptedService, client: Client, photo: Path) -> None:
    service.script(say(422, problem("invalid_request", "mode: there is no such mode")))
    with pytest.raises(ApiError, match="mode: there is no such mode") as caught:
        client.submit_file(photo, mode="best")
    assert (caught.value.status, caught.value.code) == (422, "invalid_request")
    assert len(service.asked) == 1


def test_a_proxys_error_page_is_a_refusal_too(service: ScriptedService, client: Client) -> None:
    service.script(say(403, "<html>no</html>"))
    with pytest.raises(ApiError) as caught:
        client.get(JOB)
    assert caught.value.code == "http_403"


@pytest.mark.parametrize("body", ["<html>Welcome</html>", "[1, 2]"])
def test_another_programs_answer_is_not_taken_for_the_services(
    service: ScriptedService, client: Client, body: str
) -> None:
    service.script(say(200, body))
    with pytest.raises(ServiceUnreachable, match="not as Maskline does"):
        client.get(JOB)


def test_where_nobody_listens_is_known_soon(service: ScriptedService) -> None:
    with run_scripted() as gone:
        url = gone.url
    began = time.monotonic()
    with Client(url, "mk_test") as client, pytest.raises(ServiceUnreachable, match=f"{url} cannot be reached"):
        client.get(JOB)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://127.0.0.1", "http://", "http://a:b"])
def test_what_is_no_address_is_told_at_once(url: str) -> None:
    with pytest.raises(Misuse, match="not the address of a service"):
        Client(url, "mk_test")


@pytest.mark.parametrize("verb", ["cancel", "retry"])
def test_a_change_whose_answer_was_lost_is_no_conflict(service: ScriptedService, client: Client, verb: str) -> None:
    service.script(hang_up, say(409, problem("invalid_state")), say(200, describe("canceled")))
    assert getattr(client, verb)(JOB)["state"] == "canceled"
    assert service.paths()[-1] == f"GET /v1/jobs/{JOB}"


def test_a_conflict_at_the_first_try_is_one(service: ScriptedService, client: Client) -> None:
    service.script(say(409, problem("invalid_state", "the job has succeeded")))
    with pytest.raises(ApiError, match="the job has succeeded"):
        client.cancel(JOB)


def test_a_deletion_whose_answer_was_lost_is_done(service: ScriptedService, client: Client) -> None:
    service.script(hang_up, say(404, problem("not_found")))
    client.delete(JOB)
    service.script(say(404, problem("not_found")))
    with pytest.raises(ApiError):
        client.delete(JOB)


def test_being_unavailable_is_an_answer_about_readiness(service: ScriptedService, client: Client) -> None:
    service.script(say(503, {"status": "unavailable", "checks": {"database": "cannot be reached"}}))
    assert client.readiness()["status"] == "unavailable"


def test_a_list_is_read_page_by_page_and_no_further_than_asked(service: ScriptedService, client: Client) -> None:
    service.script(
        say(200, {"items": [{"id": "1"}, {"id": "2"}], "next_cursor": "abc"}),
        say(200, {"items": [{"id": "3"}], "next_cursor": "def"}),
    )
    assert [job["id"] for job in client.list_jobs(state="failed", limit=3)] == ["1", "2", "3"]
    assert service.paths() == [
        "GET /v1/jobs?state=failed&limit=3",
        "GET /v1/jobs?state=failed&limit=1&cursor=abc",
    ]


def test_a_large_file_goes_straight_to_the_storage(
    service: ScriptedService, client: Client, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "FORM_BYTES", 100)
    upload = {
        "id": "u1", "url": f"{service.url}/bucket/u1?signature=abc", "headers": {"Content-Type": "image/x"},
        "part_size": None,
    }  # fmt: skip
    service.script(say(201, upload), hang_up, say(200, b""), say(202, describe()))

    client.submit_file(photo, mode="demo")

    assert service.paths() == ["POST /v1/uploads", *["PUT /bucket/u1?signature=abc"] * 2, "POST /v1/jobs"]
    put, submission = service.asked[2:]
    assert put.body == photo.read_bytes()
    assert put.headers["content-length"] == str(photo.stat().st_size)
    assert put.headers["content-type"] == "image/x"
    assert "authorization" not in put.headers
    assert b'"upload_id":"u1"' in submission.body


# --- waiting --------------------------------------------------------------------------------------------------------


def test_a_cut_stream_is_taken_up_where_it_ended(service: ScriptedService, client: Client) -> None:
    told: list[tuple[str, Any]] = []
    service.script(
        stream(event("state", {"state": "queued"}, number=7), event("state", {"state": "running"}, number=8)),
        say(200, describe("running")),
        stream("event: progress\nid: 9\ndata: {half a", then=hang_up),
        say(200, describe("running")),
        stream(
            event("progress", {"stage": "storing"}, number=9), event("completed", describe("succeeded"), number=9)
        ),
    )  # fmt: skip

    job = client.wait(JOB, on_event=lambda kind, data: told.append((kind, data)))

    assert job["state"] == "succeeded"
    assert told == [
        ("state", {"state": "queued"}), ("state", {"state": "running"}), ("progress", {"stage": "storing"}),
    ]  # fmt: skip
    streams = [each for each in service.asked if each.path.endswith("/events")]
    assert [each.headers.get("last-event-id") for each in streams] == [None, "8", "8"]


def test_without_a_stream_the_job_is_looked_at_until_it_ends(service: ScriptedService, client: Client) -> None:
    service.always[f"/v1/jobs/{JOB}/events"] = say(200, "<html>no streams here</html>")
    service.script(say(200, describe("running")), say(200, describe("running")), say(200, describe("failed")))
    assert client.wait(JOB)["state"] == "failed"


def test_a_service_that_restarts_does_not_end_the_wait(service: ScriptedService, client: Client) -> None:
    service.always[f"/v1/jobs/{JOB}/events"] = hang_up
    away = [hang_up, say(503, problem("database_unavailable"), retry_after="0")] * exchange.ATTEMPTS
    service.script(*away, say(200, describe("succeeded")))
    assert client.wait(JOB)["state"] == "succeeded"


def test_a_service_that_stays_away_ends_the_wait(
    service: ScriptedService, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "OUTAGE_SECONDS", 0.3)
    service.script(*[hang_up] * 1000)
    with pytest.raises(ServiceUnreachable):
        client.wait(JOB)


def test_a_job_that_is_not_there_is_not_waited_for(service: ScriptedService, client: Client) -> None:
    service.script(*[say(404, problem("not_found", "there is no such job"))] * 2)
    with pytest.raises(ApiError, match="there is no such job"):
        client.wait(JOB)


def test_a_wait_ends_in_time_however_silent_the_stream(service: ScriptedService, client: Client) -> None:
    service.always[f"/v1/jobs/{JOB}/events"] = stream(then=lambda _: time.sleep(3))
    service.always[f"/v1/jobs/{JOB}"] = say(200, describe("running"))
    began = time.monotonic()
    with pytest.raises(WaitedLongEnough, match="it goes on"):
        client.wait(JOB, timeout_seconds=0.5)
    assert time.monotonic() - began < 2.5


# --- downloading ----------------------------------------------------------------------------------------------------


def test_a_result_is_checked_and_then_in_its_place(service: ScriptedService, client: Client, tmp_path: Path) -> None:
    service.script(say(200, describe_result(service)), say(200, MASK))
    client.download(JOB, tmp_path / "new" / "folder")

    assert (tmp_path / "new" / "folder" / "mask.png").read_bytes() == MASK
    manifest = (tmp_path / "new" / "folder" / "manifest.json").read_text()
    assert '"job_id"' in manifest
    assert "signature" not in manifest  # a link that soon runs out is nothing to keep
    assert "authorization" not in service.asked[-1].headers


def test_a_damaged_file_is_fetched_again_by_a_fresh_link(
    service: ScriptedService, client: Client, tmp_path: Path
) -> None:
    fresh = describe_result(service, url=f"{service.url}/signed/mask.png?signature=fresh")
    service.script(
        say(200, describe_result(service)), say(200, MASK[:-1] + b"!"),
        say(200, fresh), say(403, "the link has run out"),
        say(200, fresh), say(200, MASK),
    )  # fmt: skip
    client.download(JOB, tmp_path)
    assert (tmp_path / "mask.png").read_bytes() == MASK
    assert service.paths()[-1] == "GET /signed/mask.png?signature=fresh"


def test_a_file_that_stays_damaged_leaves_what_was_there(
    service: ScriptedService, client: Client, tmp_path: Path
) -> None:
    (tmp_path / "mask.png").write_bytes(b"of an earlier job")
    service.always[f"/v1/jobs/{JOB}/result"] = say(200, describe_result(service))
    service.always["/signed/mask.png"] = say(200, MASK + b"!")
    with pytest.raises(Failure, match=r"mask\.png .* could not be downloaded"):
        client.download(JOB, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mask.png"]
    assert (tmp_path / "mask.png").read_bytes() == b"of an earlier job"


@pytest.mark.parametrize("name", ["../mask.png", "/tmp/mask.png", "a/b", "..", ""])  # noqa: S108
def test_no_name_leads_out_of_the_folder(service: ScriptedService, client: Client, tmp_path: Path, name: str) -> None:
    service.script(say(200, describe_result(service, name=name)), say(200, MASK))
    with pytest.raises(Failure, match="no plain file name"):
        client.download(JOB, tmp_path / "out")
    assert not (tmp_path / "mask.png").exists()
