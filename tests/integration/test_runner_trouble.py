"""The runner in trouble: bad files, servers that are away, models that cannot run. No job is lost or ends twice."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import Connection, select

from shared import lifecycle
from shared.config import Settings
from shared.db import SessionFactory
from shared.inference.errors import ModelUnavailable, OutOfMemory
from shared.models import Job, JobState, Step, StepState, WebhookDelivery
from shared.storage import Storage
from tests.integration.commits import commit, watched_commits
from tests.integration.conftest import (
    Submit,
    changed,
    count_rows,
    make_late,
    read_job,
    read_only,
    read_steps,
    small_image,
    told,
)
from tests.integration.workbench import Workbench


def failure(sessions: SessionFactory, job: Job) -> dict[str, Any]:
    failed = read_job(sessions, job)
    assert failed.state == JobState.FAILED
    assert failed.error is not None
    return failed.error


def test_what_is_no_image_fails_at_once_and_the_next_job_runs(
    submit: Submit, workbench: Workbench, sessions: SessionFactory
) -> None:
    submit(file=b"this is a text")
    job = read_only(sessions, Job)
    submit()
    workbench.run()
    error = failure(sessions, job)
    assert (error["code"], error["retryable"], read_job(sessions, job).attempts) == ("invalid_media", False, 1)
    with sessions() as session:
        assert set(session.scalars(select(Job.state))) == {JobState.FAILED, JobState.SUCCEEDED}


def test_limits_of_the_worker_hold(
    workbench: Workbench, settings: Settings, sessions: SessionFactory, job: Job
) -> None:
    for limit, code in ({"image_pixels": 100}, "media_limit"), ({"source_bytes": 100}, "source_too_large"):
        narrow = changed(settings, "worker", **limit)
        replace(workbench, settings=narrow).run()
        assert failure(sessions, job)["code"] == code
        with sessions.begin() as session:
            lifecycle.retry(session, job.id)


def test_a_source_that_was_replaced_is_not_processed(
    workbench: Workbench, storage: Storage, sessions: SessionFactory, job: Job
) -> None:
    storage.put(job.source["key"], small_image(width=64), content_type="image/png")
    assert workbench.run().asked == []
    assert failure(sessions, job)["code"] == "source_changed"


def test_a_source_that_is_gone_is_missing(
    workbench: Workbench, storage: Storage, sessions: SessionFactory, job: Job
) -> None:
    storage.delete_prefix(job.source["key"])
    workbench.run()
    assert failure(sessions, job)["code"] == "source_missing"


def test_a_storage_that_is_away_is_tried_again_after_a_pause(
    workbench: Workbench, settings: Settings, sessions: SessionFactory, closed_port: int, job: Job
) -> None:
    nowhere = settings.storage.model_copy(update={"endpoint_url": f"http://127.0.0.1:{closed_port}"})
    replace(workbench, storage=Storage.from_settings(nowhere)).run()
    [step] = read_steps(sessions, job)
    assert (step.state, step.failures, step.error and step.error["code"]) == ("queued", 1, "storage_unavailable")
    assert read_job(sessions, job).state == JobState.RUNNING
    assert workbench.run().asked == [], "the pause was not kept"
    with sessions.begin() as session:
        make_late(session, "steps", "run_after")
    workbench.run()
    assert (read_job(sessions, job).state, read_job(sessions, job).attempts) == (JobState.SUCCEEDED, 2)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ModelUnavailable("the weights of demo are missing; run: maskline models pull demo"), "model_unavailable"),
        (OutOfMemory("choose a smaller input_size"), "out_of_memory"),
    ],
)
def test_what_a_model_cannot_do_fails_the_job_with_its_reason_and_the_worker_lives_on(
    submit: Submit, workbench: Workbench, sessions: SessionFactory, job: Job, error: Exception, code: str
) -> None:
    errors = [error]

    def run_out() -> None:
        if errors:
            raise errors.pop()

    submit()
    workbench.run(run_out)
    assert failure(sessions, job) == {"code": code, "detail": str(error), "retryable": False}
    with sessions() as session:
        assert session.scalars(select(Job.state).where(Job.id != job.id)).one() == JobState.SUCCEEDED


def test_an_error_nobody_expected_is_tried_again_and_tells_no_details(
    workbench: Workbench, sessions: SessionFactory, job: Job
) -> None:
    def break_down() -> None:
        raise ZeroDivisionError("a secret")

    workbench.run(break_down)
    [step] = read_steps(sessions, job)
    assert step.error is not None
    assert (step.state, step.error["code"], step.error["retryable"]) == (StepState.QUEUED, "internal_error", True)
    assert "secret" not in step.error["detail"]


# --- the database goes away ----------------------------------------------------------------------------------------


@contextmanager
def failing_commits(sessions: SessionFactory, hit: Callable[[Connection], bool]) -> Iterator[None]:
    """`hit` sees every commit of this thread, and may have its connection cut; the heart has its own thread."""
    thread = threading.get_ident()
    with watched_commits(sessions, lambda connection: threading.get_ident() == thread and hit(connection)):
        yield


def test_connections_cut_while_the_result_is_published_cost_nothing(
    workbench: Workbench, sessions: SessionFactory, job: Job
) -> None:
    """The first commit after the model is progress, the next three are tries to publish."""
    left: list[str] = []

    def hit(_: Connection) -> bool:
        return bool(left and left.pop())

    with failing_commits(sessions, hit):
        workbench.run(lambda: left.extend(["cut"] * 4))
    assert left == []
    finished = read_job(sessions, job)
    assert (finished.state, finished.attempts, read_steps(sessions, job)[0].failures) == (JobState.SUCCEEDED, 1, 0)
    assert told(sessions, "attempt") == ["started", "done"]
    assert count_rows(sessions, WebhookDelivery) == 1


def test_a_commit_whose_answer_was_lost_is_not_made_twice(
    workbench: Workbench, sessions: SessionFactory, job: Job
) -> None:
    """The database has committed, the worker cannot know; its second try finds the attempt ended."""
    armed: list[bool] = []

    def commit_and_cut(connection: Connection) -> bool:
        if armed and is_published(connection):
            commit(connection)
            armed.clear()
            return True
        return False

    def is_published(connection: Connection) -> bool:
        return connection.scalar(select(Step.state)) == StepState.DONE

    with failing_commits(sessions, commit_and_cut):
        workbench.run(lambda: armed.append(True))
    assert armed == []
    assert read_job(sessions, job).state == JobState.SUCCEEDED
    assert told(sessions, "state") == ["queued", "running", "succeeded"]
    assert count_rows(sessions, WebhookDelivery) == 1
