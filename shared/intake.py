"""How jobs come to be: queued from the commit on, with their first steps and the event that says so.

From then on their life is `shared/lifecycle.py`. Callers commit.
"""

from collections.abc import Sequence
from datetime import timedelta
from functools import cache
from typing import Any

from sqlalchemy import Select, bindparam, cast, func, insert, select
from sqlalchemy.orm import Session

from shared import queue, retention
from shared.errors import NotFound
from shared.lifecycle import enter, new_step
from shared.models import Base, Job, JobEvent, JobState, Step, StepKind


def submit(session: Session, job: Job, *, steps: Sequence[tuple[StepKind, str]]) -> list[Step]:
    """Accept a job with its first steps, given as (kind, queue). Raises NotFound when its upload is there no more.

    One statement for all of it, which is a transaction by itself where there is none around it: trips to the database
    are most of what a submission takes. So neither the job nor the steps belong to the session.
    """
    enter(job)
    rows = [new_step(job, ordinal, kind, queue_name) for ordinal, (kind, queue_name) in enumerate(steps)]
    for row in rows:
        del row.hint_at  # counted from the database's time, as is the job's deadline
    event = {"job_id": job.id, "type": "state", "data": {"state": JobState.QUEUED}}
    given = [_values_of(job), event, *map(_values_of, rows)]
    statement = _write(tuple(tuple(each) for each in given), of_upload=job.upload_id is not None)
    told = {f"{number}_{name}": value for number, each in enumerate(given) for name, value in each.items()}
    made = session.connection().execute(statement, told).mappings().one_or_none()  # past the ORM, which has no part
    if made is None:
        raise NotFound("there is no such upload any more")
    for name, value in made.items():
        setattr(job, name, value)
    return rows


@cache
def _write(names: tuple[tuple[str, ...], ...], *, of_upload: bool) -> Select[Any]:
    """Rows with values of these names: of the job, of its event, of its steps. Made once, as that takes a while.

    The upload is held until the job that names it is committed, and without it there is no job; no event and no step
    without the job.
    """
    jobs, events, steps = (table.metadata.tables[table.__tablename__] for table in (Job, JobEvent, Step))
    tables = [jobs, events, *[steps] * (len(names) - 2)]
    values = [
        [cast(bindparam(f"{number}_{name}", type_=table.c[name].type), table.c[name].type) for name in each]
        for number, (table, each) in enumerate(zip(tables, names, strict=True))
    ]
    start_by = func.now() + func.make_interval(0, 0, 0, 0, 0, 0, bindparam("0_start_deadline_seconds"))
    wanted = select(*values[0], start_by)
    if of_upload:
        wanted = wanted.select_from(retention.hold_upload(bindparam("0_upload_id")).cte("held"))
    filled_in = [column for column in jobs.c if column.server_default is not None]
    job = insert(jobs).from_select([*names[0], "start_by"], wanted).returning(*filled_in, jobs.c.start_by).cte("job")
    event = insert(events).from_select([*names[1]], select(*values[1]).select_from(job))
    hint_at = func.now() + timedelta(seconds=queue.HINT_SECONDS)
    others = [
        insert(steps).from_select([*each, "hint_at"], select(*given, hint_at).select_from(job))
        for each, given in zip(names[2:], values[2:], strict=True)
    ]
    return select(job).add_cte(*(each.cte(f"other_{number}") for number, each in enumerate([event, *others])))


def submit_all(session: Session, jobs: Sequence[tuple[Job, Sequence[tuple[StepKind, str]]]]) -> list[Step]:
    """As `submit`, of many; what the database fills in is not read back."""
    now = session.scalars(select(func.now())).one()  # rows that hold an expression would be inserted one by one
    for job, _ in jobs:
        enter(job)
        job.start_by = now + timedelta(seconds=job.start_deadline_seconds)
        session.add(job)
    session.flush()
    hint_at = now + timedelta(seconds=queue.HINT_SECONDS)
    rows = [
        new_step(job, ordinal, kind, queue_name, hint_at=hint_at)
        for job, steps in jobs
        for ordinal, (kind, queue_name) in enumerate(steps)
    ]
    session.add_all(rows)
    session.flush()
    data = {"state": JobState.QUEUED}
    session.execute(insert(JobEvent), [{"job_id": job.id, "type": "state", "data": data} for job, _ in jobs])
    return rows


def _values_of(row: Base) -> dict[str, Any]:
    """By column."""
    held = vars(row)
    return {column: held[name] for name, column in _columns_of(type(row)) if name in held}


@cache
def _columns_of(kind: type[Base]) -> tuple[tuple[str, str], ...]:
    """Each attribute's name and its column's."""
    return tuple((each.key, each.columns[0].name) for each in kind.__mapper__.column_attrs)
