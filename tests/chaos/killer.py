"""The killer: by a seed it chooses what dies next, of all that runs, and sees how long it takes until work goes on.

Most are killed and started again; some are asked to stop, as a deploy does, and some freeze until others have their
work, and wake up as zombies. Recovery is the time from the blow until every step that the struck processes held is
running again or has ended, and for those that held none, until a step ends that was not done before. Of five blows,
four meet a system whose workers are all there, and one may meet what is still on its feet after the blow before.
"""

import os
import random
import signal
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Literal

from tests.acceptance.conftest import family
from tests.chaos.system import System

BUSY_SECONDS = 5
"""How long it waits for a worker to have something to lose."""
RECOVERY_SECONDS = 120
POLL_SECONDS = 0.02
LONGEST_PAUSE_SECONDS = 1.0
CHANCE_OF_A_WHOLE = 0.8
SILENT_SECONDS = 5  # more than a heartbeat's pause: a worker that says nothing for so long is not there


@dataclass(frozen=True)
class Victim:
    name: str
    weight: int
    queue: str | None = None
    """Of a worker: which steps it holds."""
    child: bool = False
    """Only one process of its pool; the parent lives on."""
    how: Literal["kill", "stop", "freeze"] = "kill"

    def __str__(self) -> str:
        done = {"kill": "killed", "stop": "stopped", "freeze": "frozen"}[self.how]
        return f"{'a child of ' if self.child else ''}{self.name} {done}"

    @property
    def kind(self) -> str:
        if self.how != "kill":
            return self.how
        return "child" if self.child else "worker" if self.queue else "server"


VICTIMS = (
    Victim("gpu0", 5, "gpu", child=True),
    Victim("gpu1", 5, "gpu", child=True),
    Victim("io0", 3, "io", child=True),
    Victim("gpu0", 2, "gpu"),
    Victim("gpu1", 2, "gpu"),
    Victim("io0", 2, "io"),
    Victim("gpu1", 1, "gpu", how="stop"),
    Victim("gpu0", 1, "gpu", child=True, how="freeze"),
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
        """Once, start again what nobody else does, and wait until work goes on; says what was done."""
        if self._chance.random() < CHANCE_OF_A_WHOLE:
            self._wait(self._is_whole, "the last blow before")
        victim = self._chance.choices(VICTIMS, [each.weight for each in VICTIMS])[0]
        pids, held = self._find_held(victim) if victim.queue else ([], [])
        done_before = self._count_done()
        began = time.monotonic()
        with self._blow(victim, pids[:1]):
            self._wait(lambda: self._goes_on(held) if held else self._count_done() > done_before, str(victim))
            seconds = time.monotonic() - began
        self._struck[str(victim)] += 1
        self._seconds[victim.kind].append(seconds)
        time.sleep(self._chance.uniform(0, LONGEST_PAUSE_SECONDS))
        return f"{victim}, which held {len(held)}, and work went on after {seconds:.2f} s"

    @contextmanager
    def _blow(self, victim: Victim, pids: Sequence[int]) -> Iterator[None]:
        """All is as it was after the block, if not before."""
        if victim.child:
            _send(signal.SIGKILL if victim.how == "kill" else signal.SIGSTOP, pids)
            yield
            _send(signal.SIGCONT, pids)
            return
        stack = self._system.stack
        end = stack.stop if victim.how == "stop" else stack.kill
        with ThreadPoolExecutor(1) as restarting:
            end(victim.name)
            started = restarting.submit(stack.start, victim.name)
            yield
            started.result()

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

    def _is_whole(self) -> bool:
        alive = f"SELECT pid FROM workers WHERE heartbeat_at > now() - interval '{SILENT_SECONDS} seconds'"  # noqa: S608
        there = {pid for (pid,) in self._system.query(alive)}
        names = {victim.name for victim in VICTIMS if victim.queue}
        processes = [self._system.stack.processes[name].pid for name in names]
        with suppress(FileNotFoundError):  # one that ended while it was looked at
            return all(pid is not None and there & set(family(pid)) for pid in processes)
        return False

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


def _send(order: signal.Signals, pids: Sequence[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, order)


def _percentile(seconds: Sequence[float], percent: int) -> float | None:
    if not seconds:
        return None
    ordered = sorted(seconds)
    if percent == 50:
        return round(statistics.median(ordered), 3)
    return round(ordered[min(len(ordered) - 1, -(-len(ordered) * percent // 100) - 1)], 3)
