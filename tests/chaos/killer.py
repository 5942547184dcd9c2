"""The killer: by a seed it chooses what dies next, of all that runs, and sees how long it takes until work goes on.

Recovery is the time from a kill until every step that the killed processes held is running again or has ended, and for
what holds none, until a step ends that was not done at the kill.
"""

import os
import random
import signal
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from tests.acceptance.conftest import family
from tests.chaos.system import System

BUSY_SECONDS = 5
"""How long it waits for a worker to have something to lose."""
RECOVERY_SECONDS = 120
POLL_SECONDS = 0.02
LONGEST_PAUSE_SECONDS = 1.0


@dataclass(frozen=True)
class Victim:
    name: str
    weight: int
    queue: str | None = None
    """Of a worker: which steps it holds."""
    child: bool = False
    """Only one process of its pool; the parent lives on."""


VICTIMS = (
    Victim("gpu0", 5, "gpu", child=True),
    Victim("gpu1", 5, "gpu", child=True),
    Victim("io0", 3, "io", child=True),
    Victim("gpu0", 2, "gpu"),
    Victim("gpu1", 2, "gpu"),
    Victim("io0", 2, "io"),
    Victim("webhooks0", 1),
    Victim("upkeep", 1),
    Victim("api", 2),
    Victim("redis", 2),
    Victim("postgres", 2),
    Victim("s3", 2),
)


class Killer:
    def __init__(self, system: System, *, seed: int) -> None:
        self._system = system
        self._chance = random.Random(seed)
        self._seconds: dict[str, list[float]] = defaultdict(list)
        self._struck: Counter[str] = Counter()

    def strike(self) -> str:
        """Kill once, start again what nobody else does, and wait until work goes on; says what was done."""
        victim = self._chance.choices(VICTIMS, [each.weight for each in VICTIMS])[0]
        what = f"a child of {victim.name}" if victim.child else victim.name
        pids, held = self._find_held(victim) if victim.queue else ([], [])
        done_before = self._count_done()
        began = time.monotonic()
        if victim.child:
            for pid in pids[:1]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        else:
            self._system.stack.kill(victim.name)
        with ThreadPoolExecutor(1) as starting:
            if not victim.child:
                started = starting.submit(self._system.stack.start, victim.name)
            self._wait(lambda: self._goes_on(held) if held else self._count_done() > done_before, what)
            seconds = time.monotonic() - began
            if not victim.child:
                started.result()
        kind = "child" if victim.child else "worker" if victim.queue else "server"
        self._struck[what] += 1
        self._seconds[kind].append(seconds)
        time.sleep(self._chance.uniform(0, LONGEST_PAUSE_SECONDS))
        return f"{what}, which held {len(held)}, and work went on after {seconds:.2f} s"

    def figures(self) -> dict[str, object]:
        every = [each for seconds in self._seconds.values() for each in seconds]
        kinds = {f"recovery_seconds_{kind}_p50": _percentile(found, 50) for kind, found in self._seconds.items()}
        return {
            "recovery_seconds_p50": _percentile(every, 50),
            "recovery_seconds_p99": _percentile(every, 99),
            "recovery_seconds_max": _percentile(every, 100),
            **kinds,
        }

    def describe(self) -> str:
        return ", ".join(f"{what} {times}×" for what, times in self._struck.most_common())

    def _find_held(self, victim: Victim) -> tuple[list[int], list[tuple[str, int]]]:
        """The processes of a worker that are busy, and (step, attempt) of what they hold."""
        process = self._system.stack.processes[victim.name]
        deadline = time.monotonic() + BUSY_SECONDS
        while True:
            members = family(process.pid) if process.pid is not None and process.running else []
            listed = ", ".join(map(str, members)) or "0"
            rows = self._system.query(
                "SELECT workers.pid, steps.id::text, steps.attempt FROM steps"  # noqa: S608
                " JOIN workers ON workers.id = steps.worker_id"
                f" WHERE steps.state = 'running' AND workers.pid IN ({listed})"
            )
            if rows or time.monotonic() > deadline:
                pids = [pid for pid, _, _ in rows] or members[1:]
                chosen = pids[0] if pids else None
                held = [(step, attempt) for pid, step, attempt in rows if not victim.child or pid == chosen]
                return pids, held
            time.sleep(POLL_SECONDS)

    def _goes_on(self, held: Sequence[tuple[str, int]]) -> bool:
        for step, attempt in held:
            [(state, now)] = self._system.query(f"SELECT state, attempt FROM steps WHERE id = '{step}'")  # noqa: S608
            if state == "queued" or (state == "running" and now == attempt):
                return False
        return True

    def _count_done(self) -> int:
        [(count,)] = self._system.query("SELECT count(*) FROM steps WHERE state = 'done'")
        return int(count)

    def _wait(self, seen: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + RECOVERY_SECONDS
        while not seen():
            if time.monotonic() > deadline:
                raise AssertionError(f"nothing went on for {RECOVERY_SECONDS} s after {what} was killed")
            time.sleep(POLL_SECONDS)


def _percentile(seconds: Sequence[float], percent: int) -> float | None:
    if not seconds:
        return None
    ordered = sorted(seconds)
    if percent == 50:
        return round(statistics.median(ordered), 3)
    return round(ordered[min(len(ordered) - 1, -(-len(ordered) * percent // 100) - 1)], 3)
