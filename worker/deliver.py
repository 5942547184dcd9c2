"""Sending webhooks: one signed POST per attempt, bounded in time and in what is read of the answer, many at once."""

import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx2
import structlog
from sqlalchemy.exc import SQLAlchemyError

from shared import deliveries, faults, webhooks
from shared.config import Webhooks
from shared.db import SessionFactory
from shared.deliveries import DueDelivery, Outcome
from shared.egress import UNREACHABLE, open_answer, reach_of_webhooks
from shared.errors import AddressRefused
from worker.heart import Flag
from worker.lanes import Lanes

log = structlog.get_logger(__name__)

READ_BYTES = 64_000
REPLY_BYTES = 1000  # of it, what the log keeps
ERROR_LENGTH = 300
IDLE_SECONDS = 2.0  # after which it looks by itself, should nobody wake it


class Sender:
    """Sends from threads of its own: `start` once, `wake` when there may be something. Or `send_due`, and wait."""

    def __init__(self, sessions: SessionFactory, settings: Webhooks, *, draining: Flag | None = None) -> None:
        self._sessions = sessions
        self._settings = settings
        self._reach = reach_of_webhooks(settings)
        self._draining: Flag = draining or threading.Event()
        self._closing = threading.Event()
        self._woken = threading.Event()
        self._lanes = Lanes(places=settings.parallel_sends, per_lane=settings.parallel_sends_per_endpoint)
        self._pool = ThreadPoolExecutor(settings.parallel_sends, thread_name_prefix="webhook")
        self._thread = threading.Thread(target=self._run, name="webhooks", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """There may be something due."""
        self._woken.set()

    def close(self) -> None:
        """Begin nothing more, and wait for what is on its way."""
        self._closing.set()
        self._woken.set()
        if self._thread.is_alive():
            self._thread.join()
        self._pool.shutdown()

    def send_due(self) -> None:
        """Send whatever is due, until nothing is but what rests after failures."""
        while True:
            self._woken.clear()
            busy = self._lanes.busy  # asked before: what ends meanwhile may have made room
            if not self._begin_due() and not busy:
                return
            self._woken.wait(IDLE_SECONDS)

    def _run(self) -> None:
        while not self._closing.is_set() and not self._draining.is_set():
            self._woken.clear()
            try:
                self._begin_due()
            except SQLAlchemyError as error:  # it will be there again
                log.warning("the database was not asked for webhooks", error=type(error).__name__)
            except Exception:  # a thread that died would leave a worker that looks well and sends nothing
                log.exception("the sender of webhooks stumbled")
            self._woken.wait(IDLE_SECONDS)

    def _begin_due(self) -> int:
        """Begin to send whatever is due and has a place; returns how many those are.

        Receivers that are well do not wait for what concerns others: theirs are on their way before it is touched.
        """
        with self._sessions.begin() as session:
            waiting = deliveries.find_due(session, per_lane=self._settings.parallel_sends_per_endpoint)
            well, others = self._lanes.choose(waiting)
            claimed = deliveries.claim(session, [each.id for each in well])
        self._begin(claimed)
        with self._sessions.begin() as session:
            doubtful = deliveries.claim(session, [each.id for each in others])
        self._begin(doubtful)
        return len(claimed) + len(doubtful)

    def _begin(self, claimed: Sequence[DueDelivery]) -> None:
        for delivery in claimed:
            self._lanes.enter(delivery)
            self._pool.submit(self._deliver, delivery)

    def _deliver(self, delivery: DueDelivery) -> None:
        outcome = Outcome()
        try:
            outcome = self._send(delivery)
            faults.reach("webhook-answered")
            with self._sessions.begin() as session:
                state = deliveries.record(session, delivery, outcome)
            log.info(
                "a webhook was sent", webhook_id=webhooks.message_id(delivery.id), type=delivery.type,
                attempt=delivery.attempt, status=outcome.status, error=outcome.error, state=state,
            )  # fmt: skip
        except Exception as error:  # another sender takes it over, and the receiver may get it twice
            log.warning(
                "what came of a webhook was not noted", webhook_id=webhooks.message_id(delivery.id),
                attempt=delivery.attempt, error=type(error).__name__,
            )  # fmt: skip
        finally:
            self._lanes.leave(delivery, delivered=outcome.delivered, cut=outcome.cut)
            self._woken.set()

    def _send(self, delivery: DueDelivery) -> Outcome:
        began = time.monotonic()
        try:
            return self._post(delivery, began)
        except AddressRefused as error:
            problem = str(error)
        except UNREACHABLE as error:
            problem = f"{type(error).__name__}: {error}"
        except Exception as error:  # or it would be sent for ever, as if its sender had died each time
            log.exception("a webhook could not be sent", webhook_id=webhooks.message_id(delivery.id))
            problem = f"{type(error).__name__}"
        return Outcome(seconds=_since(began), error=_as_text(problem.encode(errors="replace"))[:ERROR_LENGTH])

    def _post(self, delivery: DueDelivery, began: float) -> Outcome:
        settings = self._settings
        signed = webhooks.sign(delivery.id, delivery.body, secrets=delivery.secrets, at=datetime.now(UTC))
        headers = {**signed, "content-type": "application/json", "accept-encoding": "identity"}
        with open_answer(
            "POST", delivery.url, content=delivery.body, headers=headers,
            reach=self._reach, connect_seconds=settings.connect_timeout_seconds,
            silent_seconds=settings.total_timeout_seconds, total_seconds=settings.total_timeout_seconds,
        ) as answer:  # fmt: skip
            seconds = _since(began)
            reply, cut = _read_some(answer)
            return Outcome(
                seconds=seconds, status=answer.status_code, reply=reply, cut=cut,
                retry_after_seconds=_read_pause(answer.headers.get("retry-after", "")),
            )  # fmt: skip


def _read_some(answer: httpx2.Response) -> tuple[str, bool]:
    """The beginning of the answer, and whether the rest had to be cut: the receiver may finish, within bounds.

    Its status has come; whatever its body does, it does not change that.
    """
    read, beginning = 0, b""
    with suppress(httpx2.HTTPError, OSError):
        for block in answer.iter_raw():  # undecoded, so that a small answer cannot grow in our memory
            read += len(block)
            beginning += block[: REPLY_BYTES - len(beginning)]
            if read > READ_BYTES:
                break
    return _as_text(beginning), read > READ_BYTES


def _read_pause(told: str) -> float | None:
    """Seconds of a Retry-After, given so or as a date; None when it is neither."""
    if re.fullmatch(r"[0-9]{1,9}", told.strip()):
        return float(told)
    try:
        until = parsedate_to_datetime(told)
        return max(0.0, (until - datetime.now(UTC)).total_seconds()) if until.tzinfo is not None else None
    except (ValueError, TypeError, OverflowError):
        return None


def _as_text(told: bytes) -> str:
    """As the database can keep it."""
    return told.decode(errors="replace").replace("\x00", "")


def _since(moment: float) -> float:
    return round(time.monotonic() - moment, 6)
