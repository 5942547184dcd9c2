"""Who is sent to next: a receiver that is slow, or not known yet, never takes the places of those that are quick.

A lane is what shares its trouble: one endpoint, or one host that a tenant's jobs name. What is known of lanes is this
process's own: it is lost with the process, which costs the next one some seconds.
"""

import threading
import time
import uuid
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from shared.deliveries import DueDelivery, Waiting

SLOW_SECONDS = 2.0  # an attempt that takes longer, whatever came of it
FREE_FAILURES = 3  # in a row; from then on a lane rests after each, twice as long as before
LONGEST_REST_SECONDS = 60.0
CUT_REST_SECONDS = 1.0  # after an answer of which nobody reads the end
KNOWN_LANES = 10_000

Standing = Literal["quick", "new", "slow"]


@dataclass(frozen=True, kw_only=True)
class _Sending:
    lane: str
    tenant_id: uuid.UUID
    since: float


@dataclass(frozen=True, kw_only=True)
class _Known:
    """What the last attempts on a lane taught."""

    quick: bool
    failures: int
    rests_until: float


class Lanes:
    """Of `places`, lanes that are new may have a quarter, and slow ones another, one each at a time.

    So a dead receiver is not waited for by a new one either. No tenant has more than half of each. A lane that only
    fails is tried ever more rarely, up to once a minute, however much is due on it: one success, and all of it is sent.
    """

    def __init__(self, *, places: int, per_lane: int) -> None:
        self._places = places
        self._per_lane = per_lane
        self._shares: dict[Standing, int] = {"quick": places, "new": max(1, places // 4), "slow": max(1, places // 4)}
        self._lock = threading.Lock()  # guards all that follows
        self._sending: dict[tuple[uuid.UUID, int], _Sending] = {}
        """By delivery and attempt, as one that was asked for again may be on its way twice."""
        self._known: OrderedDict[str, _Known] = OrderedDict()
        """By lane, the one least recently used first."""

    @property
    def busy(self) -> int:
        with self._lock:
            return len(self._sending)

    def choose(self, waiting: Sequence[Waiting]) -> tuple[list[Waiting], list[Waiting]]:
        """Those for which there is a place now, in their order: of lanes that are well, and of others.

        A lane is well when its last attempt was quick and delivered.
        """
        with self._lock:
            now = time.monotonic()
            stuck = {each.lane for each in self._sending.values() if now - each.since > SLOW_SECONDS}
            named = {each.lane for each in self._sending.values()} | {each.lane for each in waiting}
            standings = {lane: self._rate(lane, stuck) for lane in named}
            lanes: Counter[str] = Counter()
            shares: Counter[Standing] = Counter()
            tenants: Counter[tuple[Standing, uuid.UUID]] = Counter()

            def take(each: _Sending | Waiting) -> None:
                lanes[each.lane] += 1
                shares[standings[each.lane]] += 1
                tenants[standings[each.lane], each.tenant_id] += 1

            for sending in self._sending.values():
                take(sending)
            well: list[Waiting] = []
            others: list[Waiting] = []
            for each in waiting:
                standing = standings[each.lane]
                share = self._shares[standing]
                known = self._known.get(each.lane)
                if (
                    shares.total() < self._places
                    and (known is None or now >= known.rests_until)
                    and lanes[each.lane] < (self._per_lane if standing == "quick" else 1)
                    and shares[standing] < share
                    and tenants[standing, each.tenant_id] < max(1, share // 2)
                ):
                    take(each)
                    is_well = standing == "quick" and known is not None and not known.failures
                    (well if is_well else others).append(each)
            return well, others

    def enter(self, delivery: DueDelivery) -> None:
        """From now on it has a place."""
        with self._lock:
            self._sending[delivery.id, delivery.attempt] = _Sending(
                lane=delivery.lane, tenant_id=delivery.tenant_id, since=time.monotonic()
            )

    def leave(self, delivery: DueDelivery, *, delivered: bool, cut: bool = False) -> None:
        """Its place is free, and its lane known by the time that it took and what came of it. One whose answers have to
        be cut counts as slow, and rests after each, as otherwise it would be the busiest of all."""
        with self._lock:
            now = time.monotonic()
            sending = self._sending.pop((delivery.id, delivery.attempt))
            before = self._known.pop(sending.lane, None)
            failures = 0 if delivered else 1 + (before.failures if before is not None else 0)
            self._known[sending.lane] = _Known(
                quick=now - sending.since <= SLOW_SECONDS and not cut,
                failures=failures,
                rests_until=now + max(_rest_seconds(failures), CUT_REST_SECONDS if cut else 0.0),
            )
            if len(self._known) > KNOWN_LANES:
                self._known.popitem(last=False)

    def _rate(self, lane: str, stuck: set[str]) -> Standing:
        if lane in stuck:
            return "slow"
        known = self._known.get(lane)
        return "new" if known is None else "quick" if known.quick else "slow"


def _rest_seconds(failures: int) -> float:
    if failures < FREE_FAILURES:
        return 0.0
    return min(2.0 ** min(failures - FREE_FAILURES, 10), LONGEST_REST_SECONDS)
