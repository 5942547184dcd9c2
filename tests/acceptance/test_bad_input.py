"""The catalogue of bad input, row by row: each has its one answer, and harms nothing (`docs/bad-input.md`)."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from cli.local.stack import Stack
from tests.acceptance.catalogue.images import list_images, save
from tests.acceptance.catalogue.movies import list_movies
from tests.acceptance.catalogue.rows import Media, Refused
from tests.acceptance.catalogue.talk import talk
from tests.acceptance.catalogue.wire import list_requests
from tests.acceptance.conftest import Service, family, wait_until
from tests.receiver import Receiver


@pytest.fixture(scope="module")
def places() -> Iterator[Path]:
    """Where all processes of the service put what is temporary, and nothing else."""
    folder = Path(tempfile.mkdtemp(prefix="maskline-catalogue-"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def hardened(places: Path) -> Iterator[Service]:
    """A service of its own, with the defaults that production has."""
    home = Path(tempfile.mkdtemp(prefix="maskline-"))
    try:
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("TMPDIR", str(places))
            with Stack(home, durable=False) as stack:
                headers = {"Authorization": f"Bearer {stack.api_key}"}
                with httpx2.Client(base_url=stack.url, headers=headers, timeout=60) as http:
                    yield Service(stack, http, places)
    finally:
        shutil.rmtree(home)


@pytest.fixture(autouse=True)
def _nothing_is_harmed(hardened: Service, places: Path) -> Iterator[None]:
    """The same processes serve on, nothing was a failure of ours, and nothing is left once the jobs are deleted."""
    before, files = list_processes(hardened), set(places.iterdir())
    yield
    assert list_processes(hardened) == before
    for name in before:
        log = (hardened.stack.path / "logs" / f"{name}.log").read_text()
        assert "failed unexpectedly" not in log, name
        assert "Traceback" not in log, name
    delete_all(hardened)
    wait_until(lambda: not hardened.storage().list_keys(""), "objects are left in the storage")
    assert set(places.iterdir()) <= files


SERVERS = {"postgres", "redis", "s3"}


def list_processes(service: Service) -> dict[str, list[int]]:
    """Of the application, each with its children."""
    return {name: family(process.pid or 0) for name, process in service.stack.processes.items() if name not in SERVERS}


def delete_all(service: Service) -> None:
    while jobs := service.http.get("/v1/jobs", params={"limit": 200}).raise_for_status().json()["items"]:
        for job in jobs:
            service.wait_for(job)
            service.http.delete(job["links"]["self"]).raise_for_status()


def check(service: Service, rows: list[Media], subtests: pytest.Subtests) -> None:
    """Send them all, and then look what became of each."""
    sent = [
        (row, service.http.post("/v1/jobs", data={"mode": "demo"}, files={"file": (row.name, row.data)}))
        for row in rows
    ]
    for row, answer in sent:
        with subtests.test(str(row)):
            if isinstance(row.answer, Refused):
                assert (answer.status_code, answer.json()["code"]) == (row.answer.status, row.answer.code)
                continue
            assert answer.status_code == 202, answer.text
            job = service.wait_for(answer.json())
            code = (job["error"] or {}).get("code")
            assert (job["state"], code) == (row.answer.state, row.answer.code), job["error"]
            assert job["attempts"] == 1
            if row.answer.warns:
                assert service.result(job)["warnings"]


def test_every_bad_image_has_its_answer(hardened: Service, subtests: pytest.Subtests) -> None:
    check(hardened, list(list_images()), subtests)


def test_every_bad_recording_has_its_answer(
    hardened: Service, receiver: Receiver, tmp_path: Path, subtests: pytest.Subtests
) -> None:
    check(hardened, list(list_movies(tmp_path, canary=receiver.url)), subtests)
    assert receiver.deliveries == []


def test_every_bad_request_has_its_answer(hardened: Service, subtests: pytest.Subtests) -> None:
    job = hardened.wait_for(hardened.submit(save("PNG")))
    for row in list_requests(hardened.stack.api_key, job_id=job["id"]):
        with subtests.test(str(row)):
            assert talk(hardened.stack.url, row.request) in row.answers
    assert hardened.look(job)["state"] == "succeeded"
