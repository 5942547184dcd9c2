"""Webhooks on their way: signed by the standard, sent until they arrive or time is up, and by one sender at a time."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from sqlalchemy import text
from standardwebhooks import Webhook, WebhookVerificationError

from shared import lifecycle, webhooks
from shared.config import Webhooks
from shared.db import SessionFactory
from shared.models import DeliveryState, Job, Tenant, WebhookDelivery
from shared.webhooks import DueDelivery
from tests.integration.conftest import MakeJob, count_rows, make_late, read_only
from tests.receiver import Receiver, run_receiver
from worker.deliver import READ_BYTES, Sender

Script = Callable[[socket.socket], None]

DRIP_SECONDS = 20


@pytest.fixture
def sender(sessions: SessionFactory) -> Sender:
    return Sender(sessions, Webhooks(total_timeout_seconds=1, connect_timeout_seconds=1, allow_private_addresses=True))


@pytest.fixture
def end_job(sessions: SessionFactory, make_job: MakeJob) -> Callable[..., Job]:
    """A job that has just ended, with news of it for the URL."""

    def end(url: str, **values: Any) -> Job:
        job = make_job(webhook_url=url, **values)
        with sessions.begin() as session:
            return lifecycle.request_cancel(session, job.id)

    return end


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with run_receiver() as running:
        yield running


def delivery(sessions: SessionFactory) -> WebhookDelivery:
    return read_only(sessions, WebhookDelivery)


def seconds_until_next(sessions: SessionFactory) -> float:
    with sessions() as session:
        seconds = session.scalar(text("SELECT extract(epoch FROM next_attempt_at - now()) FROM webhook_deliveries"))
    return float(seconds)


# --- what arrives --------------------------------------------------------------------------------------------------


def test_news_arrive_signed_as_the_reference_library_wants_it(
    sender: Sender, receiver: Receiver, end_job: Callable[..., Job], tenant: Tenant, sessions: SessionFactory
) -> None:
    job = end_job(receiver.url, details={"name": "Zoë ✓"})
    sender.send_due()
    [received] = receiver.deliveries
    event: dict[str, Any] = received.verify(tenant.webhook_secret)
    assert (event["type"], event["data"]["id"]) == ("job.canceled", str(job.id))
    assert event["data"]["metadata"] == {"name": "Zoë ✓"}
    assert received.headers["content-type"] == "application/json"
    assert delivery(sessions).state == DeliveryState.DELIVERED


def test_a_body_that_was_changed_on_its_way_does_not_verify(
    sender: Sender, receiver: Receiver, end_job: Callable[..., Job], tenant: Tenant
) -> None:
    end_job(receiver.url)
    sender.send_due()
    [received] = receiver.deliveries
    with pytest.raises(WebhookVerificationError):
        Webhook(tenant.webhook_secret).verify(received.body.replace("canceled", "succeeded"), received.headers)


def test_what_is_sent_is_what_was_recorded(
    sender: Sender, receiver: Receiver, end_job: Callable[..., Job], sessions: SessionFactory
) -> None:
    end_job(receiver.url)
    recorded = delivery(sessions).body
    sender.send_due()
    assert receiver.deliveries[0].body == recorded


def test_a_second_attempt_has_the_same_id_and_its_own_time(
    sender: Sender, end_job: Callable[..., Job], sessions: SessionFactory, tenant: Tenant
) -> None:
    with run_receiver(status=500) as receiver:
        end_job(receiver.url)
        sender.send_due()
        with sessions.begin() as session:
            make_late(session, "webhook_deliveries", "next_attempt_at")
        time.sleep(1.1)  # the header counts whole seconds
        sender.send_due()
    first, second = receiver.deliveries
    assert first.webhook_id == second.webhook_id
    assert first.body == second.body
    assert int(first.headers["webhook-timestamp"]) < int(second.headers["webhook-timestamp"])
    assert second.verify(tenant.webhook_secret)


def test_everything_that_is_due_is_sent(sender: Sender, receiver: Receiver, end_job: Callable[..., Job]) -> None:
    jobs = [end_job(receiver.url) for _ in range(3)]
    sender.send_due()
    assert [json.loads(each.body)["data"]["id"] for each in receiver.deliveries] == [str(job.id) for job in jobs]


def test_the_receiver_is_told_the_host_it_was_called_by(
    sender: Sender, receiver: Receiver, end_job: Callable[..., Job]
) -> None:
    end_job(receiver.url.replace("127.0.0.1", "localhost"))
    sender.send_due()
    [received] = receiver.deliveries
    assert received.headers["host"].startswith("localhost:")


def test_a_proxy_of_the_machine_is_not_used(
    sender: Sender, receiver: Receiver, end_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch, closed_port: int
) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{closed_port}")
    monkeypatch.setenv("ALL_PROXY", f"http://127.0.0.1:{closed_port}")
    end_job(receiver.url)
    sender.send_due()
    assert len(receiver.deliveries) == 1


def test_a_body_stays_under_20_kb_whatever_the_customer_keeps_in_it(
    end_job: Callable[..., Job], sessions: SessionFactory
) -> None:
    job = end_job("https://receiver.example", details={"a": "x" * 25_000})
    body = delivery(sessions).body
    event = json.loads(body)
    assert len(body.encode()) <= 20_000
    assert (event["data"]["id"], event["data"]["metadata"]) == (str(job.id), {})


# --- what the receiver answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
def test_any_2xx_is_delivered(
    sender: Sender, end_job: Callable[..., Job], sessions: SessionFactory, status: int
) -> None:
    with run_receiver(status=status) as receiver:
        end_job(receiver.url)
        sender.send_due()
    row = delivery(sessions)
    assert (row.state, row.last_status, row.attempt) == (DeliveryState.DELIVERED, status, 1)
    assert (row.next_attempt_at, bool(row.finished_at)) == (None, True)


@pytest.mark.parametrize("status", [300, 301, 302, 304, 307, 400, 401, 404, 429, 500, 502, 503, 504])
def test_anything_else_is_tried_again(
    sender: Sender, end_job: Callable[..., Job], sessions: SessionFactory, status: int
) -> None:
    with run_receiver(status=status) as receiver:
        end_job(receiver.url)
        sender.send_due()
        sender.send_due()
    assert len(receiver.deliveries) == 1, "it was sent again before its time"
    row = delivery(sessions)
    assert (row.state, row.last_status, row.attempt) == (DeliveryState.PENDING, status, 1)
    assert 0 < seconds_until_next(sessions) <= 5 * 1.2


def test_gone_ends_it(sender: Sender, end_job: Callable[..., Job], sessions: SessionFactory) -> None:
    with run_receiver(status=410) as receiver:
        end_job(receiver.url)
        sender.send_due()
    row = delivery(sessions)
    assert (row.state, row.last_status, row.next_attempt_at) == (DeliveryState.FAILED, 410, None)


def test_pauses_follow_the_schedule_of_the_standard_until_it_ends(
    end_job: Callable[..., Job], sessions: SessionFactory
) -> None:
    hours = 3600
    schedule = (5, 300, 1800, 2 * hours, 5 * hours, 10 * hours, 14 * hours, 20 * hours, 24 * hours)
    end_job("https://receiver.example")
    for pause in schedule:
        fail_once(sessions)
        assert delivery(sessions).state == DeliveryState.PENDING
        assert 0.99 * pause - 1 <= seconds_until_next(sessions) <= 1.2 * pause
        with sessions.begin() as session:
            make_late(session, "webhook_deliveries", "next_attempt_at")
    fail_once(sessions)
    assert (delivery(sessions).state, delivery(sessions).attempt) == (DeliveryState.FAILED, len(schedule) + 1)


def claim_due(sessions: SessionFactory) -> DueDelivery | None:
    with sessions.begin() as session:
        return webhooks.claim_due(session)


def fail_once(sessions: SessionFactory) -> None:
    due = claim_due(sessions)
    assert due is not None
    with sessions.begin() as session:
        webhooks.record_outcome(session, due, status=500, error=None)


def test_a_redirect_is_not_followed(end_job: Callable[..., Job], sender: Sender, receiver: Receiver) -> None:
    with scripted(answering(f"HTTP/1.1 307 Elsewhere\r\nLocation: {receiver.url}\r\nContent-Length: 0\r\n\r\n")) as url:
        end_job(url)
        sender.send_due()
    assert receiver.deliveries == []


# --- receivers that misbehave --------------------------------------------------------------------------------------


@contextmanager
def scripted(script: Script) -> Iterator[str]:
    """The URL of a server that does to every connection what the script says, once it has read the request."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with suppress(OSError):  # the other side hangs up, or the test is over
            while True:
                connection, _ = listening.accept()
                with connection, suppress(OSError):
                    connection.recv(2**16)
                    script(connection)

    serving = threading.Thread(target=serve)
    serving.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/hook"
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        serving.join()


