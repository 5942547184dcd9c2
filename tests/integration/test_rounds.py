"""Rounds on real servers: what is alike goes through the model together, and every step still lives its own life."""

import io
import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from sqlalchemy import func, select

from shared import lateness, lifecycle
from shared.config import Settings
from shared.db import SessionFactory
from shared.inference.errors import ModelUnavailable
from shared.models import Job, JobState, Step, StepState
from shared.storage import Storage
from tests.integration.conftest import Submit, Take, nothing_stored, read_job, read_steps, small_image, wait_until
from tests.integration.takeover import take_back, take_over, wait_for_a_beat
from tests.integration.workbench import WAIT_SECONDS, Workbench
from worker import rounds

SubmitJobs = Callable[..., list[Job]]


@pytest.fixture
def together(workbench: Workbench, monkeypatch: pytest.MonkeyPatch) -> Workbench:
    """A worker whose model takes four images at a time, and on a busy machine too waits for what is on its way."""
    monkeypatch.setattr(rounds, "LINGER_SECONDS", WAIT_SECONDS)
    return replace(workbench, batch_images=4)


@pytest.fixture
def submit_jobs(submit: Submit, sessions: SessionFactory) -> SubmitJobs:
    """Submit jobs, alike unless told otherwise, and read them back in their order."""

    def send(count: int, **fields: Any) -> list[Job]:
        ids = [submit(**fields).json()["id"] for _ in range(count)]
        with sessions() as session:
            found = {str(job.id): job for job in session.scalars(select(Job))}
        return [found[each] for each in ids]

    return send


def states(sessions: SessionFactory, jobs: list[Job]) -> list[JobState]:
    return [read_job(sessions, job).state for job in jobs]


def count_running(sessions: SessionFactory) -> int:
    with sessions() as session:
        running = select(func.count()).select_from(Step).where(Step.state == StepState.RUNNING)
        return session.scalars(running).one()


# --- what goes through the model together ----------------------------------------------------------------------------


def test_alike_jobs_go_through_the_model_in_one_batch(
    together: Workbench, submit_jobs: SubmitJobs, sessions: SessionFactory
) -> None:
    jobs = submit_jobs(4)
    assert together.run().batches == [4]
    assert states(sessions, jobs) == [JobState.SUCCEEDED] * 4


def test_no_batch_is_larger_than_the_model_gains_from(together: Workbench, submit_jobs: SubmitJobs) -> None:
    submit_jobs(8)
    assert together.run().batches == [4, 4]


def test_jobs_of_other_modes_or_options_keep_to_themselves(together: Workbench, submit_jobs: SubmitJobs) -> None:
    for fields in {}, {"options": {"input_size": 96}}, {"mode": "fast"}:
        submit_jobs(2, **fields)
    engine = together.run()
    assert engine.batches == [2, 2, 2]
    kinds = [(mode, size) for _, mode, size in engine.asked]
    assert kinds[::2] == kinds[1::2]
    assert set(kinds) == {("demo", None), ("demo", 96), ("fast", None)}


def test_images_that_the_model_sees_at_other_sizes_keep_to_themselves(
    together: Workbench, submit_jobs: SubmitJobs
) -> None:
    for _ in range(2):
        submit_jobs(1, file=small_image(width=48, height=32))
        submit_jobs(1, file=small_image(width=32, height=48))
    engine = together.run()
    assert engine.batches == [2, 2]
    shapes = [shape for shape, _, _ in engine.asked]
    assert sorted(shapes[::2]) == [(32, 48, 3), (48, 32, 3)]
    assert shapes[::2] == shapes[1::2]


