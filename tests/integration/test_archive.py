"""`maskline archive` and a service that misbehaves or forgets, and the batches of a bucket: real HTTP, and a script."""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import pytest

from cli import client as client_module
from cli import exchange, main, recordings, uploads
from tests.integration.scripted import Answer, ScriptedService, hang_up, problem, run_scripted, say

MASKS = b"masks, for all that the command knows"
RECORDING = b"FLV\x01" + bytes(100)
PREFIX = "s3://bucket/trips/"
BATCH = "019a0b52-7c1e-7d0a-9c55-3f1f0a0f4b12"
TYPED = ("--mode", "demo", "--out", "masks")

Typed: TypeAlias = Callable[..., tuple[int, str, str]]


def describe(job_id: str, state: str, *, name: str = "day.flv", code: str = "", retryable: bool = False) -> Any:
    error = {"code": code, "detail": "it is not well", "retryable": retryable} if code else None
    return {
        "id": job_id, "state": state, "created_at": "2026-01-31T12:00:00Z", "error": error,
        "progress": {"stage": None, "done": 0, "total": None, "frames_per_second": None, "eta_seconds": None},
        "timing": {"frames": 3, "total_seconds": 1.5},
        "source": {"filename": name, "size_bytes": 10, "location": f"{PREFIX}{name}"},
    }  # fmt: skip


def one_after_another(*answers: Answer) -> Answer:
    """The last one from then on."""
    left = list(answers)
    return lambda handler: (left.pop(0) if len(left) > 1 else left[0])(handler)


