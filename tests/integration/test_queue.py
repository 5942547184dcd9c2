"""Which step is taken next, how many go before a job, and which steps workers are woken for."""

import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import func, select, text, update
from sqlalchemy.orm import Session

from shared import intake, lifecycle, queue, tenants
from shared.broker import GPU
from shared.db import SessionFactory
from shared.lifecycle import ClaimedStep
from shared.models import Job, Step, StepKind, Tenant, Worker
from tests.integration.conftest import TROUBLE, MakeJob, add_worker, make_late, new_job, read_steps

GONE_SECONDS = 60
Claim = Callable[..., ClaimedStep]
Alike = Callable[..., list[uuid.UUID]]


def taken(claim: Callable[..., ClaimedStep | None], **values: Any) -> uuid.UUID | None:
    """The job whose step is taken next."""
    claimed = claim(**values)
    return None if claimed is None else claimed.job.id


@pytest.fixture
def other_tenant(sessions: SessionFactory) -> Tenant:
    with sessions.begin() as session:
        return tenants.create_tenant(session, "another tenant")


# --- the order -----------------------------------------------------------------------------------------------------


def test_the_oldest_of_equals_is_taken_first(make_job: MakeJob, claim: Claim) -> None:
    made = [make_job().id for _ in range(3)]
    assert [taken(claim) for _ in range(4)] == [*made, None]


def test_priority_comes_before_age(make_job: MakeJob, claim: Claim) -> None:
    low, normal, high = (make_job(priority=priority).id for priority in (-5, 0, 7))
    assert [taken(claim) for _ in range(3)] == [high, normal, low]


def test_the_tenant_with_the_least_running_goes_first(make_job: MakeJob, claim: Claim, other_tenant: Tenant) -> None:
    crowd = [make_job().id for _ in range(3)]
    late = [make_job(owner=other_tenant).id for _ in range(2)]
    assert [taken(claim) for _ in range(5)] == [crowd[0], late[0], crowd[1], late[1], crowd[2]]


@pytest.mark.parametrize("served", [["tenant"], ["other", "tenant"]])
def test_of_tenants_that_have_nothing_running_the_one_served_longest_ago_goes_first(
    make_job: MakeJob, claim: Claim, tenant: Tenant, other_tenant: Tenant, served: list[str]
) -> None:
    crowd = [make_job().id for _ in range(3)]
    late = make_job(owner=other_tenant).id
    ids = {"tenant": tenant.id, "other": other_tenant.id}
    assert taken(claim, served=[ids[name] for name in served]) == late
    assert taken(claim, served=[ids["tenant"], ids["other"]]) == crowd[0]


def test_the_mode_a_worker_holds_comes_before_a_tenants_turn(
    make_job: MakeJob, claim: Claim, tenant: Tenant, other_tenant: Tenant
) -> None:
    held = make_job(mode="fast").id
    make_job(owner=other_tenant, mode="sota")
    assert taken(claim, mode_loaded="fast", served=[tenant.id]) == held


def test_priority_comes_before_fairness(make_job: MakeJob, claim: Claim, other_tenant: Tenant) -> None:
    crowd = [make_job(priority=1).id for _ in range(2)]
    other = make_job(owner=other_tenant).id
    assert [taken(claim) for _ in range(3)] == [*crowd, other]


def test_fairness_comes_before_the_mode_a_worker_holds(make_job: MakeJob, claim: Claim, other_tenant: Tenant) -> None:
    make_job(mode="fast")
    taken(claim)
    make_job(mode="fast")
    other = make_job(owner=other_tenant, mode="sota").id
    assert taken(claim, mode_loaded="fast") == other


def test_the_mode_a_worker_holds_comes_before_age(make_job: MakeJob, claim: Claim) -> None:
    older, held = make_job(mode="fast").id, make_job(mode="sota").id
    assert [taken(claim, mode_loaded="sota") for _ in range(2)] == [held, older]


def test_the_oldest_is_taken_whatever_its_priority_when_it_is_that_turn(make_job: MakeJob, claim: Claim) -> None:
    starving = make_job(priority=-100).id
    make_job(priority=100)
    assert taken(claim, oldest_first=True, mode_loaded="sota") == starving


