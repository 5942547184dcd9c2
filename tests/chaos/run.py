"""One run: the stack, a quiet pass over every input, the load under the killer, calm, and the verdict."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli.local.stack import Stack
from tests.chaos.invariants import check, read_digests
from tests.chaos.killer import Killer
from tests.chaos.load import Load, make_inputs
from tests.chaos.system import System
from tests.receiver import run_receiver

LEASE_SECONDS = 6.0  # a fifth of what it is by default, or most of the time would be spent waiting for its end
BEATS_OF_A_LEASE = 4
UPKEEP_SECONDS = 1.0
GPU_WORKERS = 2
WRONG = (
    "jobs_lost", "duplicate_results", "duplicate_webhook_ids", "missing_webhooks", "masks_differing_from_quiet_run",
    "orphans_beyond_policy",
)  # fmt: skip
CALM_SECONDS = 300
"""How long everything that was accepted may take to end once nobody is killed any more."""
SETTINGS = {
    "MASKLINE_UPKEEP__PERIOD_SECONDS": str(UPKEEP_SECONDS),
    "MASKLINE_RECORDINGS__CHUNK_SECONDS": "0.001",  # as many chunks as there are keyframes
    # One step may be hit by every kill, and trouble with what was killed is not what is to be seen here.
    "MASKLINE_JOBS__LOST_ATTEMPTS": "1000",
    "MASKLINE_JOBS__FAILED_ATTEMPTS": "1000",
}


@dataclass(frozen=True)
class Verdict:
    figures: dict[str, Any]

    @property
    def is_clean(self) -> bool:
        """Whether nothing was lost, done twice or made otherwise."""
        return not any(self.figures[name] for name in WRONG)


def run(*, kills: int, seed: int, say: Callable[[str], None], lease_seconds: float = LEASE_SECONDS) -> Verdict:
    inputs = make_inputs()
    leases = {
        "MASKLINE_WORKER__LEASE_SECONDS": str(lease_seconds),
        "MASKLINE_WORKER__HEARTBEAT_SECONDS": str(lease_seconds / BEATS_OF_A_LEASE),
    }
    with (
        tempfile.TemporaryDirectory(prefix="maskline-chaos-") as folder,
        run_receiver() as receiver,
        Stack(Path(folder), durable=False, gpu_workers=GPU_WORKERS, settings=SETTINGS | leases) as stack,
    ):
        system = System(stack)
        quiet = Load(system, inputs, receiver.url, seed=seed)
        for each in inputs:
            quiet.submit(each)
        wait_for_calm(system, quiet)
        expected = read_digests(system, quiet.accepted)
        say(f"{len(inputs)} inputs were made into masks with nobody killed")
        began = time.monotonic()
        with Load(system, inputs, receiver.url, seed=seed) as load:
            killer = Killer(system, seed=seed)
            for number in range(kills):
                say(f"{number + 1} of {kills}: {killer.strike()}")
        say(f"{len(load.accepted)} jobs were accepted meanwhile; {killer.describe()}")
        wait_for_calm(system, load)
        accepted = {**quiet.accepted, **load.accepted}
        figures = {
            "kills": kills, "seed": seed, "seconds": round(time.monotonic() - began, 1),
            "lease_and_upkeep_seconds": lease_seconds + UPKEEP_SECONDS,
            **check(system, accepted, expected, receiver), **killer.figures(),
        }  # fmt: skip
    for name, value in figures.items():
        say(f"{name}: {value}")
    return Verdict(figures)


def wait_for_calm(system: System, load: Load) -> None:
    """Until all that was accepted has ended, and nobody waits to be told, or the time for it is over."""
    deadline = time.monotonic() + CALM_SECONDS
    while time.monotonic() < deadline:
        ended = system.query("SELECT id::text FROM jobs WHERE state NOT IN ('queued', 'running')")
        told = system.query("SELECT 1 FROM webhook_deliveries WHERE state = 'pending'")
        if load.accepted.keys() <= {job_id for (job_id,) in ended} and not told:
            return
        time.sleep(0.2)