def answering(head: str) -> Script:
    return lambda connection: connection.sendall(head.encode())


def say_nothing(connection: socket.socket) -> None:
    connection.recv(1)  # returns when the sender has hung up


def hang_up(connection: socket.socket) -> None:
    connection.close()


def drip_a_head(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    drip(connection, b"X-Drip: 1\r\n")


def drip_a_body(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    drip(connection, b"x")


def drip(connection: socket.socket, drop: bytes) -> None:
    """Goes on far longer than a sender may stay, and then lets the test fail by an answer that arrived."""
    for _ in range(DRIP_SECONDS * 10):
        connection.sendall(drop)
        time.sleep(0.1)
    connection.sendall(b"\r\n")


@pytest.mark.parametrize(
    "script",
    [
        say_nothing,
        hang_up,
        drip_a_head,
        answering("garbage\r\n\r\n"),
        answering("HTTP/1.1 abc OK\r\n\r\n"),
        answering("HTTP/1.1 100 Continue\r\n\r\n" * 1000),
        answering("HTTP/1.1 200 OK\r\n" + "X: y\r\n" * 100_000 + "\r\n"),
    ],
    ids=["silence", "hangs-up", "drips", "garbage", "no-status", "only-1xx", "endless-head"],
)
def test_a_receiver_that_gives_no_answer_is_tried_again(
    sender: Sender, end_job: Callable[..., Job], sessions: SessionFactory, script: Script
) -> None:
    with scripted(script) as url:
        end_job(url)
        sender.send_due()
        row = delivery(sessions)
    assert (row.state, row.attempt, row.last_status) == (DeliveryState.PENDING, 1, None)
    assert row.last_error


def test_a_receiver_that_refuses_connections_is_tried_again(
    sender: Sender, end_job: Callable[..., Job], sessions: SessionFactory, closed_port: int
) -> None:
    end_job(f"http://127.0.0.1:{closed_port}/")
    sender.send_due()
    row = delivery(sessions)
    assert (row.state, row.last_status) == (DeliveryState.PENDING, None)
    assert "refused" in str(row.last_error)


@pytest.mark.parametrize(
    "script",
    [
        drip_a_body,
        answering("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort"),
        answering("HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 7\r\n\r\nno gzip"),
        answering("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nno chunk"),
    ],
    ids=["drips", "breaks-off", "not-gzip", "not-chunked"],
)
def test_what_follows_a_2xx_does_not_undo_it(
    sender: Sender, end_job: Callable[..., Job], sessions: SessionFactory, script: Script
) -> None:
    with scripted(script) as url:
        end_job(url)
        sender.send_due()
        assert delivery(sessions).state == DeliveryState.DELIVERED


def test_an_endless_answer_is_cut(sender: Sender, end_job: Callable[..., Job], sessions: SessionFactory) -> None:
    sent = 0

    def pour(connection: socket.socket) -> None:
        nonlocal sent
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            sent += connection.send(bytes(2**14))

    with scripted(pour) as url:
        end_job(url)
        sender.send_due()
        assert delivery(sessions).state == DeliveryState.DELIVERED
    assert sent < READ_BYTES + 32 * 2**20  # what was read and what the sockets in between hold


def test_a_receiver_that_hangs_does_not_keep_news_from_others(
    sender: Sender, receiver: Receiver, end_job: Callable[..., Job]
) -> None:
    with scripted(say_nothing) as url:
        end_job(url)
        end_job(receiver.url)
        sender.send_due()
    assert len(receiver.deliveries) == 1


def test_a_private_address_is_not_called_unless_that_is_allowed(
    sessions: SessionFactory, receiver: Receiver, end_job: Callable[..., Job]
) -> None:
    end_job(receiver.url)
    Sender(sessions, Webhooks()).send_due()
    assert receiver.deliveries == []
    row = delivery(sessions)
    assert (row.state, row.last_error) == (DeliveryState.PENDING, "the URL leads to an address that is not public")


# --- several senders -----------------------------------------------------------------------------------------------


def test_each_of_many_deliveries_is_sent_by_one_of_many_senders(
    sender: Sender, receiver: Receiver, end_job: Callable[..., Job], sessions: SessionFactory
) -> None:
    for _ in range(12):
        end_job(receiver.url)
    with ThreadPoolExecutor(4) as pool:
        for sending in [pool.submit(sender.send_due) for _ in range(4)]:
            sending.result()
    assert len(receiver.deliveries) == len({each.webhook_id for each in receiver.deliveries}) == 12
    assert count_rows(sessions, WebhookDelivery) == 12


def test_a_delivery_that_is_being_sent_is_nobody_elses(end_job: Callable[..., Job], sessions: SessionFactory) -> None:
    end_job("https://receiver.example")
    assert claim_due(sessions) is not None
    assert claim_due(sessions) is None


def test_a_sender_that_died_is_replaced_and_writes_nothing_should_it_return(
    end_job: Callable[..., Job], sessions: SessionFactory
) -> None:
    end_job("https://receiver.example")
    dead = claim_due(sessions)
    assert dead is not None
    assert 15 < seconds_until_next(sessions) <= webhooks.SENDING_SECONDS
    with sessions.begin() as session:
        make_late(session, "webhook_deliveries", "next_attempt_at")
    second = claim_due(sessions)
    assert second is not None
    assert (second.id, second.attempt) == (dead.id, dead.attempt + 1)
    with sessions.begin() as session:
        assert webhooks.record_outcome(session, dead, status=200, error=None) is None
    assert delivery(sessions).state == DeliveryState.PENDING
    with sessions.begin() as session:
        assert webhooks.record_outcome(session, second, status=200, error=None) == DeliveryState.DELIVERED
        assert webhooks.record_outcome(session, second, status=500, error=None) is None
    assert delivery(sessions).state == DeliveryState.DELIVERED
