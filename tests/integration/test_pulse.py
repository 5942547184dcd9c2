"""A parent knows which of its children have no pulse, though none of their threads can say so."""

import multiprocessing
import threading

from tests.integration.conftest import wait_until
from tests.integration.processes import bury, fork
from worker.pulse import Pulses


def test_a_parent_finds_who_has_no_pulse_and_neither_the_lively_nor_the_dead() -> None:
    pulses = Pulses()

    def live() -> None:
        pulses.enter(0)
        pulses.show(0, threading.Event())

    pids = [fork(live), fork(lambda: pulses.enter(1)), fork(lambda: pulses.enter(2))]
    bury(pids[2])
    try:
        wait_until(lambda: pulses.find_silent(seconds=2))
        assert pulses.find_silent(seconds=2) == [pids[1]]
    finally:
        for pid in pids[:2]:
            bury(pid)


def test_whoever_left_its_place_is_not_missed() -> None:
    pulses, left = Pulses(), multiprocessing.Event()

    def leave() -> None:
        pulses.enter(0)
        pulses.clear(0)
        left.set()

    pid = fork(leave)
    try:
        assert left.wait(10)
        assert pulses.find_silent(seconds=-1) == []
    finally:
        bury(pid)