@pytest.mark.parametrize("oldest_first", [False, True])
def test_only_modes_that_the_worker_serves_are_taken(make_job: MakeJob, claim: Claim, *, oldest_first: bool) -> None:
    make_job(mode="sota", priority=100)
    served = make_job(mode="demo").id
    assert taken(claim, modes=("demo",), oldest_first=oldest_first) == served
    assert taken(claim, modes=("demo",), oldest_first=oldest_first) is None


@pytest.mark.parametrize("oldest_first", [False, True])
def test_only_steps_of_the_workers_own_queue_are_taken(
    sessions: SessionFactory, tenant: Tenant, claim: Claim, *, oldest_first: bool
) -> None:
    with sessions.begin() as session:
        intake.submit(session, new_job(tenant), steps=[(StepKind.PROBE, "io")])
    assert taken(claim, oldest_first=oldest_first) is None
    assert taken(claim, queue_name="io", oldest_first=oldest_first) is not None


@pytest.mark.parametrize("oldest_first", [False, True])
def test_a_step_whose_pause_is_not_over_is_not_taken(
    sessions: SessionFactory, make_job: MakeJob, claim: Claim, *, oldest_first: bool
) -> None:
    pausing = make_job(priority=100)
    with sessions.begin() as session:
        lifecycle.fail_step(session, claim().lease, TROUBLE, failed_attempts=3)
    other = make_job().id
    assert taken(claim, oldest_first=oldest_first) == other
    assert taken(claim, oldest_first=oldest_first) is None
    with sessions.begin() as session:
        make_late(session, "steps", "run_after")
    assert taken(claim, oldest_first=oldest_first) == pausing.id


def test_a_long_row_of_pauses_does_not_hide_what_may_run(
    sessions: SessionFactory, make_job: MakeJob, claim: Claim
) -> None:
    for _ in range(20):
        make_job(priority=100)
    with sessions.begin() as session:
        session.execute(update(Step).values(run_after=func.now() + timedelta(hours=1)))
    other = make_job().id
    assert taken(claim) == other


# --- a long queue --------------------------------------------------------------------------------------------------

LONG = 100_000
PAGES = 2_000  # of eight kilobytes, of some fifteen thousand that the table and its indexes have
_FILL = (
    "INSERT INTO jobs (id, tenant_id, state, kind, mode, options, metadata, priority, source, start_by,"
    "    start_deadline_seconds, run_timeout_seconds, keep_seconds)"
    " SELECT gen_random_uuid(), (SELECT id FROM tenants), 'queued', 'image',"
    "    (ARRAY['demo', 'fast', 'sota'])[1 + n % 3], '{}', '{}', n % 7, '{}', now(), 60, 60, 60"
    " FROM generate_series(1, :rows) n",
    "INSERT INTO steps (id, job_id, tenant_id, ordinal, kind, queue, mode, priority, state)"
    " SELECT gen_random_uuid(), id,"
    "    CAST('00000000-0000-0000-0000-0000000000' || (10 + floor(20 * random()))::int AS uuid), 0, 'infer', 'gpu',"
    "    mode, priority, 'queued' FROM jobs",
    "ANALYZE jobs, steps",
)


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for each in plan.get("Plans", ()):
        yield from nodes(each)


@pytest.mark.parametrize("modes", [["demo", "fast", "sota"], ["balanced"]], ids=["all modes", "one that nobody wants"])
@pytest.mark.parametrize("statement", ["_BEST_STEP", "_OLDEST_STEP"])
def test_a_claim_from_a_long_queue_reads_heads_from_partial_indexes_and_little_else(
    sessions: SessionFactory, tenant: Tenant, long_queue: None, statement: str, modes: list[str]
) -> None:
    question = "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) " + getattr(queue, statement).text
    with sessions() as session:
        [told] = session.scalar(text(question), {"queue": GPU, "modes": modes, "mode_loaded": None, "served": []})
    scans = [each for each in nodes(told["Plan"]) if each.get("Relation Name") == "steps"]
    assert {each["Node Type"] for each in scans} <= {"Index Scan", "Index Only Scan"}
    used = {each["Index Name"] for each in scans}
    assert used <= {"ix_steps_claim", "ix_steps_lease", "ix_steps_oldest_of_mode", "pk_steps"}
    assert used & {"ix_steps_claim", "ix_steps_oldest_of_mode"}
    assert told["Plan"]["Shared Hit Blocks"] + told["Plan"]["Shared Read Blocks"] < PAGES


