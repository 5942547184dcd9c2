"""What a step works with, whatever its kind."""

import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from shared.config import Settings
from shared.models import Job
from shared.storage import Storage


class Tell(Protocol):
    """Says where the step is: its stage, and how many frames it has done. Raises as `checkpoint` does."""

    def __call__(self, stage: str, done: int = 0) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Desk:
    storage: Storage
    settings: Settings
    checkpoint: Callable[[], None]
    """To be called between pieces of work; raises to stop it."""
    tell: Tell

    def storage_of(self, job: Job) -> Storage:
        """Where the job's file lies."""
        bucket = job.source.get("bucket")
        return self.storage.other(bucket) if bucket else self.storage


@contextmanager
def timed(seconds: MutableMapping[str, float], stage: str) -> Iterator[None]:
    """Add what the block takes to the stage's seconds."""
    started = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - started