def test_every_job_gets_the_mask_of_its_own_image(
    together: Workbench, submit: Submit, sessions: SessionFactory, storage: Storage
) -> None:
    def see_the_colour(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return image[:, :, 0] // 20

    sizes = {1: (48, 32), 2: (96, 64), 3: (24, 16), 4: (48, 32), 5: (72, 48), 6: (48, 32)}
    colours = {}
    for colour, (width, height) in sizes.items():
        file = small_image(width=width, height=height, colour=(20 * colour, 0, 0))
        colours[submit(file=file).json()["id"]] = colour
    engine = replace(together, label=see_the_colour).run()
    assert max(engine.batches) == 4
    with sessions() as session:
        jobs = session.scalars(select(Job)).all()
    for job in jobs:
        colour = colours[str(job.id)]
        manifest = json.loads(storage.read(str(job.manifest_key), limit_bytes=10**6))
        assert manifest["job_id"] == str(job.id)
        assert [each["id"] for each in manifest["classes"]] == [colour]
        [file] = manifest["files"]
        with Image.open(io.BytesIO(storage.read(file["key"], limit_bytes=10**6))) as mask:
            assert (mask.size, mask.getextrema()) == (sizes[colour], (colour, colour))


def test_a_higher_priority_is_not_passed_over_for_the_sake_of_a_batch(
    together: Workbench, submit_jobs: SubmitJobs
) -> None:
    submit_jobs(2, priority="1")
    submit_jobs(1, priority="5")
    submit_jobs(1, priority="3", options={"input_size": 96})
    engine = together.run()
    assert engine.batches == [1, 1, 2]
    assert [size for _, _, size in engine.asked] == [None, 96, None, None]


def test_idle_workers_are_left_their_share(together: Workbench, submit_jobs: SubmitJobs) -> None:
    submit_jobs(8)
    batches: list[list[int]] = []

    def wake_the_other() -> None:
        other.run_until_idle()
        batches.append(other_engine.batches)

    with together.runner() as (other, other_engine), together.runner(wake_the_other) as (runner, engine):
        runner.run_until_idle()
    assert (engine.batches, other_engine.batches) == ([4], [4])


def test_a_worker_whose_model_takes_one_image_at_a_time_holds_one_step_at_a_time(
    workbench: Workbench, submit_jobs: SubmitJobs, sessions: SessionFactory
) -> None:
    submit_jobs(3)
    running: list[int] = []
    workbench.run(lambda: running.append(count_running(sessions)))
    assert running == [1, 1, 1]


# --- what overlaps ---------------------------------------------------------------------------------------------------


def test_the_next_image_is_fetched_and_the_last_one_published_while_the_model_runs(
    together: Workbench, submit_jobs: SubmitJobs, sessions: SessionFactory
) -> None:
    [first] = submit_jobs(1, file=small_image(width=64, height=48))
    [second] = submit_jobs(1, file=small_image(width=48, height=64))  # cannot go through the model with the first
    turns = iter(
        [
            lambda: read_job(sessions, second).stage == "segmenting",
            lambda: read_job(sessions, first).state == JobState.SUCCEEDED,
        ]
    )
    assert together.run(lambda: wait_until(next(turns))).batches == [1, 1]
    assert states(sessions, [first, second]) == [JobState.SUCCEEDED] * 2


def test_the_lines_of_the_log_name_their_own_job(
    together: Workbench, submit_jobs: SubmitJobs, caplog: pytest.LogCaptureFixture
) -> None:
    jobs = submit_jobs(4)
    together.run()
    lines: list[Any] = [record.msg for record in caplog.records if record.name == "worker.runner"]
    for event in "a step begins", "a step ended":
        told = [line["job_id"] for line in lines if line["event"] == event]
        assert sorted(told) == sorted(str(job.id) for job in jobs)


# --- trouble of one is not trouble of all ----------------------------------------------------------------------------


def test_a_broken_image_fails_alone(
    together: Workbench, submit_jobs: SubmitJobs, sessions: SessionFactory, storage: Storage
) -> None:
    [before], [broken], [gone], [after] = (
        submit_jobs(1), submit_jobs(1, file=b"no image"), submit_jobs(1), submit_jobs(1),
    )  # fmt: skip
    storage.delete_prefix(gone.source["key"])
    assert together.run().batches == [2]
    assert states(sessions, [before, broken, gone, after]) == [
        JobState.SUCCEEDED, JobState.FAILED, JobState.FAILED, JobState.SUCCEEDED,
    ]  # fmt: skip
    codes = [job.error and job.error["code"] for job in (read_job(sessions, broken), read_job(sessions, gone))]
    assert codes == ["invalid_media", "source_missing"]


def test_an_image_that_breaks_the_model_fails_alone(
    together: Workbench, submit_jobs: SubmitJobs, sessions: SessionFactory
) -> None:
    def break_on_red(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if image[0, 0, 0] == 255:
            raise ZeroDivisionError
        return np.ones(image.shape[:2], dtype=np.uint8)

    [poison] = submit_jobs(1, file=small_image(colour=(255, 0, 0)))
    others = submit_jobs(3)
    assert replace(together, label=break_on_red).run().batches == [4, 1, 1, 1, 1]
    assert states(sessions, others) == [JobState.SUCCEEDED] * 3
    [step] = read_steps(sessions, poison)
    assert step.error is not None
    assert (step.state, step.error["code"]) == (StepState.QUEUED, "internal_error")


def test_a_model_that_cannot_be_had_fails_all_of_the_batch_at_once(
    together: Workbench, submit_jobs: SubmitJobs, sessions: SessionFactory
) -> None:
    def miss() -> None:
        raise ModelUnavailable("the weights are missing")

    jobs = submit_jobs(4)
    assert together.run(miss).batches == [4]
    assert states(sessions, jobs) == [JobState.FAILED] * 4


def test_a_canceled_job_stops_and_the_others_of_its_batch_are_published(
    together: Workbench, submit_jobs: SubmitJobs, sessions: SessionFactory, storage: Storage
) -> None:
    canceled, *others = submit_jobs(4)

    def cancel() -> None:
        with sessions.begin() as session:
            lifecycle.request_cancel(session, canceled.id)
        wait_for_a_beat(sessions)

    assert together.run(cancel).batches == [4]
    assert states(sessions, [canceled, *others]) == [JobState.CANCELED] + [JobState.SUCCEEDED] * 3
    assert nothing_stored(storage, canceled)


def test_a_batch_that_nobody_wants_any_more_is_given_up(
    together: Workbench, submit_jobs: SubmitJobs, sessions: SessionFactory
) -> None:
    jobs = submit_jobs(4)
    labelled: list[bool] = []

    def label(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        labelled.append(True)
        return np.ones(image.shape[:2], dtype=np.uint8)

    def cancel() -> None:
        with sessions.begin() as session:
            for job in jobs:
                lifecycle.request_cancel(session, job.id)
        wait_for_a_beat(sessions)

    assert replace(together, label=label).run(cancel).batches == [4]
    assert labelled == []
    assert states(sessions, jobs) == [JobState.CANCELED] * 4


# --- leases ----------------------------------------------------------------------------------------------------------


def test_every_lease_lasts_as_long_as_the_batch(
    together: Workbench, settings: Settings, submit_jobs: SubmitJobs, sessions: SessionFactory
) -> None:
    jobs = submit_jobs(4)

    def work_long() -> None:
        time.sleep(settings.worker.lease_seconds + 0.5)
        with sessions.begin() as session:
            assert lateness.reap(session, lost_attempts=3) is None

    together.run(work_long)
    ended = [read_job(sessions, job) for job in jobs]
    assert [(job.state, job.attempts) for job in ended] == [(JobState.SUCCEEDED, 1)] * 4


def test_a_worker_that_lost_one_of_its_steps_publishes_the_others(
    together: Workbench, submit_jobs: SubmitJobs, sessions: SessionFactory, storage: Storage, take: Take
) -> None:
    lost, *others = submit_jobs(4)

    def lose() -> None:
        take_over(sessions, take, lost)
        wait_for_a_beat(sessions)

    together.run(lose)
    [step] = read_steps(sessions, lost)
    assert (step.state, step.attempt) == (StepState.RUNNING, 2)
    assert nothing_stored(storage, lost)
    assert states(sessions, others) == [JobState.SUCCEEDED] * 3


def test_a_draining_worker_gives_all_its_steps_back_and_spends_no_attempt(
    together: Workbench, submit_jobs: SubmitJobs, sessions: SessionFactory, storage: Storage
) -> None:
    jobs = submit_jobs(8)
    draining = threading.Event()
    assert together.run(draining.set, draining=draining).batches == [4]
    steps = [step for job in jobs for step in read_steps(sessions, job)]
    assert {(step.state, step.lost, step.failures) for step in steps} == {(StepState.QUEUED, 0, 0)}
    assert all(nothing_stored(storage, job) for job in jobs)
    together.run()
    assert states(sessions, jobs) == [JobState.SUCCEEDED] * 8


def test_a_step_that_was_lost_with_its_worker_runs_alone(
    together: Workbench, submit_jobs: SubmitJobs, sessions: SessionFactory, take: Take
) -> None:
    """It may be what killed the worker, and would take the others with it until all of them have failed."""
    jobs = submit_jobs(4)
    for _ in range(2):
        take()
    for job in jobs[:2]:
        take_back(sessions, job)
    assert sorted(together.run().batches) == [1, 1, 2]
    assert states(sessions, jobs) == [JobState.SUCCEEDED] * 4


def test_a_worker_that_is_interrupted_leaves_its_steps_to_their_leases(
    together: Workbench, submit_jobs: SubmitJobs, sessions: SessionFactory
) -> None:
    """Without a thread that would wait for ever for a mask."""
    jobs = submit_jobs(4)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        together.run(interrupt)
    steps = [step for job in jobs for step in read_steps(sessions, job)]
    assert {(step.state, step.attempt) for step in steps} == {(StepState.RUNNING, 1)}