class Service:
    """A service of one mode, whose jobs are what a test says."""

    def __init__(self, scripted: ScriptedService) -> None:
        self.scripted, self.always = scripted, scripted.always
        self.always["/v1/modes"] = say(200, [{"name": "demo"}])
        upload = {"id": "u1", "size": len(RECORDING), "url": f"{scripted.url}/put", "headers": {}, "part_size": None}
        self.always["/v1/uploads"] = say(201, upload)
        self.always["/v1/uploads/u1"] = say(200, {**upload, "completed": False})
        self.always["/put"] = say(200)
        self.always["/masks.mkv"] = say(200, MASKS)

    def list_jobs(self, *jobs: Any) -> Answer:
        for job in jobs:
            file = {"name": "masks.mkv", "size": len(MASKS), "sha256": hashlib.sha256(MASKS).hexdigest()}
            result = {"job_id": job["id"], "files": [{**file, "url": f"{self.scripted.url}/masks.mkv"}]}
            self.always[f"/v1/jobs/{job['id']}/result"] = say(200, result)
            self.always[f"/v1/jobs/{job['id']}"] = say(200, job)
        return say(200, {"items": list(jobs), "next_cursor": None})

    def accept_jobs(self, *, then: Answer, ids: tuple[str, ...] = ("j1",)) -> None:
        """POST gives a job of the next id, and GET what `then` says."""
        accepted = one_after_another(*(say(202, describe(each, "queued")) for each in ids))

        def answer(handler: BaseHTTPRequestHandler) -> None:
            (accepted if handler.command == "POST" else then)(handler)

        self.always["/v1/jobs"] = answer

    def asked(self, method: str, path: str) -> list[Any]:
        return [
            json.loads(each.body) if each.body.startswith(b"{") else each
            for each in self.scripted.asked
            if (each.method, urlsplit(each.path).path) == (method, path)
        ]


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (client_module, exchange, uploads):
        monkeypatch.setattr(module, "PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(recordings, "LOOK_SECONDS", 0.02)


@pytest.fixture
def service() -> Iterator[Service]:
    with run_scripted() as running:
        yield Service(running)


@pytest.fixture
def archive(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Typed:
    """The command as it is typed, in a folder where `recordings/day.flv` lies."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MASKLINE_URL", service.scripted.url)
    monkeypatch.setenv("MASKLINE_API_KEY", "mk_test")
    Path("recordings").mkdir()
    Path("recordings/day.flv").write_bytes(RECORDING)

    def run(source: str = "recordings") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["maskline", "archive", source, *TYPED])
        with pytest.raises(SystemExit) as ended:
            main.run()
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capsys.readouterr()

    return run


def is_here(name: str) -> bool:
    return Path("masks", name, "masks.mkv").read_bytes() == MASKS and Path("masks", name, "manifest.json").exists()


# --- a service that is not well -------------------------------------------------------------------------------------


def test_trouble_that_passes_costs_nothing(archive: Typed, service: Service) -> None:
    away = [hang_up, say(503, problem("database_unavailable"), retry_after="0")] * exchange.ATTEMPTS
    service.accept_jobs(then=one_after_another(*away, service.list_jobs(describe("j1", "succeeded"))))
    service.always["/put"] = one_after_another(*[hang_up] * (exchange.ATTEMPTS + 1), say(200))
    service.always["/masks.mkv"] = one_after_another(say(200, MASKS[:-1] + b"!"), say(500), say(200, MASKS))
    status, out, _ = archive()
    assert (status, out.splitlines()[1].split()[:3]) == (0, ["day.flv", "succeeded", "3"])
    assert is_here("day.flv")


def test_trouble_that_stays_ends_it_with_its_reason_and_the_next_run_takes_up_the_job(
    archive: Typed, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recordings, "OUTAGE_SECONDS", 0.1)
    service.accept_jobs(then=hang_up)
    status, out, err = archive()
    assert (status, out) == (3, "")
    assert err.splitlines()[-2].endswith("the same command continues from here")
    assert err.splitlines()[-1].startswith(f"maskline: {service.scripted.url} cannot be reached")

    service.accept_jobs(then=service.list_jobs(describe("j1", "succeeded")))
    assert archive()[0] == 0
    assert is_here("day.flv")
    assert len(service.asked("POST", "/v1/jobs")) == 1


def test_a_storage_that_stays_away_ends_it_too_and_the_next_run_continues_the_upload(
    archive: Typed, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recordings, "OUTAGE_SECONDS", 0.1)
    service.always["/put"] = hang_up
    status, _, err = archive()
    assert status == 3
    assert "the storage of the service cannot be reached" in err

    service.always["/put"] = say(200)
    service.accept_jobs(then=service.list_jobs(describe("j1", "succeeded")))
    assert archive()[0] == 0
    assert len(service.asked("POST", "/v1/uploads")) == 1


def test_a_file_that_is_refused_keeps_no_other_back(archive: Typed, service: Service) -> None:
    Path("recordings/huge.flv").write_bytes(RECORDING + b"more")
    good = service.always["/v1/uploads"]

    def announce(handler: BaseHTTPRequestHandler) -> None:
        huge = b"huge.flv" in service.scripted.asked[-1].body
        (say(413, problem("too_large", "a file may have less")) if huge else good)(handler)

    service.always["/v1/uploads"] = announce
    service.accept_jobs(then=service.list_jobs(describe("j1", "succeeded")))
    status, out, _ = archive()
    assert status == 1
    assert is_here("day.flv")
    assert "failed" in out.splitlines()[2]
    assert "too_large: a file may have less" in out.splitlines()[2]


def test_a_result_that_does_not_come_whole_is_a_failure_and_the_next_run_fetches_it(
    archive: Typed, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recordings, "OUTAGE_SECONDS", 0.0)
    service.accept_jobs(then=service.list_jobs(describe("j1", "succeeded")))
    service.always["/masks.mkv"] = say(200, MASKS + b"!")
    status, out, _ = archive()
    assert status == 1
    assert "masks.mkv of job j1 could not be downloaded" in out
    assert list(Path("masks/day.flv").iterdir()) == []

    service.always["/masks.mkv"] = say(200, MASKS)
    assert archive()[0] == 0
    assert is_here("day.flv")


# --- what failed before ---------------------------------------------------------------------------------------------


def test_what_failed_and_may_succeed_is_the_same_job_again(archive: Typed, service: Service) -> None:
    failed = describe("j1", "failed", code="storage_unavailable", retryable=True)
    service.accept_jobs(then=service.list_jobs(failed))
    assert archive()[0] == 1
    service.accept_jobs(then=service.list_jobs(describe("j1", "succeeded")))
    service.always["/v1/jobs/j1"] = say(200, failed)
    service.always["/v1/jobs/j1/retry"] = say(202, describe("j1", "queued"))
    assert archive()[0] == 0
    assert len(service.asked("POST", "/v1/jobs")) == 1


def test_what_failed_for_good_is_another_job_of_the_same_upload(archive: Typed, service: Service) -> None:
    failed = describe("j1", "failed", code="model_changed")
    service.accept_jobs(then=service.list_jobs(failed))
    assert archive()[0] == 1
    service.always["/v1/uploads/u1"] = say(200, {"id": "u1", "size": len(RECORDING), "completed": True})
    service.accept_jobs(ids=("j2",), then=service.list_jobs(describe("j2", "succeeded")))
    assert archive()[0] == 0
    submitted = [each for each in service.scripted.asked if (each.method, each.path) == ("POST", "/v1/jobs")]
    assert [json.loads(each.body)["source"] for each in submitted] == [{"upload_id": "u1"}] * 2
    assert len({each.headers["idempotency-key"] for each in submitted}) == 2
    assert len(service.asked("PUT", "/put")) == 1


# --- a bucket -------------------------------------------------------------------------------------------------------


def accept_batch(service: Service, *jobs: Any, state: str = "completed") -> None:
    service.always["/v1/batches"] = say(202, {"id": BATCH, "state": "running"})
    service.always[f"/v1/batches/{BATCH}"] = say(200, {"id": BATCH, "state": state})
    service.always["/v1/jobs"] = service.list_jobs(*jobs)


def test_a_prefix_is_one_batch_whose_results_lie_as_its_objects_do(archive: Typed, service: Service) -> None:
    accept_batch(
        service, describe("j1", "succeeded"), describe("j2", "succeeded", name="far/night.mkv"),
        describe("j3", "failed", name="notes.txt", code="kind_mismatch"),
    )  # fmt: skip
    status, out, _ = archive("s3://bucket/trips")
    assert status == 0
    assert is_here("day.flv")
    assert is_here("far/night.mkv")
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [
        ["day.flv", "succeeded"], ["far/night.mkv", "succeeded"], ["notes.txt", "not"],
    ]  # fmt: skip
    [wanted] = service.asked("POST", "/v1/batches")
    assert wanted == {"name": PREFIX, "mode": "demo", "options": {}, "prefix": PREFIX, "expect": "recording"}
    assert any(f"batch_id={BATCH}" in each.path for each in service.scripted.asked)


def test_a_second_run_is_of_the_same_batch_and_fetches_nothing_again(archive: Typed, service: Service) -> None:
    jobs = describe("j1", "succeeded"), describe("j3", "failed", name="notes.txt", code="kind_mismatch")
    accept_batch(service, *jobs)
    assert archive(PREFIX)[0] == 0
    status, out, _ = archive(PREFIX)
    assert status == 0
    assert "day.flv" in out
    assert len(service.asked("POST", "/v1/batches")) == 1
    assert len(service.asked("GET", "/masks.mkv")) == 1
    assert service.asked("POST", f"/v1/batches/{BATCH}/retry-failed") == []


def test_what_failed_of_a_batch_is_retried_by_the_next_run(archive: Typed, service: Service) -> None:
    accept_batch(service, describe("j1", "failed", code="storage_unavailable", retryable=True))
    assert archive(PREFIX)[0] == 1
    done = service.list_jobs(describe("j1", "succeeded"))
    service.always[f"/v1/batches/{BATCH}/retry-failed"] = lambda handler: (
        service.always.update({"/v1/jobs": done}),
        say(202, {"id": BATCH, "state": "running"})(handler),
    )[1]
    assert archive(PREFIX)[0] == 0
    assert is_here("day.flv")


def test_jobs_that_a_batch_gets_later_are_seen(archive: Typed, service: Service) -> None:
    first, second = describe("j1", "succeeded"), describe("j2", "succeeded", name="night.flv")
    accept_batch(service)
    service.always["/v1/jobs"] = one_after_another(
        service.list_jobs(), service.list_jobs(first), service.list_jobs(second, first)
    )
    running, completed = (say(200, {"id": BATCH, "state": state}) for state in ("running", "completed"))
    service.always[f"/v1/batches/{BATCH}"] = one_after_another(running, running, running, completed)
    assert archive(PREFIX)[0] == 0
    assert is_here("day.flv")
    assert is_here("night.flv")


def test_jobs_that_were_purged_are_known_by_their_results_and_missed_without(archive: Typed, service: Service) -> None:
    accept_batch(
        service, describe("j1", "succeeded"),
        describe("j2", "failed", name="night.flv", code="worker_lost", retryable=True),
    )  # fmt: skip
    assert archive(PREFIX)[0] == 1
    accept_batch(service)
    status, out, _ = archive(PREFIX)
    assert status == 1
    assert out.splitlines()[1].split()[:3] == ["day.flv", "succeeded", "3"]
    assert "the service does not keep its job any more" in out.splitlines()[2]


def test_a_batch_that_the_service_forgot_is_made_again_unless_all_is_here(archive: Typed, service: Service) -> None:
    accept_batch(service, describe("j1", "succeeded"))
    assert archive(PREFIX)[0] == 0
    service.always[f"/v1/batches/{BATCH}"] = say(404, problem("not_found"))
    assert archive(PREFIX)[0] == 0
    assert len(service.asked("POST", "/v1/batches")) == 1

    Path("masks/day.flv/manifest.json").unlink()
    again = "019a0b52-7c1e-7d0a-9c55-3f1f0a0f4b13"
    service.always["/v1/batches"] = say(202, {"id": again, "state": "running"})
    service.always[f"/v1/batches/{again}"] = say(200, {"id": again, "state": "completed"})
    service.always["/v1/jobs"] = service.list_jobs(describe("j2", "succeeded"))
    assert archive(PREFIX)[0] == 0
    assert json.loads(Path("masks/day.flv/manifest.json").read_text())["job_id"] == "j2"
    keys = {each.headers["idempotency-key"] for each in service.scripted.asked if each.path == "/v1/batches"}
    assert len(keys) == 2


@pytest.mark.parametrize("name", ["../day.flv", "a//day.flv", "/day.flv", ".archive/day.flv", "a/./day.flv"])
def test_no_key_leads_out_of_the_out_folder_or_into_the_journal(archive: Typed, service: Service, name: str) -> None:
    accept_batch(service, describe("j1", "succeeded", name=name), describe("j2", "succeeded"))
    status, out, _ = archive(PREFIX)
    assert status == 1
    assert "cannot be that of a folder below the out folder" in out
    assert {path.name for path in Path("masks").iterdir()} == {".archive", "day.flv"}


def test_a_prefix_without_a_recording_is_told(archive: Typed, service: Service) -> None:
    accept_batch(service, describe("j1", "failed", name="notes.txt", code="kind_mismatch"))
    status, out, err = archive(PREFIX)
    assert (status, out) == (2, "")
    assert err.endswith(f"maskline: {PREFIX} holds no recording; 1 of something else\n")


def test_what_is_no_place_in_a_bucket_is_told(archive: Typed) -> None:
    status, _, err = archive("s3:///trips")
    assert status == 2
    assert "s3:///trips is no place in a bucket" in err
