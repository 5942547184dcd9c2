"""Work that goes on beside the model, in order and never far from it: what comes before it, and what comes after."""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class _End:
    """Comes after the last item: there are no more, or making the next one raised this."""

    error: BaseException | None


@contextmanager
def ahead(items: Iterator[Item], *, depth: int) -> Iterator[Iterator[Item]]:
    """The same items, made in a thread that is at most `depth` of them ahead.

    What making them raises is raised where they are taken. The thread has ended when the block has, however it ended.
    """
    ready: queue.SimpleQueue[Item | _End] = queue.SimpleQueue()
    room, unwanted = threading.Semaphore(depth), threading.Event()

    def make() -> None:
        try:
            for item in items:
                room.acquire()
                if unwanted.is_set():
                    return
                ready.put(item)
        except BaseException as error:
            ready.put(_End(error))
        else:
            ready.put(_End(None))

    def take() -> Iterator[Item]:
        while not isinstance(item := ready.get(), _End):
            room.release()
            yield item
        if item.error is not None:
            raise item.error

    thread = threading.Thread(target=make, name="ahead", daemon=True)
    thread.start()
    try:
        yield take()
    finally:
        unwanted.set()
        room.release()
        thread.join()


@contextmanager
def behind(work: Callable[[Item], None], *, depth: int) -> Iterator[Callable[[Item], None]]:
    """A function that has `work` done by a thread, item by item, which is at most `depth` of them behind.

    What the work raises is raised at the next item, or when the block ends; everything given is done by then, unless
    the block ended with an error.
    """
    given: queue.Queue[Item | None] = queue.Queue(depth)
    failed: list[BaseException] = []
    unwanted = threading.Event()

    def run() -> None:
        while (item := given.get()) is not None:
            if failed or unwanted.is_set():
                continue
            try:
                work(item)
            except BaseException as error:
                failed.append(error)

    def give(item: Item) -> None:
        if failed:
            raise failed[0]
        given.put(item)

    thread = threading.Thread(target=run, name="behind", daemon=True)
    thread.start()
    try:
        yield give
    except BaseException:
        unwanted.set()
        raise
    finally:
        given.put(None)
        thread.join()
    if failed:
        raise failed[0]