@pytest.fixture
def long_queue(sessions: SessionFactory, tenant: Tenant) -> None:
    with sessions.begin() as session:
        session.execute(text("SET LOCAL statement_timeout = 0"))
        for statement in _FILL:
            session.execute(text(statement), {"rows": LONG} if ":rows" in statement else {})


# --- what is taken along -------------------------------------------------------------------------------------------


@pytest.fixture
def alike(sessions: SessionFactory, claim: Claim) -> Alike:
    """Take the next step, and tell the jobs whose steps could be taken along, in their order."""

    def find(**values: Any) -> list[uuid.UUID]:
        chosen: dict[str, Any] = {
            "worker_id": uuid.uuid4(), "name": GPU, "modes": ["demo", "sota"], "most": 15, "source_bytes": 100,
            "gone_seconds": GONE_SECONDS,
        }  # fmt: skip
        chosen |= values
        claimed = claim(modes=chosen["modes"])
        with sessions() as session:
            found = queue.find_alike(session, claimed.lease.step_id, **chosen)
            return [session.scalars(select(Step.job_id).where(Step.id == step_id)).one() for step_id in found]

    return find


def test_only_steps_of_the_same_mode_and_options_are_taken_along(make_job: MakeJob, alike: Alike) -> None:
    make_job()
    wanted = make_job().id
    make_job(mode="sota")
    make_job(options={"input_size": 96, "outputs": ["mask"]})
    assert alike() == [wanted]


def test_no_more_are_taken_along_than_asked_for(make_job: MakeJob, alike: Alike) -> None:
    made = [make_job().id for _ in range(9)]
    assert alike(most=4) == made[1:5]


def test_tenants_take_turns_in_what_is_taken_along(make_job: MakeJob, alike: Alike, other_tenant: Tenant) -> None:
    crowd = [make_job().id for _ in range(4)]
    late = [make_job(owner=other_tenant).id for _ in range(2)]
    assert alike() == [late[0], crowd[1], late[1], crowd[2], crowd[3]]


def test_priority_orders_what_is_taken_along(make_job: MakeJob, alike: Alike) -> None:
    low, normal, high, _ = (make_job(priority=priority).id for priority in (-5, 0, 7, 9))
    assert alike() == [high, normal, low]


def test_nothing_is_taken_along_past_a_higher_priority(make_job: MakeJob, alike: Alike) -> None:
    make_job(priority=9)
    above, level = make_job(priority=8).id, make_job(priority=5).id
    make_job(priority=4)
    make_job(priority=5, mode="sota")
    assert alike() == [above, level]


def test_a_mode_that_the_worker_does_not_serve_holds_nothing_up(make_job: MakeJob, alike: Alike) -> None:
    make_job()
    wanted = make_job().id
    make_job(priority=5, mode="fast")
    assert alike(modes=["demo"]) == [wanted]


def test_large_images_recordings_and_pauses_are_not_taken_along(
    sessions: SessionFactory, make_job: MakeJob, alike: Alike, claim: Claim
) -> None:
    make_job(priority=9)
    with sessions.begin() as session:
        lifecycle.fail_step(session, claim().lease, TROUBLE, failed_attempts=3)
    make_job()
    make_job(source={"key": "a key", "etag": "an etag", "size_bytes": 101, "filename": "a.png"})
    make_job(kind="recording", steps=2)
    assert alike() == []


def test_nothing_is_taken_along_with_a_large_image_or_a_recording(make_job: MakeJob, alike: Alike) -> None:
    make_job(source={"key": "a key", "etag": "an etag", "size_bytes": 101, "filename": "a.png"})
    make_job(kind="recording")
    make_job()
    make_job()
    assert [len(alike()) for _ in range(3)] == [0, 0, 1]


def test_idle_workers_that_live_and_serve_the_mode_are_left_their_share(
    sessions: SessionFactory, make_job: MakeJob, alike: Alike
) -> None:
    made = [make_job().id for _ in range(8)]
    add_workers(sessions, 1)
    add_workers(sessions, 1, step_id=uuid.uuid4())
    add_workers(sessions, 1, modes=["sota"])
    add_workers(sessions, 1, heartbeat_at=func.now() - timedelta(seconds=GONE_SECONDS + 1))
    assert alike(most=6) == made[1:4]


