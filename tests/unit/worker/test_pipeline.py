"""What runs beside the model stays in order, stays near, and leaves neither an error nor a thread behind."""

import threading
from collections.abc import Iterator

import pytest

from worker.pipeline import ahead, behind


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate()} & {"ahead", "behind"}


def counting(made: list[int]) -> Iterator[int]:
    for number in range(100):
        made.append(number)
        yield number


def test_items_come_in_their_order() -> None:
    with ahead(counting([]), depth=3) as items:
        assert list(items) == list(range(100))
    assert not threads()


def test_what_is_ahead_waits_for_whoever_takes_it() -> None:
    made: list[int] = []
    with ahead(counting(made), depth=3) as items:
        for number in items:
            assert len(made) <= number + 1 + 3 + 1, "one taken, three ready, one in hand"
            if number == 20:
                break
    assert len(made) < 30
    assert not threads()


def test_an_error_comes_after_the_items_before_it() -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise KeyError("two")

    with ahead(failing(), depth=3) as items:
        assert next(items) == 1
        with pytest.raises(KeyError, match="two"):
            next(items)


def test_work_is_done_in_order_and_all_of_it_when_the_block_ends() -> None:
    done: list[int] = []
    with behind(done.append, depth=2) as give:
        for number in range(50):
            give(number)
    assert done == list(range(50))
    assert not threads()


def test_work_that_is_behind_holds_up_whoever_gives_more() -> None:
    gate, done, given = threading.Semaphore(0), list[int](), list[int]()

    def work(number: int) -> None:
        gate.acquire()
        done.append(number)

    def give_all() -> None:
        with behind(work, depth=2) as give:
            for number in range(10):
                give(number)
                given.append(number)

    giver = threading.Thread(target=give_all)
    giver.start()
    giver.join(0.3)
    assert len(given) <= 3, "two waiting, one in hand"
    for _ in range(10):
        gate.release()
    giver.join()
    assert done == list(range(10))


def test_what_the_work_raises_is_raised_where_it_was_given() -> None:
    def work(number: int) -> None:
        if number == 3:
            raise KeyError("three")

    def give_all(numbers: range) -> None:
        with behind(work, depth=1) as give:
            for number in numbers:
                give(number)

    for numbers in (range(100), range(3, 4)):
        with pytest.raises(KeyError, match="three"):
            give_all(numbers)
    assert not threads()


def test_after_an_error_in_the_block_no_more_work_is_begun() -> None:
    began, gate = list[int](), threading.Event()

    def work(number: int) -> None:
        began.append(number)
        gate.wait(5)

    def give_up() -> None:
        with behind(work, depth=5) as give:
            for number in range(4):
                give(number)
            while not began:
                pass
            threading.Timer(0.1, gate.set).start()
            raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        give_up()
    assert began == [0]
    assert not threads()
