"""A worker in this process: the real runner and heart on the real servers; only the model is a fake."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from shared.broker import GPU, Hints
from shared.config import Settings
from shared.db import SessionFactory
from shared.inference.recipe import Recipe
from shared.models import Worker
from shared.storage import Storage
from worker.heart import Heart
from worker.runner import Runner

if TYPE_CHECKING:
    from shared.inference.engine import Engine

WAIT_SECONDS = 30
CLASS_ID = 1
"""What the fake model sees everywhere."""


def nothing() -> None:
    pass


def see_one_class(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.full(image.shape[:2], CLASS_ID, dtype=np.uint8)


@dataclass(frozen=True)
class MadeBy:
    """As the engine's ModelInfo."""

    name: str = "a fake model"
    revision: str = "1"
    dtype: str = "float32"
    input_size: tuple[int, int] = (64, 32)
    passes: int = 1
    device: str = "cpu"
    label_space: str = "demo"


@dataclass(frozen=True)
class Made:
    """As the engine's Segmentation."""

    mask: NDArray[np.uint8]
    confidence: NDArray[np.uint8] | None = None
    load_seconds: float = 0.0
    preprocess_seconds: float = 0.1
    inference_seconds: float = 0.2
    postprocess_seconds: float = 0.3
    peak_gpu_bytes: int = 0
    model: MadeBy = field(default_factory=MadeBy)
    warnings: tuple[str, ...] = ()


@dataclass
class FakeEngine:
    """Between its two checkpoints happens what the test wants to happen while a model runs."""

    meanwhile: Callable[[], None] = nothing
    batch_images: int = 1
    label: Callable[[NDArray[np.uint8]], NDArray[np.uint8]] = see_one_class
    asked: list[tuple[tuple[int, ...], str, int | None]] = field(default_factory=list)
    """The shape, the mode and the input size of every image."""
    batches: list[int] = field(default_factory=list)
    """How many images went through the model together, for every time."""

    def segment(self, image: NDArray[np.uint8], mode: str, recipe: Recipe, *, checkpoint: Callable[[], None]) -> Made:
        [made] = self.segment_batch([image], mode, recipe, checkpoint=checkpoint)
        return made

    def segment_batch(
        self, images: Sequence[NDArray[np.uint8]], mode: str, recipe: Recipe, *, checkpoint: Callable[[], None]
    ) -> list[Made]:
        checkpoint()
        self.asked += [(image.shape, mode, recipe.input_size) for image in images]
        self.batches.append(len(images))
        self.meanwhile()
        checkpoint()
        made = []
        for image in images:
            mask = self.label(image)
            made.append(Made(mask=mask, confidence=np.full_like(mask, 255) if recipe.confidence else None))
        return made

    def input_size(self, width: int, height: int, mode: str, recipe: Recipe) -> tuple[int, int] | None:
        """As the real one's: the side that the recipe asks for, and the aspect of the image."""
        assert mode
        side = recipe.input_size or 64
        return side, round(side * height / width)


@dataclass(frozen=True, kw_only=True)
class Workbench:
    settings: Settings
    sessions: SessionFactory
    storage: Storage
    hints: Hints
    batch_images: int = 1
    label: Callable[[NDArray[np.uint8]], NDArray[np.uint8]] = see_one_class

    def run(
        self,
        meanwhile: Callable[[], None] = nothing,
        *,
        draining: threading.Event | None = None,
        queue_name: str = GPU,
    ) -> FakeEngine:
        """Run whatever is queued, as a worker process that was woken does; `meanwhile` is called inside the model."""
        with self.runner(meanwhile, draining=draining, queue_name=queue_name) as (runner, engine):
            runner.run_until_idle()
        return engine

    def run_one(self) -> None:
        """Run the next step that is queued, now or soon."""
        deadline = time.monotonic() + WAIT_SECONDS
        with self.runner() as (runner, engine):
            while not engine.asked:
                assert time.monotonic() < deadline, "no step was queued"
                runner.run_until_idle()
                time.sleep(0.02)

    @contextmanager
    def runner(
        self,
        meanwhile: Callable[[], None] = nothing,
        *,
        draining: threading.Event | None = None,
        queue_name: str = GPU,
    ) -> Iterator[tuple[Runner, FakeEngine]]:
        engine, flag = FakeEngine(meanwhile, self.batch_images, self.label), draining or threading.Event()
        row = Worker(host="bench", pid=1, queue=queue_name, device="cpu", memory_bytes=0, modes=["demo"])
        with self.sessions.begin() as session:
            session.add(row)
        limits = self.settings.worker
        heart = Heart(
            self.sessions, worker=row, draining=flag,
            beat_seconds=limits.heartbeat_seconds, lease_seconds=limits.lease_seconds,
            obey_seconds=limits.obey_seconds,
        )  # fmt: skip
        try:
            yield Runner(
                settings=self.settings, sessions=self.sessions, storage=self.storage, hints=self.hints, heart=heart,
                draining=flag, queue_name=queue_name, engine=cast("Engine", engine) if queue_name == GPU else None,
            ), engine  # fmt: skip
        finally:
            heart.stop()
