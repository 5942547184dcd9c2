"""How long each stage took, where one stage may be called for in the middle of another."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Seconds by stage; a stage inside another is not counted with it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._stage: str | None = None
        self._since = 0.0

    def __getitem__(self, stage: str) -> float:
        return self._seconds[stage]

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        outer = self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def _switch(self, name: str | None) -> str | None:
        # CUDA only queues work; without waiting for it, a stage would be charged for the one before it.
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now, previous = time.perf_counter(), self._stage
        if previous is not None:
            self._seconds[previous] += now - self._since
        self._stage, self._since = name, now
        return previous
