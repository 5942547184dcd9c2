"""A round: several steps at once, each in a place of its own, of which the model takes those together that it can.

The life of a step is `worker/runner.py` and the same in a round: its place is a thread that fetches, decodes, encodes,
stores and writes the outcome. Only where it would call the engine it asks here instead, and sleeps until its mask is
there. The engine runs in the thread that runs the round, its only one.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from shared.errors import LeaseLost
from shared.inference.errors import ModelUnavailable
from shared.inference.recipe import Recipe
from worker.heart import Draining, Flag, Stopped

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from shared.inference.engine import Engine, Segmentation

MOST_PLACES = 64
BUSY_PLACES = 8  # fetch or store at a time; the others wait for the model. Connections are as many, and a few
DECODED_BYTES = 2**30  # of images in memory, above which no further step is begun
LINGER_SECONDS = 0.1  # that the model, idle, waits for one more image before it runs an incomplete batch
ROUND_SECONDS = 2.0  # after which no further step is begun, so that steps of another kind have their turn

Task = Callable[["Round"], None]


def count_places(engine: "Engine") -> int:
    """How many steps a worker may hold at once: twice what the model takes together, one half on its way.

    One where the model takes one image at a time, as on a CPU. That has no core to spare for the others' files.
    """
    return min(2 * engine.batch_images, MOST_PLACES) if engine.batch_images > 1 else 1


@dataclass(frozen=True, kw_only=True)
class _Request:
    image: "NDArray[np.uint8]"
    mode: str
    recipe: Recipe
    kin: Hashable
    """Requests in which it is the same go through the model together."""
    checkpoint: Callable[[], None]
    answer: "Future[Segmentation]" = field(default_factory=Future)


class Round:
    """Runs `first`, whatever happens, and `others` while there is time. Each is given the round as its engine."""

    def __init__(self, engine: "Engine", first: Task, others: Sequence[Task], *, draining: Flag) -> None:
        self._engine = engine
        self._tasks = deque([first, *others])
        self._first = first
        self._draining = draining
        self._closes_at = time.monotonic() + ROUND_SECONDS
        self._busy = threading.Semaphore(BUSY_PLACES)
        self._here = threading.local()  # its `place` is the number of this thread's
        self._changed = threading.Condition()  # guards all that follows
        self._open_places = 0
        self._coming: set[int] = set()
        """The places that may soon ask for a mask."""
        self._decoded: dict[int, int] = {}
        """Bytes of the image in each place."""
        self._waiting: list[_Request] = []
        self._running: list[_Request] = []
        self._broken: BaseException | None = None

    def run(self, places: int) -> None:
        """Returns once every task that was begun has ended; raises a group of what they raised."""
        self._open_places = min(places, len(self._tasks))
        self._coming = set(range(self._open_places))
        with ThreadPoolExecutor(self._open_places, thread_name_prefix="place") as pool:
            filled = [pool.submit(self._fill_place, place) for place in range(self._open_places)]
            try:
                while group := self._next_group():
                    self._infer(group)
            except BaseException as error:
                self._break(error)  # nobody may wait for a mask that will not come
                raise
        if errors := [raised for place in filled if (raised := place.exception())]:
            raise BaseExceptionGroup("steps of a round were left as they are", errors)

    def segment(
        self, image: "NDArray[np.uint8]", mode: str, recipe: Recipe, *, checkpoint: Callable[[], None]
    ) -> "Segmentation":
        """As the engine's, from a place of the round."""
        height, width = image.shape[:2]
        size = self._engine.input_size(width, height, mode, recipe)
        kin = object() if size is None else (mode, recipe, size)
        request = _Request(image=image, mode=mode, recipe=recipe, kin=kin, checkpoint=checkpoint)
        with self._changed:
            if self._broken is not None:
                raise self._broken
            self._coming.discard(self._here.place)
            self._decoded[self._here.place] = image.nbytes
            self._waiting.append(request)
            self._changed.notify_all()
        self._busy.release()
        try:
            return request.answer.result()
        finally:
            self._busy.acquire()

    # --- the places ------------------------------------------------------------------------------------------------

    def _fill_place(self, place: int) -> None:
        self._here.place = place
        try:
            while (task := self._next_task(place)) is not None:
                with self._busy:
                    task(self)
        finally:
            with self._changed:
                self._leave(place)
                self._open_places -= 1
                self._changed.notify_all()

    def _next_task(self, place: int) -> Task | None:
        with self._changed:
            self._leave(place)
            self._changed.wait_for(lambda: self._is_over() or sum(self._decoded.values()) < DECODED_BYTES)
            if self._is_over():
                return None
            self._coming.add(place)
            return self._tasks.popleft()

    def _leave(self, place: int) -> None:
        self._coming.discard(place)
        self._decoded.pop(place, None)
        self._changed.notify_all()

    def _is_over(self) -> bool:
        if not self._tasks or self._tasks[0] is self._first:  # which is claimed already
            return not self._tasks
        late = time.monotonic() > self._closes_at
        return late or self._draining.is_set() or self._broken is not None

    # --- the model -------------------------------------------------------------------------------------------------

    def _next_group(self) -> list[_Request]:
        """What goes through the model next, as soon as it is worth it; empty when the round is over."""
        with self._changed:
            while self._open_places or self._waiting:
                group = self._largest_group()
                if group and (len(group) >= self._engine.batch_images or not self._coming):
                    return self._take(group)
                if not self._changed.wait(LINGER_SECONDS if group else None) and group:
                    return self._take(group)
            return []

    def _largest_group(self) -> list[_Request]:
        """Of equals, the one that has waited longest."""
        groups: dict[Hashable, list[_Request]] = {}
        for request in self._waiting:
            groups.setdefault(request.kin, []).append(request)
        most = self._engine.batch_images
        return max(groups.values(), key=lambda group: min(len(group), most), default=[])[:most]

    def _take(self, group: list[_Request]) -> list[_Request]:
        taken = {id(each) for each in group}
        self._waiting = [each for each in self._waiting if id(each) not in taken]
        self._running = group
        return group

    def _infer(self, group: list[_Request]) -> None:
        """Answer every request of the group; those that nobody wants any more by the reason why."""
        while group := _still_wanted(group):
            try:
                made = self._segment(group)
            except (LeaseLost, Stopped, Draining):
                continue
            except Exception as error:
                if len(group) == 1 or isinstance(error, ModelUnavailable):
                    for request in group:
                        request.answer.set_exception(error)
                else:  # it may be the fault of one of them
                    for request in group:
                        self._infer([request])
            else:
                for request, each in zip(group, made, strict=True):
                    request.answer.set_result(each)
            return

    def _segment(self, group: list[_Request]) -> "Sequence[Segmentation]":
        first = group[0]
        if len(group) == 1:
            return [self._engine.segment(first.image, first.mode, first.recipe, checkpoint=first.checkpoint)]
        images = [each.image for each in group]
        checkpoint = _checkpoint_of(group)
        return self._engine.segment_batch(images, first.mode, first.recipe, checkpoint=checkpoint)

    def _break(self, error: BaseException) -> None:
        with self._changed:
            self._broken = error
            for request in self._waiting + self._running:
                if not request.answer.done():
                    request.answer.set_exception(error)
            self._changed.notify_all()


def _still_wanted(group: list[_Request]) -> list[_Request]:
    wanted = []
    for request in group:
        try:
            request.checkpoint()
        except (LeaseLost, Stopped, Draining) as error:
            request.answer.set_exception(error)
        else:
            wanted.append(request)
    return wanted


def _checkpoint_of(group: list[_Request]) -> Callable[[], None]:
    """Stops the batch when nobody wants any of it, or the worker drains."""

    def check() -> None:
        reason: Any = None
        for request in group:
            try:
                request.checkpoint()
            except (LeaseLost, Stopped) as error:
                reason = error
            else:
                return
        raise reason

    return check
