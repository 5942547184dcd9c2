"""The Celery process: `celery -A worker.app worker -P prefork -c 1 -Q gpu` (or `-Q io`, `-Q webhooks`).

The parent only passes messages on and never loads torch; each child builds its own resources after the fork.
"""

import multiprocessing
import sys
from typing import Any

import structlog
from celery import Celery, signals

from shared import log as logs
from shared.broker import DELIVER, GPU, IO, RUN, WEBHOOKS, celery_settings
from shared.config import load_settings
from worker.process import WorkerProcess

log = structlog.get_logger(__name__)

app = Celery("maskline", set_as_current=False, include=["worker.tasks"])
app.add_defaults(lambda: celery_settings(load_settings().broker))

app.queue_name = ""
app.draining = multiprocessing.Event()  # made before the fork, so that the parent can tell its children
app.process = None


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
    app.process = WorkerProcess.build(load_settings(), queue_name=app.queue_name, draining=app.draining)


@signals.worker_ready.connect
def look_for_work(**_: Any) -> None:
    """What was queued while no worker lived had its hints long ago."""
    if app.queue_name == WEBHOOKS:
        app.send_task(DELIVER, queue=WEBHOOKS)
    else:
        app.send_task(RUN, args=["at start"], queue=app.queue_name)


@signals.worker_shutting_down.connect
def drain(**_: Any) -> None:
    log.info("the worker drains: steps are given back at the next checkpoint", queue=app.queue_name)
    app.draining.set()


@signals.worker_process_shutdown.connect
def close_process(**_: Any) -> None:
    if app.process is not None:
        app.process.close()
