"""Endpoints as deliveries find them: who is told of what, when one is left in peace, and when it is given up."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import select, text

from shared import deliveries, endpoints, lifecycle, tenants
from shared.db import SessionFactory
from shared.deliveries import Outcome
from shared.models import DeliveryState, JobState, Tenant, WebhookDelivery, WebhookEndpoint
from tests.integration.conftest import MakeJob, count_rows, make_late, read_only, twice
from tests.integration.deliveries import send_in_vain, take_delivery
from tests.receiver import Receiver, run_receiver
from worker.deliver import Sender
from worker.housekeeping import Housekeeping
from worker.upkeep import Upkeep

URL = "https://receiver.example/hook"
Register = Callable[..., WebhookEndpoint]


@pytest.fixture
def register(sessions: SessionFactory, tenant: Tenant) -> Register:
    def add(url: str = URL, *, events: tuple[str, ...] = (), owner: Tenant = tenant) -> WebhookEndpoint:
        with sessions.begin() as session:
            return endpoints.register(session, owner.id, url=url, events=events, description="a", most=20)

    return add


def told(sessions: SessionFactory, endpoint: WebhookEndpoint) -> list[str]:
    """What is on its way to it, or was."""
    with sessions() as session:
        wanted = select(WebhookDelivery.type).where(WebhookDelivery.endpoint_id == endpoint.id)
        return list(session.scalars(wanted.order_by(WebhookDelivery.created_at, WebhookDelivery.id)))


def read(sessions: SessionFactory, endpoint: WebhookEndpoint) -> WebhookEndpoint:
    with sessions() as session:
        return session.scalars(select(WebhookEndpoint).where(WebhookEndpoint.id == endpoint.id)).one()


def run(sessions: SessionFactory, statement: str) -> None:
    with sessions.begin() as session:
        session.execute(text(statement))


# --- who is told ---------------------------------------------------------------------------------------------------


def test_an_end_is_told_to_the_jobs_own_url_and_to_every_endpoint_that_wants_it(
    end_job: MakeJob, register: Register, sessions: SessionFactory
) -> None:
    everything, wanting, other = (
        register(f"{URL}/{number}", events=events)
        for number, events in enumerate([(), ("job.canceled", "job.failed"), ("job.succeeded",)])
    )
    end_job("https://its-own.example")
    assert [told(sessions, each) for each in (everything, wanting, other)] == [["job.canceled"], ["job.canceled"], []]
    assert count_rows(sessions, WebhookDelivery) == 3


@pytest.mark.parametrize("state", [JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELED, JobState.EXPIRED])
def test_every_end_is_told_once(job_in: MakeJob, register: Register, sessions: SessionFactory, state: JobState) -> None:
    endpoint = register()
    job_in(state)
    assert told(sessions, endpoint) == [f"job.{state}"]


def test_nobody_elses_endpoint_is_told(end_job: MakeJob, register: Register, sessions: SessionFactory) -> None:
    with sessions.begin() as session:
        stranger = tenants.create_tenant(session, "a stranger")
    register(owner=stranger)
    end_job()
    assert count_rows(sessions, WebhookDelivery) == 0


def test_an_end_that_is_rolled_back_is_not_told(
    make_job: MakeJob, register: Register, sessions: SessionFactory
) -> None:
    register()
    job = make_job()
    with sessions() as session:
        lifecycle.request_cancel(session, job.id)
        session.rollback()
    assert count_rows(sessions, WebhookDelivery) == 0


def test_an_endpoint_that_is_just_deleted_does_not_keep_a_job_from_ending(
    make_job: MakeJob, register: Register, sessions: SessionFactory
) -> None:
    endpoint, job = register(), make_job()
    with sessions.begin() as deleting:
        deleting.delete(endpoint)
        deleting.flush()
        with sessions.begin() as session:
            assert lifecycle.request_cancel(session, job.id).state == JobState.CANCELED
    assert count_rows(sessions, WebhookDelivery) == 0


def test_the_news_of_a_job_are_numbered(
    sender: Sender, receiver: Receiver, end_job: MakeJob, register: Register, sessions: SessionFactory
) -> None:
    endpoint = register(receiver.url)
    job = end_job()
    for _ in range(2):
        with sessions.begin() as session:
            lifecycle.retry(session, job.id)
        with sessions.begin() as session:
            lifecycle.request_cancel(session, job.id)
    sender.send_due()
    events: list[Any] = [each.verify(endpoint.secret) for each in receiver.deliveries]
    assert sorted(each["sequence"] for each in events) == [1, 2, 3]
    assert {each["data"]["id"] for each in events} == {str(job.id)}


def test_an_endpoint_is_called_at_the_url_that_it_has_by_then(
    sender: Sender, receiver: Receiver, end_job: MakeJob, register: Register, sessions: SessionFactory, tenant: Tenant
) -> None:
    endpoint = register()
    end_job()
    with sessions.begin() as session:
        endpoints.change(session, tenant.id, endpoint.id, {"url": receiver.url}, disabled=None)
    sender.send_due()
    [received] = receiver.deliveries
    assert received.verify(endpoint.secret)


# --- a receiver that asks for time ---------------------------------------------------------------------------------


def seconds_until(sessions: SessionFactory, column: str, table: str) -> float:
    with sessions() as session:
        return float(session.scalar(text(f"SELECT extract(epoch FROM {column} - now()) FROM {table}")))  # noqa: S608


@pytest.mark.parametrize("status", [429, 503])
def test_a_receiver_that_says_when_to_come_again_is_left_in_peace_until_then(
    sender: Sender, end_job: MakeJob, register: Register, sessions: SessionFactory, status: int
) -> None:
    with run_receiver(status=status, headers={"Retry-After": "120"}) as receiver:
        register(receiver.url)
        end_job()
        sender.send_due()
        end_job()
        sender.send_due()
    assert len(receiver.deliveries) == 1, "the news that came after it did not wait"
    assert 110 < seconds_until(sessions, "paused_until", "webhook_endpoints") <= 120
    waits = "(SELECT next_attempt_at FROM webhook_deliveries WHERE attempt = 1) AS first"
    assert 110 < seconds_until(sessions, "next_attempt_at", waits) <= 120 * 1.2


@pytest.mark.parametrize(
    ("status", "told", "least", "most"),
    [
        (429, "31536000", 3500, 3600 * 1.2),
        (503, "Fri, 31 Dec 9999 23:59:59 GMT", 3500, 3600 * 1.2),
        (429, "1", 4, 6),
        (429, "0", 4, 6),
        (429, "-5", 4, 6),
        (429, "Thu, 01 Jan 1970 00:00:00 GMT", 4, 6),
        (429, "soon", 4, 6),
        (429, "9" * 400, 4, 6),
        (500, "120", 4, 6),
        (302, "120", 4, 6),
    ],
)
def test_what_a_receiver_may_ask_for_is_bounded(
    sender: Sender, end_job: MakeJob, sessions: SessionFactory, status: int, told: str, least: float, most: float
) -> None:
    with run_receiver(status=status, headers={"Retry-After": told}) as receiver:
        end_job(receiver.url)
        sender.send_due()
    assert least < seconds_until(sessions, "next_attempt_at", "webhook_deliveries") <= most


def test_a_pause_is_over_when_something_is_asked_for(
    end_job: MakeJob, register: Register, sessions: SessionFactory, tenant: Tenant
) -> None:
    endpoint = register()
    end_job()
    send_in_vain(sessions, status=429, retry_after_seconds=100)
    with sessions.begin() as session:
        endpoints.ping(session, tenant.id, endpoint.id)
    due = take_delivery(sessions)
    assert due is not None
    assert due.type == "ping"


# --- one that is given up ------------------------------------------------------------------------------------------


def test_one_that_is_gone_is_disabled_and_the_others_are_told(
    sender: Sender, end_job: MakeJob, register: Register, sessions: SessionFactory
) -> None:
    other, deaf = register(f"{URL}/other", events=("webhook.disabled",)), register(events=("job.failed",))
    with run_receiver(status=410) as receiver:
        gone = register(receiver.url)
        end_job()
        sender.send_due()
        end_job()
        sender.send_due()
    assert len(receiver.deliveries) == 1
    row = read(sessions, gone)
    assert (bool(row.disabled_at), row.disabled_reason) == (True, "gone")
    assert (told(sessions, other), told(sessions, deaf)) == (["webhook.disabled"], [])
    with sessions() as session:
        body = session.scalars(select(WebhookDelivery.body).where(WebhookDelivery.endpoint_id == other.id)).one()
    assert json.loads(body)["data"] == {"id": str(gone.id), "description": "a", "reason": "gone"}


def test_one_that_failed_for_five_days_is_disabled_and_the_others_are_told_once(
    end_job: MakeJob, register: Register, sessions: SessionFactory
) -> None:
    failing = register()
    end_job()
    end_job()
    send_in_vain(sessions)
    assert (read(sessions, failing).failing_since, read(sessions, failing).disabled_at) != (None, None)
    other = register(f"{URL}/other")
    run(sessions, "UPDATE webhook_endpoints SET failing_since = failing_since - interval '4 days 23 hours'")
    with sessions.begin() as session:
        make_late(session, "webhook_deliveries", "next_attempt_at")
    first, second = take_all(sessions, 2)
    fail(sessions, first)
    assert read(sessions, failing).disabled_at is None
    run(sessions, "UPDATE webhook_endpoints SET failing_since = failing_since - interval '2 hours'")
    fail(sessions, second)
    assert read(sessions, failing).disabled_reason == "failing"
    assert told(sessions, other) == ["webhook.disabled"]


def test_one_success_and_the_days_are_counted_anew(
    end_job: MakeJob, register: Register, sessions: SessionFactory
) -> None:
    endpoint = register()
    for outcome in (500, 204, 500):
        end_job()
        send_in_vain(sessions, status=outcome)
        run(sessions, "UPDATE webhook_endpoints SET failing_since = failing_since - interval '4 days'")
    assert read(sessions, endpoint).disabled_at is None


def take_all(sessions: SessionFactory, count: int) -> list[deliveries.DueDelivery]:
    with sessions.begin() as session:
        taken = deliveries.claim(session, [each.id for each in deliveries.find_due(session, per_lane=count)])
    assert len(taken) == count
    return taken


def fail(sessions: SessionFactory, delivery: deliveries.DueDelivery) -> None:
    with sessions.begin() as session:
        deliveries.record(session, delivery, Outcome(status=500))


def test_a_jobs_own_url_that_is_gone_ends_that_delivery_alone(
    sender: Sender, end_job: MakeJob, sessions: SessionFactory
) -> None:
    with run_receiver(status=410) as receiver:
        end_job(receiver.url)
        sender.send_due()
        end_job(receiver.url)
        sender.send_due()
    assert len(receiver.deliveries) == 2


def test_what_waits_for_a_disabled_endpoint_is_given_up_when_it_is_due(
    upkeep: Upkeep, end_job: MakeJob, register: Register, sessions: SessionFactory, tenant: Tenant
) -> None:
    endpoint = register()
    end_job()
    end_job()
    send_in_vain(sessions)
    with sessions.begin() as session:
        endpoints.change(session, tenant.id, endpoint.id, {}, disabled=True)
    assert take_delivery(sessions) is None
    twice(upkeep.end_deliveries_of_disabled)
    with sessions() as session:
        rows = session.scalars(select(WebhookDelivery).order_by(WebhookDelivery.attempt)).all()
    assert [(row.state, row.last_error) for row in rows] == [
        (DeliveryState.FAILED, "the endpoint was disabled"), (DeliveryState.PENDING, None),
    ]  # fmt: skip


def test_deliveries_are_forgotten_long_after_they_ended(
    housekeeping: Housekeeping, end_job: MakeJob, sessions: SessionFactory
) -> None:
    end_job(URL)
    send_in_vain(sessions, status=410)
    end_job(URL)
    housekeeping.forget_deliveries()
    assert count_rows(sessions, WebhookDelivery) == 2
    run(sessions, "UPDATE webhook_deliveries SET finished_at = finished_at - interval '31 days'")
    housekeeping.forget_deliveries()
    assert read_only(sessions, WebhookDelivery).state == DeliveryState.PENDING


def test_an_endpoint_deleted_while_it_is_called_leaves_no_trace(
    end_job: MakeJob, register: Register, sessions: SessionFactory
) -> None:
    endpoint = register()
    end_job()
    due = take_delivery(sessions)
    assert due is not None
    with sessions.begin() as session:
        session.delete(endpoint)
    with sessions.begin() as session:
        assert deliveries.record(session, due, Outcome(status=200)) is None
