"""Receivers of webhooks, well and not: what each answer, or none, means, and how little of a sender's time it takes."""

import socket
from collections.abc import Callable
from urllib.parse import urlsplit

import pytest
from sqlalchemy import text

from shared.config import Webhooks
from shared.db import SessionFactory
from shared.models import DeliveryState, Job, WebhookDelivery
from tests.integration.conftest import read_only
from tests.receiver import (
    Receiver,
    Script,
    answering,
    drip_a_body,
    drip_a_head,
    hang_up,
    run_receiver,
    say_nothing,
    scripted,
)
from worker.deliver import READ_BYTES, Sender


def delivery(sessions: SessionFactory) -> WebhookDelivery:
    return read_only(sessions, WebhookDelivery)


def seconds_until_next(sessions: SessionFactory) -> float:
    with sessions() as session:
        seconds = session.scalar(text("SELECT extract(epoch FROM next_attempt_at - now()) FROM webhook_deliveries"))
    return float(seconds)


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


def test_a_redirect_is_not_followed(end_job: Callable[..., Job], sender: Sender, receiver: Receiver) -> None:
    with scripted(answering(f"HTTP/1.1 307 Elsewhere\r\nLocation: {receiver.url}\r\nContent-Length: 0\r\n\r\n")) as url:
        end_job(url)
        sender.send_due()
    assert receiver.deliveries == []


# --- receivers that misbehave --------------------------------------------------------------------------------------


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
    port = urlsplit(receiver.url).port
    Sender(sessions, Webhooks.model_validate({"schemes": ["http"], "ports": [port]})).send_due()
    assert receiver.deliveries == []
    row = delivery(sessions)
    assert (row.state, row.last_error) == (DeliveryState.PENDING, "the URL leads to an address that is not public")
