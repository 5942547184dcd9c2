"""Who is spoken to over TLS: an address is dialled that was looked at, and it is the name that must be certified."""

import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import trustme

from shared import egress
from shared.db import SessionFactory
from shared.models import DeliveryState, Job, WebhookDelivery
from tests.integration.conftest import read_only
from worker.deliver import Sender

LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


@pytest.fixture
def authority(monkeypatch: pytest.MonkeyPatch) -> trustme.CA:
    """One that is trusted like those that the machine knows."""
    made = trustme.CA()
    trusting = ssl.create_default_context()
    made.configure_trust(trusting)
    monkeypatch.setattr(egress, "_tls", lambda: trusting)
    return made


@contextmanager
def serve(certificate: trustme.LeafCert) -> Iterator[tuple[str, list[str]]]:
    """A receiver with that certificate: the URL of its port at `localhost`, and what it is sent."""
    came: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            came.append(self.rfile.read(int(self.headers["content-length"])).decode())
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it so
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    presenting = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    certificate.configure_cert(presenting)
    server.socket = presenting.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    serving = threading.Thread(target=server.serve_forever, daemon=True)
    serving.start()
    try:
        yield f"https://localhost:{server.server_port}/hook", came
    finally:
        server.shutdown()
        server.server_close()
        serving.join()


def test_a_receiver_whose_name_is_certified_is_told(
    authority: trustme.CA, sender: Sender, end_job: Callable[..., Job], sessions: SessionFactory
) -> None:
    with serve(authority.issue_cert("localhost")) as (url, came):
        end_job(url)
        sender.send_due()
    assert read_only(sessions, WebhookDelivery).state == DeliveryState.DELIVERED
    assert len(came) == 1


@pytest.mark.parametrize(
    "certify",
    [
        lambda authority: authority.issue_cert("elsewhere.test"),
        lambda authority: authority.issue_cert("127.0.0.1"),  # the address that is dialled is not the name
        lambda authority: authority.issue_cert("localhost", not_after=LONG_AGO),
        lambda _: trustme.CA().issue_cert("localhost"),
    ],
    ids=["another-name", "the-address", "run-out", "nobody-trusts"],
)
def test_a_receiver_that_cannot_show_who_it_is_is_told_nothing_and_called_again(
    authority: trustme.CA,
    sender: Sender,
    end_job: Callable[..., Job],
    sessions: SessionFactory,
    certify: Callable[[trustme.CA], trustme.LeafCert],
) -> None:
    with serve(certify(authority)) as (url, came):
        end_job(url)
        sender.send_due()
    row = read_only(sessions, WebhookDelivery)
    assert (row.state, row.last_status) == (DeliveryState.PENDING, None)
    assert "certificate verify failed" in str(row.last_error)
    assert came == []
