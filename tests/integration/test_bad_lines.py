"""Servers at the end of a line that is slow, breaks off or hangs: the work is done late, or done again, or put off."""

import io
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from sqlalchemy import make_url

from shared import db
from shared.config import Settings
from shared.db import SessionFactory
from shared.models import Job, JobState
from shared.storage import Storage
from tests.integration.conftest import (
    Submit,
    changed,
    make_late,
    nothing_stored,
    problem,
    read_job,
    read_only,
    read_steps,
    serve,
    told,
)
from tests.integration.workbench import Workbench
from tests.line import Line, run_line

OBJECT_BYTES = 100_000


@pytest.fixture
def storage_line(settings: Settings) -> Iterator[Line]:
    with run_line(int(str(settings.storage.endpoint_url).rpartition(":")[2])) as line:
        yield line


@pytest.fixture
def far_storage(settings: Settings, storage: Storage, storage_line: Line) -> Storage:
    """The storage at the end of the line, given up when it has been silent for a moment."""
    url = f"http://127.0.0.1:{storage_line.port}"
    return Storage.from_settings(settings.storage.model_copy(update={"endpoint_url": url, "silent_seconds": 0.5}))


def noise() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


# --- the storage ---------------------------------------------------------------------------------------------------


def test_a_slow_storage_is_waited_for(
    workbench: Workbench, far_storage: Storage, storage_line: Line, sessions: SessionFactory, job: Job
) -> None:
    storage_line.slow_down(bytes_per_second=160_000)
    replace(workbench, storage=far_storage).run()
    assert (read_job(sessions, job).state, told(sessions, "attempt")) == (JobState.SUCCEEDED, ["started", "done"])


def test_an_object_cut_in_the_middle_is_sent_again(
    submit: Submit,
    workbench: Workbench,
    storage: Storage,
    far_storage: Storage,
    storage_line: Line,
    sessions: SessionFactory,
) -> None:
    """The overlay of an image of noise is as large as that."""
    submit(file=noise(), options={"outputs": ["mask", "overlay"]})
    replace(workbench, storage=far_storage).run(lambda: storage_line.break_off(after_bytes=OBJECT_BYTES // 2, times=2))
    assert storage_line.breaks == 2
    job = read_only(sessions, Job)
    assert (job.state, told(sessions, "attempt")) == (JobState.SUCCEEDED, ["started", "done"])
    prefix = str(job.manifest_key).removesuffix("manifest.json")
    assert storage.head(f"{prefix}overlay.png").size_bytes > OBJECT_BYTES


@pytest.mark.parametrize("trouble", ["breaks", "hangs"])
def test_a_job_is_put_off_while_the_storage_is_not_to_be_had_and_nothing_of_it_is_seen(
    workbench: Workbench,
    storage: Storage,
    far_storage: Storage,
    storage_line: Line,
    sessions: SessionFactory,
    job: Job,
    trouble: str,
) -> None:
    def spoil() -> None:
        if trouble == "breaks":
            storage_line.break_off(after_bytes=0, times=100)
        else:
            storage_line.hang()

    replace(workbench, storage=far_storage).run(spoil)
    [step] = read_steps(sessions, job)
    assert (step.state, step.failures, step.error and step.error["code"]) == ("queued", 1, "storage_unavailable")
    assert nothing_stored(storage, job)
    storage_line.mend()
    with sessions.begin() as session:
        make_late(session, "steps", "run_after")
    replace(workbench, storage=far_storage).run()
    assert read_job(sessions, job).state == JobState.SUCCEEDED


# --- the database --------------------------------------------------------------------------------------------------


@pytest.fixture
def database_line(settings: Settings) -> Iterator[Line]:
    with run_line(make_url(settings.database.url).port or 0) as line:
        yield line


@pytest.fixture
def far_database(settings: Settings, database_line: Line, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The database at the end of the line, given up when it has been silent for a moment."""
    monkeypatch.setattr(db, "SILENT_SECONDS", 0.5)
    url = make_url(settings.database.url).set(port=database_line.port).render_as_string(hide_password=False)
    return changed(settings, "database", url=url, statement_timeout_seconds=0.5)


def test_a_database_that_hangs_is_given_up_and_taken_up_again(
    far_database: Settings, storage: Storage, database_line: Line, api_key: str, job: Job
) -> None:
    with serve(far_database, key=api_key) as api:
        assert api.get(f"/v1/jobs/{job.id}").status_code == 200
        database_line.hang()
        for _ in range(2):  # by the connections there are, and by a new one
            problem(api.get(f"/v1/jobs/{job.id}"), 503, "database_unavailable")
        database_line.mend()
        assert api.get(f"/v1/jobs/{job.id}").status_code == 200
