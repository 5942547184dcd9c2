"""Deliveries taken and reported back as a sender does, without anything being sent."""

from typing import Any

from shared import deliveries
from shared.db import SessionFactory
from shared.deliveries import DueDelivery, Outcome


def take_delivery(sessions: SessionFactory) -> DueDelivery | None:
    """As a sender does that has one place."""
    with sessions.begin() as session:
        claimed = deliveries.claim(session, [each.id for each in deliveries.find_due(session, per_lane=1)][:1])
    return claimed[0] if claimed else None


def send_in_vain(sessions: SessionFactory, **outcome: Any) -> None:
    """As a sender does whose receiver says 500, or what else is given."""
    due = take_delivery(sessions)
    assert due is not None
    with sessions.begin() as session:
        deliveries.record(session, due, Outcome(**{"status": 500, **outcome}))
