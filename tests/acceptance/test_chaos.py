"""`make chaos`, shortened: everything that runs is killed, again and again, under a load."""

from tests.chaos.run import run

KILLS = 20
LEASE_SECONDS = 3.0


def test_twenty_kills_of_whatever_runs_lose_nothing_and_do_nothing_twice() -> None:
    verdict = run(kills=KILLS, seed=1, lease_seconds=LEASE_SECONDS, say=print)
    assert verdict.is_clean, verdict.figures
    assert verdict.figures["jobs_accepted"] > KILLS