def test_a_worker_does_not_leave_a_share_for_itself(sessions: SessionFactory, make_job: MakeJob, alike: Alike) -> None:
    made = [make_job().id for _ in range(4)]
    assert alike(worker_id=add_worker(sessions).id) == made[1:]


# --- the position --------------------------------------------------------------------------------------------------


def position(session: Session, job: Job) -> int | None:
    return queue.find_position(session, job)


def test_the_position_counts_what_goes_before_by_priority_and_age(session: Session, make_job: MakeJob) -> None:
    old, middle, young = make_job(), make_job(), make_job()
    urgent = make_job(priority=1)
    assert [position(session, job) for job in (urgent, old, middle, young)] == [0, 1, 2, 3]


def test_a_job_that_does_not_wait_has_no_position(session: Session, make_job: MakeJob, claim: Claim) -> None:
    running, waiting = make_job(), make_job()
    claim()
    assert (position(session, running), position(session, waiting)) == (None, 0)


# --- waking workers ------------------------------------------------------------------------------------------------


def add_workers(sessions: SessionFactory, count: int, **values: object) -> None:
    for _ in range(count):
        add_worker(sessions, **values)


def hinted(sessions: SessionFactory) -> list[uuid.UUID]:
    with sessions.begin() as session:
        return [step_id for step_id, _ in queue.take_due_hints(session, gone_seconds=GONE_SECONDS)]


def step_of(sessions: SessionFactory, job: Job) -> uuid.UUID:
    [step] = read_steps(sessions, job)
    return step.id


@pytest.fixture
def waiting(sessions: SessionFactory, make_job: MakeJob) -> list[uuid.UUID]:
    """Three queued steps whose first hint was long ago."""
    steps = [step_of(sessions, make_job()) for _ in range(3)]
    with sessions.begin() as session:
        make_late(session, "steps", "hint_at")
    return steps


def test_a_step_just_submitted_needs_no_second_hint(sessions: SessionFactory, make_job: MakeJob) -> None:
    make_job()
    add_workers(sessions, 1)
    assert hinted(sessions) == []


def test_no_more_workers_are_woken_than_are_idle(sessions: SessionFactory, waiting: list[uuid.UUID]) -> None:
    add_workers(sessions, 2)
    add_workers(sessions, 5, step_id=uuid.uuid4())
    woken = hinted(sessions)
    assert len(woken) == 2
    assert set(woken) < set(waiting)


def test_nobody_is_woken_where_all_are_busy_or_of_another_queue(
    sessions: SessionFactory, waiting: list[uuid.UUID]
) -> None:
    assert hinted(sessions) == []
    add_workers(sessions, 3, step_id=uuid.uuid4())
    add_workers(sessions, 3, queue="io")
    assert hinted(sessions) == []


def test_a_worker_that_fell_silent_does_not_count(sessions: SessionFactory, waiting: list[uuid.UUID]) -> None:
    add_workers(sessions, 3)
    with sessions.begin() as session:
        session.execute(update(Worker).values(heartbeat_at=func.now() - timedelta(seconds=GONE_SECONDS + 1)))
    assert hinted(sessions) == []


def test_a_step_is_hinted_again_only_after_a_while(sessions: SessionFactory, waiting: list[uuid.UUID]) -> None:
    add_workers(sessions, 3)
    assert sorted(hinted(sessions)) == sorted(waiting)
    assert hinted(sessions) == []
    with sessions.begin() as session:
        seconds = session.scalars(text("SELECT extract(epoch FROM hint_at - now()) FROM steps")).all()
        assert all(queue.HINT_SECONDS - 5 < each <= queue.HINT_SECONDS for each in seconds)
        session.execute(text("UPDATE steps SET hint_at = hint_at - interval '11 seconds'"))
    assert sorted(hinted(sessions)) == sorted(waiting)


def test_a_step_that_was_claimed_is_not_hinted(
    sessions: SessionFactory, waiting: list[uuid.UUID], claim: Claim
) -> None:
    claimed = claim().lease.step_id
    add_workers(sessions, 3)
    assert sorted(hinted(sessions)) == sorted(set(waiting) - {claimed})
