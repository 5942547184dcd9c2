"""Workers in processes of their own, with a runner, a heart and a sleeping model each, that work when they are told."""

import importlib
import multiprocessing
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import Synchronized

import structlog

from bench._film import Film, publish, queue_chunks
from bench._meter import mark, peak_bytes
from bench._service import SleepingEngine, connect
from shared.broker import GPU
from shared.config import Settings
from shared.inference.device import choose_device

STOP_SECONDS = 10


@dataclass(frozen=True)
class Hand:
    """One of them. `given` counts the frames its model was given, also when it is killed."""

    process: BaseProcess
    orders: Connection
    given: "Synchronized[int]"

    def begin(self, latency: float) -> None:
        """Let it run whatever is queued."""
        self.orders.send(latency)

    def wait(self) -> None:
        """Until it finds nothing more to do. Raises EOFError when it has died."""
        self.orders.recv()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


@contextmanager
def open_crew(settings: Settings, tenant_id: uuid.UUID, *, workers: int) -> Iterator[list[Hand]]:
    """So many workers, all of them ready."""
    context = multiprocessing.get_context("spawn")
    crew = []
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            given = context.Value("l", 0)
            process = context.Process(target=_work, args=(settings, tenant_id, theirs, given), daemon=True)
            process.start()
            theirs.close()  # so that its death is heard
            crew.append(Hand(process, ours, given))
        for hand in crew:
            hand.wait()
        yield crew
    finally:
        for hand in crew:
            hand.orders.close()
        for hand in crew:
            hand.process.join(STOP_SECONDS)
            hand.kill()


def measure_chunk(
    settings: Settings, tenant_id: uuid.UUID, films: tuple[Film, Film], latency: float
) -> tuple[int, int]:
    """For `in_child`: what the process has once a chunk of the first film was made, and what one of the second adds."""
    device = choose_device("cpu")
    quiet()
    with connect(settings, tenant_id) as service:
        engine = SleepingEngine(latency=latency, batch_images=1)
        before = taken = 0
        for film in films:
            job_id = queue_chunks(service, film)
            with service.runner(GPU, engine) as runner:
                before = mark(device)
                taken = peak_bytes(runner.run_until_idle, device)
            publish(service, job_id)
    return before, taken


def quiet() -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))  # errors alone


def _work(settings: Settings, tenant_id: uuid.UUID, orders: Connection, given: "Synchronized[int]") -> None:
    importlib.import_module("worker.chunks")  # else the first chunk pays for it

    def count(images: int) -> None:
        given.value += images

    quiet()
    engine = SleepingEngine(latency=0, batch_images=1, count=count)
    with connect(settings, tenant_id) as service, service.runner(GPU, engine) as runner:
        orders.send(None)
        while True:
            try:
                engine.latency = orders.recv()
            except EOFError:  # nobody gives orders any more
                return
            runner.run_until_idle()
            orders.send(None)
