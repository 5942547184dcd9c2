"""What Celery messages start. They carry no orders, only "there is work"; the database says which."""

from typing import Any

from shared.broker import DELIVER, RUN
from worker.app import app


@app.task(name=RUN)
def run(_step_id: str) -> None:
    """Claim and run steps until none is left. The id is for people who read the broker; any step may be claimed."""
    _process().runner.run_until_idle()


@app.task(name=DELIVER)
def deliver() -> None:
    """There may be webhooks to send. The sender has threads of its own, so that no slow receiver delays this."""
    _process().sender.wake()


def _process() -> Any:
    return app.process
