"""The event stream of a job: every event once, in order, from wherever the client left off, and then its end."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from starlette.testclient import TestClient

from shared.db import SessionFactory
from shared.models import Job, JobState, create_id
from tests.integration.conftest import BAD_MEDIA, MakeJob, Submit, problem, read_only, wait_until
from tests.integration.workbench import Workbench


@dataclass(frozen=True)
class Event:
    id: str
    type: str
    data: dict[str, Any]


def parse(lines: Iterable[str]) -> Iterator[Event]:
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(": ")
        if line:
            fields[name] = value
        elif "event" in fields:  # else it was a comment that keeps the line open
            yield Event(fields["id"], fields["event"], json.loads(fields["data"]))
            fields = {}


def follow(api: TestClient, path: str, *, after: str | None = None) -> list[Event]:
    """All events until the stream ends by itself."""
    answer = api.get(path, headers={} if after is None else {"Last-Event-ID": after})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    return list(parse(answer.text.split("\n")))


@pytest.fixture
def finished(submit: Submit, workbench: Workbench, sessions: SessionFactory) -> dict[str, str]:
    """The links of a job that has succeeded, and whose segmenting took long enough to tell of."""
    links: dict[str, str] = submit().json()["links"]
    workbench.run(lambda: wait_until(lambda: read_only(sessions, Job).stage == "segmenting"))
    return links


def test_the_events_tell_the_life_of_the_job_in_order(api: TestClient, finished: dict[str, str]) -> None:
    events = follow(api, finished["events"])
    states = [event.data["state"] for event in events if event.type == "state"]
    assert states == ["queued", "running", "succeeded"]
    assert [event.data["outcome"] for event in events if event.type == "attempt"] == ["started", "done"]
    assert [event.data["stage"] for event in events if event.type == "progress"] == ["segmenting"]
    assert [event.type for event in events].index("progress") < len(events) - 3


def test_stages_that_are_over_at_once_are_not_told(api: TestClient, submit: Submit, workbench: Workbench) -> None:
    links = submit().json()["links"]
    workbench.run()
    assert [event.type for event in follow(api, links["events"])] == [
        "state",
        "state",
        "attempt",
        "attempt",
        "state",
        "completed",
    ]


def test_ids_and_times_only_rise(api: TestClient, finished: dict[str, str]) -> None:
    *events, _ = follow(api, finished["events"])
    assert [int(event.id) for event in events] == sorted({int(event.id) for event in events})
    assert [event.data["at"] for event in events] == sorted(event.data["at"] for event in events)


def test_the_last_event_is_the_whole_job(api: TestClient, finished: dict[str, str]) -> None:
    last = follow(api, finished["events"])[-1]
    assert last.type == "completed"
    assert last.data == api.get(finished["self"]).json()


def test_a_client_resumes_after_the_last_event_it_has_seen(api: TestClient, finished: dict[str, str]) -> None:
    everything = follow(api, finished["events"])
    for seen in range(1, len(everything)):
        assert follow(api, finished["events"], after=everything[seen - 1].id) == everything[seen:]


def test_a_client_that_has_seen_it_all_is_only_told_the_end(api: TestClient, finished: dict[str, str]) -> None:
    last = follow(api, finished["events"])[-1]
    assert follow(api, finished["events"], after=last.id) == [last]


def test_events_come_as_they_happen(api: TestClient, submit: Submit, workbench: Workbench) -> None:
    with api.stream("GET", submit().json()["links"]["events"]) as stream:
        events = parse(stream.iter_lines())
        assert next(events).data["state"] == "queued"
        workbench.run()
        assert [event.type for event in events][-1] == "completed"


def test_an_end_without_a_result_is_an_end_too(api: TestClient, job_in: MakeJob) -> None:
    for state in (JobState.FAILED, JobState.CANCELED, JobState.EXPIRED):
        last = follow(api, f"/v1/jobs/{job_in(state).id}/events")[-1]
        assert (last.type, last.data["state"]) == ("completed", state)


def test_a_failure_is_told_with_its_reason(api: TestClient, job_in: MakeJob) -> None:
    events = follow(api, f"/v1/jobs/{job_in(JobState.FAILED).id}/events")
    [failed] = [event for event in events if event.type == "state" and event.data["state"] == "failed"]
    assert failed.data["error"] == BAD_MEDIA.model_dump()


def test_what_cannot_be_followed_is_refused_before_the_stream_begins(
    api: TestClient, finished: dict[str, str], foreign: dict[str, str], subtests: pytest.Subtests
) -> None:
    problem(api.get(f"/v1/jobs/{create_id()}/events"), 404, "not_found")
    problem(api.get(finished["events"], headers=foreign), 404, "not_found")
    problem(api.get("/v1/jobs/1/events"), 422, "invalid_request")
    problem(api.get(finished["events"], headers={"Authorization": "Bearer none"}), 401, "unauthorized")
    for seen in ("last", "-1", "1.5", "", " ", "9" * 19, "٣"):
        with subtests.test(seen=seen):
            headers = {b"Last-Event-ID": seen.encode()}
            problem(api.get(finished["events"], headers=headers), 422, "invalid_request")
