"""The sender of webhooks: many at once, none held up by another, and what is on its way when it is closed."""

import socket
import threading

import pytest
from sqlalchemy import select

from shared import deliveries, endpoints, webhooks
from shared.config import Webhooks
from shared.db import SessionFactory
from shared.models import Tenant, WebhookDelivery
from tests.integration.conftest import MakeJob, read_only, wait_until
from tests.receiver import Receiver, say_nothing, scripted
from worker.deliver import Sender


def test_news_reach_others_while_a_receiver_hangs(
    sessions: SessionFactory, receiver: Receiver, end_job: MakeJob, tenant: Tenant
) -> None:
    """The one that hangs does so until the others have all they are to have, not for a time."""
    released, impatient = threading.Event(), Webhooks(total_timeout_seconds=30, allow_private_addresses=True)
    running = Sender(sessions, impatient)

    def hang(_: socket.socket) -> None:
        released.wait(20)

    with scripted(hang) as url:
        with sessions.begin() as session:
            endpoints.register(session, tenant.id, url=url, events=(), description=None, most=1)
        running.start()
        try:
            for number in range(10):
                end_job(receiver.url, details={"number": number})
                running.wake()
            wait_until(lambda: len(receiver.deliveries) == 10)
            assert not released.is_set()
        finally:
            released.set()
            running.close()


def test_a_lane_with_many_due_does_not_hide_the_others(end_job: MakeJob, sessions: SessionFactory) -> None:
    for _ in range(30):
        end_job("https://busy.example/hook")
    end_job("https://quiet.example/hook")
    with sessions() as session:
        due = deliveries.find_due(session, per_lane=4)
    assert sorted(each.lane.split()[1] for each in due) == ["busy.example"] * 4 + ["quiet.example"]


def test_a_sender_finds_what_nobody_woke_it_for(sessions: SessionFactory, receiver: Receiver, end_job: MakeJob) -> None:
    running = Sender(sessions, Webhooks(allow_private_addresses=True))
    running.start()
    end_job(receiver.url)
    wait_until(lambda: len(receiver.deliveries) == 1)
    running.close()


def test_a_sender_that_is_closed_waits_for_what_is_on_its_way_and_begins_nothing_more(
    sessions: SessionFactory, end_job: MakeJob
) -> None:
    arrived = threading.Event()
    running = Sender(sessions, Webhooks(total_timeout_seconds=1, allow_private_addresses=True))

    def arrive(connection: socket.socket) -> None:
        arrived.set()
        say_nothing(connection)

    with scripted(arrive) as url:
        end_job(url)
        running.start()
        assert arrived.wait(20)
        running.close()
        end_job("https://receiver.example")
    with sessions() as session:
        rows = session.scalars(select(WebhookDelivery).order_by(WebhookDelivery.id)).all()
    assert [(row.attempt, bool(row.last_error)) for row in rows] == [(1, True), (0, False)]


def test_a_delivery_that_cannot_be_sent_at_all_is_given_up_in_the_end(
    sender: Sender, end_job: MakeJob, sessions: SessionFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were it not noted, it would be sent for ever, as if its sender had died each time."""
    monkeypatch.setattr(webhooks, "sign", None)
    end_job("https://receiver.example")
    sender.send_due()
    row = read_only(sessions, WebhookDelivery)
    assert (row.attempt, row.last_error) == (1, "TypeError")
