"""What those who died on this machine held is given back at once, and nothing of anybody who lives."""

import os
import signal
import threading
from collections.abc import Callable

import pytest
from sqlalchemy import text, update
from sqlalchemy.exc import OperationalError

from shared import db, lifecycle
from shared.broker import Hints
from shared.config import Settings
from shared.db import SessionFactory
from shared.lifecycle import ClaimedStep
from shared.models import Step, StepState, Worker, create_id
from tests.integration.conftest import Broker, MakeJob, add_worker, count_rows, read_job, read_steps, told, wait_until
from tests.integration.processes import bury, fork
from worker.relief import find_gone, read_mark, relieve, take_back

Claim = Callable[..., ClaimedStep]


def add_process(sessions: SessionFactory, pid: int) -> Worker:
    return add_worker(sessions, pid=pid, mark=read_mark(pid))


# --- what it held --------------------------------------------------------------------------------------------------


def test_all_that_a_dead_worker_held_is_queued_again_long_before_its_leases_end(
    sessions: SessionFactory, make_job: MakeJob, claim: Claim
) -> None:
    jobs = [make_job() for _ in range(3)]
    dead = add_worker(sessions)
    for _ in jobs:
        claim(worker_id=dead.id, lease_seconds=3600)
    assert len(take_back(sessions, dead.id, lost_attempts=3)) == 3
    assert [(step.state, step.lost) for job in jobs for step in read_steps(sessions, job)] == [("queued", 1)] * 3
    assert told(sessions, "attempt") == ["started"] * 3 + ["lost"] * 3
    assert count_rows(sessions, Worker) == 0


def test_what_others_hold_is_left_alone(sessions: SessionFactory, make_job: MakeJob, claim: Claim) -> None:
    job = make_job()
    dead, alive = add_worker(sessions), add_worker(sessions)
    claim(worker_id=alive.id)
    assert take_back(sessions, dead.id, lost_attempts=3) == []
    assert [step.state for step in read_steps(sessions, job)] == [StepState.RUNNING]
    assert count_rows(sessions, Worker) == 1


def test_a_step_that_another_has_by_now_is_left_to_it(
    sessions: SessionFactory, make_job: MakeJob, claim: Claim
) -> None:
    job = make_job()
    dead = create_id()
    claim(worker_id=dead)
    take_back(sessions, dead, lost_attempts=3)
    claim(worker_id=create_id())
    assert take_back(sessions, dead, lost_attempts=3) == []
    [step] = read_steps(sessions, job)
    assert (step.state, step.attempt, step.lost) == (StepState.RUNNING, 2, 1)


def test_a_worker_that_gave_its_step_back_itself_has_lost_nothing(
    sessions: SessionFactory, make_job: MakeJob, claim: Claim
) -> None:
    job = make_job()
    drained = create_id()
    lease = claim(worker_id=drained).lease
    with sessions.begin() as session:
        lifecycle.release_step(session, lease)
    assert take_back(sessions, drained, lost_attempts=3) == []
    assert [step.lost for step in read_steps(sessions, job)] == [0]


def test_a_job_that_killed_three_workers_fails(sessions: SessionFactory, make_job: MakeJob, claim: Claim) -> None:
    job = make_job()
    for _ in range(3):
        dead = create_id()
        claim(worker_id=dead)
        take_back(sessions, dead, lost_attempts=3)
    error = read_job(sessions, job).error
    assert error is not None
    assert error["code"] == "worker_lost"


def test_a_canceled_job_of_a_dead_worker_is_canceled_then(
    sessions: SessionFactory, make_job: MakeJob, claim: Claim
) -> None:
    job = make_job()
    dead = create_id()
    claim(worker_id=dead)
    with sessions.begin() as session:
        lifecycle.request_cancel(session, job.id)
    take_back(sessions, dead, lost_attempts=3)
    assert read_job(sessions, job).state == "canceled"


