"""The broker carries hints: "there is work". A hint may be lost, doubled or late with no harm.

So sending one never delays and never fails its sender: a thread sends, and what cannot be sent is counted and left
to upkeep, which hints again whatever stays queued.
"""

import queue
import threading
import time
import uuid
from typing import Any

import structlog
from celery import Celery

from shared.config import Broker

RUN = "maskline.run"
DELIVER = "maskline.deliver"
GPU, IO, WEBHOOKS = "gpu", "io", "webhooks"
"""The queues. Webhooks have their own, as a download or the joining of a long recording may take hours."""
BACKLOG = 64
AT_ONCE = 16
REST_SECONDS = 0.04  # for each beyond those: any hint wakes for all that is queued, and sending takes from the requests
CHECK_SECONDS = 2
EXPIRES_SECONDS = 300  # by then upkeep has hinted many times over

log = structlog.get_logger(__name__)


def celery_settings(settings: Broker) -> dict[str, Any]:
    """Prefork workers of concurrency one that acknowledge early and fetch nothing ahead: the database recovers."""
    return {
        "broker_url": settings.url,
        "task_acks_late": False,
        "worker_disable_prefetch": True,
        "worker_prefetch_multiplier": 1,
        "worker_pool": "prefork",
        "worker_max_tasks_per_child": None,  # a fresh child would load its model again
        "worker_proc_alive_timeout": 120.0,
        "task_reject_on_worker_lost": False,
        "task_retry_on_worker_lost": False,
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "task_ignore_result": True,
        "result_backend": None,
        "task_store_errors_even_if_ignored": False,
        "task_serializer": "json",
        "accept_content": ["json"],
        "result_accept_content": ["json"],
        "task_time_limit": None,  # the deadline is the job's, in the database
        "task_soft_time_limit": None,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "broker_transport_options": {
            "socket_timeout": settings.socket_timeout_seconds,
            "socket_connect_timeout": settings.connect_timeout_seconds,
            "socket_keepalive": True,
            "health_check_interval": 25,
            "retry_on_timeout": False,
            "visibility_timeout": 3600,
            "unacked_restore_interval": 10,
            "unacked_restore_throttle": 1,
            "global_keyprefix": "maskline:",
        },
        "task_publish_retry": True,
        "task_publish_retry_policy": {"max_retries": 1, "interval_start": 0.1, "interval_max": 0.5},
        "worker_send_task_events": False,
        "worker_hijack_root_logger": False,
        "worker_enable_remote_control": True,
    }


class Hints:
    """Wakes workers, from any thread. `close` gives what is still unsent a moment, and no more."""

    def __init__(self, settings: Broker) -> None:
        self._app = Celery("maskline-hints", set_as_current=False)
        self._app.conf.update(celery_settings(settings))
        self._waiting: queue.Queue[tuple[str, str, list[str]] | None] = queue.Queue(maxsize=BACKLOG)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._send_waiting, name="hints", daemon=True)
        self._thread.start()
        self.unsent = 0

    def wake(self, queue_name: str, step_id: uuid.UUID) -> None:
        """There is a queued step; call it after the commit that made it so."""
        self._put((RUN, queue_name, [str(step_id)]))

    def wake_sender(self) -> None:
        """There may be a webhook to deliver."""
        self._put((DELIVER, WEBHOOKS, []))

    def check(self) -> str | None:
        """What keeps hints from being sent, or None."""
        soon = {"socket_timeout": CHECK_SECONDS, "socket_connect_timeout": CHECK_SECONDS}  # a prober does not wait long
        try:
            with self._app.connection_for_write(transport_options=soon) as connection:
                connection.ensure_connection(max_retries=1, interval_start=0, timeout=CHECK_SECONDS)
                connection.default_channel.client.ping()
        except Exception as error:  # drivers raise what they please
            return f"cannot be reached: {type(error).__name__}"
        return None

    def close(self, *, seconds: float = 2) -> None:
        self._closing.set()
        self._put(None)
        self._thread.join(seconds)

    def _put(self, hint: tuple[str, str, list[str]] | None) -> None:
        try:
            self._waiting.put_nowait(hint)
        except queue.Full:
            self.unsent += 1

    def _send_waiting(self) -> None:
        free_at = time.monotonic()
        while (hint := self._waiting.get()) is not None:
            now = time.monotonic()
            free_at = max(free_at + REST_SECONDS, now - AT_ONCE * REST_SECONDS)
            self._closing.wait(max(0.0, free_at - now))
            task, queue_name, arguments = hint
            try:
                self._app.send_task(task, args=arguments, queue=queue_name, expires=EXPIRES_SECONDS)
            except Exception as error:  # whatever the broker's trouble is, upkeep makes up for it
                self.unsent += 1
                log.warning("a hint was not sent", task=task, queue=queue_name, error=str(error), unsent=self.unsent)
