"""The Celery process: `celery -A worker.app worker -P prefork -c 1 -Q gpu` (or `-Q io`, `-Q webhooks`).

The parent only passes messages on and never loads torch; each child builds its own resources after the fork.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import structlog
from billiard import current_process
from celery import Celery, bootsteps, signals
from celery.app.amqp import AMQP
from celery.worker.components import Pool
from celery.worker.consumer.tasks import Tasks
from kombu.connection import Connection

from shared import faults
from shared import log as logs
from shared.broker import DELIVER, GPU, IO, RUN, WEBHOOKS, Hints, celery_settings
from shared.config import load_settings
from shared.db import SessionFactory
from worker.process import WorkerProcess
from worker.pulse import Pulses
from worker.relief import relieve
from worker.runner import DATABASE_AWAY

log = structlog.get_logger(__name__)

RECONNECT_SECONDS = 2


class SteadyConnection(Connection):
    """Celery's pauses before it tries a lost broker again grow to half a minute, for which its return goes unseen; and
    it looks after its children in none of them.
    """

    def ensure_connection(self, *args: Any, callback: Callable[[], None] = lambda: None, **options: Any) -> Any:
        def wait() -> None:  # once a second
            callback()
            app.maintain_pool()

        steady = {"interval_start": RECONNECT_SECONDS, "interval_step": 0, "callback": wait, **options}
        return super().ensure_connection(*args, **steady)  # type: ignore[no-untyped-call]


class Amqp(AMQP):  # type: ignore[misc]
    Connection = SteadyConnection


app = Celery("maskline", set_as_current=False, include=["worker.tasks"], amqp=Amqp)
app.add_defaults(lambda: celery_settings(load_settings().broker))

app.queue_name = ""
app.draining = multiprocessing.Event()  # made before the fork, so that the parent can tell its children
app.pulses = Pulses()  # likewise
app.process = None
app.maintain_pool = lambda: None  # what is not in a worker has none

WATCH_SECONDS = 0.25


class Watch(bootsteps.StartStopStep):  # type: ignore[misc]
    """The parent ends a child without a pulse, and forks another into a dead one's place.

    Celery hears of a death by a pipe, which closes a moment before the process can be waited for; when it looks in
    that moment, it looks again only after five seconds.
    """

    requires = (Pool,)

    def start(self, worker: Any) -> None:
        app.maintain_pool = worker.pool.maintain_pool

    def register_with_event_loop(self, _worker: Any, hub: Any) -> None:
        # Twice a lease: by then others have for certain what it holds, and it is of no use to anybody.
        hub.call_repeatedly(WATCH_SECONDS, partial(end_silent, 2 * load_settings().worker.lease_seconds))
        hub.call_repeatedly(WATCH_SECONDS, app.maintain_pool)


class LookForWork(bootsteps.StartStopStep):  # type: ignore[misc]
    """What was queued while no worker lived, or the broker was away, had its hints long ago."""

    requires = (Tasks,)

    def start(self, _consumer: Any) -> None:
        if app.queue_name == WEBHOOKS:
            app.send_task(DELIVER, queue=WEBHOOKS)
        else:
            app.send_task(RUN, args=["at start"], queue=app.queue_name)


app.steps["worker"].add(Watch)
app.steps["consumer"].add(LookForWork)


def end_silent(seconds: float) -> None:
    for pid in app.pulses.find_silent(seconds=seconds):
        log.error("a process hangs and is ended: another comes in its place", pid=pid, silent_seconds=seconds)
        os.kill(pid, signal.SIGKILL)


@signals.setup_logging.connect
def configure_logging(**_: Any) -> None:
    logs.configure(load_settings())


@signals.celeryd_after_setup.connect
def learn_queue(instance: Any, **_: Any) -> None:
    queues = set(instance.app.amqp.queues.consume_from)
    if len(queues) != 1 or not queues <= {GPU, IO, WEBHOOKS}:
        raise SystemExit(f"a worker serves exactly one queue, -Q {GPU}, -Q {IO} or -Q {WEBHOOKS}")
    (app.queue_name,) = queues
    if "torch" in sys.modules:
        raise SystemExit("the parent process must not load torch: its children could not use the device")


@signals.worker_process_init.connect
def build_process(**_: Any) -> None:
    settings = load_settings()
    faults.prepare(settings.faults_folder)
    app.process = WorkerProcess.build(
        settings, queue_name=app.queue_name, draining=app.draining,
        pulses=app.pulses, place=current_process().index,
    )  # fmt: skip


@signals.worker_shutting_down.connect
def drain(**_: Any) -> None:
    log.info("the worker drains: steps are given back at the next checkpoint", queue=app.queue_name)
    app.draining.set()


@signals.worker_process_shutdown.connect
def close_process(**_: Any) -> None:
    if app.process is not None:
        app.process.close()


@signals.worker_shutdown.connect
def relieve_the_dead(**_: Any) -> None:
    """A child that died while the worker drained has no successor; now nothing is forked any more."""
    settings = load_settings()
    sessions, hints = SessionFactory(settings.database), Hints(settings.broker)
    try:
        relieve(settings, sessions, hints)
    except DATABASE_AWAY as error:
        log.warning("what died here is left to its leases", error=type(error).__name__)
    hints.close()
    sessions.dispose()