def test_the_claim_that_a_worker_was_committing_when_it_died_is_waited_for(
    sessions: SessionFactory, make_job: MakeJob
) -> None:
    job = make_job()
    dead = add_worker(sessions)
    taken: list[Step] = []
    taking = threading.Thread(target=lambda: taken.extend(take_back(sessions, dead.id, lost_attempts=3)))
    with sessions.begin() as session:
        lifecycle.claim(
            session, worker_id=dead.id, queue_name="gpu", modes=("demo",), mode_loaded=None, lease_seconds=3600
        )
        session.execute(update(Worker).where(Worker.id == dead.id).values(mode_loaded="demo"))
        taking.start()
        wait_until(lambda: is_waited_for(sessions))
    taking.join()
    assert [step.job_id for step in taken] == [job.id]


def is_waited_for(sessions: SessionFactory) -> bool:
    with sessions() as session:
        waiting = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        return session.scalar(text(waiting)) is not None


def test_others_are_woken_for_what_is_queued_again(
    settings: Settings, sessions: SessionFactory, hints: Hints, broker: Broker, make_job: MakeJob, claim: Claim
) -> None:
    make_job()
    pid = fork()
    dead = add_process(sessions, pid)
    step_id = claim(worker_id=dead.id).lease.step_id
    bury(pid)
    relieve(settings, sessions, hints)
    hints.close()
    assert broker.steps() == [step_id]


def test_what_could_not_be_given_back_without_the_database_can_be_later(
    settings: Settings, sessions: SessionFactory, make_job: MakeJob, claim: Claim, closed_port: int
) -> None:
    job = make_job()
    dead = create_id()
    claim(worker_id=dead)
    nowhere = settings.database.model_copy(update={"url": f"postgresql+psycopg://nobody@127.0.0.1:{closed_port}/none"})
    with pytest.raises(OperationalError):
        take_back(db.SessionFactory(nowhere), dead, lost_attempts=3)
    take_back(sessions, dead, lost_attempts=3)
    assert [step.state for step in read_steps(sessions, job)] == [StepState.QUEUED]


# --- who is dead ---------------------------------------------------------------------------------------------------


def test_whose_process_is_gone_is_found_and_none_that_lives(sessions: SessionFactory) -> None:
    pids = [fork(), fork(), fork()]
    killed, reaped, _alive = [add_process(sessions, pid) for pid in pids]
    try:
        assert find_gone(sessions) == []
        bury(pids[1])
        os.kill(pids[0], signal.SIGKILL)  # and nobody has taken note of it
        wait_until(lambda: read_mark(pids[0]) is None)
        assert sorted(find_gone(sessions)) == sorted([killed.id, reaped.id])
    finally:
        bury(pids[0])
        bury(pids[2])


def test_a_process_that_stands_still_is_not_gone(sessions: SessionFactory) -> None:
    pid = fork()
    add_process(sessions, pid)
    try:
        os.kill(pid, signal.SIGSTOP)
        os.waitpid(pid, os.WUNTRACED)
        assert find_gone(sessions) == []
    finally:
        bury(pid)


def test_whose_process_id_another_has_by_now_is_found(sessions: SessionFactory) -> None:
    mark = read_mark(os.getpid())
    assert mark is not None
    before, another = f"{mark[:-1]}{(int(mark[-1]) + 1) % 10}", add_worker(sessions, pid=os.getpid(), mark=mark)
    gone = add_worker(sessions, pid=os.getpid(), mark=before)
    assert find_gone(sessions) == [gone.id]
    assert another.id != gone.id


@pytest.mark.parametrize("elsewhere", [None, "another machine pid:[4026531836] 7", "pid:[4026531836] 7"])
def test_nobody_judges_the_workers_of_another_machine(sessions: SessionFactory, elsewhere: str | None) -> None:
    add_worker(sessions, pid=2**22, mark=elsewhere)
    assert find_gone(sessions) == []
