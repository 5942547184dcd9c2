"""Work that goes on beside the model, in order and never far from it: what comes before it, and what comes after."""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")

_WAIT_SECONDS = 0.1  # after which a thread that waits looks whether it is still wanted


@contextmanager
def ahead(items: Iterator[Item], *, depth: int) -> Iterator[Iterator[Item]]:
    """The same items, made in a thread that is at most `depth` of them ahead.

    What making them raises is raised where they are taken. The thread has ended when the block has, however it ended.
    """
    ready: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(depth)
    unwanted = threading.Event()

    def put(item: Item | None, error: BaseException | None) -> bool:
        while not unwanted.is_set():
            try:
                ready.put((item, error), timeout=_WAIT_SECONDS)
            except queue.Full:
                continue
            return True
        return False

    def make() -> None:
        try:
            for item in items:
                if not put(item, None):
                    return
        except BaseException as error:
            put(None, error)
        else:
            put(None, StopIteration())

    def take() -> Iterator[Item]:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]  # an item comes without an error

    thread = threading.Thread(target=make, name="ahead", daemon=True)
    thread.start()
    try:
        yield take()
    finally:
        unwanted.set()
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
