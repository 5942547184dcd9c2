"""Places for sends: quick receivers have as many as there are, new and slow ones a share that leaves the others be."""

import uuid
from collections.abc import Callable, Sequence

import pytest

from shared.deliveries import DueDelivery, Waiting
from shared.models import create_id
from worker import lanes
from worker.lanes import Lanes

TENANT = create_id()
OTHER = create_id()


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(lanes, "time", clock)
    return clock


def waiting(*named: str, tenant: uuid.UUID = TENANT) -> list[Waiting]:
    return [Waiting(id=create_id(), tenant_id=tenant, lane=lane) for lane in named]


def send(places: Lanes, chosen: Sequence[Waiting]) -> list[DueDelivery]:
    sent = [
        DueDelivery(
            id=each.id, tenant_id=each.tenant_id, endpoint_id=None, lane=each.lane, attempt=1, position=1, url="",
            body="", secrets=(), type="ping",
        )
        for each in chosen
    ]  # fmt: skip
    for each in sent:
        places.enter(each)
    return sent


@pytest.fixture
def known(clock: Clock) -> Callable[..., Lanes]:
    """Sixteen places, and lanes of which it is known whether they are quick or slow."""

    def make(*, quick: Sequence[str] = (), slow: Sequence[str] = ()) -> Lanes:
        places = Lanes(places=16, per_lane=4)
        for lane in (*quick, *slow):
            [sent] = send(places, waiting(lane))
            clock.now += 10 if lane in slow else 0.1
            places.leave(sent, delivered=True)
        return places

    return make


def pick(places: Lanes, named: list[Waiting]) -> list[Waiting]:
    """All that have a place, in the order in which they are begun."""
    well, others = places.choose(named)
    return [*well, *others]


def chosen(places: Lanes, named: list[Waiting]) -> list[str]:
    return [each.lane for each in pick(places, named)]


def test_a_quick_lane_has_several_places_and_a_new_or_slow_one_has_one(known: Callable[..., Lanes]) -> None:
    places = known(quick=["quick"], slow=["slow"])
    assert chosen(places, waiting(*["quick"] * 9)) == ["quick"] * 4
    assert chosen(places, waiting(*["slow"] * 9)) == ["slow"]
    assert chosen(places, waiting(*["new"] * 9)) == ["new"]


def test_what_is_on_its_way_counts(known: Callable[..., Lanes]) -> None:
    places = known(quick=["quick"])
    sent = send(places, waiting("quick", "quick", "quick"))
    assert chosen(places, waiting(*["quick"] * 9)) == ["quick"]
    places.leave(sent[0], delivered=True)
    assert chosen(places, waiting(*["quick"] * 9)) == ["quick"] * 2
    assert places.busy == 2


def test_slow_lanes_leave_places_for_new_ones_and_both_for_quick_ones(known: Callable[..., Lanes]) -> None:
    slow, new = [f"slow {number}" for number in range(20)], [f"new {number}" for number in range(20)]
    places = known(quick=["quick"], slow=slow)
    for tenant in (TENANT, OTHER):
        send(places, pick(places, waiting(*slow[:10], *new[:10], tenant=tenant)))
        slow, new = slow[10:], new[10:]
    assert places.busy == 8, "a quarter of each"
    assert chosen(places, waiting(*slow, *new, *["quick"] * 4)) == ["quick"] * 4


def test_no_tenant_has_more_than_half_of_any_share(known: Callable[..., Lanes]) -> None:
    quick = [f"quick {number}" for number in range(20)]
    places = known(quick=quick)
    send(places, pick(places, waiting(*quick)))
    assert places.busy == 8
    assert len(pick(places, waiting(*quick, tenant=OTHER))) == 8
    assert len(pick(places, waiting("a", "b", "c", "d"))) == 2


def test_there_are_no_more_places_than_there_are(known: Callable[..., Lanes]) -> None:
    quick = [f"quick {number}" for number in range(20)]
    places = known(quick=quick)
    for _ in range(5):
        send(places, pick(places, waiting(*quick, tenant=create_id())))
    assert places.busy == 16


def test_a_lane_on_which_something_is_stuck_is_slow_before_it_has_ended(
    known: Callable[..., Lanes], clock: Clock
) -> None:
    places = known(quick=["quick"])
    [stuck] = send(places, waiting("quick"))
    clock.now += 3
    assert chosen(places, waiting("quick")) == []
    places.leave(stuck, delivered=True)
    assert chosen(places, waiting("quick", "quick")) == ["quick"]


def test_a_lane_that_is_quick_again_is_as_good_as_any(known: Callable[..., Lanes], clock: Clock) -> None:
    places = known(slow=["lane"])
    [sent] = send(places, waiting("lane"))
    places.leave(sent, delivered=True)
    assert chosen(places, waiting(*["lane"] * 9)) == ["lane"] * 4


def test_a_lane_whose_answers_have_to_be_cut_rests_after_each_and_is_as_slow_ones(
    known: Callable[..., Lanes], clock: Clock
) -> None:
    places = known(quick=["lane"])
    [sent] = send(places, waiting("lane"))
    places.leave(sent, delivered=True, cut=True)
    assert chosen(places, waiting(*["lane"] * 9)) == []
    clock.now += lanes.CUT_REST_SECONDS
    assert chosen(places, waiting(*["lane"] * 9)) == ["lane"]


def test_the_same_delivery_may_be_on_its_way_twice(known: Callable[..., Lanes]) -> None:
    """When it was asked for again meanwhile."""
    places = known()
    [first] = send(places, waiting("lane"))
    second = DueDelivery(**{**vars(first), "attempt": 2})
    places.enter(second)
    places.leave(first, delivered=True)
    places.leave(second, delivered=True)
    assert places.busy == 0


def test_what_is_known_of_lanes_does_not_grow_for_ever(
    known: Callable[..., Lanes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "KNOWN_LANES", 2)
    places = known(quick=["first", "second", "third"])
    assert chosen(places, waiting(*["first"] * 2, *["third"] * 2)) == ["third", "third", "first"]


def test_a_lane_that_only_fails_is_tried_ever_more_rarely_and_one_success_frees_it(
    known: Callable[..., Lanes], clock: Clock
) -> None:
    places, pauses = known(quick=["lane"]), []
    clock.now = 10  # a whole number, which adds up exactly
    for _ in range(12):
        [sent] = send(places, pick(places, waiting("lane")))
        places.leave(sent, delivered=False)
        began = clock.now
        while not pick(places, waiting("lane")):
            clock.now += 0.5
        pauses.append(clock.now - began)
    assert pauses == [0, 0, 1, 2, 4, 8, 16, 32, 60, 60, 60, 60]
    [sent] = send(places, pick(places, waiting("lane")))
    places.leave(sent, delivered=True)
    assert chosen(places, waiting(*["lane"] * 9)) == ["lane"] * 4


def test_a_lane_is_well_when_its_last_attempt_was_quick_and_delivered(known: Callable[..., Lanes]) -> None:
    places = known(quick=["well", "failing"], slow=["slow"])
    [sent] = send(places, waiting("failing"))
    places.leave(sent, delivered=False)
    well, others = places.choose(waiting("slow", "failing", "new", "well"))
    assert [each.lane for each in well] == ["well"]
    assert [each.lane for each in others] == ["slow", "failing", "new"]
