"""The service around the model: submissions, claims, lists, webhooks and events, and what it adds to every image.

A whole stack of real processes on this machine, which shares its cores with whoever asks. Submissions take turns with a
bare endpoint that inserts one row (`bench/_bare.py`). Moments within a job are by the database's clock: from the start
of the transaction that accepts it. `--outage-seconds` stops Redis for so long under steady submissions.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from typing import Any

import structlog
from sqlalchemy import text

from bench import _news, _rows, _submissions
from bench._system import System, open_system, wait_until
from bench.webhooks import percentile

SIDE = 512
PAUSE_SECONDS = (0.05, 0.25)  # between jobs for an idle worker
OUTAGE_PAUSE_SECONDS = 2.0  # slower than the worker is, or its backlog would be measured
_ENDED = text("SELECT state FROM jobs WHERE id = :job AND state IN ('succeeded', 'failed', 'canceled', 'expired')")

_TIMES = text("""
    SELECT 1000 * extract(epoch FROM claimed.created_at - jobs.created_at)::float AS claimed,
        1000 * (extract(epoch FROM ended.created_at - jobs.created_at)::float
            - (jobs.timing->>'inference_seconds')::float) AS overhead
    FROM jobs JOIN job_events claimed ON claimed.job_id = jobs.id AND claimed.data->>'outcome' = 'started'
    JOIN job_events ended ON ended.job_id = jobs.id AND ended.data->>'state' = 'succeeded'
    WHERE jobs.id = :job
""")


def measure_jobs(system: System, upload_id: str, *, jobs: int) -> dict[str, float]:
    """One at a time, so that the worker is idle when each comes. The first ones warm it up."""
    claimed, overhead = [], []
    for number in range(jobs + 3):
        job = system.submit(upload_id)
        _wait_for_end(system, job)
        with system.sessions() as session:
            times = session.execute(_TIMES, {"job": job}).one()
        if number >= 3:
            claimed.append(times.claimed)
            overhead.append(times.overhead)
        time.sleep(random.uniform(*PAUSE_SECONDS))
    return {
        f"{name}_p{rank}_ms": round(percentile(each, rank), 1)
        for name, each in (("submit_to_claimed", claimed), ("overhead_per_image_job", overhead))
        for rank in (50, 99)
    }


def measure_submissions(
    system: System, upload_id: str, *, clients: Sequence[int], seconds: float, turns: int
) -> list[dict[str, Any]]:
    """Without the worker, which would take the cores for the jobs."""
    system.stack.stop("gpu0")
    try:
        with _submissions.bare_endpoint(system) as bare:
            return [
                _submissions.compare(system, bare, upload_id, clients=each, seconds=seconds, turns=turns)
                for each in clients
            ]
    finally:
        forget_jobs(system)
        system.stack.start("gpu0")


def measure_outage(system: System, upload_id: str, *, seconds: float) -> dict[str, float]:
    """Submissions while Redis is down, and how long after its return the last of their jobs is done."""
    system.stack.kill("redis")
    until, jobs, longest = time.monotonic() + seconds, [], 0.0
    while time.monotonic() < until:
        began = time.monotonic()
        jobs.append(system.submit(upload_id))
        longest = max(longest, time.monotonic() - began)
        time.sleep(OUTAGE_PAUSE_SECONDS)
    system.stack.start("redis")
    back = time.monotonic()
    for job in jobs:
        _wait_for_end(system, job)
    return {
        "redis_down_seconds": seconds,
        "redis_down_submissions": len(jobs),
        "redis_down_submit_max_seconds": round(longest, 3),
        "redis_back_all_done_seconds": round(time.monotonic() - back, 1),
    }


def forget_jobs(system: System) -> None:
    with system.sessions.begin() as session:
        session.execute(text("DELETE FROM jobs WHERE state = 'queued'"))
    with system.sessions.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE jobs, steps, job_events"))


def _wait_for_end(system: System, job: str) -> None:
    def look() -> str | None:
        with system.sessions() as session:
            state: str | None = session.scalar(_ENDED, {"job": job})
            return state

    state = wait_until(look, otherwise="a job did not end", pause_seconds=0.05)
    assert state == "succeeded", state


def measure(system: System, options: argparse.Namespace) -> dict[str, Any]:
    figures: dict[str, Any] = {"load_before": [round(each, 2) for each in os.getloadavg()]}
    upload_id = system.upload(side=SIDE)
    figures |= measure_jobs(system, upload_id, jobs=options.jobs)
    figures["webhooks_per_second"] = round(_news.measure_webhooks(system, jobs=options.webhooks), 1)
    told = _news.measure_events(
        system, listeners=options.listeners, events=options.events, pause_seconds=options.event_pause
    )
    figures[f"events_per_second_{options.listeners}_listeners"] = round(told["events_per_second"], 1)
    if options.outage_seconds:
        figures |= measure_outage(system, upload_id, seconds=options.outage_seconds)
    rows = measure_submissions(system, upload_id, clients=options.clients, seconds=options.seconds, turns=options.turns)
    figures |= _submissions.summarise(rows) | {"submissions": rows}
    return figures | _rows.measure(system, options.rows, repeats=options.repeats, turns=options.turns)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.service", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="the last line alone, one JSON object")
    parser.add_argument("--quick", action="store_true", help="leave 100,000 and a million rows out")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 10, 50])
    parser.add_argument("--seconds", type=float, default=5, help="of each turn of submissions")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=200, help="one after another, for the idle worker")
    parser.add_argument("--webhooks", type=int, default=500)
    parser.add_argument("--listeners", type=int, default=200)
    parser.add_argument("--events", type=int, default=20, help="for each listener")
    parser.add_argument("--event-pause", type=float, default=0.25, help="seconds between them")
    parser.add_argument("--rows", type=int, nargs="+", help="the sizes of the tables; default 1000 100000 1000000")
    parser.add_argument("--repeats", type=int, default=100, help="claims and pages of each turn")
    parser.add_argument("--outage-seconds", type=float, default=0, help="how long Redis is down")
    options = parser.parse_args(arguments)
    options.rows = options.rows or ([1000] if options.quick else [1000, 100_000, 1_000_000])
    return options


def run(arguments: Sequence[str] = ()) -> None:
    """Measure and print; the last line is one JSON object."""
    options = parse(arguments)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))  # errors alone
    with open_system() as system:
        figures = measure(system, options)
    for name in ("claim_p99_ratio_1m_to_1k", "list_p99_ratio_1m_to_1k"):
        figures.setdefault(name, None)  # not measured with fewer rows
    if not options.json:
        for name, value in figures.items():
            for each in value if isinstance(value, list) else [value]:
                print(f"{name:<36} {each}")
    print(json.dumps(figures))


if __name__ == "__main__":
    run(sys.argv[1:])
